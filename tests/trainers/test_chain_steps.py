"""Chains of linear layers train several clients at once, with the bits of autograd for single clients."""

from collections import OrderedDict
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

import strategies  # noqa: E402
from fedlearn import LocalSettings, Schedule, federate, serial, start, vector  # noqa: E402
from fedlearn.algorithm.local_rule import LocalRule, plain_training, proximal  # noqa: E402
from fedlearn.core.records import ClientWork, ExampleDP, Examples, Request  # noqa: E402
from fedlearn.data.from_arrays import from_arrays  # noqa: E402
from fedlearn.engines.process_pool import ProcessPool  # noqa: E402
from fedlearn.trainers.torch import TorchTrainer  # noqa: E402
from fedlearn.trainers.torch.chain import find_chain  # noqa: E402
from fedlearn.trainers.torch.chain_passes import ChainPasses  # noqa: E402
from fedlearn.trainers.torch.chain_shares import ChainShares  # noqa: E402
from fedlearn.trainers.torch.chain_steps import ChainSteps  # noqa: E402
from fedlearn.trainers.torch.contract import prepare_module  # noqa: E402
from fedlearn.trainers.torch.flat_model import FlatModel  # noqa: E402
from simulations import models  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
ACTIVATIONS = (nn.ReLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Identity)
CONTROLLED = LocalRule(correct=lambda grad, w, w_global, c: grad - c + 0.1 * (w - w_global), client_state=("c",))
LOCALS = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "nesterov": {"optimizer": {"name": "sgd", "nesterov": True}, "momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optimizer": "adam"},
    "clipping": {"max_grad_norm": 0.05},
    "cosine": {"schedule": {"name": "cosine", "over": "steps"}},
}
CLOSE = partial(torch.allclose, atol=1e-5, equal_nan=True)
NUM_OUTPUTS = {"binary": 1, "multiclass": 5, "regression": 1, "multilabel": 3, "survival": 1}


def targets(task, rng, count):
    if task == "regression":
        return rng.standard_normal(count).astype(np.float32)
    if task == "survival":
        return np.stack([rng.random(count) + 0.1, rng.integers(0, 2, count)], axis=1).astype(np.float32)
    if task == "multilabel":
        return rng.integers(0, 2, (count, 3))
    return rng.integers(0, NUM_OUTPUTS[task] if task == "multiclass" else 2, count)


def random_chain(rng, num_inputs, num_outputs):
    widths = [num_inputs, *rng.integers(2, 70, rng.integers(0, 3)).tolist(), num_outputs]
    layers = [nn.Flatten()] if rng.random() < 0.5 else []
    for i in range(len(widths) - 1):
        layers.append(nn.Linear(widths[i], widths[i + 1], bias=bool(rng.random() < 0.8)))
        chosen = rng.integers(0, len(ACTIVATIONS), rng.integers(1, 3)) if i < len(widths) - 2 else ()
        layers += [ACTIVATIONS[k]() for k in chosen]
    return nn.Sequential(*layers)


def random_work(rng, task, num_inputs, rule, num_parameters):
    sizes = rng.integers(2, 60, 6) if rng.random() < 0.7 else np.full(6, 40)
    x = rng.standard_normal((sizes.sum(), num_inputs)).astype(np.float32)
    y, ends, shares = targets(task, rng, len(x)), np.cumsum(sizes), rng.random() < 0.5
    parts = [Examples(x[e - n : e], y[e - n : e]) for n, e in zip(sizes, ends, strict=True)]
    parts = parts if shares else [Examples(part.x.copy(), part.y.copy()) for part in parts]
    state = {name: rng.standard_normal(num_parameters).astype(np.float32) for name in rule.client_state}
    return [ClientWork(client=3 * k, examples=part, client_state=state) for k, part in enumerate(parts)]


def request(trainer, local):
    return Request(seed=1, round=2, params_D=trainer.init(0), broadcast={}, local=local)


def bits(updates):
    return [np.asarray(updates.delta_KD).tobytes(), updates.metrics["loss"].total_K.tobytes()]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", LOCALS)
def test_a_chain_has_the_bits_of_autograd_for_any_model_and_cut(name, seed, monkeypatch):
    rng = np.random.default_rng([seed, len(name)])
    task = rng.choice(list(NUM_OUTPUTS))
    num_inputs = int(rng.choice([1, 2, 13, 64, 333]))
    trainer = TorchTrainer(random_chain(rng, num_inputs, NUM_OUTPUTS[task]), task=task)
    rule = (plain_training, proximal(0.1), CONTROLLED)[seed % 3]
    work = random_work(rng, task, num_inputs, rule, trainer.layout.num_parameters)
    steps = {"epochs": 2} if rng.random() < 0.7 else {"epochs": 1, "steps": 5}
    local = LocalSettings(batch_size=int(rng.integers(1, 33)), learning_rate=0.05, **steps, **LOCALS[name])
    order = request(trainer, local)
    together = trainer.fit(order, rule, work)
    steps = trainer._chain_steps
    before = dict(steps.is_equal)
    steps.is_equal.clear()
    with monkeypatch.context() as patched:  # the passes are correct, also on machines where autograd has other bits
        patched.setattr(torch, "equal", CLOSE)
        close_KD = trainer.fit(order, rule, work).delta_KD
        assert steps.is_equal
        assert all(steps.is_equal.values())
    steps.is_equal.clear()
    steps.is_equal.update(before)
    single = np.concatenate([trainer.fit(order, rule, [client_work]).delta_KD for client_work in work])
    monkeypatch.setattr(ChainSteps, "fits", lambda steps, job: False)
    expected = trainer.with_batching("map").fit(order, rule, work)
    assert bits(together) == bits(expected)
    assert single.tobytes() == expected.delta_KD.tobytes()
    assert np.allclose(close_KD, expected.delta_KD, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_dp_sgd_of_a_chain_has_the_bits_of_autograd(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    task = ("binary", "multiclass", "regression", "multilabel")[seed % 4]
    trainer = TorchTrainer(random_chain(rng, 13, NUM_OUTPUTS[task]), task=task)
    work = random_work(rng, task, 13, plain_training, trainer.layout.num_parameters)
    if seed % 2:
        work[0].examples.x[1, 2] = np.inf  # an example that must add nothing
    local = LocalSettings(epochs=1, batch_size=8, example_dp=ExampleDP(clip=0.5, noise_multiplier=seed % 3 / 2))
    order, counts = request(trainer, local), []
    by_chain = ChainShares.__call__
    monkeypatch.setattr(ChainShares, "__call__", lambda self, *batch: counts.append(1) or by_chain(self, *batch))
    together = trainer.fit(order, plain_training, work)
    assert np.isfinite(together.delta_KD).all()
    counts.clear()
    with monkeypatch.context() as patched:  # the passes are correct, also on machines where autograd has other bits
        patched.setattr(torch, "equal", CLOSE)
        clipped = trainer._client_steps(()).clipped(clip=0.5)
        clipped._equals_chain.clear()
        close_KD = trainer.fit(order, plain_training, work).delta_KD
        assert clipped._equals_chain
        assert all(clipped._equals_chain.values())
        assert len(counts) > len(clipped._equals_chain)
    assert np.allclose(close_KD, together.delta_KD, atol=1e-4)
    monkeypatch.setattr(ChainShares, "fits", lambda self, x_B: False)
    assert bits(together) == bits(trainer.fit(order, plain_training, work))


def problem(rng, sizes):
    x = rng.standard_normal((sum(sizes), 20)).astype(np.float32)
    assignment = np.repeat(np.arange(len(sizes)), sizes)
    return from_arrays(x, rng.integers(0, 3, len(x)), assignment=assignment, task="multiclass")


def end_of(engine, strategy, **local):
    state = start(strategy, engine.trainer.init(1), engine, seed=1)
    settings = LocalSettings(batch_size=16, learning_rate=0.05, **local)
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=3, max_failures=0.0), local=settings):
        state = done.state
    engine.close()
    return np.asarray(state.params_D)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "fedadam"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_all_engines_give_one_model_for_clients_of_any_size(name, momentum):
    data = problem(np.random.default_rng(1), [1, 5, 33, 64, 100, 7, 50, 20, 3, 12] * 4)
    trainer = TorchTrainer(nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 3)), task="multiclass")
    settings = {"momentum": momentum} if name == "scaffold" else {}
    strategy = getattr(strategies, name)(clients_per_round=36, **settings)
    one_by_one = end_of(serial(data, trainer), strategy, momentum=momentum)
    for options in ({}, {"block_size": 7}, {"batching": "process_pool"}):
        engine = vector(data, trainer, **options)
        assert np.array_equal(end_of(engine, strategy, momentum=momentum), one_by_one)


def test_blocks_of_a_chain_have_several_clients():
    data = problem(np.random.default_rng(1), [10] * 20)
    wide = nn.Sequential(nn.Linear(20, 1000), nn.ReLU(), nn.Linear(1000, 3))
    other = nn.Sequential(nn.Linear(20, 1000), nn.LayerNorm(1000), nn.Linear(1000, 3))
    pools = [ProcessPool(TorchTrainer(m, task="multiclass"), data, num_processes=2) for m in (wide, other)]
    assert [len(pool.parts(10)) for pool in pools] == [2, 8]


def test_passes_with_other_bits_are_not_used(monkeypatch):
    rng = np.random.default_rng(3)
    trainer = TorchTrainer(random_chain(rng, 13, 5), task="multiclass")
    work = random_work(rng, "multiclass", 13, plain_training, trainer.layout.num_parameters)
    order = request(trainer, LocalSettings(epochs=1, batch_size=8))
    exact = ChainPasses.forward

    def inexact(passes):
        outputs = exact(passes)
        if len(outputs) > 1:  # other bits for several clients only, as on other hardware
            outputs[0, 0, 0] += 1e-3
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(ChainPasses, "forward", inexact)
        trained = trainer.fit(order, plain_training, work)
    is_equal = trainer._chain_steps.is_equal
    assert is_equal
    assert all(equal == (count == 1) for (count, _), equal in is_equal.items())
    monkeypatch.setattr(ChainSteps, "fits", lambda steps, job: False)
    assert bits(trained) == bits(trainer.fit(order, plain_training, work))


def built(model):
    return chain_of(prepare_module(model, input_shape=(6,), forward=None, output=None, trim=None))


def chain_of(network):
    return find_chain(network, FlatModel(network, "cpu").leaves)


def plain():
    return nn.Sequential(OrderedDict(first=nn.Linear(6, 6), relu=nn.ReLU(), out=nn.Linear(6, 2)))


@pytest.mark.parametrize(
    "model",
    [
        plain(),
        nn.Sequential(nn.Flatten(), plain()),
        nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.Tanh()),
        nn.Linear(6, 2),
    ],
    ids=str,
)
def test_chains_are_recognized(model):
    assert built(model) is not None


def test_the_models_of_the_project_are_recognized():
    data = problem(np.random.default_rng(1), [10] * 2)
    for name in ("linear", "mlp"):
        trainer, _ = models.build_trainer(name, data, input_shape=(20,))
        assert trainer.clients_per_step > 1


class Model(nn.Module):
    """A model with code of the user, which may do anything."""

    def __init__(self):
        super().__init__()
        self.layers = plain()

    def forward(self, x):
        return self.layers(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Reversed(nn.Sequential):
    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


class Steep(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


def tied():
    model = plain()
    model.first, model.out = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    model.out.weight = model.first.weight
    return model


def hooked(register):
    model = plain()
    getattr(model.first, register)(lambda *arguments: None)
    return model


def patched():
    model = plain()
    model.first.forward = lambda x: F.linear(x, 2 * model.first.weight, model.first.bias)
    return model


def parametrized():
    model = plain()
    nn.utils.parametrizations.orthogonal(model.first)
    return model


def frozen():
    model = plain()
    model.first.bias.requires_grad = False
    return model


NO_CHAINS = {
    "code of the user": Model,
    "part with code of the user": lambda: nn.Sequential(Model(), nn.ReLU()),
    "reversed": lambda: Reversed(nn.Linear(6, 6), nn.Linear(6, 2)),
    "activation of the user": lambda: nn.Sequential(nn.Linear(6, 6), Steep(), nn.Linear(6, 2)),
    "other alpha": lambda: nn.Sequential(nn.Linear(6, 6), nn.ELU(0.5), nn.Linear(6, 2)),
    "no layer": lambda: nn.Sequential(nn.Flatten(), nn.Identity()),
    "subclass": lambda: nn.Sequential(Doubled(6, 6), nn.Linear(6, 2)),
    "flattened batch": lambda: nn.Sequential(nn.Flatten(0), nn.Linear(6, 2)),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)),
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
    "one layer twice": lambda: nn.Sequential(layer := nn.Linear(6, 6), nn.ReLU(), layer),
    "width 1": lambda: nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 2)),
    "activation first": lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 2)),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 2))),
    "forward hook": lambda: hooked("register_forward_hook"),
    "forward pre-hook": lambda: hooked("register_forward_pre_hook"),
    "backward hook": lambda: hooked("register_full_backward_hook"),
    "tied": tied,
    "patched": patched,
    "parametrized": parametrized,
    "frozen": frozen,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NO_CHAINS)
def test_other_models_are_no_chains(name):
    assert built(NO_CHAINS[name]()) is None


CHANGES = {
    "hook": lambda m: m.first.register_forward_hook(lambda layer, inputs, output: 2 * output),
    "tensor hook": lambda m: m.first.weight.register_hook(lambda gradient: 2 * gradient),
    "patch": lambda m: setattr(m.first, "forward", lambda x: F.linear(x, 2 * m.first.weight)),
    "activation": lambda m: setattr(m, "out", nn.Sequential(m.out, nn.ReLU())),
    "replaced": lambda m: setattr(m, "relu", nn.Tanh()),
    "class of the model": lambda m: setattr(m, "__class__", Reversed),
    "further part": lambda m: m.append(nn.Tanh()),
    "frozen": lambda m: m.first.weight.requires_grad_(False),
    "class": lambda m: setattr(m.first, "__class__", Doubled),
}


def test_a_changed_activation_ends_the_chain():
    model = nn.Sequential(nn.Linear(6, 6), nn.ELU(), nn.Linear(6, 2))
    network = prepare_module(model, input_shape=(6,), forward=None, output=None, trim=None)
    chain = chain_of(network)
    network.inner[1].alpha = 0.5
    assert not chain.is_intact


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_no_chain_any_more(name):
    network = prepare_module(plain(), input_shape=(6,), forward=None, output=None, trim=None)
    chain = chain_of(network)
    assert chain.is_intact
    CHANGES[name](network.inner)
    assert not chain.is_intact


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bfloat16"},
        {"micro_batch_size": 2},
        {"label_smoothing": 0.1},
        {"class_weights": "balanced"},
        {"optimizer": lambda params, lr: torch.optim.SGD(params, lr)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_use_autograd(change, monkeypatch):
    rng = np.random.default_rng(1)
    trainer = TorchTrainer(random_chain(rng, 13, 5), task="multiclass")
    work = random_work(rng, "multiclass", 13, plain_training, trainer.layout.num_parameters)
    local = replace(LocalSettings(epochs=1, batch_size=8), **change)

    def fail(steps, job):
        raise AssertionError("the chain must not train")

    monkeypatch.setattr(ChainSteps, "fit", fail)
    trainer.fit(request(trainer, local), plain_training, work)
    with pytest.raises(Exception, match="must not train"):
        trainer.fit(request(trainer, LocalSettings(epochs=1, batch_size=8)), plain_training, work)


def test_a_loss_of_the_user_uses_autograd(monkeypatch):
    loss = lambda outputs, y: F.cross_entropy(outputs, y, reduction="none") + outputs.mean()  # noqa: E731
    rng = np.random.default_rng(1)
    trainer = TorchTrainer(random_chain(rng, 13, 5), task="multiclass", loss=loss)
    work = random_work(rng, "multiclass", 13, plain_training, trainer.layout.num_parameters)
    trainer.fit(request(trainer, LocalSettings(epochs=1, batch_size=8)), plain_training, work)
    assert not trainer._chain_steps.is_equal
