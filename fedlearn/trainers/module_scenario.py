"""Build a scenario from data sets of clients and a module of PyTorch or JAX."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlearn.core.federated_data import FederatedData
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
    shape = data.train(first).x.shape[1:]
    columns = () if target is None or collate is not None else _columns(datasets, read.reader.columns)
    return Scenario(
        name=name,
        data=data,
        trainer=_trainer(model, data, input_shape=shape, loss=loss, device=device),
        model=type(model).__name__,
        metric=metric,
        preprocessing=_preprocessing(columns, shape, data, target, tuple(map(str, classes))),
    )


def _columns(datasets: Mapping[str, Any], names_of: Callable[[Any], tuple[str, ...]]) -> tuple[str, ...]:
    first = next(iter(datasets.values()))
    return () if isinstance(first, tuple) or callable(first) else names_of(first)


def _preprocessing(
    columns: tuple[str, ...], shape: tuple[int, ...], data: FederatedData, target: str | None, classes: tuple[str, ...]
) -> Preprocessing | None:
    """Return the columns of tables, so that predictions find them by name; None for other inputs."""
    if shape != (len(columns),):
        return None
    names = classes or tuple(map(str, range(data.num_classes))) if data.task.decide is not None else ()
    described = Target(name=target or "target", task=data.task, classes=names)
    return Preprocessing(inputs=TableInputs(columns=tuple(Number(name=name) for name in columns)), target=described)


def _trainer(
    model: Any, data: FederatedData, *, input_shape: tuple[int, ...], loss: Callable[..., Any] | None, device: str
) -> Trainer:
    """Return a trainer for a module of PyTorch or flax, or the model itself if it is a trainer."""
    if all(hasattr(model, member) for member in ("layout", "fit", "predict")):
        require(loss is None, "loss", loss, "None: the trainer has a loss", "loss=None")
        trainer: Trainer = model
        return trainer
    options: dict[str, Any] = {"task": data.task, "loss": loss, "device": device}
    if _is_instance(model, "torch.nn", "Module"):
        from fedlearn.trainers.torch import TorchTrainer

        return TorchTrainer(model, **options)
    if _is_instance(model, "flax.linen", "Module"):
        from fedlearn.trainers.jax import JaxTrainer

        return JaxTrainer(model, input_shape=input_shape, **options)
    expected = "an nn.Module of PyTorch, a module of flax.linen, or a trainer"
    raise SettingError("model", f"a {type(model).__name__}", expected, "model=torch.nn.Linear(8, 1)")


def _is_instance(model: Any, module: str, name: str) -> bool:
    """Return whether a model is an instance of a class. A framework that is not loaded has no instances."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(model, kind)
