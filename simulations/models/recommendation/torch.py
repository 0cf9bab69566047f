"""Recommender models in PyTorch. `simulations.models.recommendation.jax` has the same models.

A model serves one user. Its leaves ``user.*`` are the user's personal parameters; all others describe the items.

Shapes: B batch, F factors, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fedlearn.data.subword_tokenizer import IDS, LABELS, MASK
from fedlearn.trainers.torch.hugging_face import build_decoder, score_tokens

__all__ = ["build_decoder"]
Module = nn.Module


class User(nn.Module):
    """Parameters of one user: vectors of F numbers, and a bias."""

    def __init__(self, num_factors: int, num_vectors: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(num_vectors, num_factors))
        self.bias = nn.Parameter(torch.zeros(1))


class MatrixFactorization(nn.Module):
    """Biased matrix factorization, ``mu + b_u + b_i + p_u q_i``.

    Reference: Koren, Bell, Volinsky, *Matrix Factorization Techniques for Recommender Systems*, IEEE Computer 42, 2009.
    """

    def __init__(self, num_items: int, num_factors: int, global_mean: float) -> None:
        super().__init__()
        self.global_mean = global_mean
        self.user = User(num_factors, 1)
        self.items, self.item_bias = nn.Embedding(num_items, num_factors), nn.Embedding(num_items, 1)

    def forward(self, x_B: torch.Tensor) -> torch.Tensor:
        """Map item numbers ``(B,)`` to scores ``(B, 1)``."""
        item_B = x_B.long()
        match_B1 = self.items(item_B) @ self.user.vectors.t()
        return self.global_mean + self.user.bias + self.item_bias(item_B) + match_B1


class NeuralCollaborativeFiltering(nn.Module):
    """Neural collaborative filtering: an affine map of two parts, a product of factors (GMF) and a perceptron (MLP).

    Each part has its own vectors for the user and the items.

    Reference: He, Liao, Zhang, Nie, Hu, Chua, *Neural Collaborative Filtering*, WWW 2017, arXiv:1708.05031.
    """

    def __init__(self, num_items: int, num_factors: int, global_mean: float) -> None:
        super().__init__()
        self.global_mean = global_mean
        self.user = User(num_factors, 2)
        self.items, self.item_bias = nn.Embedding(num_items, 2 * num_factors), nn.Embedding(num_items, 1)
        self.hidden_0, self.hidden_1 = (
            nn.Linear(2 * num_factors, 2 * num_factors),
            nn.Linear(2 * num_factors, num_factors),
        )
        self.out = nn.Linear(2 * num_factors, 1)

    def forward(self, x_B: torch.Tensor) -> torch.Tensor:
        """Map item numbers ``(B,)`` to scores ``(B, 1)``."""
        item_B = x_B.long()
        product_BF, beside_BF = self.items(item_B).chunk(2, dim=1)
        gmf_BF = product_BF * self.user.vectors[0]
        pair_BF = torch.cat([beside_BF, self.user.vectors[1].expand_as(beside_BF)], dim=1)
        mlp_BF = F.elu(self.hidden_1(F.elu(self.hidden_0(pair_BF))))
        return self.global_mean + self.user.bias + self.item_bias(item_B) + self.out(torch.cat([gmf_BF, mlp_BF], dim=1))


def mf(num_items: int, num_factors: int, global_mean: float) -> nn.Module:
    """Return a model of biased matrix factorization."""
    return MatrixFactorization(num_items, num_factors, global_mean)


def ncf(num_items: int, num_factors: int, global_mean: float) -> nn.Module:
    """Return a model of neural collaborative filtering."""
    return NeuralCollaborativeFiltering(num_items, num_factors, global_mean)


def score_films(module: nn.Module, x_B: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the four outputs of each sequence, ``(B, 4)``; see `simulations.models.recommendation.next_film`."""
    logits_BTV = module(input_ids=x_B[IDS], attention_mask=x_B[MASK], use_cache=False).logits
    candidates_BL, before_last_B = x_B["candidates"].long(), x_B[MASK].sum(dim=1).long() - 2
    last_BV = logits_BTV[torch.arange(len(logits_BTV)), before_last_B.clamp(min=0)].detach()
    scores_BL = last_BV.gather(1, candidates_BL)
    rank_B = 1 + (scores_BL[:, 1:] >= scores_BL[:, :1]).sum(dim=1)
    rank_B = torch.where(candidates_BL[:, 0] > 0, rank_B, 0).float()
    return torch.cat([score_tokens(logits_BTV, x_B[LABELS]), rank_B[:, None]], dim=1)
