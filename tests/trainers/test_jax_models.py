"""JaxTrainer trains models of flax.nnx, equinox and pairs of functions as it trains models of flax.linen."""

from dataclasses import replace

import numpy as np
import pytest

import fedlearn
from fedlearn import LocalSettings, Scenario, Schedule, SettingError, federate, from_arrays, serial, start, vector
from fedlearn.core.records import ExampleDP
from strategies import fedavg

jax = pytest.importorskip("jax")
jnp = jax.numpy
linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

X = np.random.default_rng(0).normal(size=(61, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
DATA = from_arrays(X, Y, assignment=np.arange(61) % 3, task="binary", seed=1)
STRATEGY = replace(fedavg(), buffers="average")


class Linen(linen.Module):
    norm: bool = False

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(8, name="hidden")(x)
        if self.norm:
            x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        return linen.Dense(1, name="out")(jnp.tanh(x))


class Nnx(nnx.Module):
    def __init__(self, norm=False, rate=0.0):
        rngs = nnx.Rngs(0)
        self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs) if norm else None
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = self.hidden(x)
        return self.out(self.drop(jnp.tanh(x if self.norm is None else self.norm(x))))


def equinox_net(rate=0.0):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear
        drop: eqx.nn.Dropout

        def __call__(self, x, key=None):
            return self.out(self.drop(jnp.tanh(self.hidden(x)), key=key))

    first, second = jax.random.split(jax.random.key(0))
    return Net(eqx.nn.Linear(6, 8, key=first), eqx.nn.Linear(8, 1, key=second), eqx.nn.Dropout(rate))


def draw(key, x):
    first, second = jax.random.split(key)
    hidden = {"weight": 0.3 * jax.random.normal(first, (8, x.shape[1])), "bias": jnp.zeros(8)}
    return {"hidden": hidden, "out": [0.3 * jax.random.normal(second, (1, 8)), jnp.zeros(1)]}


def apply(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["weight"].T + params["hidden"]["bias"])
    return hidden @ params["out"][0].T + params["out"][1]


PAIR = (draw, apply)
KINDS = {"nnx": Nnx, "equinox": equinox_net, "functions": lambda: PAIR}


def trainer(model, **options):
    return fedlearn.JaxTrainer(model, task="binary", **{"input_shape": (6,), **options})


def trained(built, first_D=None, *, engine=vector, private=False):
    running = engine(DATA, built)
    state = start(STRATEGY, built.init(1) if first_D is None else first_D, running, seed=1)
    dp = ExampleDP(clip=1.0, noise_multiplier=0.0) if private else None
    local = LocalSettings(epochs=2, batch_size=8, learning_rate=0.1, example_dp=dp)
    for round in federate(STRATEGY, running, state, schedule=Schedule(rounds=2), local=local):
        assert not round.failures, round.failures[0]
        state = round.state
    return np.asarray(state.params_D)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
def test_nnx_has_the_names_and_the_training_of_linen(norm):
    mine, other = trainer(Nnx(norm), input_shape=None), trainer(Linen(norm))
    assert mine.layout == other.layout
    np.testing.assert_array_equal(trained(mine), trained(other, mine.init(1)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equinox", "nnx"])
def test_a_model_trains_as_the_module_of_torch_with_the_same_names(kind):
    torch = pytest.importorskip("torch")
    module = torch.nn.ModuleDict({"hidden": torch.nn.Linear(6, 8), "out": torch.nn.Linear(8, 1)})
    module.forward = lambda x: module["out"](torch.tanh(module["hidden"](x)))
    mine, other = trainer(KINDS[kind]()), fedlearn.TorchTrainer(module, task="binary")
    assert mine.layout == other.layout
    np.testing.assert_allclose(trained(mine), trained(other, mine.init(1)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_engines_and_programs_train_equal_models(kind, rate):
    models = {"functions": lambda: PAIR, "nnx": lambda: Nnx(rate=rate), "equinox": lambda: equinox_net(rate)}
    built = trainer(models[kind]())
    final_D = trained(built, engine=serial)
    assert np.abs(final_D - built.init(1)).max() > 0.01
    np.testing.assert_array_equal(trained(built), final_D)
    np.testing.assert_allclose(trained(built.with_batching("vmap")), final_D, atol=1e-5)
    np.testing.assert_array_equal(trained(built, private=True), trained(built, private=True, engine=serial))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_dp_sgd_clips_each_example_of_any_model(kind):
    from fedlearn.testing import check_trainer

    check_trainer(trainer(KINDS[kind]()), [DATA.train(client) for client in DATA.clients])


@pytest.mark.parametrize("kind", ["nnx", "equinox"])
def test_a_module_keeps_its_weights_and_comes_back(kind):
    model = KINDS[kind]()
    built = trainer(model, input_shape=None)
    assert built.initialization == "weights as given"
    params_D = built.init(1)
    np.testing.assert_array_equal(params_D, built.init(2))
    network = built.network(params_D + 1)
    run = network if kind == "nnx" else jax.vmap(network)
    np.testing.assert_allclose(run(X), built.predict(params_D + 1, X), atol=1e-6)
    np.testing.assert_array_equal(built.init(1), params_D)  # the module of the user has not changed


def test_functions_draw_weights_from_the_seed():
    built = trainer(PAIR)
    assert [leaf.name for leaf in built.layout.leaves] == ["hidden.bias", "hidden.weight", "out.0", "out.1"]
    assert built.initialization == "weights drawn from the seed"
    np.testing.assert_array_equal(built.init(1), trainer(PAIR).init(1))
    assert np.abs(built.init(1) - built.init(2)).max() > 0.01
    run, params = built.network(built.init(1))
    np.testing.assert_allclose(run(params, X), built.predict(built.init(1), X), atol=1e-6)


@pytest.mark.parametrize("num_rows", [0, 513, 10_000])
def test_a_prediction_passes_few_rows_at_once_to_the_model(num_rows):
    init, apply = PAIR
    row_counts = []

    def counting(params, x):
        row_counts.append(len(x))
        return apply(params, x)

    built = trainer((init, counting))
    x, params_D = np.resize(X, (num_rows, 6)), built.init(1)
    outputs = built.predict(params_D, x)
    assert max(row_counts) <= 512
    np.testing.assert_allclose(outputs, apply(built.network(params_D)[1], x), atol=1e-6)


@pytest.mark.parametrize("kind", ["nnx", pytest.param("equinox", marks=pytest.mark.slow)])
def test_a_scenario_of_data_sets_takes_any_model_of_jax(kind):
    scenario = Scenario.from_datasets({"north": (X, Y), "south": (X, Y)}, model=KINDS[kind](), task="binary")
    assert scenario.trainer.framework == "jax"
    assert scenario.model == {"nnx": "Nnx", "equinox": "Net"}[kind]
    assert scenario.trainer.predict(scenario.trainer.init(1), X).shape == (61, 1)


@pytest.mark.slow
def test_tied_parameters_of_nnx_stay_tied():
    class Tied(nnx.Module):
        def __init__(self):
            self.first, self.out = nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 1, rngs=nnx.Rngs(1))
            self.second = self.first

        def __call__(self, x):
            return self.out(jnp.tanh(self.second(jnp.tanh(self.first(x)))))

    built = trainer(Tied())
    assert [leaf.name for leaf in built.layout.leaves] == ["first.bias", "first.weight", "out.bias", "out.weight"]
    module = built.network(trained(built))
    assert module.first is module.second


class Writer(nnx.Module):
    def __init__(self):
        self.out, self.count = nnx.Linear(6, 1, rngs=nnx.Rngs(0)), nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.count[...] = self.count[...] + 1
        return self.out(x)


def equinox_norm():
    eqx = pytest.importorskip("equinox")
    return eqx.nn.Sequential([eqx.nn.BatchNorm(6, axis_name="batch", mode="ema")])


def equinox_tied():
    eqx = pytest.importorskip("equinox")
    first, second = (eqx.nn.Linear(6, 6, key=jax.random.key(0)) for _ in range(2))
    tied = eqx.tree_at(lambda layer: layer.weight, second, first.weight)
    return eqx.nn.Sequential([first, tied])


WRONG = {
    "writer": (Writer, "writes the variable count", "without this variable"),
    "equinox batch norm": (equinox_norm, "the state of layers[0]", "eqx.nn.GroupNorm"),
    "equinox tied": (equinox_tied, "one array at layers[0].weight and layers[1].weight", "eqx.nn.Shared"),
    "class": (lambda: Nnx, "the class Nnx", "Nnx()"),
    "no shape": (lambda: PAIR, "None", "input_shape=x.shape[1:]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_updates_cannot_describe_is_refused(name):
    build, value, fix = WRONG[name]
    with pytest.raises(SettingError) as caught:
        trainer(build(), input_shape=None).check_model(DATA.train(0))
    assert value in str(caught.value.value)
    assert fix in caught.value.fix
    assert len(str(caught.value).splitlines()) == 3
