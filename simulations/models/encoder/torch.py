"""Pretrained text encoder in PyTorch. `simulations.models.encoder.jax` has the same model.

Shapes: B batch, T positions, E width, A heads, R rank, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from simulations.models.encoder import MASK_PENALTY, EncoderConfig, FineTuning

Module = nn.Module
INFERENCE_BATCH_SIZE = 64  # texts per batch in inference mode


class Layer(nn.Module):
    """Self-attention and a two-layer perceptron, each with a residual connection and then a layer norm."""

    def __init__(self, config: EncoderConfig, tuning: FineTuning, adapted_modules: tuple[str, ...]) -> None:
        super().__init__()
        self.num_heads, self.scale, self.adapted_modules = config.num_heads, tuning.scale, adapted_modules
        self.drop = build_dropout(tuning)
        for name, (inputs, outputs) in config.projections.items():
            self.add_module(name, nn.Linear(inputs, outputs))
            if name in adapted_modules:
                self.add_module(f"{name}_a", nn.Linear(inputs, tuning.rank, bias=False))
                self.add_module(f"{name}_b", nn.Linear(tuning.rank, outputs, bias=False))
        self.norm_0 = nn.LayerNorm(config.width, eps=config.epsilon)
        self.norm_1 = nn.LayerNorm(config.width, eps=config.epsilon)

    def forward(self, x_BTE: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        """Map token vectors ``(B, T, E)`` to token vectors ``(B, T, E)``."""
        shape = (*x_BTE.shape[:2], self.num_heads, -1)
        query, key, value = (
            self.project(name, x_BTE).view(shape).transpose(1, 2) for name in ("query", "key", "value")
        )
        score_BATT = query @ key.transpose(2, 3) / sqrt(query.shape[-1]) - MASK_PENALTY * ~real_BT[:, None, None, :]
        mixed_BATE = torch.softmax(score_BATT, dim=-1) @ value
        x_BTE = self.norm_0(x_BTE + self.project("mix", mixed_BATE.transpose(1, 2).flatten(2)))
        return self.norm_1(x_BTE + self.project("down", F.gelu(self.project("up", x_BTE))))

    def project(self, name: str, x_BTE: torch.Tensor) -> torch.Tensor:
        """Apply an affine map of the layer, and its adapter if there is one."""
        y_BTE: torch.Tensor = self.get_submodule(name)(x_BTE)
        if name not in self.adapted_modules:
            return y_BTE
        low_BTR = self.get_submodule(f"{name}_a")(self.drop(x_BTE))
        return y_BTE + self.scale * self.get_submodule(f"{name}_b")(low_BTR)


class Encoder(nn.Module):
    """BERT's encoder, a mean over the tokens of a text, then an affine map.

    The input is one text, not a pair of texts as in the paper.

    Reference: Devlin, Chang, Lee, Toutanova, *BERT*, NAACL 2019, arXiv:1810.04805.
    """

    def __init__(self, config: EncoderConfig, tuning: FineTuning, num_outputs: int) -> None:
        super().__init__()
        self.num_layers = config.num_layers
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.epsilon)
        for layer in range(config.num_layers):
            self.add_module(
                f"layer_{layer}", Layer(config, tuning, tuning.adapted_modules(layer, num_layers=config.num_layers))
            )
        self.drop = build_dropout(tuning)
        self.out = nn.Linear(config.width, num_outputs)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``."""
        if torch.is_inference_mode_enabled():
            return self._encode_by_length(x_BT)
        return self._encode(x_BT)

    def _encode_by_length(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Encode texts of similar lengths together, without their common padding.

        Otherwise padding takes half of the time.
        """
        length_B, order_B = (x_BT > 0).sum(1).sort()
        parts = zip(x_BT[order_B].split(INFERENCE_BATCH_SIZE), length_B.split(INFERENCE_BATCH_SIZE), strict=True)
        outputs_BC = torch.cat([self._encode(part[:, : max(1, int(lengths[-1]))]) for part, lengths in parts])
        return outputs_BC[order_B.argsort()]

    def _encode(self, x_BT: torch.Tensor) -> torch.Tensor:
        real_BT = x_BT > 0
        places_BT = torch.arange(x_BT.shape[1], device=x_BT.device).expand(x_BT.shape)
        x_BTE = self.norm(self.token_embedding(x_BT.long()) + self.position_embedding(places_BT))
        for layer in range(self.num_layers):
            x_BTE = self.get_submodule(f"layer_{layer}")(x_BTE, real_BT)
        total_BE = (x_BTE * real_BT[:, :, None]).sum(1)
        return self.out(self.drop(total_BE / real_BT.sum(1, keepdim=True).clamp(min=1)))


def build_dropout(tuning: FineTuning) -> nn.Module:
    """Return a dropout layer, or the identity if the dropout rate is zero.

    The identity draws no random numbers. Clients with models that draw random numbers are trained one by one.
    """
    return nn.Dropout(tuning.dropout) if tuning.dropout else nn.Identity()


def build_encoder(
    config: EncoderConfig, tuning: FineTuning, num_outputs: int, frozen: Mapping[str, np.ndarray]
) -> nn.Module:
    """Build an encoder with a head.

    Parameters in ``frozen`` have these values, and training does not change them. All others are zero.
    """
    with torch.device("meta"):
        module = Encoder(config, tuning, num_outputs)
    values = {name: torch.zeros(leaf.shape) for name, leaf in module.named_parameters() if name not in frozen}
    module.load_state_dict(values | {name: torch.from_numpy(v) for name, v in frozen.items()}, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return module
