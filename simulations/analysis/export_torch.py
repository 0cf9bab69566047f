"""Write a trained network as a torch state dict or as ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from fedlearn.errors import MissingExtra


def save_state_dict(network: torch.nn.Module, path: Path) -> None:
    """Write the state dict. Load it with ``module.load_state_dict(torch.load(path, weights_only=True))``."""
    torch.save(network.state_dict(), path)


def save_onnx(network: torch.nn.Module, example: np.ndarray, path: Path) -> None:
    """Write the network as ONNX. Its input is ``x``, for any number of examples; its output is ``outputs``.

    Outputs are logits for classification and values for regression.

    Args:
        network: network with its parameters, in evaluation mode.
        example: example of an input, ``(B, ...)``.
        path: path of the file.

    Raises:
        MissingExtra: The library onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise MissingExtra("format=onnx", "export") from missing
    network = network.cpu()
    batch = torch.from_numpy(np.concatenate([example[:1], example[:1]]))  # torch treats a batch size of 1 as constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own parts
        torch.onnx.export(
            network,
            (batch,),
            path,
            input_names=["x"],
            output_names=["outputs"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
            dynamo=True,
        )
