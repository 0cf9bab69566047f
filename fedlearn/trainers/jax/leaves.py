"""Names and axes of the leaves of a JAX model in the layout of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from fedlearn.core.layout import RUNNING_MEAN, RUNNING_VARIANCE
from fedlearn.errors import SettingError

PARAMS = "params"  # name of the collection with the parameters of a model
BATCH_STATS = "batch_stats"  # name of the collection with its buffers
FLAX_NAMES = {  # flax -> torch
    PARAMS: {"kernel": "weight", "scale": "weight", "embedding": "weight"},
    BATCH_STATS: {"mean": RUNNING_MEAN, "var": RUNNING_VARIANCE},
}
Path = tuple[str, ...]  # path of a leaf in the model


class JaxLeaf(NamedTuple):
    """Place of a leaf in the layout.

    Attributes:
        name: dotted name, as in torch.
        shape: shape in torch.
        axes: order of the axes of the model that gives the axes of torch.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def torch_leaves(variables: Mapping[str, Any], kind: str, *, is_flax: bool) -> dict[Path, JaxLeaf]:
    """Return the places of the leaves of one collection, by their paths in the model.

    Args:
        variables: collections of nested mappings.
        kind: name of the collection.
        is_flax: whether a kernel has the inputs before the outputs, as in flax. Other models keep names and axes.

    Raises:
        SettingError: Two leaves have equal names.
    """
    leaves = {}
    for path, leaf in flatten_dict(variables.get(kind, {})).items():
        names = FLAX_NAMES[kind] if is_flax else {}
        axes = _axes_to_torch(path, leaf.ndim) if is_flax else tuple(range(leaf.ndim))
        name = ".".join([*path[:-1], names.get(path[-1], path[-1])])
        leaves[path] = JaxLeaf(name, tuple(leaf.shape[axis] for axis in axes), axes)
    names_of = [leaf.name for leaf in leaves.values()]
    equal = next((name for name in names_of if names_of.count(name) > 1), None)
    if equal is not None:
        raise SettingError("module", f"a model with two parameters {equal}", "one name per parameter", "other keys")
    return leaves


def to_torch(leaf: JaxLeaf, array: Any) -> Any:
    """Return an array of the model with the axes of torch."""
    return array.transpose(leaf.axes)


def from_torch(leaf: JaxLeaf, array: Any) -> Any:
    """Return an array of torch with the axes of the model."""
    return array.transpose(tuple(np.argsort(leaf.axes).tolist()))


def named_arrays(variables: Mapping[str, Any], kind: str, leaves: Mapping[Path, JaxLeaf]) -> dict[str, np.ndarray]:
    """Return the arrays of a collection by their names and with the axes of torch.

    Raises:
        SettingError: The collection lacks a leaf of the model, or a shape differs.
    """
    values = flatten_dict(variables.get(kind, {}))
    arrays = {}
    for path, leaf in leaves.items():
        array = np.asarray(to_torch(leaf, values[path]), np.float32) if path in values else None
        actual = "nothing" if array is None else f"shape {array.shape}"
        expected = f"an array of shape {leaf.shape} at {'/'.join(path)}, as module.init returns it"
        if array is None or array.shape != leaf.shape:
            raise SettingError(f"variables[{kind!r}]", actual, expected, "variables=module.init(key, x)")
        arrays[leaf.name] = array
    return arrays


def _axes_to_torch(path: Path, ndim: int) -> tuple[int, ...]:
    """Return the order of axes that turns a flax leaf into a torch leaf.

    Flax kernels are (..., inputs, outputs). Torch weights are (outputs, inputs, ...).
    """
    is_kernel = path[-1] == "kernel" and ndim > 1
    return (ndim - 1, ndim - 2, *range(ndim - 2)) if is_kernel else tuple(range(ndim))


def nested_paths(tree: Any) -> tuple[Path, ...]:
    """Return the paths of the leaves of a pytree, as names."""
    paths = [tuple(map(_key, path)) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return tuple(path or ("weight",) for path in paths)


def _key(key: Any) -> str:
    """Return a key of a path as text: the name of an attribute, the key of a mapping or the index of a sequence."""
    for kind in ("name", "key", "idx"):
        if hasattr(key, kind):
            return str(getattr(key, kind))
    return str(key)
