"""DP-SGD: sums of clipped gradients equal those of a plain loop, and noise has the size that the ledger charges."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fedlearn import Examples, LocalRule, LocalSettings, SettingError
from fedlearn.algorithm import plain_training
from fedlearn.core import ClientWork, Request
from fedlearn.core.layout import default_initial_parameters
from fedlearn.core.records import ExampleDP
from fedlearn.trainers.batching import poisson_plans
from strategies.fedprox import proximal

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
import optax  # noqa: E402
from flax import linen  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from fedlearn.trainers.jax import JaxTrainer  # noqa: E402
from fedlearn.trainers.jax.dp_sgd import clipped_gradient  # noqa: E402
from fedlearn.trainers.torch import TorchTrainer  # noqa: E402
from fedlearn.trainers.torch.dp_sgd import ClippedGradient  # noqa: E402
from simulations.models.basic.jax import cnn  # noqa: E402

B, CLASSES = 12, 3


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(50, 8, padding_idx=0), nn.Linear(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(self.embed(x))).mean(1))


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.linspace(0.5, 1.5, 5)), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.out(x * self.scale)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.again, self.out = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.again(torch.tanh(self.again(x)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.out(torch.tanh(self.other(torch.tanh(self.one(x)))))


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        hidden = self.first(x)
        outputs = self.out(hidden)
        hidden.mul_(2)  # after its first use
        return outputs + hidden.sum(1, keepdim=True)


def conv():
    layers = [nn.Conv2d(2, 6, 3, padding=1, stride=2), nn.GroupNorm(2, 6), nn.ELU(), nn.Conv2d(6, 40, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LayerNorm(160), nn.Linear(160, CLASSES))


TORCH = {
    "mlp, in place": lambda: nn.Sequential(nn.Linear(20, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES)),
    "no bias": lambda: nn.Sequential(nn.Linear(20, 16, bias=False), nn.Tanh(), nn.Linear(16, CLASSES)),
    "positions": lambda: nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4), nn.Flatten(), nn.Linear(28, 3)),
    "conv": conv,
    "grouped conv": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(144, CLASSES)),
    "same conv": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.Flatten(), nn.Linear(256, CLASSES)),
    "text": Text,
    "own parameter": OwnParameter,
    "twice": Twice,
    "tied": Tied,
}
SHAPES = {"positions": (7, 20), "conv": (2, 8, 8), "grouped conv": (2, 8, 8), "same conv": (2, 8, 8)}
WHOLE = ("own parameter", "twice", "tied")  # differentiated example by example
METHODS = dict.fromkeys(WHOLE, "gradients")


def torch_batch(name):
    rng = np.random.default_rng(0)
    if name == "text":
        x = torch.from_numpy(rng.integers(0, 50, (B, 9)))
    else:
        shape = SHAPES.get(name, (5,) if name in WHOLE else (20,))
        x = torch.from_numpy(rng.normal(size=(B, *shape)).astype(np.float32))
    return x, torch.from_numpy(rng.integers(0, CLASSES, B))


def losses(outputs, y):
    return F.cross_entropy(outputs, y, reduction="none")


@pytest.mark.parametrize("clip", [0.05, 0.7, 100.0])
@pytest.mark.parametrize("name", TORCH)
def test_the_sum_in_torch_is_that_of_gradients_clipped_one_by_one(name, clip):
    torch.manual_seed(1)
    module = TORCH[name]()
    leaves, (x, y) = list(module.parameters()), torch_batch(name)
    clipped = ClippedGradient(module, losses, leaves, clip=clip)
    sums, loss_B = clipped(x, y)
    expected = [torch.zeros_like(leaf) for leaf in leaves]
    for i in range(B):
        item = torch.autograd.grad(losses(module(x[i : i + 1]), y[i : i + 1]).sum(), leaves)
        norm = torch.sqrt(sum(g.square().sum() for g in item))
        for total, g in zip(expected, item, strict=True):
            total += g * min(1.0, clip / float(norm))
    assert clipped.method == METHODS.get(name, "graph")
    assert torch.allclose(loss_B, losses(module(x), y), atol=1e-6)
    # otherwise the graphs of a client's steps would accumulate in memory
    assert not any(current.requires_grad for current in [*sums, loss_B])
    for total, current in zip(expected, sums, strict=True):
        assert (total - current).abs().max() < 1e-6 * max(1.0, float(total.abs().max()))


def test_a_model_that_autograd_refuses_is_refused_here_too():
    module, (x, y) = ChangesItsInput(), torch_batch("own parameter")
    with pytest.raises(SettingError, match=r"in-?place"):
        ClippedGradient(module, losses, list(module.parameters()), clip=1.0)(x, y)


class FlaxText(linen.Module):
    @linen.compact
    def __call__(self, x):
        hidden = linen.relu(linen.Dense(16)(linen.Embed(50, 8)(x)))
        return linen.Dense(CLASSES)(hidden.mean(1))


class FlaxConv(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.elu(linen.GroupNorm(2)(linen.Conv(6, (3, 3))(x)))
        return linen.Dense(CLASSES)(linen.LayerNorm()(x.reshape(len(x), -1)))


class FlaxRnn(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(CLASSES)(linen.RNN(linen.GRUCell(6))(x)[:, -1])


class FlaxTwice(linen.Module):
    @linen.compact
    def __call__(self, x):
        again = linen.Dense(x.shape[-1])
        return linen.Dense(CLASSES)(linen.tanh(again(linen.tanh(again(x)))))


class FlaxTied(linen.Module):
    @linen.compact
    def __call__(self, x):
        table = linen.Embed(50, 8)
        return table.attend(linen.Dense(8)(table(x).mean(1)))[:, :CLASSES]


FLAX = {
    "dense": (lambda: linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(CLASSES, use_bias=False)]), (20,)),
    "positions": (lambda: linen.Sequential([linen.Dense(9), linen.tanh, lambda x: x.mean(1), linen.Dense(3)]), (7, 20)),
    "our cnn": (lambda: cnn((8, 8, 2), CLASSES), (8, 8, 2)),
    "conv": (FlaxConv, (8, 8, 2)),
    "text": (FlaxText, (9,)),
    "rnn": (FlaxRnn, (7, 4)),
    "twice": (FlaxTwice, (5,)),
    "tied": (FlaxTied, (9,)),
}


LONG_TO_COMPILE = ("positions", "our cnn", "conv", "rnn", "twice")
CLIPS = [pytest.param(clip, marks=[] if clip == 0.7 else [pytest.mark.slow]) for clip in (0.05, 0.7, 100.0)]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG_TO_COMPILE else []) for name in FLAX]
)
def test_the_sum_in_jax_is_that_of_gradients_clipped_one_by_one(name, clip):
    build, shape = FLAX[name]
    module, rng = build(), np.random.default_rng(0)
    x = (
        rng.integers(0, 50, (B, *shape))
        if name in ("text", "tied")
        else rng.normal(size=(B, *shape)).astype(np.float32)
    )
    y, real = rng.integers(0, CLASSES, B), np.arange(B) < B - 2
    params = module.init(jax.random.key(0), x)["params"]

    def loss_of(params, x, y, key):
        return optax.softmax_cross_entropy_with_integer_labels(module.apply({"params": params}, x), y)

    key = jax.random.key(1)
    sums, loss = clipped_gradient(loss_of, clip=clip)(params, x, y, real, key)
    expected = jax.tree.map(np.zeros_like, params)
    for i in np.flatnonzero(real):
        item = jax.grad(lambda p, i=i: loss_of(p, x[i : i + 1], y[i : i + 1], key).sum())(params)
        norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(item)))
        expected = jax.tree.map(lambda total, g, norm=norm: total + g * min(1.0, clip / norm), expected, item)
    assert float(loss) == pytest.approx(float(loss_of(params, x, y, key)[real].sum()), rel=1e-5)
    for total, current in zip(jax.tree.leaves(expected), jax.tree.leaves(sums), strict=True):
        assert np.abs(total - current).max() < 1e-6 * max(1.0, float(np.abs(total).max()))


def trainer(framework, sizes=(20, 8, CLASSES)):
    if framework == "torch":
        module = nn.Sequential(*[nn.Linear(sizes[0], sizes[1]), nn.ELU(), nn.Linear(sizes[1], sizes[2])])
        return TorchTrainer(module, task="multiclass", initial=default_initial_parameters)
    module = linen.Sequential([linen.Dense(sizes[1]), linen.elu, linen.Dense(sizes[2])])
    return JaxTrainer(module, task="multiclass", input_shape=(sizes[0],))


def examples(num=50, features=20, seed=0):
    rng = np.random.default_rng(seed)
    return Examples(rng.normal(size=(num, features)).astype(np.float32), rng.integers(0, CLASSES, num))


def order(built, *, clip=1.0, noise_multiplier=1.0, round=1, deployed=False, **local):
    dp = ExampleDP(clip=clip, noise_multiplier=noise_multiplier)
    settings = LocalSettings(**{"batch_size": 16, "learning_rate": 0.1, "example_dp": dp, **local})
    return Request(round=round, seed=1, params_D=built.init(1), local=settings, deployed=deployed)


def fitted(built, asked, clients=(0,), data=None, rule=plain_training):
    work = [ClientWork(client=c, examples=data or examples(seed=c)) for c in clients]
    return np.asarray(built.fit(asked, rule, work).delta_KD)


PASSES = {"epochs": 2}


@pytest.mark.parametrize(
    "settings",
    [PASSES, {**PASSES, "momentum": 0.9, "weight_decay": 0.1}, {**PASSES, "optimizer": "adamw"}, {"steps": 9}],
)
def test_torch_and_jax_train_alike_without_noise(settings):
    item, other = (
        fitted(built, order(built, noise_multiplier=0.0, **settings), clients=(0, 1, 2))
        for built in (trainer("torch"), trainer("jax"))
    )
    assert np.abs(item).max() > 1e-3
    assert np.abs(item - other).max() < (1e-4 if "optimizer" in settings else 1e-6)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_noise_has_the_standard_deviation_that_is_accounted_for(framework):
    built = trainer(framework, (1000, 100, CLASSES))
    asked = order(built, clip=2.0, noise_multiplier=1.5, steps=1, learning_rate=1.0)
    without_noise = replace(asked, local=replace(asked.local, example_dp=ExampleDP(clip=2.0, noise_multiplier=0.0)))
    data = examples(features=1000)
    noise = fitted(built, asked, data=data) - fitted(built, without_noise, data=data)
    assert noise.size > 1e5
    assert noise.std() == pytest.approx(2.0 * 1.5 / 16, rel=0.02)  # divided by the expected batch
    assert abs(noise.mean()) < 5 * noise.std() / np.sqrt(noise.size)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_noise_is_fresh_for_each_client_round_and_step(framework):
    built, data = trainer(framework), examples()
    first = order(built, learning_rate=1.0, steps=1)
    rounds = [fitted(built, replace(first, round=number), (0, 1), data) for number in (1, 2)]
    two = fitted(built, replace(first, local=replace(first.local, steps=2)), (0,), data)[0] - rounds[0][0]
    drawn = [rounds[0][0], rounds[0][1], rounds[1][0], rounds[1][1], two]
    correlations = np.corrcoef(np.stack(drawn))[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < 0.5
    assert np.array_equal(fitted(built, first, (0, 1), data), rounds[0])


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_client_trains_the_same_alone_in_a_block_and_together(framework):
    built = trainer(framework)
    asked = order(built, epochs=2)
    block = fitted(built.with_batching("map"), asked, (0, 1, 2, 3, 4))
    together = fitted(built.with_batching("vmap"), asked, (0, 1, 2, 3, 4))
    alone = np.concatenate([fitted(built.with_batching("map"), asked, (client,)) for client in range(5)])
    assert np.abs(block - alone).max() <= (0 if framework == "torch" else 1e-6)
    assert np.abs(block - together).max() < 1e-5


@pytest.mark.parametrize("batching", ["map", "vmap"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_an_example_of_any_value_moves_a_step_by_no_more_than_the_clip(framework, batching, poison):
    built, data = trainer(framework).with_batching(batching), examples(num=16)
    asked = order(built, clip=0.5, noise_multiplier=0.0, steps=1, learning_rate=1.0)  # rate 1: all examples are drawn
    spoilt = Examples(data.x.copy(), data.y)
    spoilt.x[3] = poison
    moved = fitted(built, asked, data=spoilt) - fitted(built, asked, data=data)
    assert np.isfinite(moved).all()
    assert 0 < np.linalg.norm(moved) <= 2 * 0.5 / 16 * (1 + 1e-4)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_an_empty_batch_is_noised_and_counted(framework):
    built, asked = trainer(framework), None
    asked = order(built, batch_size=1, steps=12, learning_rate=1.0)
    data = examples(num=40)
    plan_KSB, steps_K = poisson_plans(asked, np.array([0]), np.array([40]))
    empty = (plan_KSB[0] < 0).all(axis=1)
    assert 1 <= empty.sum() < 12
    assert steps_K.tolist() == [12]
    longer = [fitted(built, replace(asked, local=replace(asked.local, steps=s)), data=data)[0] for s in range(1, 13)]
    strides = [np.linalg.norm(after - before) for before, after in pairwise([np.zeros_like(longer[0]), *longer])]
    assert min(strides) > 0.5 * np.sqrt(longer[0].size)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_what_a_rule_adds_to_a_gradient_is_not_clipped(framework):
    # two steps: the proximal term pulls the second one back by exactly mu times the first
    built, data = trainer(framework), examples(num=16)
    asked = order(built, clip=0.1, noise_multiplier=0.0, steps=1, learning_rate=1.0)
    two = replace(asked, local=replace(asked.local, steps=2))
    once, free = fitted(built, asked, data=data), fitted(built, two, data=data)
    held = fitted(built, two, data=data, rule=proximal(0.75))
    assert np.allclose(held - free, -0.75 * once, atol=1e-6)
    assert isinstance(proximal(0.75), LocalRule)


def test_poisson_batches_take_each_example_at_the_rate_and_independently():
    asked = Request(round=1, seed=1, params_D=np.zeros(1), local=LocalSettings(batch_size=20, steps=400))
    plan_KSB, steps_K = poisson_plans(asked, np.array([3, 4]), np.array([100, 10]))
    sizes_S = (plan_KSB[0] >= 0).sum(axis=1)
    assert sizes_S.mean() == pytest.approx(20, rel=0.05)
    assert sizes_S.var() == pytest.approx(100 * 0.2 * 0.8, rel=0.25)
    taken_N = np.bincount(plan_KSB[0][plan_KSB[0] >= 0], minlength=100)
    assert taken_N.std() < 1.3 * np.sqrt(400 * 0.2 * 0.8)
    assert ((plan_KSB[1] >= 0).sum(axis=1) == 10).all()  # fewer examples than a batch: each batch has all of them
    assert steps_K.tolist() == [400, 400]


def test_real_clients_draw_batches_that_do_not_follow_from_the_seed():
    asked = Request(round=1, seed=1, params_D=np.zeros(1), local=LocalSettings(batch_size=20, steps=5), deployed=True)
    item, other = (poisson_plans(asked, np.array([3]), np.array([100]))[0] for _ in range(2))
    assert item.shape != other.shape or not np.array_equal(item, other)


@pytest.mark.parametrize("batching", ["map", "vmap"])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_noise_of_real_clients_does_not_follow_from_the_seed(framework, batching):
    built, data = trainer(framework, (400, 50, CLASSES)).with_batching(batching), examples(num=16, features=400)
    asked = order(built, clip=0.01, noise_multiplier=2.0, steps=3, learning_rate=1.0, deployed=True)
    item, other = (fitted(built, asked, (0, 1), data) for _ in range(2))
    drawn = np.stack([*item, *other]) - fitted(built, replace(asked, local=without_noise(asked.local)), (0,), data)
    assert drawn.std() == pytest.approx(np.sqrt(3) * 0.01 * 2.0 / 16, rel=0.03)
    assert np.abs(np.corrcoef(drawn)[np.triu_indices(4, 1)]).max() < 0.05


def without_noise(local):
    return replace(local, example_dp=replace(local.example_dp, noise_multiplier=0.0))
