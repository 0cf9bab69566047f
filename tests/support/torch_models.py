"""PyTorch models and losses for tests of DP-SGD: each has inputs, outputs ``(B, CLASSES)``, and odd properties.

Shapes: B batch, T positions, F features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

CLASSES, TOKENS = 3, 12


class Net(nn.Module):
    """A model of parts and a function ``(parts, x) -> outputs``."""

    def __init__(self, run: Callable[..., torch.Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the model, ``(B, CLASSES)``."""
        return self.run(self, x)


def linear(num_inputs: int = 6, num_outputs: int = CLASSES, **options: bool) -> nn.Linear:
    return nn.Linear(num_inputs, num_outputs, **options)


def around(*layers: nn.Module, width: int = 8) -> nn.Module:
    """Return layers between two affine maps of vectors."""
    return nn.Sequential(linear(6, width), *layers, linear(width))


def image(layer: nn.Module, axes: int = 2) -> nn.Module:
    """Return a layer of images, and an affine map of its outputs."""
    shape = {1: (2, 12), 2: (2, 4, 3), 3: (2, 2, 3, 2)}[axes]
    outputs = layer(torch.zeros(1, *shape)).numel()
    return nn.Sequential(nn.Unflatten(1, shape), layer, nn.Tanh(), nn.Flatten(), linear(outputs))


def tokens(run: Callable[..., torch.Tensor], width: int = 4, **parts: nn.Module) -> nn.Module:
    return Net(run, **{"embed": nn.Embedding(TOKENS, width), "out": linear(width), **parts})


def with_hook(module: nn.Module, layer: nn.Module, hook: Callable[..., object]) -> nn.Module:
    layer.register_forward_hook(hook)
    return module


def recurrent(kind: type[nn.RNNBase], **options: object) -> nn.Module:
    layer = kind(2, 4, batch_first=True, **options)  # type: ignore[arg-type]
    width = 8 if options.get("bidirectional") else 4
    return Net(lambda s, x: s.out(s.layer(x.view(len(x), 3, 2))[0][:, -1]), layer=layer, out=linear(width))


def time_first(kind: type[nn.RNNBase]) -> nn.Module:
    run = lambda s, x: s.out(s.layer(x.view(len(x), 3, 2).transpose(0, 1))[0][-1])  # noqa: E731
    return Net(run, layer=kind(2, 4), out=linear(4))


def attention() -> nn.Module:
    def run(s: Net, x: torch.Tensor) -> torch.Tensor:
        hidden = s.inner(x.view(len(x), 3, 2))
        return s.out(s.attend(hidden, hidden, hidden)[0].mean(1))

    return Net(run, inner=linear(2, 4), attend=nn.MultiheadAttention(4, 2, batch_first=True), out=linear(4))


def encoder(dropout: float = 0.0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (3, 2)), linear(2, 4), layer, nn.Flatten(), linear(12))


class Noise(nn.Module):
    """Add Gaussian noise in training."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the inputs with noise."""
        if self.how == "randn":
            return x + 0.3 * torch.randn(x.shape)
        if self.how == "randn_like":
            return x + 0.3 * torch.randn_like(x)
        if self.how == "rand":  # drops whole examples
            return x * (torch.rand(len(x), 1) > 0.3)
        if self.how == "normal":
            return torch.normal(x, 0.3)
        if self.how == "gumbel":
            return F.gumbel_softmax(x)
        if self.how == "randint":
            return x * torch.randint(0, 2, x.shape)
        return x + torch.distributions.Normal(0.0, 0.3).sample(x.shape)


class Factors(nn.Module):
    """Multiply inputs by parameters that belong to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weights = nn.Parameter(torch.tensor(1.3)), nn.ParameterList([torch.randn(6, 3)] * 2)
        self.row = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the model, ``(B, CLASSES)``."""
        return (x * self.row) @ self.weights[0] * self.scale + torch.sin(x) @ self.weights[1]


class Lora(nn.Module):
    """A frozen affine map and a trained product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = linear(6, 6).requires_grad_(False), linear(6, 2, bias=False), linear(2, 6)
        self.out = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the model, ``(B, CLASSES)``."""
        return self.out(torch.tanh(self.base(x) + self.up(self.down(x))))


class Conv1D(nn.Module):
    """The affine map of GPT-2: its weight is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.3 * torch.randn(6, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the affine map of the inputs."""
        return torch.addmm(self.bias, x.view(-1, 6), self.weight).view(*x.shape[:-1], 4)


def grow(x: torch.Tensor) -> torch.Tensor:
    x += 1
    return x


def until_small(x: torch.Tensor) -> torch.Tensor:
    """Divide an input by 2 until it is small, with control flow that depends on values."""
    return x if float(x.abs().max()) < 1 else until_small(x / 2)


half = nn.utils.parametrizations.weight_norm
FLOATS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "linear, no bias": lambda: linear(bias=False),
    "mlp": lambda: around(nn.Tanh()),
    "in place": lambda: around(nn.ReLU(inplace=True)),
    "view": lambda: Net(
        lambda s, x: s.out(s.inner(x.view(x.size(0), 3, 2)).mean(1)), inner=linear(2, 4), out=linear(4)
    ),
    "shape": lambda: Net(lambda s, x: s.out(x.reshape(x.shape[0], -1)), out=linear()),
    "positions": lambda: nn.Sequential(nn.Unflatten(1, (3, 2)), linear(2, 4), nn.Tanh(), nn.Flatten(), linear(12)),
    "rows in the batch": lambda: Net(
        lambda s, x: s.out(torch.tanh(s.inner(x.reshape(-1, 2))).reshape(len(x), 3, 4).mean(1)),
        inner=linear(2, 4),
        out=linear(4),
    ),
    "time first": lambda: Net(
        lambda s, x: s.out(torch.tanh(s.inner(x.t()[..., None])).mean(0)), inner=linear(1, 4), out=linear(4)
    ),
    "twice": lambda: Net(lambda s, x: s.out(torch.tanh(s.a(torch.tanh(s.a(x))))), a=linear(6, 6), out=linear()),
    "unused": lambda: Net(lambda s, x: s.out(x), out=linear(), other=linear()),
    "functional": lambda: Net(
        lambda s, x: s.out(torch.tanh(F.linear(x, s.a.weight, s.a.bias))), a=linear(6, 6), out=linear()
    ),
    "module and functional": lambda: Net(
        lambda s, x: s.out(torch.tanh(s.a(x)) + F.linear(x, s.a.weight)), a=linear(6, 6), out=linear()
    ),
    "tied transpose": lambda: Net(
        lambda s, x: s.out(F.linear(torch.tanh(s.a(x)), s.a.weight.t())), a=linear(6, 5, bias=False), out=linear()
    ),
    "own parameters": Factors,
    "lora": Lora,
    "transposed weight": lambda: Net(lambda s, x: s.out(torch.tanh(s.a(x))), a=Conv1D(), out=linear(4)),
    "control flow": lambda: Net(lambda s, x: s.out(torch.stack([until_small(row) for row in x])), out=linear()),
    "changes its input": lambda: Net(lambda s, x: s.out(grow(s.a(x))), a=linear(6, 6), out=linear()),
    "buffer of zeros": lambda: Net(
        lambda s, x: s.out(torch.zeros(len(x), 6).index_copy_(1, torch.tensor([0, 1]), s.a(x))),
        a=linear(6, 2),
        out=linear(),
    ),
    "hook": lambda: with_hook(net := around(nn.Tanh()), net[0], lambda m, i, o: 2 * o + i[0].sum(1, keepdim=True)),
    "weight norm": lambda: nn.Sequential(half(linear(6, 8)), nn.Tanh(), linear(8)),
    "old weight norm": lambda: nn.Sequential(nn.utils.weight_norm(linear(6, 8)), nn.Tanh(), linear(8)),
    "prelu": lambda: around(nn.PReLU()),
    "bilinear": lambda: Net(lambda s, x: s.a(x, torch.tanh(x)), a=nn.Bilinear(6, 6, CLASSES)),
    "layer norm": lambda: around(nn.LayerNorm(8)),
    "rms norm": lambda: around(nn.RMSNorm(8)),
    "group norm": lambda: around(nn.GroupNorm(2, 8)),
    "instance norm": lambda: image(nn.Sequential(nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True))),
    "local response": lambda: image(nn.Sequential(nn.Conv2d(2, 4, 2), nn.LocalResponseNorm(2))),
    "conv 1d": lambda: image(nn.Conv1d(2, 4, 3, stride=2), 1),
    "conv 1d circular": lambda: image(nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), 1),
    "conv 2d": lambda: image(nn.Conv2d(2, 4, 2, padding=1)),
    "conv 2d same": lambda: image(nn.Conv2d(2, 4, 3, padding="same")),
    "conv 2d groups": lambda: image(nn.Conv2d(2, 4, 2, groups=2, dilation=2, padding=1)),
    "conv 2d reflect": lambda: image(nn.Conv2d(2, 4, 2, padding=1, padding_mode="reflect")),
    "conv 2d replicate": lambda: image(nn.Conv2d(2, 4, 2, padding=1, padding_mode="replicate")),
    "conv 3d": lambda: image(nn.Conv3d(2, 3, (1, 2, 2)), 3),
    "transposed conv": lambda: image(nn.ConvTranspose2d(2, 3, 2, stride=2)),
    "conv without batch": lambda: Net(
        lambda s, x: s.out(torch.stack([s.a(row.view(2, 4, 3)).flatten() for row in x])),
        a=nn.Conv2d(2, 3, 2),
        out=linear(18),
    ),
    "max pool": lambda: image(nn.Sequential(nn.Conv2d(2, 4, 2), nn.MaxPool2d(2))),
    "rnn": lambda: recurrent(nn.RNN),
    "gru": lambda: recurrent(nn.GRU),
    "lstm": lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "gru, two directions": lambda: recurrent(nn.GRU, num_layers=2, bidirectional=True),
    "time first gru": lambda: time_first(nn.GRU),
    "time first lstm": lambda: time_first(nn.LSTM),
    "gru cell": lambda: Net(lambda s, x: s.out(s.a(x, torch.zeros(len(x), 4))), a=nn.GRUCell(6, 4), out=linear(4)),
    "attention": attention,
    "encoder layer": encoder,
}
RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: around(nn.Tanh(), nn.Dropout(0.5)),
    "dropout in place": lambda: around(nn.Dropout(0.5, inplace=True)),
    "functional dropout": lambda: Net(lambda s, x: s.out(F.dropout(s.a(x), 0.4)), a=linear(6, 6), out=linear()),
    "alpha dropout": lambda: around(nn.AlphaDropout(0.3)),
    "feature alpha dropout": lambda: image(nn.Sequential(nn.Conv2d(2, 4, 2), nn.FeatureAlphaDropout(0.3))),
    "dropout 1d": lambda: image(nn.Sequential(nn.Conv1d(2, 4, 2), nn.Dropout1d(0.5)), 1),
    "dropout 2d": lambda: image(nn.Sequential(nn.Conv2d(2, 4, 2), nn.Dropout2d(0.5))),
    "dropout in rows": lambda: Net(
        lambda s, x: s.out(F.dropout(s.inner(x.reshape(-1, 2)), 0.5).reshape(len(x), 3, 4).mean(1)),
        inner=linear(2, 4),
        out=linear(4),
    ),
    "dropout, time first": lambda: Net(
        lambda s, x: s.out(F.dropout(torch.tanh(s.a(x.t()[..., None])), 0.5).mean(0)), a=linear(1, 4), out=linear(4)
    ),
    "rrelu": lambda: around(nn.RReLU()),
    "encoder dropout": lambda: encoder(0.2),
    "gru dropout": lambda: recurrent(nn.GRU, num_layers=2, dropout=0.4),
    "lstm dropout": lambda: recurrent(nn.LSTM, num_layers=2, dropout=0.4),
    **{
        f"noise {how}": lambda how=how: around(Noise(how))
        for how in ("randn", "randn_like", "rand", "normal", "gumbel", "randint", "distribution")
    },
}
INTEGERS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: tokens(lambda s, x: s.out(s.embed(x).mean(1))),
    "padding": lambda: tokens(lambda s, x: s.out(s.embed(x).mean(1)), embed=nn.Embedding(TOKENS, 4, padding_idx=0)),
    "sparse": lambda: tokens(lambda s, x: s.out(s.embed(x).mean(1)), embed=nn.Embedding(TOKENS, 4, sparse=True)),
    "by frequency": lambda: tokens(
        lambda s, x: s.out(s.embed(x).mean(1)), embed=nn.Embedding(TOKENS, 4, scale_grad_by_freq=True)
    ),
    "bag": lambda: tokens(lambda s, x: s.out(s.embed(x)), embed=nn.EmbeddingBag(TOKENS, 4)),
    "bag of sums": lambda: tokens(lambda s, x: s.out(s.embed(x)), embed=nn.EmbeddingBag(TOKENS, 4, mode="sum")),
    "tied": lambda: tokens(
        lambda s, x: F.linear(torch.tanh(s.hidden(s.embed(x).mean(1))), s.embed.weight)[:, :CLASSES],
        hidden=linear(4, 4),
        out=nn.Identity(),
    ),
    "learned positions": lambda: tokens(
        lambda s, x: s.out((s.embed(x) * s.place(torch.arange(x.shape[1]))).mean(1)), place=nn.Embedding(9, 4)
    ),
    "learned positions, row": lambda: tokens(
        lambda s, x: s.out((s.embed(x) * s.place(torch.arange(x.shape[1])[None])).mean(1)), place=nn.Embedding(9, 4)
    ),
    "token by token": lambda: tokens(lambda s, x: s.out(s.embed(x.flatten()).view(*x.shape, 4).mean(1))),
    "text gru": lambda: tokens(lambda s, x: s.out(s.cell(s.embed(x))[0][:, -1]), cell=nn.GRU(4, 4, batch_first=True)),
    "text dropout": lambda: tokens(lambda s, x: s.out(F.dropout(s.embed(x), 0.3).mean(1))),
}
MIXING: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: around(nn.BatchNorm1d(8, affine=False, track_running_stats=False)),
    "sync batch norm": lambda: around(nn.SyncBatchNorm(8, track_running_stats=False)),
    "functional batch norm": lambda: Net(
        lambda s, x: s.out(F.batch_norm(s.a(x), None, None, training=True)), a=linear(6, 6), out=linear()
    ),
    "centred": lambda: Net(lambda s, x: s.out((h := s.a(x)) - h.mean(0)), a=linear(6, 6), out=linear()),
    "centred, no gradient": lambda: Net(
        lambda s, x: s.out((h := s.a(x)) - h.detach().mean(0)), a=linear(6, 6), out=linear()
    ),
    "zero branch": lambda: Net(
        lambda s, x: s.out(x) + s.gate(x.mean(0, keepdim=True)),
        out=linear(),
        gate=nn.Linear(6, CLASSES).requires_grad_(True),
    ),
    "large values": lambda: Net(lambda s, x: s.out(F.relu(x.abs() - 8).mean(0) + x), out=linear()),
    "softmax of the batch": lambda: Net(lambda s, x: s.out(x).softmax(0), out=linear()),
    "attention over the batch": lambda: Net(
        lambda s, x: s.out(s.a(h := x.view(len(x), 3, 2), h, h)[0].flatten(1)),
        a=nn.MultiheadAttention(2, 1),
        out=linear(),
    ),
    "mixup": lambda: Net(lambda s, x: s.out(0.7 * x + 0.3 * x[torch.randperm(len(x))]), out=linear()),
    "mixup at times": lambda: Net(
        lambda s, x: s.out(x + x[torch.randperm(len(x))] if float(torch.rand(1)) < 0.3 else x), out=linear()
    ),
    "cumulative": lambda: Net(lambda s, x: s.out(x.cumsum(0)), out=linear()),
    "gradient hook": lambda: Net(lambda s, x: s.out(centred_gradient(s.a(x))), a=linear(6, 6), out=linear()),
}


def centred_gradient(hidden: torch.Tensor) -> torch.Tensor:
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: gradient - gradient.mean(0))
    return hidden


class Counter(nn.Module):
    """Write state in a forward pass."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.out, self.calls, self.last = how, linear(), 0, torch.zeros(6)
        self.register_buffer("count", torch.zeros(6, dtype=torch.int64) if how == "counter" else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs, and change the module."""
        if self.how == "counter":
            self.count += 1
        if self.how == "attribute":
            self.calls += 1
        if self.how == "memory":
            x, self.last = x + 0.1 * self.last, x[-1].detach()
        if self.how == "weight":
            self.out.weight.data.mul_(0.9)
        return self.out(x)


WRITES_STATE: dict[str, Callable[[], nn.Module]] = {
    **{how: lambda how=how: Counter(how) for how in ("counter", "attribute", "memory", "weight")},
    "spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(linear(6, 4)), linear(4)),
    "spectral parametrization": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(linear(6, 4)), linear(4)),
}


def cross_entropy(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, y, reduction="none")


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross entropy": cross_entropy,
    "label smoothing": lambda o, y: F.cross_entropy(o, y, reduction="none", label_smoothing=0.1),
    "class weights": lambda o, y: F.cross_entropy(o, y, reduction="none", weight=torch.tensor([0.2, 1.0, 3.0])),
    "squared error": lambda o, y: ((o - F.one_hot(y, CLASSES)) ** 2).mean(1),
    "hinge": lambda o, y: F.multi_margin_loss(o, y, reduction="none"),
    "huber": lambda o, y: F.huber_loss(o[:, 0], y.float(), reduction="none"),
    "focal": lambda o, y: (1 - o.softmax(1).gather(1, y[:, None])[:, 0]) ** 2 * cross_entropy(o, y),
    "poisson": lambda o, y: F.poisson_nll_loss(o[:, 0], y.float(), reduction="none"),
    "with penalty": lambda o, y: cross_entropy(o, y) + 0.1 * o.square().sum(1),
    "control flow": lambda o, y: torch.stack(
        [a[b] if float(a[b]) > 0 else 2 * a[b] for a, b in zip(o, y, strict=True)]
    ),
}
COUPLED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cox": lambda o, y: o[:, 0].logcumsumexp(0) - o[:, 0],
    "contrastive": lambda o, y: F.cross_entropy(o @ o.t(), torch.arange(len(o)), reduction="none"),
    "centred": lambda o, y: (o[:, 0] - o[:, 0].mean() - y) ** 2,
    "mean": lambda o, y: F.cross_entropy(o, y),
    "normalized": lambda o, y: cross_entropy(o, y) / len(y),
    "weighted": lambda o, y: cross_entropy(o, y) / torch.bincount(y, minlength=CLASSES)[y],
}
