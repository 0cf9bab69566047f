"""A model that exists once in each framework, by its name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import default_initial_parameters
from fedlearn.errors import SettingError, did_you_mean
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.base import Initializer
from fedlearn.trainers.mixed import MixedTrainer
from simulations.models import load_family


def build_named_trainer(
    family: str,
    model: Any,
    model_names: Sequence[str],
    model_args: Sequence[Any],
    data: FederatedData,
    *,
    input_shape: tuple[int, ...],
    framework: str,
    device: str,
    loss_name: str = "",
    initial: Initializer | None = None,
) -> Trainer:
    """A trainer of a family's model.

    Args:
        family: ``simulations.models.<family>_torch`` and ``..._jax`` hold it.
        model: the name of a function there, or a module of the framework.
        model_names: of the family's models.
        model_args: the function's arguments.
        data: for the task.
        input_shape: of one example.
        framework: ``torch``, ``jax`` or ``mixed``.
        device: where to compute.
        loss_name: the name of a function there, instead of the task's loss.
        initial: draws the initial parameters. None is `fedlearn.core.layout.default_initial_parameters` for a model by
            name, and keeps the weights of a module.

    Raises:
        SettingError: the model or framework is unknown.
        MissingExtra: the framework is not installed.
    """
    in_one = partial(
        build_named_trainer,
        family,
        model,
        model_names,
        model_args,
        data,
        input_shape=input_shape,
        device=device,
        loss_name=loss_name,
        initial=initial,
    )
    if framework == "mixed" and model in model_names:
        return MixedTrainer([in_one(framework="torch"), in_one(framework="jax")])
    modules, trainers = load_family("torch" if framework == "mixed" else framework, family)
    if framework == "mixed" or not (model in model_names or isinstance(model, modules.Module)):
        own = "" if framework == "mixed" else ", or a module of the chosen framework"
        known = [name.removeprefix("next_") for name in model_names]
        guess = did_you_mean(str(model), known) or known[0]
        raise SettingError("model", model, f"one of {', '.join(known)}{own}", f"model={guess}")
    module = getattr(modules, model)(*model_args) if isinstance(model, str) else model
    initial = initial or (default_initial_parameters if isinstance(model, str) else None)
    how: dict[str, Any] = {"task": data.task, "device": device, "initial": initial}
    how |= {"loss": getattr(modules, loss_name)} if loss_name else {}
    if framework == "torch":
        made: Trainer = trainers.TorchTrainer(module, **how)
        return made
    made = trainers.JaxTrainer(module, input_shape=input_shape, **how)
    return made
