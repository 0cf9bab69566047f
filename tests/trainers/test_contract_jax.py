"""A flax module, a loss and examples are checked before training. Each error names an argument and a repair."""

import numpy as np
import pytest

from fedlearn import LocalSettings, Schedule, SettingError, federate, from_arrays, start
from fedlearn.core.model_report import ModelWarning
from fedlearn.core.records import ExampleDP, Examples
from fedlearn.engines.base import serial, vector
from strategies import fedavg

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from flax import linen as nn  # noqa: E402

from fedlearn.trainers.jax import JaxTrainer  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(480, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
EXAMPLES = Examples(X[:20], Y[:20])


def of(function):
    """Return a module whose ``__call__`` is a function."""

    class Module(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x)

    return Module


class TrainRequired(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(nn.Dense(8)(x)))


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dense(1)(nn.Dropout(0.5)(x, deterministic=deterministic))


class Unused(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.param("extra", nn.initializers.zeros, (3,))
        return nn.Dense(1)(x)


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("counts", "count", lambda: jnp.zeros(()))
        count.value = count.value + 1
        return nn.Dense(1)(x)


def by_data(x):
    hidden = nn.Dense(8)(x)
    return nn.Dense(1)(2 * hidden if hidden.mean() > 0 else hidden)


def torch_linear():
    return pytest.importorskip("torch").nn.Linear(6, 1)


def norm(x):
    return nn.Dense(1)(nn.BatchNorm(use_running_average=False)(x))


TRAINS = {
    "linear": lambda: nn.Dense(1),
    "train without default": TrainRequired,
    "deterministic": Deterministic,
    "unused": Unused,
    "float16": lambda: nn.Dense(1, param_dtype=jnp.float16),
    "bfloat16": lambda: nn.Dense(1, param_dtype=jnp.bfloat16),
    "embedding": of(lambda x: nn.Dense(1)(nn.Embed(10, 4)(jnp.clip(jnp.abs(x).astype(int), 0, 9)).mean(1))),
    "sigmoid": of(lambda x: nn.sigmoid(nn.Dense(1)(x))),
}

REFUSED = {  # module -> part of the value, and the repair
    "(B,)": (of(lambda x: nn.Dense(1)(x)[:, 0]), "shape (5,)", "outputs[:, None]"),
    "two outputs": (lambda: nn.Dense(2), "2 outputs", "nn.Dense(1) as the last layer, or task='multiclass'"),
    "tuple": (of(lambda x: (nn.Dense(1)(x), x)), "tuple of 2", "output=0"),
    "dict": (of(lambda x: {"out": nn.Dense(1)(x)}), "keys out", "output='out'"),
    "sequence": (of(lambda x: nn.Dense(1)(x[..., None])), "shape (5, 6, 1)", "outputs[:, -1]"),
    "scalar": (of(lambda x: nn.Dense(1)(x).mean()), "shape ()", "first axis of x"),
    "NaN": (of(lambda x: nn.Dense(1)(x) / jnp.zeros(()) * 0), "NaN or infinite", "smaller initial weights"),
    "NumPy": (of(lambda x: nn.Dense(1)(np.asarray(x))), "TracerArrayConversionError", "jax.numpy in place of NumPy"),
    "branch": (of(by_data), "TracerBoolConversionError", "jnp.where in place of if"),
    "item": (of(lambda x: nn.Dense(1)(x) * float(x.std())), "ConcretizationTypeError", "float() and item()"),
    "state": (Counting, "the state counts", "a model without this state"),
    "no parameters": (of(lambda x: x.mean(1, keepdims=True)), "without parameters", "nn.Dense"),
    "bfloat16 outputs": (lambda: nn.Dense(1, dtype=jnp.bfloat16), "outputs in bfloat16", "astype('float32')"),
    "float codes": (of(lambda x: nn.Embed(10, 1)(x)), "must be an integer", "x.astype('int32')"),
    "class": (lambda: nn.Dense, "the class Dense", "Dense()"),
    "torch": (torch_linear, "torch.nn", "TorchTrainer(module)"),
    "function": (lambda: len, "builtin", "flax.linen.Dense(1)"),
    "batch norm": (of(norm), "immutable", "use_running_average=not train"),
    "stopped": (of(lambda x: jax.lax.stop_gradient(nn.Dense(1)(x))), "do not depend", "nn.Dense(1)"),
    "own error": (of(lambda x: 1 / 0), "ZeroDivisionError", "the module on x"),
}


def train(build, *, num_clients=3, private=False, engine=vector, **options):
    """Train one round. Return the final parameters."""
    count = 12 * num_clients
    data = from_arrays(X[:count], Y[:count], assignment=np.arange(count) % num_clients, task="binary", seed=1)
    trainer = JaxTrainer(build(), task="binary", input_shape=(6,), **options)
    running = engine(data, trainer)
    dp = ExampleDP(clip=1.0, noise_multiplier=0.0) if private else None
    state = start(fedavg(), trainer.init(1), running, seed=1)
    local = LocalSettings(batch_size=4, example_dp=dp)
    for round in federate(fedavg(), running, state, schedule=Schedule(rounds=1), local=local):
        state = round.state
        assert not round.failures, round.failures
    return np.asarray(state.params_D)


def refusal(action):
    """Return the error of an action, which has three lines."""
    with pytest.raises(SettingError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 3
    return caught.value


def checked(build, *, loss=None, task="binary", input_shape=(6,), examples=EXAMPLES):
    return JaxTrainer(build(), task=task, input_shape=input_shape, loss=loss).check_model(examples)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "NaN"])
def test_a_module_that_does_not_fit_is_refused_with_a_repair(name):
    build, value, fix = REFUSED[name]
    error = refusal(lambda: checked(build))
    assert error.setting == "module"
    assert value in error.value
    assert fix in error.fix


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(("num_clients", "private"), [(3, False), (40, False), (3, True)])
@pytest.mark.parametrize("engine", [serial, vector])
def test_every_such_module_is_refused_by_each_engine(name, num_clients, private, engine):
    build, value, fix = REFUSED[name]
    error = refusal(lambda: train(build, num_clients=num_clients, private=private, engine=engine))
    assert error.setting == "module"
    assert value in error.value
    assert fix in error.fix


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fedlearn.core.model_report.ModelWarning")
@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize(("num_clients", "private"), [(3, False), (40, False), (3, True)])
def test_every_other_module_trains(name, num_clients, private):
    assert np.isfinite(train(TRAINS[name], num_clients=num_clients, private=private)).all()


@pytest.mark.parametrize(
    ("build", "output"),
    [(of(lambda x: (x, nn.Dense(1)(x))), 1), (of(lambda x: {"logits": nn.Dense(1)(x)}), "logits")],
)
def test_output_selects_a_part_of_the_result(build, output):
    plain = train(of(lambda x: nn.Dense(1)(x)))
    assert np.array_equal(train(build, output=output), plain)
    assert "one of out" in refusal(lambda: train(REFUSED["dict"][0], output="logit")).expected


@pytest.mark.parametrize(
    ("loss", "value", "fix"),
    [
        (lambda o, y: jnp.mean((o[:, 0] - y) ** 2), "shape ()", "reduction='none'"),
        (lambda o, y: (o - y[:, None]) ** 2, "shape (5, 1)", "outputs[:, 0]"),
        (lambda o, y: (o - y) ** 2, "shape (5, 5)", "outputs[:, 0]"),
        (lambda o, y: o.reshape(2, 3), "fails on outputs (5, 1)", "loss=None"),
        ("mse", "mse", "loss=None"),
    ],
)
def test_a_loss_without_one_value_per_example_is_refused(loss, value, fix):
    error = refusal(lambda: checked(lambda: nn.Dense(1), loss=loss))
    assert error.setting == "loss"
    assert value in error.value
    assert fix in error.fix


def test_a_loss_that_is_not_finite_is_refused_in_the_first_round():
    error = refusal(lambda: train(lambda: nn.Dense(1), loss=lambda o, y: jnp.log(o[:, 0] * 0 - 1)))
    assert (error.setting, error.fix) == ("loss", "loss=None for the loss of the task")


def test_an_input_shape_of_other_data_is_named():
    error = refusal(lambda: checked(lambda: nn.Dense(1), input_shape=(5,)))
    assert error.fix == "input_shape=(6,)"


def test_targets_beyond_the_outputs_are_refused():
    many = Examples(X[:9], np.arange(9))
    error = refusal(lambda: checked(lambda: nn.Dense(3), task="multiclass", examples=many))
    assert error.fix == "nn.Dense(9) as the last layer"


@pytest.mark.parametrize(
    ("build", "task", "text"),
    [
        (TRAINS["sigmoid"], "binary", "module returns probabilities"),
        (of(lambda x: nn.softmax(nn.Dense(2)(x))), "multiclass", "module returns probabilities"),
        (Unused, "binary", "no gradient, so they do not train: extra"),
        (Deterministic, "binary", "the argument deterministic"),
    ],
)
def test_probable_mistakes_are_warnings(build, task, text):
    assert [warning for warning in checked(build, task=task).warnings if text in warning]
    assert checked(of(lambda x: nn.log_softmax(nn.Dense(2)(x))), task="multiclass").warnings == ()


def test_other_types_of_parameters_become_float32_with_a_warning():
    with pytest.warns(ModelWarning, match="parameters in bfloat16"):
        JaxTrainer(TRAINS["bfloat16"](), task="binary", input_shape=(6,))
