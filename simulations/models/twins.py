"""Build trainers for models that exist in both frameworks under one name."""

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
from simulations.models import is_module, load_family


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
    """Build a trainer for a model of a family.

    Args:
        family: name of a package with the modules ``simulations.models.<family>.torch`` and ``.jax``.
        model: name of a function in these modules, or a module of the framework.
        model_names: names of all models of the family.
        model_args: arguments of the function.
        data: data set that defines the task.
        input_shape: shape of one example.
        framework: ``torch``, ``jax`` or ``mixed``.
        device: device for the computation.
        loss_name: name of a loss function in these modules; empty uses the loss of the task.
        initial: function that draws the initial parameters. None uses
            `fedlearn.core.layout.default_initial_parameters` for a name, and keeps the weights of a module.

    Raises:
        SettingError: The model or the framework is unknown.
        MissingExtra: The framework is not installed.
    """
    build_for = partial(
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
        return MixedTrainer([build_for(framework="torch"), build_for(framework="jax")])
    modules, trainers = load_family("torch" if framework == "mixed" else framework, family)
    if framework == "mixed" or not (model in model_names or is_module(model, modules)):
        or_module = "" if framework == "mixed" else ", or a module of the chosen framework"
        known = [name.removeprefix("next_").removeprefix("tag_") for name in model_names]
        guess = did_you_mean(str(model), known) or known[0]
        raise SettingError("model", model, f"one of {', '.join(known)}{or_module}", f"model={guess}")
    module = getattr(modules, model)(*model_args) if isinstance(model, str) else model
    initial = initial or (default_initial_parameters if isinstance(model, str) else None)
    options: dict[str, Any] = {"task": data.task, "device": device, "initial": initial}
    options |= {"loss": getattr(modules, loss_name)} if loss_name else {}
    if framework == "torch":
        trainer: Trainer = trainers.TorchTrainer(module, input_shape=input_shape, **options)
        return trainer
    trainer = trainers.JaxTrainer(module, input_shape=input_shape, **options)
    return trainer
