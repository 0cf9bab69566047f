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
        self._clients_N = torch.zeros(0, dtype=torch.long)

    def weights(self, params_KD: torch.Tensor) -> list[torch.Tensor]:
        """Return the weights of each leaf, ``(K, *shape)``, without a copy. Trained ones are leaves of a new graph."""
        slices, trained = self.model.layout.slices, self.model.trained.leaves
        return [
            params_KD[:, slices[leaf.name]].unflatten(1, leaf.shape).detach().requires_grad_(leaf in trained)
            for leaf in self.model.layout.trainable.leaves
        ]

    @contextmanager
    def using(self, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        """Use the weights of K clients in this block of code. Each pass needs `rows_of_clients` before it."""
        with ExitStack() as stack:
            for place in self._places:
                weight = weights[place.weight] if place.weight >= 0 else None
                bias = weights[place.bias] if place.bias >= 0 else None
                place.layer.forward = partial(self._forward, place.layer, weight, bias)  # type: ignore[method-assign]
                stack.callback(vars(place.layer).pop, "forward")
            yield

    def rows_of_clients(self, clients_N: torch.Tensor) -> None:
        """Set the client of each row of the next pass, ascending, as an index into the weights."""
        self._clients_N = clients_N

    def _forward(
        self, layer: nn.Linear, weight: torch.Tensor | None, bias: torch.Tensor | None, x: torch.Tensor
    ) -> torch.Tensor:
        """Return the outputs of a layer. The first axis of ``x`` has the rows of the pass, or rows times positions."""
        rows = self._clients_N
        x_NTF = x.reshape(len(rows), -1, x.shape[-1])
        if weight is None:
            outputs = F.linear(x_NTF, layer.weight)
        elif len(rows) * weight[0].numel() <= MAX_COPIED:
            outputs = torch.bmm(x_NTF, weight.index_select(0, rows).mT)
        else:
            clients, counts = torch.unique_consecutive(rows, return_counts=True)
            parts = zip(x_NTF.split(counts.tolist()), clients.tolist(), strict=True)
            outputs = torch.cat([F.linear(part, weight[k]) for part, k in parts])
        if bias is not None:
            outputs = outputs + bias.index_select(0, rows)[:, None]
        elif layer.bias is not None:
            outputs = outputs + layer.bias
        return outputs.view(*x.shape[:-1], outputs.shape[-1])
