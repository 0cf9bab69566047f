"""Load the model of a run folder, and predict with it. No training data are needed.

Shapes: N examples, C classes, D parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.callbacks.checkpoints import CHECKPOINT_FOLDER
from fedlearn.callbacks.formatting import format_metric
from fedlearn.callbacks.run_history import metric_values, read_history
from fedlearn.core import checkpoint as checkpoints
from fedlearn.core.layout import Layout
from fedlearn.data.example_files import InputBatch, read_batches
from fedlearn.data.input_parts import join_parts
from fedlearn.data.inputs import (
    ArrayInputs,
    ImageInputs,
    Inputs,
    TableInputs,
    TextColumnInputs,
    TextInputs,
    model_inputs,
)
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.data.prompt_inputs import PromptInputs
from fedlearn.data.tables import table_from_columns
from fedlearn.data.token_inputs import SubwordTokenInputs, TokenInputs, are_sentences, without_padding
from fedlearn.errors import DataError, FedlearnError, is_count, is_number, require
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.wrappers import TrainerWrapper
from fedlearn.runner.base_model import complete_inputs, with_base
from fedlearn.runner.consent import allowed_by_environment, listed_modules, refuse_packages, require_consent
from fedlearn.runner.model_folder import (
    ModelDescription,
    read_model_description,
    read_model_settings,
    read_preprocessing,
)
from fedlearn.runner.model_network import BuiltNetwork, build_network, require_same_layout
from fedlearn.runner.model_parameters import ModelParameters, read_parameters

BATCH_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """Model of a run after one of its rounds. Its methods accept raw examples.

    Raw examples are a path, a data frame, a mapping of columns, a list of texts or of sentences, or an array. A path
    is a file or a folder of images. A sentence is a list of tokens. An array of bytes holds images; any other array
    holds model inputs.

    Attributes:
        folder: run folder.
        description: description of the model.
        preprocessing: inputs and target; None for a scenario without it, whose model accepts model inputs only.
        parameters: parameters, and the round and the client that they belong to.
        value: value of the metric of the run after this round; None if the round was not evaluated.
        framework: ``torch``, ``jax`` or ``mixed``; None is the framework of the run.
        allow_targets: modules of the user that the settings of the run may import.
        device: device of the predictions.
        trainer_of_caller: trainer with the network of the model; None builds it from the run folder.
    """

    folder: Path
    description: ModelDescription
    preprocessing: Preprocessing | None
    parameters: ModelParameters
    value: float | None = None
    framework: str | None = None
    allow_targets: tuple[str, ...] = ()
    device: str = "cpu"
    trainer_of_caller: Trainer | None = None

    def __str__(self) -> str:
        metric = self.description.metric
        value = "not evaluated" if self.value is None else f"{metric} {format_metric(metric, self.value)}"
        client = f", client {self.parameters.client}" if self.parameters.client is not None else ""
        return f"model of round {self.round}{client} ({value})"

    @property
    def round(self) -> int:
        """Number of the round of the parameters."""
        return self.parameters.round

    @property
    def params_D(self) -> np.ndarray:  # noqa: N802
        """Parameters as one vector, float32."""
        return self.parameters.params_D

    @property
    def seed(self) -> int:
        """Seed of the run, from its checkpoint."""
        return self.parameters.seed

    @property
    def layout(self) -> Layout:
        """Names and shapes of the parameters."""
        return self.description.layout

    @property
    def target(self) -> Target:
        """Target of the model; without preprocessing, the classes are their numbers."""
        if self.preprocessing is not None:
            return self.preprocessing.target
        task = self.description.task
        count = self.description.num_classes if task.decide else 0
        return Target(task=task, classes=tuple(map(str, range(count))))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the columns of `predict_proba`; empty for a regression."""
        return self.target.classes

    @cached_property
    def inputs(self) -> Inputs:
        """Inputs of the model; without preprocessing, arrays of model inputs."""
        if self.preprocessing is None:
            return ArrayInputs(shape=self._network.input_shape)
        return complete_inputs(self.preprocessing.inputs, self.description)

    @cached_property
    def _network(self) -> Any:
        if self.trainer_of_caller is not None:
            return BuiltNetwork(trainer=self.trainer_of_caller, input_shape=self.description.input_shape)
        return build_network(
            self.folder, self.description, self.framework, allow_targets=self.allow_targets, device=self.device
        )

    @property
    def trainer(self) -> Trainer:
        """Trainer with the network of the model; it is built at the first use."""
        trainer: Trainer = self._network.trainer
        return trainer

    @property
    def module(self) -> Any:
        """Module with the trained weights: an ``nn.Module``, or a pair of a flax module and its variables."""
        return self.inner_trainer.network(self.params_D)

    @property
    def inner_trainer(self) -> Any:
        """Trainer of one framework without wrappers."""
        trainer: Any = self.trainer
        while isinstance(trainer, TrainerWrapper):
            trainer = trainer.trainer
        return trainer.trainers[0] if trainer.framework not in ("torch", "jax") else trainer

    def predict(self, data: Any, *, threshold: float = 0.5, **options: Any) -> np.ndarray:
        """Return one prediction for each example, ``(N,)``: the name of a class, or a value in the unit of the target.

        The prediction of ``survival`` is the logarithm of the relative hazard. ``multilabel`` has 1 or 0 for each
        label, ``(N, L)``. Sentences have a list of tags each.

        Args:
            data: raw examples. A model with several inputs gets a mapping or a tuple of arrays.
            threshold: probability above which a binary task predicts the positive class, in [0, 1).
            options: ``batch_size`` (default 1024), ``allow_unknown``, ``allow_missing``; see `batches`.

        Raises:
            FedlearnError: an example is not valid, or the framework of the model is not installed.
        """
        check_threshold(self.target, threshold)
        if isinstance(self.inputs, TokenInputs | SubwordTokenInputs):
            return np.concatenate([self.tags(batch) for batch in self.batches(data, **options)])
        return self.labels(self.outputs(data, **options), threshold)

    def tags(self, batch: InputBatch) -> np.ndarray:
        """Return the tags of the tokens of each sentence as a list, ``(N,)``."""
        return without_padding(self.labels(self.trainer.predict(self.params_D, batch.x)), batch.x)

    def predict_proba(self, data: Any, **options: Any) -> np.ndarray:
        """Return the probability of each class, ``(N, C)``, in the order of `classes`.

        Args:
            data: raw examples.
            options: see `predict`.

        Raises:
            FedlearnError: the model has no classes, or an example is not valid.
        """
        if not self.classes:
            problem = f"the model predicts {self.target.name}, which has no classes"
            raise FedlearnError(f"{problem}\n  expected  a classification\n  advice    predict(...)")
        return self.target.probabilities(self.outputs(data, **options))

    def labels(self, outputs_NC: np.ndarray, threshold: float = 0.5) -> np.ndarray:
        """Return the predictions for model outputs."""
        if self.target.task.decide is None:
            return self.target.values(outputs_NC)
        numbers = self.target.class_numbers(outputs_NC, threshold)
        return np.array(self.classes, object)[numbers] if self.target.task.has_class_names else numbers

    def outputs(self, data: Any, **options: Any) -> np.ndarray:
        """Return the outputs of the model ``(N, C)``: logits, or scaled values of a regression."""
        return np.concatenate([self.trainer.predict(self.params_D, batch.x) for batch in self.batches(data, **options)])

    def batches(
        self, data: Any, *, batch_size: int = BATCH_SIZE, allow_unknown: bool = False, allow_missing: bool = False
    ) -> Iterator[InputBatch]:
        """Yield model inputs of raw examples. At most ``batch_size`` examples of a file are in memory.

        Args:
            data: raw examples.
            batch_size: examples in one pass of the model, >= 1.
            allow_unknown: whether an unknown category counts as missing. If not, it is an error.
            allow_missing: whether an absent column counts as missing. If not, it is an error.

        Raises:
            DataError: an example is not valid; the message names row and column.
        """
        require(is_count(batch_size), "batch_size", batch_size, "a whole number >= 1", "batch_size=1024")
        if self.description.inputs:
            data, few = join_parts(data, self.description.inputs), batch_size
            yield from (InputBatch(x=data[start : start + few]) for start in range(0, len(data), few))
            return
        if isinstance(data, str | PathLike):
            yield from read_batches(
                Path(data), self.inputs, batch_size, allow_unknown=allow_unknown, allow_missing=allow_missing
            )
            return
        x = self._transform(data, allow_unknown=allow_unknown, allow_missing=allow_missing)
        for start in range(0, len(x), batch_size):
            yield InputBatch(x=x[start : start + batch_size])

    def _transform(self, data: Any, *, allow_unknown: bool, allow_missing: bool) -> np.ndarray:
        inputs = self.inputs
        if isinstance(inputs, TableInputs | TextColumnInputs | PromptInputs) and _has_columns(data):
            table = table_from_columns(data)
            return inputs.transform(table, allow_unknown=allow_unknown, allow_missing=allow_missing)
        if isinstance(inputs, ImageInputs) and isinstance(data, np.ndarray) and data.dtype == np.uint8:
            return inputs.transform(data)
        if isinstance(inputs, TextInputs) and _are_texts(data):
            return inputs.transform(data)
        if isinstance(inputs, TokenInputs | SubwordTokenInputs) and are_sentences(data):
            return inputs.transform(data)
        if not isinstance(data, np.ndarray):
            expected = {
                "table": "a data frame or a mapping of columns",
                "text columns": "a data frame",
                "texts": "a list of texts",
                "tokens": "a list of sentences, which are lists of tokens",
            }.get(inputs.kind)
            problem = f"the examples are a {type(data).__name__}"
            raise DataError(
                f"{problem}\n  expected  {expected or 'an array'}, a path, or an array of model inputs\n"
                f"  try       model.predict(numpy_array)"
            )
        return model_inputs(data, inputs.input_shape)


def load(
    run_folder: str | PathLike[str],
    checkpoint: str | int = "last",
    *,
    client: str | None = None,
    framework: str | None = None,
    device: str = "cpu",
    allow_targets: Sequence[str] = (),
    trainer: Trainer | None = None,
    base: str | PathLike[str] | None = None,
) -> TrainedModel:
    """Load the trained model of a run.

    Args:
        run_folder: run folder, also on another machine; ``model/`` and ``checkpoints/`` are enough.
        checkpoint: ``last`` (default), ``best`` (see `fedlearn.callbacks.checkpoints.Checkpoints`) or a round.
        client: name or number of a client of a run with personal models; ``global`` for the global model, if there is
            a complete one.
        framework: ``torch`` or ``jax``, which share the parameters; None keeps the framework of the run.
        device: device of the predictions, e.g. ``cpu`` (default) or ``cuda``.
        allow_targets: modules of the user with the code of the model. A run folder can name code, so a module that is
            not listed here is not imported.
        trainer: trainer with the network of the model, for a run whose scenario was an object of a Python program.
        base: folder or name of the pretrained model of the run on this machine; None takes ``model.path`` of the run.

    Raises:
        SettingError: the checkpoint or the client does not exist, or the run needs a client.
        FedlearnError: the folder has no trained model, or a file of the model is damaged.

    >>> load("outputs/heart")  # doctest: +SKIP
    """
    folder = Path(run_folder)
    return load_trained_model(
        folder,
        checkpoint=str(checkpoint),
        client=client,
        framework=framework,
        device=device,
        allow_targets=tuple(allow_targets),
        trainer=trainer,
        base=None if base is None else str(base),
    )


def load_trained_model(
    folder: Path,
    *,
    checkpoint: str = "last",
    client: str | None = None,
    framework: str | None = None,
    device: str = "cpu",
    allow_targets: Sequence[str] | None = None,
    trainer: Trainer | None = None,
    base: str | None = None,
) -> TrainedModel:
    """Load the trained model of a run; see `load`.

    Args:
        folder: see `load`.
        checkpoint: see `load`.
        client: see `load`.
        framework: see `load`.
        device: see `load`.
        allow_targets: see `load`; None, the default of the commands, takes the modules in the settings of the run, if
            the person who starts the command has allowed them.
        trainer: see `load`.
        base: see `load`.
    """
    checkpoints.check_format(folder / CHECKPOINT_FOLDER)
    if allow_targets is None:
        allow_targets = listed_modules(read_model_settings(folder))
        require_consent(allow_targets)
    refuse_packages(allow_targets)
    description = read_model_description(folder, (*allow_targets, *allowed_by_environment()))
    description = with_base(description, base)
    if trainer is not None:
        require_same_layout(trainer, description, folder)
    parameters = read_parameters(folder, description, checkpoint, client)
    history = read_history(folder)
    return TrainedModel(
        folder=folder,
        description=description,
        preprocessing=read_preprocessing(folder, description.task),
        parameters=parameters,
        value=dict(metric_values(history, description.metric)).get(parameters.round),
        framework=framework,
        allow_targets=(*allow_targets, *allowed_by_environment()),
        device=device,
        trainer_of_caller=trainer,
    )


def check_threshold(target: Target, threshold: float) -> None:
    """Refuse a threshold out of range, or a threshold for a task without a positive class.

    Raises:
        SettingError: the threshold has no meaning.
    """
    is_share = is_number(threshold, at_least=0, below=1)
    require(is_share, "threshold", threshold, "a number in [0, 1)", "threshold=0.5")
    is_used = threshold == 0.5 or target.task.has_threshold
    require(is_used, "threshold", threshold, "0.5, because the task has no threshold", "threshold=0.5")


def _has_columns(data: Any) -> bool:
    return isinstance(data, Mapping) or hasattr(data, "columns")


def _are_texts(data: Any) -> bool:
    return isinstance(data, Sequence) and not isinstance(data, str) and all(isinstance(text, str) for text in data)
