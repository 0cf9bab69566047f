"""Sample text from a trained language model, one character at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedlearn.callbacks.checkpoints import CHECKPOINT_FOLDER
from fedlearn.core import checkpoint
from fedlearn.core.random import Purpose, generator
from fedlearn.errors import SettingError, is_count, is_number, require
from fedlearn.loop.scenario import Scenario
from fedlearn.runner.config import allowed_modules, build
from fedlearn.runner.environment import set_environment
from fedlearn.runner.run_config import read_run_config


def sample_text(folder: Path, *, prompt: str, num_characters: int, temperature: float) -> str:
    """Sample text from the newest model of a run. Equal arguments give equal text.

    Args:
        folder: folder of a run. The scenario of the run must have `Scenario.characters`.
        prompt: first characters of the text, at least one.
        num_characters: number of sampled characters, >= 1.
        temperature: softmax temperature, >= 0; 0 always takes the most likely character.

    Raises:
        FedlearnError: The folder has no run of such a scenario, data are missing, or an argument is out of range.
    """
    require(is_count(num_characters), "--length", num_characters, "a whole number >= 1", "--length 300")
    require(bool(prompt), "--start", repr(prompt), "at least one character", "--start O")
    require(is_number(temperature, at_least=0), "--temperature", temperature, "a number >= 0", "--temperature 0.6")
    cfg = read_run_config(folder)
    set_environment(cfg.get("framework"))
    scenario: Scenario = build(cfg.scenario, "scenario", allow=allowed_modules(cfg))
    characters = scenario.characters
    if characters is None:
        expected = "a scenario with Scenario.characters, which encodes text"
        raise SettingError("scenario of the run", scenario.name, expected, "a run of scenario=shakespeare")
    state, _, _ = checkpoint.load_latest(folder / CHECKPOINT_FOLDER, scenario.trainer.layout)
    rng, text = generator(state.seed, Purpose.EVALUATE), prompt
    for _ in range(num_characters):
        tokens_T = characters.encode(text[-characters.length :])
        x = np.zeros((1, characters.length), np.int32)
        x[0, : len(tokens_T)] = tokens_T
        logits_C = scenario.trainer.predict(state.params_D, x)[0, len(tokens_T) - 1].astype(np.float64)
        text += characters.alphabet[_draw_character(logits_C[1:], temperature, rng)]
    return text


def _draw_character(logits_C: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits_C.argmax())
    p_C = np.exp((logits_C - logits_C.max()) / temperature)
    return int(rng.choice(len(p_C), p=p_C / p_C.sum()))
