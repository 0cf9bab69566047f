"""Models of the scenarios, each in PyTorch and in JAX with equal names, shapes, inputs and outputs.

Images have the shape N x height x width x channels in both frameworks. Both frameworks share one flat vector of
parameters.

Nonlinearities are smooth: ELU instead of ReLU, means instead of maxima. The reason is rounding, which differs between
frameworks. At the kink of a ReLU or a maximum, one unit in the last place flips a whole gradient. With ReLU and
maxima, the two versions of a small CNN differed by 4e-3 after twenty rounds. With ELU and means, they differ by 1e-7.
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
from fedlearn.loop.scenario import Network
from fedlearn.trainers.base import Initializer
from fedlearn.trainers.mixed import MixedTrainer
from simulations.models import published, vision

MODELS = ("linear", "mlp", "cnn", *vision.MIN_IMAGE_SIZE, *published.NETWORKS)
FRAMEWORKS = ("torch", "jax", "mixed")


def network_of(**arguments: Any) -> Network:
    """Return the description of the network that `build_trainer` builds with these arguments, without data."""
    return Network(builder=f"{__name__}.{build_trainer.__name__}", arguments=arguments)


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
    """Build a trainer for a model and a data set, and describe the model in one line.

    Args:
        model: name or module. Names are ``linear``, ``mlp``, ``cnn``, the networks of
            `simulations.models.vision.build_network` and `simulations.models.published.NETWORKS`, and ``unet`` for
            segmentation. A module is an ``nn.Module`` for
            torch. For JAX it is a module of flax or equinox, or functions ``(init, apply)``. It has one output for
            binary tasks and regression, else one output per class.
        data: data set that defines the task and the number of classes.
        input_shape: shape of one example.
        hidden: widths of the hidden layers of ``mlp``, default (32,).
        framework: ``torch`` (default), ``jax`` or ``mixed``. With ``mixed``, clients with even numbers train in
            torch and clients with odd numbers in JAX.
        device: device for the computation, e.g. ``cpu`` (default) or ``cuda:0``.
        initial: function that draws the initial parameters. None uses
            `fedlearn.core.layout.default_initial_parameters` for a name, and keeps the weights of a module.

    Raises:
        SettingError: The model or the framework is unknown, or the model does not accept inputs of this shape.
        MissingExtra: The framework is not installed.
    """
    if framework == "mixed":
        require(isinstance(model, str), "model", model, f"one of {', '.join(MODELS)} for framework=mixed", "model=mlp")
        build_for = partial(
            build_trainer, model, data, input_shape=input_shape, hidden=hidden, device=device, initial=initial
        )
        (torch_trainer, line), (jax_trainer, _) = build_for(framework="torch"), build_for(framework="jax")
        return MixedTrainer([torch_trainer, jax_trainer]), line
    initial = initial or (default_initial_parameters if isinstance(model, str) else None)
    modules, trainers = load_family(framework)
    num_outputs = data.task.num_outputs(data.num_classes)
    is_dense = data.task.class_axis == 1  # a class for each pixel
    if isinstance(model, str) and (is_dense or model == "unet"):
        expected = "unet or a module, for segmentation" if is_dense else "another model: unet is for segmentation"
        require(is_dense and model == "unet", "model", model, expected, "model=unet" if is_dense else "model=mlp")
        module, line = vision.build_unet(framework, input_shape=input_shape, num_outputs=num_outputs)
    elif isinstance(model, str) and model in vision.MIN_IMAGE_SIZE:
        module, line = vision.build_network(model, framework, input_shape=input_shape, num_outputs=num_outputs)
    elif isinstance(model, str) and model in published.NETWORKS:
        module, line = published.build_published_network(
            model, framework, input_shape=input_shape, num_outputs=num_outputs
        )
    else:
        module, line = _build(model, modules, input_shape, tuple(hidden), num_outputs)
    if framework == "torch":
        options = {"task": data.task, "device": device, "initial": initial, "input_shape": input_shape}
        return trainers.TorchTrainer(module, **options), line
    trainer = trainers.JaxTrainer(module, task=data.task, input_shape=input_shape, device=device, initial=initial)
    return trainer, line


def load_family(framework: str, family: str = "basic") -> tuple[ModuleType, ModuleType]:
    """Import the models of a family (``text``, ...) and the trainers of a framework.

    Raises:
        SettingError: The framework is unknown.
        MissingExtra: The framework is not installed.
    """
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


def is_module(model: Any, modules: ModuleType) -> bool:
    """Return whether a model is a module of the framework of these models, not a name."""
    if not modules.__name__.endswith("jax"):
        return isinstance(model, modules.Module)
    from fedlearn.trainers.jax.networks import is_jax_model

    return is_jax_model(model)


def _build(
    model: Any, modules: ModuleType, input_shape: tuple[int, ...], hidden: tuple[int, ...], num_outputs: int
) -> tuple[Any, str]:
    num_inputs = prod(input_shape)
    if is_module(model, modules):
        return model, "init, apply" if isinstance(model, tuple) else type(model).__name__
    if model == "linear":
        return modules.linear(num_inputs, num_outputs), f"linear {num_inputs}-{num_outputs}"
    if model == "mlp":
        widths = (num_inputs, *hidden, num_outputs)
        return modules.mlp(widths), f"mlp {'-'.join(map(str, widths))}"
    if model == "cnn" and len(input_shape) == 3 and min(input_shape[:2]) >= 4:
        return modules.cnn(input_shape, num_outputs), f"cnn {'x'.join(map(str, input_shape))}-16-32-{num_outputs}"
    if model == "cnn":
        raise SettingError("model", model, "linear or mlp: the examples are not images of at least 4 x 4", "model=mlp")
    known = known_models(input_shape)
    guess = did_you_mean(model, known) if isinstance(model, str) else None
    expected = f"one of {', '.join(known)}, or a module of the chosen framework"
    shown = model if isinstance(model, str) else f"a {type(model).__name__}"  # not the layers of a module
    other = "jax" if modules.__name__.endswith("torch") else "torch"
    fix = f"model={guess or 'mlp'}" if isinstance(model, str) else f"framework={other}"
    raise SettingError("model", shown, expected, fix)


def known_models(input_shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of the models that accept inputs of a shape.

    >>> known_models((13,)), len(known_models((32, 32, 3)))
    (('linear', 'mlp'), 11)
    """
    size = min(input_shape[:2]) if len(input_shape) == 3 else 0
    sizes = {"linear": 0, "mlp": 0, "cnn": 4, **vision.MIN_IMAGE_SIZE}
    return tuple(name for name, smallest in sizes.items() if size >= smallest)
