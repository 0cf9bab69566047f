"""Text models in PyTorch. `simulations.models.text.jax` has the same models under the same names.

A text is a row of token numbers, padded with 0 at its end. Padding does not change the outputs of a model. Recurrent
layers consist of affine maps. The recurrent layers of torch support neither batches of clients nor gradients of
single examples.

Shapes: B batch, T positions, E width, H hidden, A heads, C outputs.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from simulations.models.text import sinusoids

Module = nn.Module
MASK_PENALTY = 1e9  # subtracted from the scores of masked positions before a softmax


def next_token_loss(outputs_BTC: torch.Tensor, y_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of each text over its positions with a target. A target of -1 means none."""
    real_BT = y_BT >= 0
    loss_BT = F.cross_entropy(outputs_BTC.transpose(1, 2), y_BT.clamp(min=0).long(), reduction="none")
    return (loss_BT * real_BT).sum(1) / real_BT.sum(1).clamp(min=1)


class Recurrent(nn.Module):
    """A layer of LSTM (four gates) or GRU (three gates).

    The gates are defined as in ``torch.nn.LSTM`` and ``torch.nn.GRU``, with two differences. Each gate has one bias
    instead of two. The forget gate adds 1 to its input, so that a new layer keeps its state. A backward layer starts
    at the end of the row, and its state stays zero until the text begins.
    """

    def __init__(self, num_inputs: int, hidden: int, num_gates: int, *, backward: bool = False) -> None:
        super().__init__()
        self.hidden, self.num_gates, self.backward = hidden, num_gates, backward
        self.input_weight = nn.Parameter(torch.zeros(num_gates * hidden, num_inputs))
        self.hidden_weight = nn.Parameter(torch.zeros(num_gates * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(num_gates * hidden))

    def forward(self, x_BTE: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        """Map token vectors ``(B, T, E)`` to states ``(B, T, H)``."""
        drive_TBG = F.linear(x_BTE, self.input_weight, self.bias).unbind(1)
        real_TB1 = real_BT.to(x_BTE.dtype)[:, :, None].unbind(1)
        cell, weight_HG = _lstm if self.num_gates == 4 else _gru, self.hidden_weight.t()
        state = (x_BTE.new_zeros(len(x_BTE), self.hidden),) * (self.num_gates - 2)
        outputs = [state[0]] * len(drive_TBG)
        for t in range(len(drive_TBG))[:: -1 if self.backward else 1]:
            state = cell(drive_TBG[t], state[0] @ weight_HG, *state)
            if self.backward:
                state = tuple(part_BH * real_TB1[t] for part_BH in state)
            outputs[t] = state[0]
        return torch.stack(outputs, dim=1)


def _lstm(drive: torch.Tensor, recall: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
    enter, forget, new, show = (drive + recall).chunk(4, dim=-1)
    c = torch.sigmoid(forget + 1) * c + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(show) * torch.tanh(c), c


def _gru(drive: torch.Tensor, recall: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
    (reset, keep, new), (reset_h, keep_h, new_h) = drive.chunk(3, dim=-1), recall.chunk(3, dim=-1)
    candidate = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
    return (torch.lerp(candidate, h, torch.sigmoid(keep + keep_h)),)


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each on normalized inputs and with a residual connection."""

    def __init__(self, width: int, num_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.norm_0, self.norm_1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTE: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
        """Map token vectors ``(B, T, E)`` to token vectors ``(B, T, E)``."""
        batch, positions, width = x_BTE.shape
        visible_BATT = real_BT[:, None, None, :]
        if self.causal:
            visible_BATT = visible_BATT & torch.ones(positions, positions, dtype=torch.bool, device=x_BTE.device).tril()
        split = self.qkv(self.norm_0(x_BTE)).view(batch, positions, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        score_BATT = query @ key.transpose(2, 3) / sqrt(width / self.num_heads) - MASK_PENALTY * ~visible_BATT
        mixed_BATE = torch.softmax(score_BATT, dim=-1) @ value
        x_BTE = x_BTE + self.mix(mixed_BATE.transpose(1, 2).flatten(2))
        return x_BTE + self.down(F.gelu(self.up(self.norm_1(x_BTE)), approximate="tanh"))


class TextCnn(nn.Module):
    """Affine maps of 2 and 3 neighbouring tokens, ELU, a mean over the text, then an affine map.

    The paper has a maximum instead of the mean.

    Reference: Kim, *Convolutional Neural Networks for Sentence Classification*, EMNLP 2014, arXiv:1408.5882.
    """

    def __init__(self, vocab_size: int, num_outputs: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.conv_2, self.conv_3 = nn.Linear(2 * width, hidden), nn.Linear(3 * width, hidden)
        self.out = nn.Linear(width + 2 * hidden, num_outputs)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = self.embed(tokens_BT) * real_BT[:, :, None]
        padded = F.pad(x_BTE, (0, 0, 0, 2))
        shifted = [padded[:, i : i + x_BT.shape[1]] for i in range(3)]
        pairs = F.elu(self.conv_2(torch.cat(shifted[:2], dim=2)))
        triples = F.elu(self.conv_3(torch.cat(shifted, dim=2)))
        return self.out(_mean(torch.cat([x_BTE, pairs, triples], dim=2), real_BT))


class BiLstm(nn.Module):
    """An LSTM from each end of the text, a mean over the text, then an affine map."""

    def __init__(self, vocab_size: int, num_outputs: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.forth = Recurrent(width, hidden, 4)
        self.back = Recurrent(width, hidden, 4, backward=True)
        self.out = nn.Linear(2 * hidden, num_outputs)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = self.embed(tokens_BT)
        return self.out(_mean(torch.cat([self.forth(x_BTE, real_BT), self.back(x_BTE, real_BT)], dim=2), real_BT))


class RecurrentClassifier(nn.Module):
    """An LSTM or a GRU from the start of the text, a mean over the text, then an affine map."""

    def __init__(self, vocab_size: int, num_outputs: int, width: int, hidden: int, num_gates: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.forth = Recurrent(width, hidden, num_gates)
        self.out = nn.Linear(hidden, num_outputs)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        return self.out(_mean(self.forth(self.embed(tokens_BT), real_BT), real_BT))


class Encoder(nn.Module):
    """Transformer blocks with sinusoidal positions, a mean over the text, then an affine map.

    Unlike in the paper, the layer norms come before attention and perceptron.

    Reference: Vaswani et al., *Attention Is All You Need*, NeurIPS 2017, arXiv:1706.03762.
    """

    def __init__(
        self, vocab_size: int, num_outputs: int, width: int, num_heads: int, num_layers: int, causal: bool
    ) -> None:
        super().__init__()
        self.width, self.num_layers, self.causal = width, num_layers, causal
        self.embed = nn.Embedding(vocab_size, width)
        for layer in range(num_layers):
            self.add_module(f"block_{layer}", Block(width, num_heads, causal=causal))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, num_outputs)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Map token numbers ``(B, T)`` to outputs ``(B, C)``, or to ``(B, T, C)`` if causal."""
        tokens_BT, real_BT = _read(x_BT)
        positions = torch.from_numpy(sinusoids(x_BT.shape[1], self.width)).to(x_BT.device)
        x_BTE = self.embed(tokens_BT) * sqrt(self.width) + positions
        for layer in range(self.num_layers):
            x_BTE = self.get_submodule(f"block_{layer}")(x_BTE, real_BT)
        x_BTE = self.norm(x_BTE)
        return self.out(x_BTE if self.causal else _mean(x_BTE, real_BT))


class NextToken(nn.Module):
    """Recurrent layers that predict the next token at each position."""

    def __init__(self, vocab_size: int, width: int, hidden: int, num_layers: int, num_gates: int) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.embed = nn.Embedding(vocab_size, width)
        for layer in range(num_layers):
            self.add_module(f"layer_{layer}", Recurrent(hidden if layer else width, hidden, num_gates))
        self.out = nn.Linear(hidden, vocab_size)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Map token numbers ``(B, T)`` to outputs ``(B, T, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = self.embed(tokens_BT)
        for layer in range(self.num_layers):
            x_BTE = self.get_submodule(f"layer_{layer}")(x_BTE, real_BT)
        return self.out(x_BTE)


class Tagger(nn.Module):
    """An LSTM or a GRU from each end of the sentence, then an affine map of each position."""

    def __init__(self, vocab_size: int, num_outputs: int, width: int, hidden: int, num_gates: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.forth = Recurrent(width, hidden, num_gates)
        self.back = Recurrent(width, hidden, num_gates, backward=True)
        self.out = nn.Linear(2 * hidden, num_outputs)

    def forward(self, x_BT: torch.Tensor) -> torch.Tensor:
        """Map token numbers ``(B, T)`` to outputs ``(B, T, C)``."""
        tokens_BT, real_BT = _read(x_BT)
        x_BTE = self.embed(tokens_BT)
        return self.out(torch.cat([self.forth(x_BTE, real_BT), self.back(x_BTE, real_BT)], dim=2))


def _read(x_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token numbers, and a mask that is false at padding."""
    return x_BT.long(), x_BT > 0


def _mean(x_BTE: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean over the tokens of each text; zero for an empty text."""
    return (x_BTE * real_BT[:, :, None]).sum(1) / real_BT.sum(1, keepdim=True).clamp(min=1)


def cnn(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a text CNN of width 64."""
    return TextCnn(vocab_size, num_outputs, width=64, hidden=64)


def bilstm(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a bidirectional LSTM of width 64."""
    return BiLstm(vocab_size, num_outputs, width=64, hidden=64)


def lstm(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return an LSTM of width 64."""
    return RecurrentClassifier(vocab_size, num_outputs, width=64, hidden=64, num_gates=4)


def gru(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a GRU of width 64."""
    return RecurrentClassifier(vocab_size, num_outputs, width=64, hidden=64, num_gates=3)


def transformer(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a Transformer encoder of two layers, width 64, 4 heads."""
    return Encoder(vocab_size, num_outputs, width=64, num_heads=4, num_layers=2, causal=False)


def next_lstm(vocab_size: int) -> nn.Module:
    """Return the model of LEAF: an embedding of 8 and two LSTM layers of 256."""
    return NextToken(vocab_size, width=8, hidden=256, num_layers=2, num_gates=4)


def next_gru(vocab_size: int) -> nn.Module:
    """Return an embedding of 32 and one GRU layer of 256."""
    return NextToken(vocab_size, width=32, hidden=256, num_layers=1, num_gates=3)


def next_transformer(vocab_size: int) -> nn.Module:
    """Return a causal Transformer of two layers, width 128, 4 heads."""
    return Encoder(vocab_size, vocab_size, width=128, num_heads=4, num_layers=2, causal=True)


def tag_gru(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a bidirectional GRU of width 64 with outputs per token."""
    return Tagger(vocab_size, num_outputs, width=64, hidden=64, num_gates=3)


def tag_bilstm(vocab_size: int, num_outputs: int) -> nn.Module:
    """Return a bidirectional LSTM of width 64 with outputs per token."""
    return Tagger(vocab_size, num_outputs, width=64, hidden=64, num_gates=4)
