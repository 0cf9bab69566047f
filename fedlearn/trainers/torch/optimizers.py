"""Take the steps of the optimizers of local training in PyTorch.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fedlearn.core.named_option import describe_option, option_name, option_values
from fedlearn.core.optimizers import PORTABLE_OPTIMIZERS, optimizer_values
from fedlearn.core.records import LocalSettings
from fedlearn.errors import SettingError, did_you_mean, require

Gradients = tuple[torch.Tensor, ...]  # one gradient per parameter
Step = Callable[[Gradients, float], None]  # takes a step with a learning rate

NOT_FOR_GRADIENTS = ("lbfgs", "sparseadam")  # these call the model themselves, or need sparse gradients
# each value of a parameter has its own state, so that a block of clients can be one parameter
ELEMENTWISE = frozenset({"sgd", "adam", "adamw", "adagrad", "rmsprop", "adadelta", "adamax", "nadam", "radam", "rprop"})


_TORCH_NAMES = {"first": "exp_avg", "second": "exp_avg_sq", "total": "sum", "mean": "square_avg"}


def torch_optimizers() -> Mapping[str, Callable[..., torch.optim.Optimizer]]:
    """Return the optimizers of torch.optim by their names in lower case."""
    classes = [v for v in vars(torch.optim).values() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)]
    known = {kind.__name__.lower(): kind for kind in classes if kind is not torch.optim.Optimizer}
    return {name: kind for name, kind in known.items() if name not in NOT_FOR_GRADIENTS}


def is_elementwise(local: LocalSettings) -> bool:
    """Return whether the step of a value depends on no other value, so that clients can step together."""
    return option_name(local.optimizer) in ELEMENTWISE


def check_optimizer(local: LocalSettings) -> None:
    """Check that torch has the optimizer, with these values.

    Raises:
        SettingError: The name is unknown, or a value is unknown or out of range.
    """
    if option_name(local.optimizer) == "sgd":  # the import of torch.optim takes a second
        return
    _build([nn.Parameter(torch.zeros(2, 2))], local)


@dataclass(frozen=True, kw_only=True)
class KeptState:
    """Hold the optimizer state that a client keeps. The steps change it in place.

    Args:
        vectors: name of a vector -> its part for each parameter.
        counts: number of steps so far, once per parameter.
    """

    vectors: Mapping[str, Sequence[torch.Tensor]]
    counts: Sequence[torch.Tensor]


def optimizer_step(leaves: Sequence[nn.Parameter], local: LocalSettings, kept: KeptState | None = None) -> Step:
    """Return a function that takes optimizer steps.

    Args:
        leaves: parameters.
        local: settings of local training.
        kept: state of the last round; None for a new optimizer state.
    """
    return _sgd(leaves, local, kept) if option_name(local.optimizer) == "sgd" else _torch_step(leaves, local, kept)


def clip_gradients(max_norm: float, gradients: Gradients) -> Gradients:
    """Scale the gradient of one client to an L2 norm of at most ``max_norm``."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return tuple(torch._foreach_mul(gradients, (max_norm / norm).clamp(max=1)))


def clip_rows(max_norm: float, gradient_KD: torch.Tensor) -> torch.Tensor:
    """Scale the gradient of each client to an L2 norm of at most ``max_norm``."""
    norm_K1 = torch.linalg.vector_norm(gradient_KD, dim=1, keepdim=True)
    return gradient_KD * (max_norm / norm_K1).clamp(max=1)


def _sgd(leaves: Sequence[nn.Parameter], local: LocalSettings, kept: KeptState | None) -> Step:
    """Return the steps of ``torch.optim.SGD``. Its import and overhead take longer than a step of a small model."""
    weights = [leaf.detach() for leaf in leaves]
    velocity = tuple(torch.zeros_like(weight) for weight in weights) if local.momentum else None
    if kept is not None and velocity is not None:
        velocity = tuple(kept.vectors["velocity"])
    nesterov = optimizer_values(local.optimizer)["nesterov"]

    def step(gradients: Gradients, rate: float) -> None:
        if local.weight_decay:
            gradients = torch._foreach_add(gradients, weights, alpha=local.weight_decay)
        if velocity is not None:
            torch._foreach_mul_(velocity, local.momentum)
            torch._foreach_add_(velocity, gradients)
            gradients = torch._foreach_add(gradients, velocity, alpha=local.momentum) if nesterov else velocity
        torch._foreach_add_(weights, gradients, alpha=-rate)

    return step


def _torch_step(leaves: Sequence[nn.Parameter], local: LocalSettings, kept: KeptState | None) -> Step:
    optimizer = _build(leaves, local)
    for i, leaf in enumerate(leaves if kept is not None else ()):
        assert kept is not None
        vectors = {_TORCH_NAMES[name]: parts[i] for name, parts in kept.vectors.items()}
        optimizer.state[leaf] = {"step": kept.counts[i], **vectors}

    def step(gradients: Gradients, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()

    return step


def _build(leaves: Sequence[nn.Parameter], local: LocalSettings) -> torch.optim.Optimizer:
    """Return a new optimizer of torch.

    Raises:
        SettingError: See `check_optimizer`.
    """
    name, known = option_name(local.optimizer), torch_optimizers()
    if name is None:
        kind, values = local.optimizer, {}
    else:
        near = did_you_mean(name, known) or "adam"
        require(name in known, "local.optimizer", name, f"one of {', '.join(sorted(known))}", f"local.optimizer={near}")
        kind, values = known[name], option_values(local.optimizer)
        values = optimizer_values(local.optimizer) if name in PORTABLE_OPTIMIZERS else values
    if local.weight_decay or name == "adamw":  # the default of torch is 0.01
        values = {**values, "weight_decay": local.weight_decay}
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        optimizer = partial(kind, **arguments)(leaves, lr=local.learning_rate)
    except (TypeError, ValueError) as error:
        shown, expected = describe_option(local.optimizer), f"values that torch accepts ({str(error).splitlines()[0]})"
        raise SettingError("local.optimizer", shown, expected, "local.optimizer=adam") from error
    is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
    expected = f"a function that returns a torch.optim.Optimizer; it returned {type(optimizer).__name__}"
    require(is_optimizer, "local.optimizer", describe_option(local.optimizer), expected, "local.optimizer=adam")
    return optimizer
