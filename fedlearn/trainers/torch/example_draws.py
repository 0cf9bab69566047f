"""Random numbers of private steps: each draw in a forward pass depends on one example only.

Shapes: B batch, M numbers per example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN, FIRST, SECOND = (z - 2**64 for z in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class UnsupportedDrawError(RuntimeError):
    """Report a draw that cannot be divided among the examples of a batch."""


class _Draws(TorchDispatchMode):
    """Replace the random operations of torch, also inside ``vmap`` and in C++ code."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler of torch, which takes a second

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or _has_no_dropout(func, args, kwargs):
            return func(*args, **kwargs)
        return self.draw(func, func.overloadpacket.__name__, args, kwargs)

    def draw(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of a random operation."""
        raise NotImplementedError


class ExampleDraws(_Draws):
    """Draw the numbers of each example from the stream of its key, by SplitMix64.

    Args:
        keys_B: key of each example, int64.
        start: numbers of each stream to skip.

    *Guarantees*: row i of a draw depends on ``keys_B[i]`` and on the number of earlier draws. A draw whose first axis
    is not the batch raises `UnsupportedDrawError`, and so does an operation without a rule.

    Reference: Steele, Lea, Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014.
    """

    def __init__(self, keys_B: torch.Tensor, *, start: int = 0) -> None:
        super().__init__()
        self.keys_B, self.used = keys_B, start

    def draw(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return draws from the streams of the examples."""
        if name not in RULES or kwargs.get("generator") is not None:
            raise UnsupportedDrawError(f"the operation {func} draws random numbers")
        return RULES[name](self.uniforms, *args, **kwargs)

    def uniforms(self, like: torch.Tensor) -> torch.Tensor:
        """Return uniform numbers in [0, 1) in the shape of a tensor ``(B, ...)``, float64."""
        size = len(self.keys_B)
        if not like.ndim or len(like) != size:
            raise UnsupportedDrawError(f"a draw has the shape {tuple(like.shape)}, and the batch has {size} examples")
        count = like[0].numel()
        counter_M = torch.arange(self.used + 1, self.used + count + 1, device=self.keys_B.device)
        self.used += count
        bits_BM = _mix_bits(self.keys_B[:, None] + GOLDEN * counter_M)
        return (_shift(bits_BM, 11).double() * 2.0**-53).view(like.shape)


class ConstantDraws(_Draws):
    """Replace each draw by a fixed value of its distribution, so that results do not depend on draws.

    Args:
        level: quantile of the fixed value, in (0, 1). A binary draw gives its mean.

    Attributes:
        has_drawn: True after the first draw.
        unknown: name of an operation that drew numbers for lack of a rule, or "".
    """

    def __init__(self, level: float = 0.5) -> None:
        super().__init__()
        self.level, self.has_drawn, self.unknown = level, False, ""

    def draw(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return a fixed value of the distribution of a random operation."""
        self.has_drawn = True
        if name in ("bernoulli", "bernoulli_"):
            return _keep_probability(name, *args, **kwargs)
        if name in RULES:
            return RULES[name](self.levels, *args, **kwargs)
        if name == "randperm":  # reversed, so that a model that mixes by permutations differs
            return torch.arange(args[0] - 1, -1, -1, dtype=kwargs.get("dtype"), device=kwargs.get("device"))
        if name == "rrelu_with_noise":
            x, noise, lower, upper = args[:4]
            noise.copy_(torch.where(x <= 0, (lower + upper) / 2, 1.0))
            return x * noise
        if name == "normal":
            mean = args[0]
            return mean.clone() if isinstance(mean, torch.Tensor) else torch.full_like(args[1], mean)
        self.unknown = str(func)
        return func(*args, **kwargs)

    def levels(self, like: torch.Tensor) -> torch.Tensor:
        """Return the quantile in the shape of a tensor, float64."""
        return torch.full(like.shape, self.level, dtype=torch.float64, device=like.device)


def _has_no_dropout(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation draws only for its dropout, for example attention, and the rate is zero."""
    names = [argument.name for argument in func._schema.arguments]
    rates = [value for name, value in [*zip(names, args, strict=False), *kwargs.items()] if name == "dropout_p"]
    return "dropout_p" in names and not any(rates)


Uniforms = Callable[[torch.Tensor], torch.Tensor]


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a logical right shift of 64-bit numbers."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix_bits(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift(z, 30)) * FIRST
    z = (z ^ _shift(z, 27)) * SECOND
    return z ^ _shift(z, 31)


def _keep_probability(name: str, x: torch.Tensor, p: Any = None, **kwargs: Any) -> torch.Tensor:
    if name == "bernoulli_":
        return x.copy_(torch.as_tensor(0.5 if p is None else p, dtype=x.dtype, device=x.device))
    return x.clone() if p is None else torch.full_like(x, p)


def _bernoulli(uniforms: Uniforms, x: torch.Tensor, p: Any = None, **kwargs: Any) -> torch.Tensor:
    return (uniforms(x) < (x if p is None else p)).to(x.dtype)


def _bernoulli_(uniforms: Uniforms, x: torch.Tensor, p: Any = 0.5, **kwargs: Any) -> torch.Tensor:
    return x.copy_(uniforms(x) < p)


def _native_dropout(uniforms: Uniforms, x: torch.Tensor, p: float, train: bool | None = None) -> Any:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = uniforms(x) >= p
    return x * mask / max(1 - p, 1e-30), mask


def _uniform_(uniforms: Uniforms, x: torch.Tensor, low: float = 0.0, high: float = 1.0, **kwargs: Any) -> torch.Tensor:
    u = torch.floor(uniforms(x) * 2**24) * 2.0**-24  # float32 would round the largest numbers up to 1
    return x.copy_(low + u * (high - low))


def _normal_(uniforms: Uniforms, x: torch.Tensor, mean: float = 0.0, std: float = 1.0, **kwargs: Any) -> torch.Tensor:
    return x.copy_(mean + std * torch.special.ndtri(uniforms(x) + 2.0**-54))


def _exponential_(uniforms: Uniforms, x: torch.Tensor, rate: float = 1.0, **kwargs: Any) -> torch.Tensor:
    return x.copy_((-torch.log1p(-uniforms(x))).clamp(min=1e-30) / rate)


def _new(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def new(uniforms: Uniforms, size: Sequence[int], **kwargs: Any) -> torch.Tensor:
        kwargs.pop("generator", None)
        return fill(uniforms, torch.empty(size, **kwargs))

    return new


def _like(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda uniforms, x, **kwargs: fill(uniforms, torch.empty_like(x, **kwargs))


RULES: dict[str, Callable[..., Any]] = {
    "bernoulli": _bernoulli,
    "bernoulli_": _bernoulli_,
    "native_dropout": _native_dropout,
    "uniform_": _uniform_,
    "normal_": _normal_,
    "exponential_": _exponential_,
    "rand": _new(_uniform_),
    "randn": _new(_normal_),
    "rand_like": _like(_uniform_),
    "randn_like": _like(_normal_),
}
