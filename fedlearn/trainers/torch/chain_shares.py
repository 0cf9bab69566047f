"""Per-example gradients of a chain of linear layers in implicit form, without autograd.

Shapes: B batch.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fedlearn.trainers.torch.chain import Chain
from fedlearn.trainers.torch.chain_losses import write_loss_gradients
from fedlearn.trainers.torch.chain_passes import ChainPasses, LayerParameters, RowMemory
from fedlearn.trainers.torch.flat_model import MIN_LENT_BYTES
from fedlearn.trainers.torch.layer_gradients import Share, layer_shares
from fedlearn.trainers.torch.losses import LOSSES, Loss


class ChainShares:
    """Compute the share of each layer in the gradients of the examples of a batch.

    The links of a chain keep row i of all values apart from other rows, so no example reads another example.

    Args:
        chain: the model.
        loss: ``(outputs_BC, y_B) -> loss_B``.
    """

    def __init__(self, chain: Chain, loss: Loss) -> None:
        self.chain, self.loss = chain, loss
        num_bytes = sum(4 * parameter.numel() for layer, _ in chain.links for parameter in layer.parameters())
        # the memory of large models changes, see `FlatModel.lend`, and the overhead of autograd is small for them
        self._is_possible = num_bytes < MIN_LENT_BYTES and loss in LOSSES.values()
        self._memory = RowMemory()
        self._passes = lru_cache(maxsize=256)(self._build_passes)  # by batch size

    def fits(self, x_B: torch.Tensor) -> bool:
        """Return whether the model is small, its loss is a loss of the library, and it accepts the inputs."""
        fits = self._is_possible and x_B.dtype == torch.float32 and self.chain.accepts(x_B.shape[1:])
        return fits and self.chain.is_intact

    def __call__(self, x_B: torch.Tensor, y_B: torch.Tensor) -> tuple[list[Share], torch.Tensor]:
        """Return the shares of all layers, and the losses."""
        passes = self._passes(len(y_B))
        passes.x[0].copy_(x_B.flatten(1))
        (loss_B,) = write_loss_gradients(self.loss, passes.forward(), y_B[None], passes.delta, share=1.0)
        passes.backward()
        parts = zip(self.chain.links, passes.inputs, passes.deltas, strict=True)
        shares = [layer_shares(link.layer, a_1BF[0], d_1BO[0], from_vmap=False) for link, a_1BF, d_1BO in parts]
        return [share for layer in shares for share in layer], loss_B

    def _build_passes(self, size: int) -> ChainPasses:
        parameters = []
        for layer, _ in self.chain.links:
            bias = None if layer.bias is None else layer.bias.detach()[None]
            parameters.append(LayerParameters(layer.weight.detach()[None], bias))
        return ChainPasses(self.chain, parameters, None, size=size, memory=self._memory)
