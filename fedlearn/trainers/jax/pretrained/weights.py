"""Read the weights of a folder in the format of transformers as arrays of JAX, and write them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedlearn.data.pretrained_files import weight_files
from fedlearn.errors import DataError

ADVICE = "a folder that save_pretrained of transformers wrote"


def read_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], *, prefix: str, replaceable: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the parameters of a model that the files hold, in their types.

    Args:
        folder: folder with one or more ``.safetensors`` files.
        shapes: shapes of all parameters, by their names in transformers.
        prefix: prefix of the names that the file of a model without head does not have.
        replaceable: parameters of a head, which the file may have for another number of classes.

    Raises:
        DataError: a file is damaged, a parameter has another shape, or most parameters are missing.
    """
    with ExitStack() as stack:
        files = _open(folder, stack)
        stored = {_modern(name): (file, name) for file in files for name in file.keys()}  # noqa: SIM118
        places = {name: stored.get(name) or stored.get(name.removeprefix(prefix)) for name in shapes}
        arrays = {}
        for name, shape in shapes.items():
            place = places[name]
            actual = None if place is None else tuple(place[0].get_slice(place[1]).get_shape())
            if place is not None and actual == shape:
                arrays[name] = place[0].get_tensor(place[1])
            elif place is not None and name not in replaceable:
                expected = f"shape {shape}, as config.json says"
                raise DataError(f"{folder} has shape {actual} for {name}\n  expected  {expected}\n  advice    {ADVICE}")
    base = [name for name in shapes if name.startswith(prefix)]
    lacking = [name for name in base if name not in arrays]
    if 2 * len(lacking) > len(base):
        problem = f"the weights of the model lack {len(lacking)} of {len(base)} parameters, e.g. {lacking[0]}"
        raise DataError(f"{problem}\n  advice    weights and config.json of the same model")
    return arrays


def _open(folder: Path, stack: ExitStack) -> list[Any]:
    try:
        return [stack.enter_context(safe_open(file, framework="flax")) for file in weight_files(folder)]
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder} has a damaged file of weights ({error})\n  advice    {ADVICE}") from error


def _modern(name: str) -> str:
    """Return the name of a parameter of an old file in today's transformers."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def write_tensors(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as a float32 file that torch and transformers read."""
    save_file({n: np.ascontiguousarray(v, np.float32) for n, v in arrays.items()}, path, metadata={"format": "pt"})
