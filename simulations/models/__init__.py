"""The models of the scenarios, once for PyTorch and once for JAX: equal names, shapes, inputs and outputs.

Images come as N x height x width x channels in both; the flat vector of one is the flat vector of the other.

Nonlinearities are smooth (ELU, means instead of maxima) so that rounding, which differs between frameworks, stays as
small as it is: at the kink of a ReLU or a maximum one unit in the last place flips a whole gradient, and after twenty
rounds the twins of a small CNN were 4e-3 apart instead of 1e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import default_initial_parameters
from fedlearn.errors import MissingExtra, SettingError, did_you_mean, require
from fedlearn.loop.protocols import Trainer
from fedlearn.trainers.base import Initializer
from fedlearn.trainers.mixed import MixedTrainer
from simulations.models import vision

MODELS = ("linear", "mlp", "cnn", *vision.MIN_IMAGE_SIZE)
FRAMEWORKS = ("torch", "jax", "mixed")


def build_trainer(
    model: Any,
    data: FederatedData,
    *,
    input_shape: tuple[int, ...],
    hidden: Sequence[int] = (32,),
    framework: str = "torch",
    device: str = "cpu",
    initial: Initializer | None = None,
) -> tuple[Trainer, str]:
    """A trainer of a model for some data, and one line that describes the model.

    Args:
        model: ``linear``, ``mlp``, ``cnn`` or another network for images (see
            `simulations.models.vision.build_network`), or a module of your own: an ``nn.Module`` for torch, a flax
            (linen) module for JAX. It has one output for binary tasks and regression, else one for each class.
        data: for the task and the number of classes.
        input_shape: of one example.
        hidden: widths of the hidden layers of ``mlp``.
        framework: ``torch``, ``jax``, or ``mixed``: clients with even numbers in torch, those with odd ones in JAX.
        device: where to compute, e.g. ``cpu`` or ``cuda:0``.
        initial: draws the initial parameters. None is `fedlearn.core.layout.default_initial_parameters` for a model by
            name, and keeps the weights of a module.

    Raises:
        SettingError: the model or framework is unknown, or the model is not for such inputs.
        MissingExtra: the framework is not installed.
    """
    if framework == "mixed":
        require(isinstance(model, str), "model", model, f"one of {', '.join(MODELS)} for framework=mixed", "model=mlp")
        in_one = partial(
            build_trainer, model, data, input_shape=input_shape, hidden=hidden, device=device, initial=initial
        )
        (one, line), (other, _) = in_one(framework="torch"), in_one(framework="jax")
        return MixedTrainer([one, other]), line
    initial = initial or (default_initial_parameters if isinstance(model, str) else None)
    modules, trainers = load_family(framework)
    num_outputs = data.num_classes if data.task == "multiclass" else 1
    if isinstance(model, str) and model in vision.MIN_IMAGE_SIZE:
        module, line = vision.build_network(model, framework, input_shape=input_shape, num_outputs=num_outputs)
    else:
        module, line = _build(model, modules, input_shape, tuple(hidden), num_outputs)
    if framework == "torch":
        return trainers.TorchTrainer(module, task=data.task, device=device, initial=initial), line
    made = trainers.JaxTrainer(module, task=data.task, input_shape=input_shape, device=device, initial=initial)
    return made, line


def load_family(framework: str, family: str = "basic") -> tuple[ModuleType, ModuleType]:
    """Return the module with the models of a family (``text``, ...) and the module with the trainer of a framework."""
    if framework not in FRAMEWORKS:
        guess = did_you_mean(str(framework), FRAMEWORKS) or "torch"
        raise SettingError("framework", framework, f"one of {', '.join(FRAMEWORKS)}", f"framework={guess}")
    try:
        models = import_module(f"simulations.models.{family}.{framework}")
        return models, import_module(f"fedlearn.trainers.{framework}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("simulations", "fedlearn")):
            raise
        raise MissingExtra(f"framework={framework}", framework) from error


def _build(
    model: Any, modules: ModuleType, input_shape: tuple[int, ...], hidden: tuple[int, ...], num_outputs: int
) -> tuple[Any, str]:
    num_inputs = prod(input_shape)
    if isinstance(model, modules.Module):
        return model, type(model).__name__
    if model == "linear":
        return modules.linear(num_inputs, num_outputs), f"linear {num_inputs}-{num_outputs}"
    if model == "mlp":
        widths = (num_inputs, *hidden, num_outputs)
        return modules.mlp(widths), f"mlp {'-'.join(map(str, widths))}"
    if model == "cnn" and len(input_shape) == 3 and min(input_shape[:2]) >= 4:
        return modules.cnn(input_shape, num_outputs), f"cnn {'x'.join(map(str, input_shape))}-16-32-{num_outputs}"
    if model == "cnn":
        raise SettingError("model", model, "linear or mlp: these examples are not images of 4 x 4 or more", "model=mlp")
    known = known_models(input_shape)
    guess = did_you_mean(model, known) if isinstance(model, str) else None
    expected = f"one of {', '.join(known)}, or a module of the chosen framework"
    raise SettingError("model", model, expected, f"model={guess or 'mlp'}")


def known_models(input_shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of the models that accept inputs of a shape.

    >>> known_models((13,)), len(known_models((32, 32, 3)))
    (('linear', 'mlp'), 11)
    """
    size = min(input_shape[:2]) if len(input_shape) == 3 else 0
    sizes = {"linear": 0, "mlp": 0, "cnn": 4, **vision.MIN_IMAGE_SIZE}
    return tuple(name for name, smallest in sizes.items() if size >= smallest)
