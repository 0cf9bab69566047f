"""A model that exists once in each framework, by its name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fedlearn.data.federated import FederatedData
from fedlearn.errors import SettingError, did_you_mean
from fedlearn.trainers.base import Initial, Trainer
from fedlearn.trainers.mixed import MixedTrainer
from simulations.models import _load


def twins(
    family: str,
    model: Any,
    names: Sequence[str],
    sizes: Sequence[Any],
    data: FederatedData,
    *,
    shape: tuple[int, ...],
    framework: str,
    device: str,
    loss: str = "",
    initial: Initial | None = None,
) -> Trainer:
    """A trainer of a family's model.

    Args:
        family: ``simulations.models.<family>_torch`` and ``..._jax`` hold it.
        model: the name of a function there, or a module of the framework.
        names: of the family's models.
        sizes: the function's arguments.
        data: for the task.
        shape: of one example.
        framework: ``torch``, ``jax`` or ``mixed``.
        device: where to compute.
        loss: the name of a function there, instead of the task's loss.
        initial: law of the initial parameters.

    Raises:
        SettingError: the model or framework is unknown.
        MissingExtra: the framework is not installed.
    """
    in_one = partial(twins, family, model, names, sizes, data, shape=shape, device=device, loss=loss, initial=initial)
    if framework == "mixed" and model in names:
        return MixedTrainer([in_one(framework="torch"), in_one(framework="jax")])
    modules, trainers = _load("torch" if framework == "mixed" else framework, f"{family}_")
    if framework == "mixed" or not (model in names or isinstance(model, modules.Module)):
        own = "" if framework == "mixed" else ", or a module of the chosen framework"
        known = [name.removeprefix("next_") for name in names]
        guess = did_you_mean(str(model), known) or known[0]
        raise SettingError("model", model, f"one of {', '.join(known)}{own}", f"model={guess}")
    module = getattr(modules, model)(*sizes) if isinstance(model, str) else model
    how: dict[str, Any] = {"task": data.task, "device": device, "initial": initial}
    how |= {"loss": getattr(modules, loss)} if loss else {}
    if framework == "torch":
        made: Trainer = trainers.TorchTrainer(module, **how)
        return made
    made = trainers.JaxTrainer(module, input_shape=shape, **how)
    return made
