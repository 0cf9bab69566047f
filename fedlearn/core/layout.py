"""Layout of a model in one flat vector, the same for torch and JAX.

Shapes: D parameters.

Leaves are in order of their names and in the orientation of torch. A linear weight is outputs x inputs. A convolution
is outputs x inputs x height x width. The JAX trainer transposes its leaves, so equal vectors are equal models.
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

RUNNING_MEAN, RUNNING_VARIANCE = "running_mean", "running_var"  # endings of the names of batch norm statistics


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of a model.

    Attributes:
        name: dotted name, e.g. ``out.weight``.
        shape: shape in the orientation of torch.
        dtype: name of the dtype.
        is_buffer: True for a statistic that a layer updates during training, e.g. a running mean; False for a
        parameter.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    is_buffer: bool = field(default=False, repr=False)

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Names, shapes, dtypes and offsets of the leaves in ``params_D``.

    *Guarantees*: ``pack(unpack(v)) == v``, bit for bit. Two models with equal layouts can exchange vectors.

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
        """Return the layout of float32 parameters and buffers, in order of their names.

        Args:
            shapes: name and shape of each parameter.
            buffers: name and shape of each buffer.
        """
        leaves = [Leaf(name, tuple(shape)) for name, shape in shapes]
        leaves += [Leaf(name, tuple(shape), is_buffer=True) for name, shape in buffers]
        return cls(tuple(sorted(leaves, key=lambda leaf: leaf.name)))

    @cached_property
    def slices(self) -> Mapping[str, slice]:
        """Position of each leaf in the vector: name -> slice."""
        ends = np.cumsum([leaf.size for leaf in self.leaves], dtype=np.int64).tolist()
        return {leaf.name: slice(end - leaf.size, end) for leaf, end in zip(self.leaves, ends, strict=True)}

    @property
    def num_parameters(self) -> int:
        """Length D of the vector, including buffers."""
        return sum(leaf.size for leaf in self.leaves)

    @cached_property
    def buffers(self) -> tuple[str, ...]:
        """Names of the leaves that are buffers."""
        return tuple(leaf.name for leaf in self.leaves if leaf.is_buffer)

    @cached_property
    def trainable(self) -> Layout:
        """Layout of the parameters, without the buffers."""
        return self.without(self.buffers)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of names, shapes and dtypes. Coordinator and node compare it to detect different models."""
        return hashlib.sha256(repr(self.leaves).encode()).hexdigest()

    def positions(self, patterns: tuple[str, ...], *, setting: str = "strategy.personal_parameters") -> np.ndarray:
        """Return the positions in the vector of all leaves that match a pattern, ascending, int64.

        Args:
            patterns: patterns of leaf names, e.g. ``head.*``.
            setting: name of the setting with the patterns, for the error.

        Raises:
            SettingError: A pattern matches no leaf.
        """
        return _positions(self, patterns, setting)

    def without(self, patterns: tuple[str, ...]) -> Layout:
        """Return the layout without the leaves that match a pattern, e.g. ``head.*``."""
        if not patterns:
            return self
        return Layout(tuple(leaf for leaf in self.leaves if not any(fnmatchcase(leaf.name, p) for p in patterns)))

    def unpack(self, params_D: np.ndarray) -> dict[str, np.ndarray]:
        """Return views of the vector by leaf name.

        Raises:
            ValueError: The vector has another length.
        """
        if params_D.shape != (self.num_parameters,):
            raise ValueError(f"params_D has shape {params_D.shape}, expected ({self.num_parameters},)")
        return {leaf.name: params_D[self.slices[leaf.name]].reshape(leaf.shape) for leaf in self.leaves}

    def pack(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the vector of the tensors by leaf name, float32.

        Raises:
            ValueError: Names or shapes differ from the layout.
        """
        names = {leaf.name for leaf in self.leaves}
        if set(tensors) != names:
            raise ValueError(f"the leaves differ from the layout in {sorted(set(tensors) ^ names)}")
        for leaf in self.leaves:
            if tuple(tensors[leaf.name].shape) != leaf.shape:
                raise ValueError(f"{leaf.name} has shape {tuple(tensors[leaf.name].shape)}, expected {leaf.shape}")
        if not self.leaves:
            return np.zeros(0, np.float32)
        return np.concatenate([np.asarray(tensors[leaf.name], np.float32).ravel() for leaf in self.leaves])


@lru_cache(maxsize=64)
def _positions(layout: Layout, patterns: tuple[str, ...], setting: str) -> np.ndarray:
    names = [leaf.name for leaf in layout.leaves]
    for pattern in patterns:
        matches = any(fnmatchcase(name, pattern) for name in names)
        fix = f"{setting}={names[-1] if names else ''}"
        require(
            matches,
            setting,
            pattern,
            f"a pattern that matches one of these names: {', '.join(names)}",
            fix,
        )
    selected = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    positions_D = np.arange(layout.num_parameters)
    return np.concatenate([np.zeros(0, np.int64), *(positions_D[layout.slices[name]] for name in selected)])


def default_initial_parameters(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Return initial parameters: the defaults of torch for linear and convolution layers, for torch and JAX.

    Weights and biases of a layer with ``fan_in`` inputs are uniform in ``[-1/sqrt(fan_in), 1/sqrt(fan_in)]``.
    One-dimensional weights (normalization scales) and running variances are 1. Their biases and running means are 0.

    Args:
        layout: layout of the model.
        rng: generator for the random numbers.

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
    """Return initial parameters in the default distribution, for one of several models.

    Args:
        layout: layout of the model.
        seed: seed of the run.
        index: index of the model, >= 0; different indices give different parameters.
    """
    return default_initial_parameters(layout, generator(seed, Purpose.INIT, client=index))
