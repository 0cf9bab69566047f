"""DP-SGD with torch: each example trains alone, in many models and losses, or the model is refused by name."""

import zlib

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch_models import (  # noqa: E402
    COUPLED,
    FLOATS,
    INTEGERS,
    LOSSES,
    MIXING,
    RANDOM,
    TOKENS,
    WRITES_STATE,
    cross_entropy,
    linear,
)

from fedlearn import SettingError  # noqa: E402
from fedlearn.trainers.example_keys import content_keys  # noqa: E402
from fedlearn.trainers.torch.dp_sgd import ClippedGradient  # noqa: E402
from fedlearn.trainers.torch.example_draws import ExampleDraws  # noqa: E402

B = 8
MODELS = {**FLOATS, **RANDOM, **INTEGERS}
FAST = (
    *("linear", "rows in the batch", "time first", "tied transpose", "own parameters", "control flow", "hook", "gru"),
    *("conv 2d reflect", "encoder layer", "dropout", "dropout in rows", "rrelu", "encoder dropout", "gru dropout"),
    *("noise randn", "noise normal", "embedding", "by frequency", "bag", "learned positions"),
)


def fast(names, chosen):
    return [pytest.param(name, marks=[] if name in chosen else [pytest.mark.slow]) for name in names]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(name):
    torch.manual_seed(1)
    return {**MODELS, **MIXING, **WRITES_STATE}[name]().train()


def batch(name):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.integers(0, TOKENS, (B, 5)) if name in INTEGERS else 1.5 * rng.normal(size=(B, 12 if "conv" in name else 6))
    if name in FLOATS or name in RANDOM:
        width = 24 if any(part in name for part in IMAGES_2D) else 24 if "1d" in name or "3d" in name else 6
        x = 1.5 * rng.normal(size=(B, width))
    x = torch.from_numpy(x if name in INTEGERS else x.astype(np.float32))
    return x, torch.from_numpy(rng.integers(0, 3, B))


IMAGES_2D = ("conv", "instance", "local", "max pool", "dropout 2d", "feature alpha")


def flat(tensors):
    return torch.cat([(t.to_dense() if t.is_sparse else t).flatten() for t in tensors]).double()


def loop(module, loss, leaves, x, y):
    """Return the gradient of each example alone, ``(B, D)``."""
    rows = []
    for i in range(len(y)):
        value = loss(module(x[i : i + 1]), y[i : i + 1]).sum()
        rows.append(flat(torch.autograd.grad(value, leaves, materialize_grads=True)))
    return torch.stack(rows)


def clipped_sum(gradients, clip):
    norms = gradients.norm(dim=1, keepdim=True)
    return (gradients * (clip / norms.clamp(min=clip))).sum(0)


def moved(clipped, x, y, keys):
    """Return the largest movement of the sum by one removed example, in units of the clip norm."""
    whole = flat(clipped(x, y, keys_B=keys)[0])
    rows = [torch.arange(len(y)) != i for i in range(len(y))]
    others = [flat(clipped(x[keep], y[keep], keys_B=None if keys is None else keys[keep])[0]) for keep in rows]
    return max(float((whole - other).norm()) for other in others) / clipped.clip


def keys_of(x, y):
    return torch.from_numpy(content_keys(x.numpy(), y.numpy(), b"secret").view(np.int64))


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", fast({**FLOATS, **INTEGERS}, FAST))
def test_the_sum_is_the_sum_of_gradients_of_single_examples(name):
    if name == "text dropout":
        pytest.skip("draws random numbers")
    module, (x, y) = build(name), batch(name)
    leaves = trained(module)
    gradients = loop(module, cross_entropy, leaves, x, y)
    for clip in (0.3 * float(gradients.norm(dim=1).median()), float(gradients.norm(dim=1).median()), 1e6):
        clipped = ClippedGradient(module, cross_entropy, leaves, clip=clip)
        expected = clipped_sum(gradients, clip)
        assert (flat(clipped(x, y)[0]) - expected).abs().max() < 1e-4 * max(expected.abs().max(), 1e-3)


@pytest.mark.parametrize("name", fast(MODELS, FAST))
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(name):
    module, (x, y) = build(name), batch(name)
    clipped = ClippedGradient(module, cross_entropy, trained(module), clip=0.01)
    assert moved(clipped, x, y, keys_of(x, y)) <= 1 + 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_single_examples_are_bounded_and_exact(name):
    module, (x, y), loss = build("mlp"), batch("mlp"), LOSSES[name]
    leaves = trained(module)
    gradients = loop(module, loss, leaves, x, y)
    clipped = ClippedGradient(module, loss, leaves, clip=float(gradients.norm(dim=1).median()))
    expected = clipped_sum(gradients, clipped.clip)
    sums, loss_B = clipped(x, y)
    assert (flat(sums) - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert torch.allclose(loss_B, loss(module(x), y), atol=1e-5)
    assert moved(clipped, x, y, None) <= 1 + 1e-4


@pytest.mark.parametrize("name", fast(MIXING, (*list(MIXING)[:1], "centred", "zero branch", "large values", "mixup")))
def test_a_model_that_mixes_examples_is_refused(name):
    module, (x, y) = build(name), batch(name)
    with pytest.raises(SettingError, match=r"mixes the examples|statistics of the batch|depend on each|a batch of 1"):
        ClippedGradient(module, cross_entropy, trained(module), clip=1.0)(x, y)


def test_the_refusal_names_the_module_that_mixes():
    module = torch.nn.Sequential()
    module.add_module("deep", torch.nn.Sequential(linear(6, 6), MIXING["centred"](), linear(3)))
    clipped = ClippedGradient(module, cross_entropy, trained(module), clip=1.0)
    with pytest.raises(SettingError, match=r"deep\.1 \(Net\) mixes the examples of a batch"):
        clipped(*batch("mlp"))


@pytest.mark.parametrize("name", WRITES_STATE)
def test_a_forward_pass_that_changes_the_model_is_refused(name):
    module, (x, y) = build(name), batch("mlp")
    with pytest.raises(SettingError, match="a forward pass changes"):
        ClippedGradient(module, cross_entropy, trained(module), clip=1.0)(x, y)


def test_a_later_batch_that_changes_a_buffer_is_refused():
    class Rare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = linear()
            self.register_buffer("seen", torch.zeros(6), persistent=False)

        def forward(self, x):
            if float(x.abs().max()) > 1e4:
                self.seen += x.sum(0)
            return self.out(x + self.seen)

    module, (x, y) = Rare(), batch("mlp")
    clipped = ClippedGradient(module, cross_entropy, trained(module), clip=1.0)
    clipped(x, y)
    x[0] = 1e5
    with pytest.raises(SettingError, match="a forward pass changes a buffer"):
        clipped(x, y)


def test_a_table_of_rows_and_of_columns_gets_valid_row_numbers():
    class Columns(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.few, self.many, self.out = torch.nn.Embedding(2, 4), torch.nn.Embedding(90, 4), linear(4)

        def forward(self, x):
            return self.out(self.few(x[:, 0].long()) * self.many(x[:, 1].long()))

    module = Columns()
    x = torch.stack([torch.arange(B) % 2, 11 * torch.arange(B)], 1)
    for inputs in (x, x.float()):
        for synthetic in (False, True):
            clipped = ClippedGradient(module, cross_entropy, trained(module), clip=1.0)
            clipped.prepare(inputs, torch.arange(B) % 3, synthetic=synthetic)
            assert clipped.method in ("vmap", "gradients")


@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_max_norm_is_refused_by_name(kind):
    module = torch.nn.Sequential(kind(TOKENS, 4, max_norm=1.0), torch.nn.Flatten(), torch.nn.LazyLinear(3))
    x, y = batch("embedding")
    module(x)
    with pytest.raises(SettingError, match=r"0 \(Embedding(Bag)?\) has max_norm"):
        ClippedGradient(module, cross_entropy, trained(module), clip=1.0)(x, y)


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_examples_is_refused(name):
    module, (x, y) = build("mlp"), batch("mlp")
    with pytest.raises(SettingError, match=r"losses of the examples depend|the loss has the shape"):
        ClippedGradient(module, COUPLED[name], trained(module), clip=1.0)(x, y)


@pytest.mark.parametrize("source", ["python", "numpy", "own generator"])
def test_draws_outside_torchs_generator_are_refused(source):
    import random

    class Jitter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.generator = linear(), torch.Generator().manual_seed(0)

        def forward(self, x):
            if source == "python":
                return self.out(x * (1 + random.random()))
            if source == "numpy":
                return self.out(x * (1 + np.random.rand()))  # noqa: NPY002
            return self.out(x + torch.randn(x.shape, generator=self.generator))

    module, (x, y) = Jitter(), batch("mlp")
    with pytest.raises(SettingError, match="draws random numbers outside torch's generator"):
        ClippedGradient(module, cross_entropy, trained(module), clip=1.0)(x, y)


@pytest.mark.parametrize("name", fast(RANDOM, ("dropout", "rrelu", "noise randn")))
def test_draws_of_an_example_depend_on_its_key_and_on_nothing_else(name):
    module, (x, y) = build(name), batch(name)
    clipped, keys = ClippedGradient(module, cross_entropy, trained(module), clip=1e6), keys_of(x, y)
    whole, order = flat(clipped(x, y, keys_B=keys)[0]), torch.arange(B - 1, -1, -1)
    assert (whole - flat(clipped(x[order], y[order], keys_B=keys[order])[0])).abs().max() < 1e-4 * whole.abs().max()
    alone = sum(flat(clipped(x[i : i + 1], y[i : i + 1], keys_B=keys[i : i + 1])[0]) for i in range(B))
    assert (whole - alone).abs().max() < 1e-4 * whole.abs().max()
    other = flat(clipped(x, y, keys_B=keys, start=1 << 40)[0])
    assert (whole - other).abs().max() > 1e-3 * whole.abs().max()  # another step draws other numbers


LAWS = {
    "bernoulli": (lambda: torch.bernoulli(torch.full((B, 4000), 0.3)), 0.3, 0.21),
    "bernoulli_": (lambda: torch.empty(B, 4000).bernoulli_(0.2), 0.2, 0.16),
    "dropout": (lambda: torch.nn.functional.dropout(torch.ones(B, 4000), 0.25), 1.0, 1 / 3),
    "uniform": (lambda: torch.empty(B, 4000).uniform_(-1, 3), 1.0, 16 / 12),
    "rand": (lambda: torch.rand(B, 4000), 0.5, 1 / 12),
    "randn": (lambda: torch.randn(B, 4000), 0.0, 1.0),
    "normal": (lambda: torch.empty(B, 4000).normal_(2, 0.5), 2.0, 0.25),
    "exponential": (lambda: torch.empty(B, 4000).exponential_(2.0), 0.5, 0.25),
    "like": (lambda: torch.randn_like(torch.empty(B, 4000)), 0.0, 1.0),
}


@pytest.mark.parametrize("name", LAWS)
def test_draws_keep_their_law(name):
    draw, mean, variance = LAWS[name]
    with ExampleDraws(torch.arange(1, B + 1)):
        first, second = draw(), draw()
    assert float(first.mean()) == pytest.approx(mean, abs=4 * np.sqrt(variance / first.numel()))
    assert float(first.var()) == pytest.approx(variance, rel=0.06)
    rows = torch.cat([first, second]).double()
    assert (torch.corrcoef(rows) - torch.eye(2 * B)).abs().max() < 0.08


def test_dropout_keeps_its_law():
    module = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(400, 1, bias=False))
    x, y = torch.ones(B, 400), torch.arange(B)
    clipped = ClippedGradient(module, lambda o, y: o[:, 0], trained(module), clip=1e6)
    kept = flat(clipped(x, y, keys_B=keys_of(x, y))[0]) * 0.7  # the number of examples that keep each input
    assert float(kept.mean()) == pytest.approx(0.7 * B, rel=0.03)
    assert float(kept.var()) == pytest.approx(0.21 * B, rel=0.25)


def test_a_later_batch_may_take_another_path_through_the_code():
    class Branch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.strange = linear(), False

        def forward(self, x):
            if self.strange:
                x = torch.from_numpy(x.numpy())  # vmap refuses this
            return self.out(x)

    module, (x, y) = Branch(), batch("mlp")
    clipped = ClippedGradient(module, cross_entropy, trained(module), clip=0.01)
    first = flat(clipped(x, y)[0])
    assert clipped.method == "graph"
    assert moved(clipped, x, y, None) <= 1 + 1e-4
    clipped.method, module.strange = "vmap", True
    assert torch.allclose(first, flat(clipped(x, y)[0]), atol=1e-6)
    assert clipped.method == "loop"
