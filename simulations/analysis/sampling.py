"""Sample text from a trained language model, one character at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedlearn.core.random import Purpose, generator
from fedlearn.data.inputs import CharacterInputs
from fedlearn.errors import SettingError, is_count, is_number, require
from fedlearn.runner.trained_model import load_trained_model


def sample_text(folder: Path, *, prompt: str, num_characters: int, temperature: float) -> str:
    """Sample text from the newest model of a run. Equal arguments give equal text.

    Args:
        folder: folder of a run whose model predicts the next character.
        prompt: first characters of the text, at least one.
        num_characters: number of sampled characters, >= 1.
        temperature: softmax temperature, >= 0; 0 always takes the most likely character.

    Raises:
        FedlearnError: The folder has no model of characters, or an argument is out of range.
    """
    require(is_count(num_characters), "--length", num_characters, "a whole number >= 1", "--length 300")
    require(bool(prompt), "--start", repr(prompt), "at least one character", "--start O")
    require(is_number(temperature, at_least=0), "--temperature", temperature, "a number >= 0", "--temperature 0.6")
    model = load_trained_model(folder)
    inputs = model.inputs
    if not isinstance(inputs, CharacterInputs):
        expected = "a scenario whose inputs are characters"
        raise SettingError(
            "scenario of the run", model.description.scenario, expected, "choose a run of scenario=shakespeare"
        )
    characters = inputs.encoding
    rng, text = generator(model.seed, Purpose.EVALUATE), prompt
    for _ in range(num_characters):
        last = min(len(text), characters.length) - 1
        logits_C = model.trainer.predict(model.params_D, inputs.transform([text]))[0, last].astype(np.float64)
        text += characters.alphabet[_draw_character(logits_C[1:], temperature, rng)]
    return text


def _draw_character(logits_C: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits_C.argmax())
    p_C = np.exp((logits_C - logits_C.max()) / temperature)
    return int(rng.choice(len(p_C), p=p_C / p_C.sum()))
