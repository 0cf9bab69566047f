"""Build a scenario from data sets of clients and a module of PyTorch or JAX."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.inputs import has_fields
from fedlearn.core.metric import Metric
from fedlearn.core.tasks import Task
from fedlearn.data.client_datasets import Collate, client_datasets
from fedlearn.data.column_types import Number
from fedlearn.data.inputs import TableInputs
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.errors import DataError, SettingError, require
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.scenario import Scenario


def scenario_from_datasets(
    datasets: Mapping[str, Any],
    *,
    model: Any,
    task: Task | str = "multiclass",
    loss: Callable[..., Any] | None = None,
    forward: Callable[..., Any] | None = None,
    output: str | int | None = None,
    metrics: Sequence[Metric] = (),
    target: str | None = None,
    features: Sequence[str] | None = None,
    classes: Sequence[Any] = (),
    num_classes: int | None = None,
    collate: Collate | None = None,
    test: Mapping[str, Any] | None = None,
    test_share: float = 0.25,
    metric: str | None = None,
    name: str = "custom",
    device: str = "cpu",
    seed: int = 1,
) -> Scenario:
    """Return a scenario; see `fedlearn.Scenario.from_datasets`."""
    read = client_datasets(
        datasets,
        task=task,
        target=target,
        features=features,
        classes=classes,
        collate=collate,
        test=test,
        test_share=test_share,
        seed=seed,
    )
    data = read.federated(num_classes=num_classes, metrics=metrics)
    first = next((client for client in data.clients if len(data.train(client))), None)
    if first is None:
        raise DataError("no client has training examples\n  expected  one example or more\n  try       test_share=0.25")
    x = data.train(first).x
    is_table = target is not None and collate is None and not has_fields(x)
    columns = () if not is_table else _columns(datasets, read.reader.columns)
    return Scenario(
        name=name,
        data=data,
        trainer=_trainer(model, x, task=data.task, loss=loss, forward=forward, output=output, device=device),
        model="init, apply" if isinstance(model, tuple) else type(model).__name__,
        metric=metric,
        preprocessing=_preprocessing(columns, x.shape[1:], data, target, tuple(map(str, classes))),
    )


def _columns(datasets: Mapping[str, Any], names_of: Callable[[Any], tuple[str, ...]]) -> tuple[str, ...]:
    first = next(iter(datasets.values()))
    has_columns = hasattr(first, "columns") or hasattr(first, "column_names")
    return names_of(first) if has_columns else ()


def _preprocessing(
    columns: tuple[str, ...], shape: tuple[int, ...], data: FederatedData, target: str | None, classes: tuple[str, ...]
) -> Preprocessing | None:
    """Return the columns of tables, so that predictions find them by name; None for other inputs."""
    if shape != (len(columns),):
        return None
    names = classes or tuple(map(str, range(data.num_classes))) if data.task.decide is not None else ()
    described = Target(name=target or "target", task=data.task, classes=names)
    return Preprocessing(inputs=TableInputs(columns=tuple(Number(name=name) for name in columns)), target=described)


def _trainer(model: Any, x: np.ndarray, **options: Any) -> Trainer:
    """Return a trainer for a module of PyTorch or JAX, or the model itself if it is a trainer.

    Args:
        model: model of the user.
        x: inputs of a client.
        options: arguments of the trainer.

    Raises:
        SettingError: the model is something else.
    """
    if all(hasattr(model, member) for member in ("layout", "fit", "predict")) and not isinstance(model, type):
        for name in ("loss", "forward", "output"):
            require(options[name] is None, name, options[name], "None: the trainer has it", f"{name}=null")
        trainer: Trainer = model
        return trainer
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(model, type):
        raise SettingError("model", f"the class {model.__name__}", "an object", f"model={model.__name__}(...)")
    if _is_torch(model):
        from fedlearn.trainers.torch import TorchTrainer

        return TorchTrainer(model, **options)
    expected = "an nn.Module of PyTorch, a module of flax or equinox, functions (init, apply), or a trainer"
    value = f"a {type(model).__module__}.{type(model).__qualname__}"
    may_be_jax = isinstance(model, tuple) or "jax" in sys.modules  # a framework that is not loaded has no modules
    require(may_be_jax, "model", value, expected, "model=torch.nn.Linear(8, 1)")
    from fedlearn.trainers.jax.networks import is_jax_model

    require(is_jax_model(model), "model", value, expected, "model=torch.nn.Linear(8, 1)")
    from fedlearn.trainers.jax import JaxTrainer

    return JaxTrainer(model, input_shape=x.dtype if has_fields(x) else x.shape[1:], **options)


def _is_torch(model: Any) -> bool:
    """Return whether a model is a module of PyTorch. A framework that is not loaded has no modules."""
    kind = getattr(sys.modules.get("torch.nn"), "Module", None)
    return isinstance(kind, type) and isinstance(model, kind)
