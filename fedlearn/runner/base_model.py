"""Find the pretrained model of a run. A run folder has its digest and its name, but not its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedlearn.data.base_tokenizer import read_base_tokenizer
from fedlearn.data.inputs import Inputs
from fedlearn.data.pretrained_files import PretrainedFiles, find_pretrained
from fedlearn.errors import DataError, SettingError, require
from fedlearn.runner.model_folder import ModelDescription
from fedlearn.trainers.pretrained import build_pretrained

BUILDER = f"{build_pretrained.__module__}.{build_pretrained.__name__}"


def has_base(description: ModelDescription) -> bool:
    """Return whether a pretrained model is the base of the model of a run."""
    is_pretrained = description.network is not None and description.network.builder == BUILDER
    return is_pretrained and isinstance(description.settings.get("model"), Mapping)


def with_base(description: ModelDescription, base: str | None) -> ModelDescription:
    """Return the description of a model with another place of its pretrained model.

    Args:
        description: description in the run folder.
        base: folder or name of the pretrained model on this machine; None keeps the place in the run folder.

    Raises:
        SettingError: the run has no pretrained model.
    """
    if base is None:
        return description
    expected = "no base, because this run has no pretrained model"
    require(has_base(description), "base", base, expected, "the same command without --base")
    model = {**description.settings["model"], "path": base, "revision": None}
    return replace(description, settings={**description.settings, "model": model})


def find_base(description: ModelDescription) -> PretrainedFiles:
    """Return the verified files of the pretrained model of a run.

    Raises:
        DataError: the model is not on this machine, or its files differ from the files of the run.
    """
    assert description.network is not None
    model, digest = description.settings["model"], description.network.arguments.get("digest")
    try:
        return find_pretrained(str(model.get("path")), revision=model.get("revision"), digest=digest)
    except (DataError, SettingError) as error:
        other = f"{model.get('path')} is not the pretrained model of this run"
        problem = other if isinstance(error, SettingError) else str(error).split("\n")[0]
        expected = f"the files with the SHA-256 {digest}" if digest else "the pretrained model of this run"
        fix = "--base FOLDER, or fedlearn.load(run, base=FOLDER), with a copy of these files"
        raise DataError(f"{problem}\n  expected  {expected}\n  advice    {fix}") from error


def complete_inputs(inputs: Inputs, description: ModelDescription) -> Inputs:
    """Return the inputs of a run with the tokenizer of the pretrained model, if the run folder does not have it."""
    return read_base_tokenizer(inputs, lambda: find_base(description).folder)
