"""How a model lies in one flat vector, the same for torch and JAX.

Shapes: D parameters laid flat.

Leaves are ordered by name and held in torch's orientation (a linear weight is outputs x inputs, a convolution
outputs x inputs x height x width); the JAX trainer turns its own leaves, so that one vector means one model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from math import prod, sqrt

import numpy as np

from fedlearn.core.random import Purpose, generator
from fedlearn.errors import require

RUNNING_MEAN, RUNNING_VARIANCE = "running_mean", "running_var"  # how the names of a batch norm's statistics end


@dataclass(frozen=True, slots=True)
class Leaf:
    """Describe one tensor of a model: dotted name, shape and dtype.

    A ``is_buffer`` is no parameter: what a layer counts or averages while it trains, e.g. a running mean.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    is_buffer: bool = field(default=False, repr=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Describe the leaves in ``params_D``: names, shapes, dtypes and offsets.

    *Guarantees*: ``pack(unpack(v)) == v`` bit for bit, and two models with equal layouts can exchange vectors.

    >>> layout = Layout.from_shapes([("out.weight", (1, 3)), ("out.bias", (1,))])
    >>> layout.num_parameters, [leaf.name for leaf in layout.leaves]
    (4, ['out.bias', 'out.weight'])
    >>> layout.unpack(np.arange(4.0, dtype=np.float32))["out.weight"]
    array([[1., 2., 3.]], dtype=float32)
    """

    leaves: tuple[Leaf, ...]

    @classmethod
    def from_shapes(
        cls, shapes: Iterable[tuple[str, tuple[int, ...]]], buffers: Iterable[tuple[str, tuple[int, ...]]] = ()
    ) -> Layout:
        """A layout of float32 leaves, parameters and buffers, put in order of their names."""
        leaves = [Leaf(name, tuple(shape)) for name, shape in shapes]
        leaves += [Leaf(name, tuple(shape), is_buffer=True) for name, shape in buffers]
        return cls(tuple(sorted(leaves, key=lambda leaf: leaf.name)))

    @cached_property
    def slices(self) -> Mapping[str, slice]:
        """Where each leaf lies in the vector."""
        ends = np.cumsum([leaf.size for leaf in self.leaves], dtype=np.int64).tolist()
        return {leaf.name: slice(end - leaf.size, end) for leaf, end in zip(self.leaves, ends, strict=True)}

    @property
    def num_parameters(self) -> int:
        """D, buffers included."""
        return sum(leaf.size for leaf in self.leaves)

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Names of the leaves that are buffers."""
        return tuple(leaf.name for leaf in self.leaves if leaf.is_buffer)

    @cached_property
    def trainable(self) -> Layout:
        """The layout of the parameters alone."""
        return self.without(self.buffers)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes and dtypes: tells on the wire whether two sides speak of the same model."""
        return hashlib.sha256(repr(self.leaves).encode()).hexdigest()

    def positions(self, patterns: tuple[str, ...]) -> np.ndarray:
        """Where in the vector the leaves lie whose names match one of the patterns (``head.*``), ascending.

        Raises:
            SettingError: a pattern matches no leaf.
        """
        return _positions(self, patterns)

    def without(self, patterns: tuple[str, ...]) -> Layout:
        """The layout of what is left without those leaves."""
        if not patterns:
            return self
        return Layout(tuple(leaf for leaf in self.leaves if not any(fnmatchcase(leaf.name, p) for p in patterns)))

    def unpack(self, params_D: np.ndarray) -> dict[str, np.ndarray]:
        """Views of the vector by leaf name."""
        if params_D.shape != (self.num_parameters,):
            raise ValueError(f"params_D has shape {params_D.shape}, expected ({self.num_parameters},)")
        return {leaf.name: params_D[self.slices[leaf.name]].reshape(leaf.shape) for leaf in self.leaves}

    def pack(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """The vector of a set of named tensors; names and shapes must be those of the layout."""
        names = {leaf.name for leaf in self.leaves}
        if set(tensors) != names:
            raise ValueError(f"leaves differ from the layout: {sorted(set(tensors) ^ names)}")
        for leaf in self.leaves:
            if tuple(tensors[leaf.name].shape) != leaf.shape:
                raise ValueError(f"{leaf.name} has shape {tuple(tensors[leaf.name].shape)}, expected {leaf.shape}")
        if not self.leaves:
            return np.zeros(0, np.float32)
        return np.concatenate([np.asarray(tensors[leaf.name], np.float32).ravel() for leaf in self.leaves])


@lru_cache(maxsize=64)
def _positions(layout: Layout, patterns: tuple[str, ...]) -> np.ndarray:
    names = [leaf.name for leaf in layout.leaves]
    for pattern in patterns:
        known = any(fnmatchcase(name, pattern) for name in names)
        fix = f"strategy.personal_parameters={names[-1] if names else ''}"
        require(
            known,
            "strategy.personal_parameters",
            pattern,
            f"a pattern of some of the model's names: {', '.join(names)}",
            fix,
        )
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    every = np.arange(layout.num_parameters)
    return np.concatenate([np.zeros(0, np.int64), *(every[layout.slices[name]] for name in found)])


def default_initial_parameters(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Return initial parameters, equal for torch and JAX: torch's default for linear and convolution layers.

    Weights and biases of a layer with ``fan_in`` inputs are uniform in ``[-1/sqrt(fan_in), 1/sqrt(fan_in)]``; a
    one-dimensional weight (a normalisation scale) is one, and its bias zero; so are running variances and means.

    Reference: He, Zhang, Ren, Sun, *Delving Deep into Rectifiers*, ICCV 2015, arXiv:1502.01852, with ``a = sqrt(5)``.
    """
    shapes = {leaf.name: leaf.shape for leaf in layout.leaves}
    tensors = {}
    for leaf in layout.leaves:
        weight = shapes.get(leaf.name.removesuffix("bias") + "weight", leaf.shape)
        if len(weight) >= 2:
            bound = 1 / sqrt(prod(weight[1:]))
            tensors[leaf.name] = rng.uniform(-bound, bound, leaf.shape).astype(np.float32)
        else:
            is_zero = leaf.name.endswith(("bias", RUNNING_MEAN))
            tensors[leaf.name] = np.full(leaf.shape, 0.0 if is_zero else 1.0, np.float32)
    return layout.pack(tensors)


def random_parameters(layout: Layout, seed: int, index: int) -> np.ndarray:
    """Return initial parameters in the default distribution, different for each ``index``, for several models."""
    return default_initial_parameters(layout, generator(seed, Purpose.INIT, client=index))
