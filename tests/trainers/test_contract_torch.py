"""A torch module, a loss and examples are checked before training. Each error names an argument and a repair."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlearn import LocalSettings, Schedule, SettingError, federate, from_arrays, start
from fedlearn.core.model_report import ModelWarning
from fedlearn.core.records import ExampleDP, Examples
from fedlearn.engines.base import serial, vector
from fedlearn.errors import FedlearnError
from strategies import fedavg

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from fedlearn.trainers.torch import TorchTrainer  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.normal(size=(480, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)
EXAMPLES = Examples(X[:20], Y[:20])


class Apply(nn.Module):
    """Apply a function to the outputs of a linear layer and to the inputs."""

    def __init__(self, change, *, outputs=1):
        super().__init__()
        self.change, self.out = change, nn.Linear(6, outputs)

    def forward(self, x):
        return self.change(self.out(x), x)


class BeforeLayer(nn.Module):
    """Apply a function to the inputs before a layer."""

    def __init__(self, change, layer):
        super().__init__()
        self.change, self.layer = change, layer

    def forward(self, x):
        return self.layer(self.change(x))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.extra = nn.Linear(6, 1), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(x)


class SplitModes(Apply):
    """Return a tuple in training only, as networks with auxiliary outputs do."""

    def forward(self, x):
        return (self.out(x), x) if self.training else self.out(x)


def codes(x):
    return x.abs().long().clamp(max=9)


def mean_embedding(**options):
    embedding = nn.Embedding(10, 4, **options)
    return nn.Sequential(BeforeLayer(codes, embedding), BeforeLayer(lambda h: h.mean(1), nn.Linear(4, 1)))


def inplace(outputs, x):
    x[:, 0] = 0.0
    return outputs


def by_data(outputs, x):
    return 2 * outputs if outputs.mean() > 0 else outputs


TRAINS = {
    "linear": lambda: nn.Linear(6, 1),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)),
    "functional dropout": lambda: Apply(lambda o, x: F.dropout(o, 0.5)),
    "noise": lambda: Apply(lambda o, x: o + 0.1 * torch.randn(o.shape)),
    "rrelu": lambda: nn.Sequential(nn.Linear(6, 8), nn.RReLU(), nn.Linear(8, 1)),
    "branch": lambda: Apply(by_data),
    "item": lambda: Apply(lambda o, x: o * (1 + float(x.std(correction=0).item()))),
    "inplace activation": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)),
    "boolean mask": lambda: Apply(lambda o, x: o + o[o > 0].sum() * 0),
    "frozen layer": lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 1)),
    "unused layer": Unused,
    "embedding": mean_embedding,
    "sparse embedding": lambda: mean_embedding(sparse=True),
    "gru": lambda: nn.Sequential(nn.Unflatten(1, (6, 1)), Gru()),
    "float64": lambda: nn.Linear(6, 1).double(),
    "bfloat16": lambda: nn.Linear(6, 1).bfloat16(),
    "float16": lambda: nn.Linear(6, 1).half(),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 1)),
    "compiled": lambda: torch.compile(nn.Linear(6, 1), backend="eager"),
    "DataParallel": lambda: nn.DataParallel(nn.Linear(6, 1)),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))),
    "sigmoid": lambda: nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()),
}


class Gru(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


REFUSED = {  # module -> part of the value, and the repair
    "(B,)": (lambda: Apply(lambda o, x: o[:, 0]), "shape (5,)", "nn.Sequential(module, nn.Unflatten(0, (-1, 1)))"),
    "two outputs": (lambda: nn.Linear(6, 2), "2 outputs", "nn.Linear(6, 1) as the last layer, or task='multiclass'"),
    "no output": (lambda: nn.Linear(6, 0), "0 outputs", "nn.Linear(6, 1) as the last layer"),
    "tuple": (lambda: Apply(lambda o, x: (o, x)), "tuple of 2", "output=0"),
    "dict": (lambda: Apply(lambda o, x: {"h": x, "out": o}), "keys h, out", "output='out'"),
    "nothing": (lambda: Apply(lambda o, x: None), "NoneType", "return outputs"),
    "array": (lambda: Apply(lambda o, x: o.detach().numpy()), "ndarray", "return outputs"),
    "tuple in training": (lambda: SplitModes(None), "tuple of 2", "output=0"),
    "sequence": (lambda: Apply(lambda o, x: o[:, None].expand(-1, 3, -1)), "shape (5, 3, 1)", "outputs[:, -1]"),
    "scalar": (lambda: Apply(lambda o, x: o.mean()), "shape ()", "outputs that keep the first axis of x"),
    "mean over the batch": (lambda: Apply(lambda o, x: o.mean(0, keepdim=True)), "shape (1, 1)", "first axis of x"),
    "double": (lambda: Apply(lambda o, x: o.double()), "outputs in float64", "outputs.float()"),
    "half": (lambda: Apply(lambda o, x: o.half()), "outputs in float16", "outputs.float()"),
    "NaN": (lambda: Apply(lambda o, x: o / 0 * 0), "NaN or infinite", "smaller initial weights"),
    "changes x": (lambda: Apply(inplace), "changes its inputs in place", "x = x.clone()"),
    "detached": (lambda: Apply(lambda o, x: o.detach()), "no gradient", "detach()"),
    "independent": (lambda: Apply(lambda o, x: x[:, :1].clone().requires_grad_()), "do not depend", "requires_grad_"),
    "all frozen": (lambda: nn.Linear(6, 1).requires_grad_(False), "all frozen", "module.requires_grad_(True)"),
    "no parameters": (lambda: nn.AdaptiveAvgPool1d(1), "without parameters", "nn.Linear"),
    "float codes": (lambda: BeforeLayer(lambda x: x, nn.Embedding(10, 1)), "layer (Embedding)", "x = x.long()"),
    "narrow": (lambda: nn.Linear(5, 1), "mat1 and mat2", "nn.Linear(6, 1) for module"),
    "not flat": (lambda: BeforeLayer(lambda x: x.view(-1, 2, 3), nn.Linear(6, 1)), "mat1", "nn.Flatten()"),
    "channels last": (
        lambda: BeforeLayer(lambda x: x.view(-1, 1, 2, 3), nn.Conv2d(3, 1, 1)),
        "Conv2d",
        "x = x.movedim(-1, 1)",
    ),
    "own error": (lambda: Apply(lambda o, x: 1 / 0), "ZeroDivisionError", "module(torch.from_numpy(x[:5]))"),
}


def train(build, *, num_clients, private=False, engine=vector, loss=None, **options):
    """Train two rounds. Return the final parameters."""
    count = 12 * num_clients
    data = from_arrays(X[:count], Y[:count], assignment=np.arange(count) % num_clients, task="binary", seed=1)
    torch.manual_seed(0)
    trainer = TorchTrainer(build(), task="binary", loss=loss, **options)
    running = engine(data, trainer)
    dp = ExampleDP(clip=1.0, noise_multiplier=0.0) if private else None
    local = LocalSettings(epochs=1, batch_size=4, example_dp=dp)
    state = start(fedavg(), trainer.init(1), running, seed=1)
    for round in federate(fedavg(), running, state, schedule=Schedule(rounds=2), local=local):
        state = round.state
        assert not round.failures, round.failures
    return np.asarray(state.params_D)


def refusal(action):
    """Return the error of an action. It has three lines and no text of a framework in place of an explanation."""
    with pytest.raises(SettingError) as caught:
        action()
    assert len(str(caught.value).splitlines()) == 3
    return caught.value


@pytest.mark.parametrize("name", ["(B,)", "two outputs", "dict", "narrow", "detached", "all frozen"])
def test_a_module_that_does_not_fit_is_refused_with_a_repair(name):
    build, value, fix = REFUSED[name]
    error = refusal(lambda: TorchTrainer(build(), task="binary").check_model(EXAMPLES))
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
def test_every_other_module_trains_and_repeats_its_result(name, num_clients, private):
    run = lambda: train(TRAINS[name], num_clients=num_clients, private=private)  # noqa: E731
    if private and name in ("branch", "item", "scripted"):  # these mix examples, or cannot be read
        assert refusal(run).setting in ("privacy", "module")
        return
    first = run()
    assert np.isfinite(first).all()
    assert np.array_equal(first, run())


@pytest.mark.filterwarnings("ignore::fedlearn.core.model_report.ModelWarning")
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: Apply(lambda o, x: (x, o)), {"output": 1}),
        (lambda: Apply(lambda o, x: {"logits": o}), {"output": "logits"}),
        (lambda: Apply(lambda o, x: {"logits": o}), {}),
        (lambda: nn.Sequential(Apply(lambda o, x: o[:, 0]), nn.Unflatten(0, (-1, 1))), {}),
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1)), {"input_shape": (6,)}),
        (lambda: torch.jit.script(nn.Linear(6, 1)), {}),
    ],
)
def test_the_repairs_work_as_typed(build, options):
    assert np.isfinite(train(build, num_clients=3, **options)).all()
    if not isinstance(build(), torch.jit.ScriptModule):
        assert np.isfinite(train(build, num_clients=3, private=True, **options)).all()


LOSSES = {
    "mean": (lambda o, y: F.binary_cross_entropy_with_logits(o[:, 0], y.float()), "shape ()", "reduction='none'"),
    "column": (lambda o, y: (o - y[:, None]) ** 2, "shape (5, 1)", "outputs[:, 0]"),
    "square": (lambda o, y: (o - y) ** 2, "shape (5, 5)", "outputs[:, 0]"),
    "NaN": (lambda o, y: torch.log(o[:, 0] * 0 - 1), "NaN or infinity", "loss=None"),
    "number": (lambda o, y: 1.0, "returns a float", "loss=None"),
    "class": (nn.CrossEntropyLoss, "the class CrossEntropyLoss", "loss=CrossEntropyLoss(reduction='none')"),
    "fails": (lambda o, y: F.binary_cross_entropy(o, y), "fails on outputs (5, 1)", "y.float()"),
    "no gradient": (lambda o, y: (o[:, 0] > 0).float() - y, "no gradient", "detach()"),
    "text": ("mse", "mse", "loss=None"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_without_one_finite_value_per_example_is_refused(name):
    loss, value, fix = LOSSES[name]
    error = refusal(lambda: TorchTrainer(nn.Linear(6, 1), task="binary", loss=loss).check_model(EXAMPLES))
    assert error.setting == "loss"
    assert value in error.value
    assert fix in error.fix


@pytest.mark.parametrize(
    ("x", "y", "task", "setting", "fix"),
    [
        (X.astype(np.float64), Y, "binary", "x", "x.astype('float32')"),
        (X.astype(str), Y, "binary", "x", "x.astype('float32')"),
        (X.astype(np.int64), Y, "binary", "module", "x.astype('float32')"),
        (X, Y + 1, "binary", "y", "task='multiclass'"),
        (X, np.where(Y, np.nan, 1.0), "regression", "y", "y[numpy.isfinite(y)]"),
        (X, Y, "multiclass", "module", "task='binary'"),
    ],
)
def test_data_that_do_not_fit_are_refused_by_name(x, y, task, setting, fix):
    error = refusal(lambda: TorchTrainer(nn.Linear(6, 1), task=task).check_model(Examples(x, y)))
    assert error.setting == setting
    assert fix in error.fix


def test_the_number_of_outputs_covers_the_classes():
    error = refusal(lambda: TorchTrainer(nn.Linear(6, 3), task="multiclass").check_model(Examples(X[:9], np.arange(9))))
    assert "at least 9 outputs" in error.expected
    assert error.fix == "nn.Linear(6, 9) as the last layer"


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 1), nn.Sigmoid()), "module returns probabilities"),
        (lambda: Apply(lambda o, x: torch.sigmoid(o)), "module returns probabilities"),
        (Unused, "no gradient, so they do not train: extra.bias, extra.weight"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), "batch with one example"),
    ],
)
def test_probable_mistakes_are_warnings(build, text):
    report = TorchTrainer(build(), task="binary").check_model(EXAMPLES)
    assert [warning for warning in report.warnings if text in warning]
    assert TorchTrainer(nn.Linear(6, 1), task="binary").check_model(EXAMPLES).warnings == ()


def test_other_types_of_parameters_become_float32_with_a_warning():
    module = nn.Sequential(nn.Linear(6, 1)).double()
    with pytest.warns(ModelWarning, match="parameters in float64; the trainer changes them to float32"):
        trainer = TorchTrainer(module, task="binary")
    assert {p.dtype for p in trainer.module.parameters()} == {torch.float32}
    assert {p.dtype for p in module.parameters()} == {torch.float64}  # the module of the user does not change


def test_two_trainers_of_one_module_are_independent_and_leave_it_unchanged():
    module = nn.Sequential(nn.Linear(6, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = (TorchTrainer(module, task="binary") for _ in range(2))
    first.predict(first.init(1) + 1, EXAMPLES.x)
    second.predict(second.init(1) + 2, EXAMPLES.x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert np.array_equal(first.init(1), second.init(1))
    weights = first.network(first.init(1) + 1)[0].weight
    assert torch.equal(weights, before["0.weight"] + 1)


@pytest.mark.slow
def test_compiled_parts_have_the_names_of_the_plain_module():
    plain, part, whole = (nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 1))) for _ in range(3))
    part[1] = torch.compile(part[1], backend="eager")
    whole.compile(backend="eager")
    for module in (part, whole, torch.compile(plain, backend="eager")):
        trainer = TorchTrainer(module, task="binary")
        assert trainer.layout == TorchTrainer(plain, task="binary").layout
        trainer.check_model(EXAMPLES)


def test_the_check_leaves_module_and_generators_as_they_are():
    module = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).eval()
    trainer = TorchTrainer(module, task="binary")
    module = trainer.module
    state = torch.random.get_rng_state()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.check_model(EXAMPLES)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module.training


@pytest.mark.filterwarnings("ignore::fedlearn.core.model_report.ModelWarning")
def test_a_batch_of_one_example_gives_a_failure_in_three_lines():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    with pytest.raises(FedlearnError, match="trains on a batch with one example") as caught:
        train(lambda: nn.Sequential(nn.Linear(6, 4), norm, nn.Linear(4, 1)), num_clients=3)
    assert "group norm" in str(caught.value)


def test_vmap_is_refused_by_name_for_code_that_it_does_not_support():
    error = refusal(lambda: train(lambda: Apply(by_data), num_clients=3, batching="vmap", engine=serial))
    assert (error.setting, error.fix) == ("batching", "batching=map")


def test_a_real_client_is_refused_for_reasons_that_do_not_depend_on_its_data():
    trainer = TorchTrainer(nn.Linear(6, 3), task="multiclass")
    odd = Examples(np.full((9, 6), np.nan, np.float32), np.arange(9))
    assert trainer.check_model(odd, synthetic=True).num_outputs == 3


@st.composite
def modules(draw):
    """Draw a chain of layers, of which many do not fit each other."""
    width, layers = 6, []
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(
            st.sampled_from(["linear", "norm", "dropout", "act", "flatten", "conv", "unflatten", "embed", "gru"])
        )
        size = draw(st.integers(1, 8))
        layers.append(
            {
                "linear": lambda width=width, size=size: nn.Linear(width, size),
                "norm": lambda width=width: nn.LayerNorm(width),
                "dropout": lambda: nn.Dropout(0.5),
                "act": lambda: draw(st.sampled_from([nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Softmax]))(),
                "flatten": lambda: nn.Flatten(draw(st.integers(0, 2))),
                "conv": lambda size=size: nn.Conv1d(size, size, 1),
                "unflatten": lambda size=size: nn.Unflatten(1, (size, -1)),
                "embed": lambda size=size: nn.Embedding(size, size),
                "gru": lambda width=width, size=size: nn.GRU(width, size),
            }[kind]()
        )
        width = size if kind in ("linear", "gru", "embed") else width
    return nn.Sequential(*layers, nn.Linear(draw(st.sampled_from([width, width, 5])), draw(st.integers(1, 3))))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(modules(), st.sampled_from(["binary", "multiclass", "regression"]), st.booleans())
def test_a_random_module_trains_or_is_refused_by_name(module, task, private):
    y = Y.astype(np.float32) if task == "regression" else Y
    data = from_arrays(X[:60], y[:60], assignment=np.arange(60) % 3, task=task, seed=1)
    dp = ExampleDP(clip=1.0, noise_multiplier=0.0) if private else None
    error = None
    try:
        trainer = TorchTrainer(module, task=task)
        engine = serial(data, trainer)
        state = start(fedavg(), trainer.init(1), engine, seed=1)
        list(federate(fedavg(), engine, state, schedule=Schedule(rounds=1), local=LocalSettings(example_dp=dp)))
    except SettingError as refused:
        error = refused
    assert error is None or error.setting in ("module", "loss", "task", "x", "y", "privacy")
    assert error is None or len(str(error).splitlines()) == 3
