"""Run one forward pass for the batches of several clients, which differ in the weights of some linear layers.

Shapes: K clients, N rows of a pass, D parameters, T positions, F inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fedlearn.trainers.torch.flat_model import FlatModel

MAX_COPIED = 2**22  # numbers of the weights that a pass copies for its rows
FINAL_LAYERS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass(frozen=True)
class _Place:
    """One trained linear layer, and the positions of its weights in the vector."""

    layer: nn.Linear
    weight: int  # number of the leaf; -1 for a weight that does not train
    bias: int


class JointLayers:
    """Give the trained linear layers of a model the weights of several clients at once.

    The other layers see one batch of all clients, so a pass reads their weights once. This is right if all trained
    parameters are weights of linear layers, and the model keeps the rows of a batch apart.

    Args:
        model: the model.

    Attributes:
        reason: why the model does not fit, or an empty string.
    """

    def __init__(self, model: FlatModel) -> None:
        self.model = model
        parameters = dict(model.module.inner.named_parameters())
        leaves = [parameters[leaf.name] for leaf in model.layout.trainable.leaves]
        numbers = {id(leaf): i for i, leaf in enumerate(leaves)}
        owners = [m for m in model.module.modules() if any(id(p) in numbers for p in m.parameters(recurse=False))]
        self._places = [
            _Place(m, numbers.get(id(m.weight), -1), numbers.get(id(m.bias), -1))
            for m in owners
            if isinstance(m, nn.Linear) and type(m) in FINAL_LAYERS and not m._forward_hooks
        ]
        owned = sorted(i for place in self._places for i in (place.weight, place.bias) if i >= 0)
        fits = owned == list(range(len(leaves))) and len(self._places) == len(owners)
        self.reason = "" if fits else "trains parameters outside of linear layers"

    def weights(self, params_KD: torch.Tensor) -> list[torch.Tensor]:
        """Return the weights of each leaf, ``(K, *shape)``, without a copy. Trained ones are leaves of a new graph."""
        slices, trained = self.model.layout.slices, self.model.trained.leaves
        return [
            params_KD[:, slices[leaf.name]].unflatten(1, leaf.shape).detach().requires_grad_(leaf in trained)
            for leaf in self.model.layout.trainable.leaves
        ]

    @contextmanager
    def using(self, weights: Sequence[torch.Tensor], clients_N: torch.Tensor) -> Iterator[None]:
        """Use the weights of K clients in this block of code, for the forward and the backward pass.

        Args:
            weights: weights of each leaf, ``(K, *shape)``.
            clients_N: client of each row of the pass, ascending, as an index into the weights; each client has a row.
        """
        _, counts = torch.unique_consecutive(clients_N, return_counts=True)
        rows = _Rows(clients_N, counts.tolist())
        with ExitStack() as stack:
            for place in self._places:
                weight = weights[place.weight] if place.weight >= 0 else None
                bias = weights[place.bias] if place.bias >= 0 else None
                place.layer.forward = partial(_forward, place.layer, weight, bias, rows)  # type: ignore[method-assign]
                stack.callback(vars(place.layer).pop, "forward")
            yield


@dataclass(frozen=True)
class _Rows:
    """The client of each row of a pass, and the number of rows of each client."""

    clients_N: torch.Tensor
    counts: Sequence[int]

    @property
    def is_even(self) -> bool:
        """True if each client has the same number of rows."""
        return len(set(self.counts)) == 1


def _forward(
    layer: nn.Linear, weight: torch.Tensor | None, bias: torch.Tensor | None, rows: _Rows, x: torch.Tensor
) -> torch.Tensor:
    """Return the outputs of a layer. The first axis of ``x`` has the rows of the pass, or rows times positions."""
    clients_N = rows.clients_N
    x_NTF = x.reshape(len(clients_N), -1, x.shape[-1])
    if weight is None:
        outputs = F.linear(x_NTF, layer.weight)
    elif rows.is_even:
        outputs = torch.bmm(x_NTF.reshape(len(weight), -1, x.shape[-1]), weight.mT).view(*x_NTF.shape[:2], -1)
    elif len(clients_N) * weight[0].numel() <= MAX_COPIED:
        outputs = torch.bmm(x_NTF, weight.index_select(0, clients_N).mT)
    else:
        parts = zip(x_NTF.split(rows.counts), weight, strict=True)
        outputs = torch.cat([F.linear(part, weight_OF) for part, weight_OF in parts])
    if bias is not None:
        outputs = outputs + bias.index_select(0, clients_N)[:, None]
    elif layer.bias is not None:
        outputs = outputs + layer.bias
    return outputs.view(*x.shape[:-1], outputs.shape[-1])
