"""Generate text with a trained language model, one token at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedlearn.core.random import Purpose, generator, integer_seed
from fedlearn.data.inputs import CharacterInputs
from fedlearn.data.prompt_inputs import PromptInputs
from fedlearn.errors import SettingError, is_count, is_number, require
from fedlearn.runner.trained_model import TrainedModel, load_trained_model


def generate_text(
    folder: Path,
    *,
    prompt: str = "O ",
    context: str = "",
    length: int = 300,
    temperature: float = 0.6,
    checkpoint: str = "last",
    client: str | None = None,
    base: str | None = None,
) -> str:
    """Generate text with a model of a run. Equal arguments give equal text.

    Args:
        folder: folder of a run with a language model.
        prompt: beginning of the text, which is part of the result. A model that was trained with prompts and responses
            gets the prompt in the form of the training, and the result is the response alone.
        context: further input of a prompt; only for models of prompts and responses.
        length: largest number of new tokens, >= 1.
        temperature: softmax temperature, >= 0; 0 always takes the most likely token.
        checkpoint: ``last``, ``best`` or the number of a round.
        client: client of a personal model; None for a run with one model.
        base: folder or name of the pretrained model of the run; None takes ``model.path`` of the run.

    Raises:
        FedlearnError: The folder has no language model, or an argument is out of range.
    """
    require(is_count(length), "--length", length, "a whole number >= 1", "--length 300")
    require(bool(prompt), "--prompt", repr(prompt), "at least one character", "--prompt O")
    require(is_number(temperature, at_least=0), "--temperature", temperature, "a number >= 0", "--temperature 0.6")
    model = load_trained_model(folder, checkpoint=checkpoint, client=client, base=base)
    if isinstance(model.inputs, CharacterInputs):
        return _characters(model, model.inputs, prompt, length, temperature)
    if isinstance(model.inputs, PromptInputs):
        return _subwords(model, model.inputs, prompt, context, length, temperature)
    expected = "a run of task=causal_lm, or of scenario=shakespeare"
    raise SettingError("scenario of the run", model.description.scenario, expected, "choose a run of scenario=text")


def _characters(model: TrainedModel, inputs: CharacterInputs, text: str, length: int, temperature: float) -> str:
    characters, rng = inputs.encoding, generator(model.seed, Purpose.EVALUATE)
    for _ in range(length):
        last = min(len(text), characters.length) - 1
        logits_C = model.trainer.predict(model.params_D, inputs.transform([text]))[0, last].astype(np.float64)
        text += characters.alphabet[_draw_character(logits_C[1:], temperature, rng)]
    return text


def _draw_character(logits_C: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits_C.argmax())
    p_C = np.exp((logits_C - logits_C.max()) / temperature)
    return int(rng.choice(len(p_C), p=p_C / p_C.sum()))


def _subwords(
    model: TrainedModel, inputs: PromptInputs, prompt: str, context: str, length: int, temperature: float
) -> str:
    ids, _ = inputs.tokens(inputs.segments_of_prompt(prompt, context))
    trainer = model.inner_trainer
    expected = "torch: this model generates in torch"
    require(hasattr(trainer, "generate"), "framework of the run", trainer.framework, expected, "framework=torch")
    seed = integer_seed(model.seed, Purpose.EVALUATE)
    new = trainer.generate(model.params_D, ids, num_tokens=length, temperature=temperature, seed=seed)
    written = inputs.tokenizer.decode(new)
    return prompt + written if inputs.text else written
