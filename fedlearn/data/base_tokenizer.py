"""Inputs without their tokenizer, for a coordinator: the files of the pretrained model at the nodes have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedlearn.data.inputs import Inputs, TextColumnInputs
from fedlearn.data.prompt_inputs import PromptInputs, prompt_inputs
from fedlearn.data.subword_tokenizer import SubwordTokenizer, load_tokenizer
from fedlearn.data.token_inputs import SubwordTokenInputs

FORMS = ("text", "prompt", "context", "response", "messages")


def missing_tokenizer(length: int) -> SubwordTokenizer:
    """Return a place for the tokenizer of a pretrained model; see `read_base_tokenizer`."""
    return SubwordTokenizer(tokenizer_json="", length=length)


def read_base_tokenizer(inputs: Inputs, find: Callable[[], Path]) -> Inputs:
    """Return inputs with the tokenizer of their pretrained model, if they lack it.

    Args:
        inputs: inputs of a trained model.
        find: returns the folder of the pretrained model; called only if the tokenizer is absent.
    """
    if not isinstance(inputs, TextColumnInputs | PromptInputs | SubwordTokenInputs):
        return inputs
    tokenizer = inputs.tokenizer
    if not isinstance(tokenizer, SubwordTokenizer) or tokenizer.tokenizer_json:
        return inputs
    folder = find()
    if isinstance(inputs, PromptInputs):
        columns = {name: getattr(inputs, name) for name in FORMS if getattr(inputs, name)}
        return prompt_inputs(folder, length=tokenizer.length, **columns)
    return replace(inputs, tokenizer=load_tokenizer(folder, length=tokenizer.length))
