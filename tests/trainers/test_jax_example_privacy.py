"""DP-SGD in JAX: one example moves the sum by at most the clip norm, for any model, or the model is refused."""

import inspect

import numpy as np
import pytest

from fedlearn import Examples, LocalSettings, SettingError
from fedlearn.algorithm import plain_training
from fedlearn.core import ClientWork, Request
from fedlearn.core.records import ExampleDP

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import linen as nn  # noqa: E402

from fedlearn.trainers.jax import JaxTrainer  # noqa: E402
from fedlearn.trainers.jax.batch_axes import has_separate_examples  # noqa: E402
from fedlearn.trainers.jax.example_keys import example_keys  # noqa: E402

N, T, F, CLASSES, VOCABULARY = 6, 6, 4, 3, 11  # the padded batch has T examples
CLIP = 0.05


class Model(nn.Module):
    """A model from two functions: layers in front, and the whole computation."""

    build: object

    @nn.compact
    def __call__(self, x, train=False):
        return self.build(x, train)


def out(h):
    return nn.Dense(CLASSES)(h.reshape(len(h), -1))


def tokens(x):
    return (jnp.abs(x[..., 0]) * 7).astype(jnp.int32) % VOCABULARY


def embedded(x, width=4):
    return nn.Embed(VOCABULARY, width)(tokens(x))


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        again = nn.Dense(F)
        return out(again(jnp.tanh(again(x))))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        table = nn.Embed(VOCABULARY, 4)
        return table.attend(nn.Dense(4)(table(tokens(x)).mean(1)))[:, :CLASSES]


class TiedByMatrix(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        table = nn.Embed(VOCABULARY, 4)
        return (nn.Dense(4)(table(tokens(x)).mean(1)) @ table.embedding.T)[:, :CLASSES]


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        scale = self.param("scale", nn.initializers.ones, (F,))
        return out(nn.Dense(F)(x) * scale)


class Gate(nn.Module):
    @nn.compact
    def __call__(self, h):
        return h * self.param("gate", nn.initializers.ones, (h.shape[-1],))


class Noise(nn.Module):
    @nn.compact
    def __call__(self, h, train):
        scale = self.param("scale", nn.initializers.ones, ())
        return h if not train else h + 0.3 * scale * jax.random.normal(self.make_rng("noise"), h.shape)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        layer = nn.scan(
            lambda block, h, _: (jnp.tanh(block(h)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        h, _ = layer(nn.Dense(F), x, None)
        return out(h)


class Block(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, h, train):
        drop = nn.Dropout(self.dropout, deterministic=not train)
        h = h + drop(nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(h)))
        return h + nn.Dense(h.shape[-1])(nn.gelu(nn.Dense(8)(nn.LayerNorm()(h))))


def transformer(dropout):
    def build(x, train):
        h = embedded(x) + nn.Embed(T, 4)(jnp.arange(x.shape[1]))
        for _ in range(2):
            h = Block(dropout)(h, train)
        return nn.Dense(CLASSES)(nn.LayerNorm()(h).mean(1))

    return build


def lora(x, train):
    return out(nn.Dense(F)(x) + nn.Dense(F, use_bias=False)(nn.Dense(2, use_bias=False)(x)))


def dropped(rate, **options):
    def build(x, train):
        h = nn.Dropout(rate, deterministic=not train, **options)(nn.elu(nn.Dense(8)(x)))
        return out(nn.Dropout(rate, deterministic=not train)(nn.elu(nn.Dense(8)(h))))

    return build


def conv(*args, **options):
    return lambda x, train: out(nn.Conv(*args, **options)(x))


def rnn(cell, **options):
    return lambda x, train: out(nn.RNN(cell(4), **options)(x))


SEPARATE = {
    "dense": lambda x, train: out(nn.elu(nn.Dense(8)(x.reshape(len(x), -1)))),
    "dense without bias": lambda x, train: nn.Dense(CLASSES, use_bias=False)(x.reshape(len(x), -1)),
    "dense at positions": lambda x, train: nn.Dense(CLASSES)(nn.tanh(nn.Dense(8)(x)).mean(1)),
    "dense at many positions": lambda x, train: nn.Dense(CLASSES)(nn.tanh(nn.Dense(2)(x)).mean(1)),
    "dense general": lambda x, train: out(nn.DenseGeneral((2, 3), axis=(-2, -1))(x)),
    "dense general, other axis": lambda x, train: out(nn.DenseGeneral(3, axis=1)(x)),
    "einsum": lambda x, train: out(nn.Einsum((F, 3), "btf,fo->bto")(x)),
    "conv": conv(5, (3,)),
    "conv valid": conv(5, (3,), padding="VALID"),
    "conv circular": conv(5, (3,), padding="CIRCULAR"),
    "conv reflect": conv(5, (3,), padding="REFLECT"),
    "conv causal": conv(5, (3,), padding="CAUSAL"),
    "conv stride": conv(5, (2,), strides=2),
    "conv dilation": conv(5, (2,), kernel_dilation=2),
    "conv groups": conv(4, (3,), feature_group_count=2),
    "conv local": lambda x, train: out(nn.ConvLocal(3, (2,))(x)),
    "conv transpose": lambda x, train: out(nn.ConvTranspose(3, (2,), strides=(2,))(x)),
    "conv 2d": lambda x, train: out(nn.Conv(3, (2, 2))(x[..., None])),
    "embedding": lambda x, train: nn.Dense(CLASSES)(embedded(x).mean(1)),
    "embedding, tied": Tied(),
    "embedding, tied by its matrix": TiedByMatrix(),
    "negative tokens": lambda x, train: out(nn.Embed(VOCABULARY, 4)(jnp.where(x > 0, VOCABULARY - 1, -1)[..., 0])),
    "positions, arange(T)": lambda x, train: out(x + nn.Embed(T, F)(jnp.arange(x.shape[1]))),
    "positions, parameter": lambda x, train: out(Gate()(x + nn.Embed(T, F)(jnp.arange(x.shape[1]))[None])),
    "layer norm": lambda x, train: out(nn.LayerNorm()(nn.Dense(8)(x))),
    "group norm": lambda x, train: out(nn.GroupNorm(2)(nn.Dense(8)(x))),
    "rms norm": lambda x, train: out(nn.RMSNorm()(nn.Dense(8)(x))),
    "instance norm": lambda x, train: out(nn.InstanceNorm()(nn.Dense(8)(x))),
    "weight norm": lambda x, train: nn.WeightNorm(nn.Dense(CLASSES))(x.mean(1)),
    "prelu": lambda x, train: out(nn.PReLU()(nn.Dense(8)(x))),
    "simple rnn": rnn(nn.SimpleCell),
    "gru": rnn(nn.GRUCell),
    "lstm, reversed": rnn(nn.OptimizedLSTMCell, reverse=True),
    "bidirectional": lambda x, train: out(nn.Bidirectional(nn.RNN(nn.GRUCell(2)), nn.RNN(nn.GRUCell(2)))(x)),
    "time-major rnn inside": lambda x, train: out(nn.RNN(nn.GRUCell(4), time_major=True)(x.swapaxes(0, 1))[-1]),
    "attention": lambda x, train: out(nn.MultiHeadDotProductAttention(2)(x)),
    "transformer": transformer(0.0),
    "rows folded into the batch": lambda x, train: nn.Dense(CLASSES)(
        nn.tanh(nn.Dense(8)(x.reshape(-1, F))).reshape(len(x), -1, 8).mean(1)
    ),
    "all layers on folded rows": lambda x, train: nn.Dense(CLASSES)(x.reshape(-1, F)).reshape(len(x), -1, 3).mean(1),
    "time first inside": lambda x, train: nn.Dense(CLASSES)(nn.tanh(nn.Dense(8)(x.swapaxes(0, 1))).mean(0)),
    "own parameter": lambda x, train: out(Gate()(x)),
    "nested": Nested(),
    "twice": Twice(),
    "lora": lora,
    "scan": Scanned(),
    "remat": lambda x, train: out(nn.remat(nn.Dense)(8)(x)),
    "unused layer": lambda x, train: (nn.Dense(2)(x), out(x))[1],
}
DRAWING = {
    "dropout": dropped(0.5),
    "dropout of features": dropped(0.5, broadcast_dims=(1,)),
    "dropout in a transformer": transformer(0.3),
    "noise layer": lambda x, train: out(Noise()(nn.Dense(8)(x), train)),
    "noise without parameters": lambda x, train: out(
        x + 0.3 * jax.random.normal(nn.module._context.module_stack[-1].make_rng("noise"), x.shape) if train else x
    ),
}
MIXING = {
    "batch mean": (lambda x, train: (lambda h: h - h.mean(0))(out(x)), "Model"),
    "inner batch mean": (lambda x, train: out(Centred(name="centred")(x)), r"centred \(Centred\)"),
    "time-major rnn of batches": (lambda x, train: out(nn.RNN(nn.GRUCell(4), time_major=True)(x)), r"RNN_0 \(RNN\)"),
    "layer norm over the batch": (lambda x, train: out(nn.LayerNorm(reduction_axes=(0, 2))(x)), "LayerNorm_0"),
    "attention between examples": (
        lambda x, train: out(nn.MultiHeadDotProductAttention(2)(x.swapaxes(0, 1)).swapaxes(0, 1)),
        r"MultiHeadDotProductAttention_0 \(",
    ),
    "place in the batch": (lambda x, train: out(x) + jnp.arange(len(x))[:, None], "Model"),
    "number of examples": (lambda x, train: out(x) / len(x), "Model"),
    "gradient only": (lambda x, train: (lambda m: out(x) + m - jax.lax.stop_gradient(m))(out(x).mean(0)), "gradients"),
    "large inputs only": (lambda x, train: (lambda h: h - jnp.where(h > 15, h.mean(0), 0))(out(x)), "Model"),
    "mixup": (lambda x, train: out(Mixup()(x) if train else x), "Mixup"),
    "batch norm": (lambda x, train: out(nn.BatchNorm(use_running_average=not train)(x)), r"BatchNorm_0 \(BatchNorm\)"),
    "spectral norm": (
        lambda x, train: nn.SpectralNorm(nn.Dense(CLASSES))(x.mean(1), update_stats=train),
        "SpectralNorm_0",
    ),
}


class Centred(nn.Module):
    def __call__(self, x):
        return x - x.mean(0)


class Mixup(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 0.5 * x + 0.5 * jax.random.permutation(self.make_rng("dropout"), x)


def cross_entropy(outputs, y):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


def smoothed(outputs, y):
    return optax.softmax_cross_entropy(outputs, optax.smooth_labels(jax.nn.one_hot(y, CLASSES), 0.1))


def weighted(outputs, y):
    return cross_entropy(outputs, y) * jnp.array([1.0, 5.0, 0.1])[y]


def squared(outputs, y):
    return ((outputs - y[:, None]) ** 2).sum(1)


def focal(outputs, y):
    loss = cross_entropy(outputs, y)
    return (1 - jnp.exp(-loss)) ** 2 * loss


LOSSES = {"label smoothing": smoothed, "class weights": weighted, "squared": squared, "focal": focal}


def cox(outputs, y):
    risk = outputs[:, 0]
    at_risk = jnp.where(y[None] >= y[:, None], risk[None], -1e9)
    return jax.nn.logsumexp(at_risk, axis=1) - risk


COUPLED = {
    "cox": (cox, "the loss cox"),
    "mean": (lambda outputs, y: cross_entropy(outputs, y).mean(), r"returns shape \(\)"),
    "mean of the batch": (lambda outputs, y: cross_entropy(outputs, y) / len(y), "the loss"),
    "contrast": (lambda outputs, y: -jnp.diag(jax.nn.log_softmax(outputs @ outputs.T)), "the loss"),
    "normalized weights": (lambda outputs, y: (1 + y) / (1 + y).sum() * cross_entropy(outputs, y), "the loss"),
}


def data(num=N, seed=0):
    rng = np.random.default_rng(seed)
    return Examples(rng.normal(size=(num, T, F)).astype(np.float32), rng.integers(0, CLASSES, num))


def trainer_of(build, loss=cross_entropy, shape=(T, F)):
    module = build if isinstance(build, nn.Module) else Model(build)
    return JaxTrainer(module, task="multiclass", input_shape=shape, loss=loss)


def sums(trainer, parts, *, clip=CLIP, seed=1, deployed=False):
    """Return the sum of clipped gradients of each part of the examples, from one step without noise."""
    size = max(map(len, parts))
    dp = ExampleDP(clip=clip, noise_multiplier=0.0)
    local = LocalSettings(steps=1, batch_size=size, learning_rate=1.0, example_dp=dp)
    request = Request(round=1, seed=seed, params_D=start(trainer), local=local, deployed=deployed)
    work = [ClientWork(client=0, examples=part) for part in parts]
    delta_KD = np.asarray(trainer.fit(request, plain_training, work).delta_KD, np.float64)
    return -delta_KD * np.minimum(size, [[len(part)] for part in parts])


def summed(trainer, examples, **options):
    return sums(trainer, [examples], **options)[0]


def start(trainer):
    noise = np.random.default_rng(5).normal(0, 0.3, trainer.layout.num_parameters)
    return (trainer.init(1) + noise).astype(np.float32)


def brute_force(trainer, examples, clip):
    """Return the same sum from a loop over single examples, for a model without random numbers."""
    total_D, params = np.zeros(trainer.layout.num_parameters), trainer._model.unflatten(start(trainer))
    train = {"train": True} if "train" in inspect.signature(trainer.module.__call__).parameters else {}

    def loss(params, x, y):
        return trainer.loss(trainer.module.apply({"params": params}, x, **train), y)[0]

    gradient = jax.jit(jax.grad(loss))
    for n in range(len(examples)):
        grad_D = trainer._model.flatten(gradient(params, examples.x[n : n + 1], examples.y[n : n + 1]), {})
        grad_D = np.asarray(grad_D, np.float64)
        total_D += grad_D * min(1.0, clip / np.linalg.norm(grad_D))
    return total_D


def require_bounded(trainer, examples, **options):
    """Check that the sum without an example differs by at most the clip norm. Return the sum of all examples."""
    without = [np.arange(len(examples)) != n for n in range(len(examples))]
    parts = [Examples(examples.x[keep], examples.y[keep]) for keep in without]
    whole_D, *rest_ND = sums(trainer, [examples, *parts], **options)
    assert np.linalg.norm(whole_D - np.array(rest_ND), axis=1).max() <= CLIP * (1 + 1e-4)
    return whole_D


FAST = ("positions, arange(T)", "time first inside")


def sample(cases, fast):
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in cases]


@pytest.mark.parametrize("name", sample(SEPARATE, FAST))
def test_the_sum_is_that_of_a_loop_and_one_example_moves_it_by_no_more_than_the_clip(name):
    trainer, examples = trainer_of(SEPARATE[name]), data()
    expected_D = brute_force(trainer, examples, CLIP)
    assert np.abs(require_bounded(trainer, examples) - expected_D).max() <= 2e-5 * np.abs(expected_D).max()


@pytest.mark.parametrize("name", sample(SEPARATE, ()))
def test_gradients_without_clipping_are_those_of_a_loop(name):
    trainer, examples = trainer_of(SEPARATE[name]), data()
    expected_D = brute_force(trainer, examples, 1e6)
    assert np.abs(summed(trainer, examples, clip=1e6) - expected_D).max() <= 2e-5 * np.abs(expected_D).max()


@pytest.mark.parametrize("name", sample(LOSSES, ()))
def test_losses_of_users_are_clipped_as_in_a_loop(name):
    trainer, examples = trainer_of(SEPARATE["dense"], LOSSES[name]), data()
    expected_D = brute_force(trainer, examples, CLIP)
    assert np.abs(require_bounded(trainer, examples) - expected_D).max() <= 2e-5 * np.abs(expected_D).max()


@pytest.mark.parametrize("num", [T - 1, T, T + 1, 2 * T])
@pytest.mark.slow
def test_positions_do_not_depend_on_the_size_of_the_padded_batch(num):
    trainer, examples = trainer_of(SEPARATE["positions, arange(T)"]), data(num)
    expected_D = brute_force(trainer, examples, CLIP)
    assert np.abs(summed(trainer, examples) - expected_D).max() <= 2e-5 * np.abs(expected_D).max()


@pytest.mark.parametrize("name", sample(DRAWING, ("dropout",)))
def test_one_example_moves_a_model_with_random_numbers_by_no_more_than_the_clip(name):
    trainer, examples = trainer_of(DRAWING[name]), data()
    whole_D = require_bounded(trainer, examples)
    assert not np.allclose(whole_D, require_bounded(trainer, examples, seed=2), atol=1e-2 * CLIP)


@pytest.mark.parametrize("name", sample(MIXING, ("inner batch mean", "batch norm")))
def test_a_model_that_mixes_examples_is_refused_with_the_name_of_the_module(name):
    build, expected = MIXING[name]
    with pytest.raises(SettingError, match=expected) as refused:
        summed(trainer_of(build), data())
    assert len(str(refused.value).splitlines()) == 3
    assert refused.value.exit_code == 2


PROVEN = {
    "affine": lambda x: jnp.tanh(x @ jnp.ones((F, 2))),
    "attention": lambda x: jax.nn.softmax(jnp.einsum("btf,bsf->bts", x, x)) @ x,
    "time first": lambda x: x.swapaxes(0, 1).mean(0),
    "convolution": lambda x: jax.lax.conv_general_dilated(x.swapaxes(1, 2), jnp.ones((2, F, 3)), (1,), "SAME"),
    "tokens": lambda x: jnp.ones((VOCABULARY, 2))[tokens(x)],
    "scan": lambda x: jax.lax.scan(lambda h, t: (h + t, h), jnp.zeros((len(x), F)), x.swapaxes(0, 1))[0],
    "pad, slice and sort": lambda x: jnp.sort(jnp.pad(x, ((0, 0), (1, 2), (0, 0)))[:, 1:, ::2], axis=1),
    "draws": lambda x: x * jax.random.bernoulli(jax.random.key(1), 0.5, x.shape),
}
UNPROVEN = {
    "mean": lambda x: x - x.mean(0),
    "mean at positions": lambda x: x.swapaxes(0, 1) - x.mean(0)[:, None],
    "roll": lambda x: jnp.roll(x, 1, axis=0),
    "reverse": lambda x: x[::-1],
    "sort": lambda x: jnp.sort(x, axis=0),
    "cumulative sum": lambda x: jnp.cumsum(x, axis=0),
    "first example": lambda x: x + x[:1],
    "product of examples": lambda x: x + (x[:, 0] @ x[:, 0].T @ x[:, 0])[:, None],
    "flat sum": lambda x: x + x.reshape(-1, F).sum(0),
    "shifted rows": lambda x: jax.lax.pad(x, 0.0, ((1, -1, 0), (0, 0, 0), (0, 0, 0))),
    "place": lambda x: x + jnp.arange(len(x))[:, None, None],
    "count": lambda x: x / len(x),
    "count in an array": lambda x: x * np.float32(1 / np.sqrt(len(x))) * jnp.ones(F),
    "permutation": lambda x: jax.random.permutation(jax.random.key(1), x),
    "scan over examples": lambda x: jax.lax.scan(lambda h, t: (h + t, h + t), x[0] * 0, x)[1],
    "carried mean": lambda x: jax.lax.scan(lambda h, t: (h + t.mean(0), h), x[:, 0], x.swapaxes(0, 1))[0],
    "window": lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (3, 1, 1), (1, 1, 1), "SAME"),
    "convolution over examples": lambda x: jax.lax.conv_general_dilated(
        x[None, :, 0], jnp.ones((3, F, F)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0],
    "outputs along another axis": lambda x: x.swapaxes(0, 1),
}


def test_a_proof_fails_for_operations_that_mix_examples():
    example = (np.zeros((T, F), np.float32),)
    assert [name for name, run in PROVEN.items() if not has_separate_examples(run, example)] == []
    assert [name for name, run in UNPROVEN.items() if has_separate_examples(run, example)] == []


@pytest.mark.parametrize("name", sample(COUPLED, ("cox",)))
def test_a_loss_that_couples_examples_is_refused_by_name(name):
    loss, expected = COUPLED[name]
    with pytest.raises(SettingError, match=expected) as refused:
        summed(trainer_of(SEPARATE["dense"], loss), data())
    assert len(str(refused.value).splitlines()) == 3


def test_the_key_of_an_example_follows_from_its_content_and_its_rank_among_equal_examples():
    key, x, y = jax.random.key(1), np.array([[1.0], [2.0], [1.0], [1.0]], np.float32), np.array([0, 0, 0, 1])
    keys = np.asarray(jax.random.key_data(example_keys(key, x, y)))
    assert len(np.unique(keys, axis=0)) == 4
    assert np.array_equal(keys[[1, 0, 3]], jax.random.key_data(example_keys(key, x[1:], y[1:])))


def test_the_key_of_an_example_does_not_depend_on_examples_that_collide_in_a_hash_without_secret():
    """Check two examples that had equal hashes, when the hash depended on their content alone."""
    x = np.zeros((2, 400), np.uint32)
    x[:, [139, 234]] = [[0x480284D1, 0x116C592A], [0xC80284D1, 0x916C592A]]
    for seed in (1, 2):
        key, y = jax.random.key(seed), np.zeros(2, np.int32)
        together, alone = example_keys(key, x, y), example_keys(key, x[1:], y[1:])
        assert np.array_equal(jax.random.key_data(together)[1:], jax.random.key_data(alone))


def test_real_clients_draw_masks_from_secret_entropy():
    trainer, examples = trainer_of(DRAWING["dropout"]), data()
    one_D, other_D = sums(trainer, [examples, examples], deployed=True)
    assert np.linalg.norm(one_D - other_D) > 0.1 * CLIP


@pytest.mark.parametrize("deployed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_releases_lie_on_a_grid_with_and_without_an_example(deployed):
    trainer, examples = trainer_of(SEPARATE["dense without bias"]), data(8)
    params_D = np.zeros(trainer.layout.num_parameters, np.float32)  # the update is then exact
    dp = ExampleDP(clip=1.0, noise_multiplier=1.0)
    local = LocalSettings(steps=1, batch_size=8, learning_rate=1.0, example_dp=dp)
    request = Request(round=1, seed=1, params_D=params_D, local=local, deployed=deployed)
    blank = Examples(np.concatenate([examples.x[:7], 0 * examples.x[7:]]), examples.y)
    work = [ClientWork(client=n, examples=part) for n, part in enumerate((examples, blank))]
    steps_KD = np.asarray(trainer.fit(request, plain_training, work).delta_KD, np.float64) * 8 * 2**20
    assert not (steps_KD % 1).any()
    assert (steps_KD % 16).any(axis=1).all()


def test_gradients_that_cancel_are_clipped_although_float32_loses_their_norm():
    def build(x, train):  # two large and opposite gradients of one row of a table
        h = nn.Embed(VOCABULARY, 4)(jnp.zeros((len(x), 2), jnp.int32))
        return nn.Dense(CLASSES)(1e6 * h[:, 0] - (1e6 - 0.5) * h[:, 1])

    require_bounded(trainer_of(build), data())
