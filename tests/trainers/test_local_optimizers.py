"""Optimizers, schedules and changes of the loss: equal in all frameworks and batchings, and equal to torch alone."""

from functools import partial

import numpy as np
import pytest

from fedlearn import LocalSettings, Schedule, SettingError, federate, start, vector
from fedlearn.algorithm.local_rule import LocalRule, plain_training, proximal, with_optimizer_state
from fedlearn.core.optimizers import PORTABLE_OPTIMIZERS
from fedlearn.core.records import ClientWork, Examples, Request
from fedlearn.data.from_arrays import from_arrays
from fedlearn.loop.local_training import initial_rule_state
from fedlearn.testing import LinearTrainer, linear_problem

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

import strategies  # noqa: E402
from fedlearn.trainers.torch import TorchTrainer  # noqa: E402
from simulations.models import build_trainer  # noqa: E402

CLASSES, FEATURES, SIZES = 3, 4, (13, 5, 8)  # clients with different numbers of steps, and batches that are not full


def examples(size, seed, *, classes=CLASSES):
    rng = np.random.default_rng(seed)
    y = np.arange(size) % classes if seed else np.zeros(size)
    return Examples(rng.normal(size=(size, FEATURES)).astype(np.float32), y.astype(np.int64))


WORK = [ClientWork(client=k, examples=examples(size, k)) for k, size in enumerate(SIZES)]
BINARY = [ClientWork(client=k, examples=examples(size, k, classes=2)) for k, size in enumerate(SIZES)]


def build(framework, work=WORK):
    x, y = arrays(work)
    assignment, task = np.repeat(np.arange(len(work)), SIZES), "binary" if y.max() == 1 else "multiclass"
    data = from_arrays(x, y, assignment=assignment, task=task)
    return build_trainer("mlp", data, input_shape=(FEATURES,), hidden=(5,), framework=framework)[0]


def arrays(work):
    return tuple(np.concatenate([getattr(w.examples, name) for w in work]) for name in ("x", "y"))


def torch_linear():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = torch.nn.Linear(3, 1)

        def forward(self, x):
            return self.out(x)

    return TorchTrainer(Net(), task="regression")


def updates(trainer, local, *, work=WORK, rule=plain_training, start_D=None):
    params_D = trainer.init(1) if start_D is None else start_D
    request = Request(round=2, seed=1, params_D=params_D, local=LocalSettings(**{"batch_size": 4, **local}))
    return np.asarray(trainer.fit(request, rule, work).delta_KD)


OPTIMIZERS = [
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": {"name": "sgd", "nesterov": True}, "momentum": 0.9, "weight_decay": 0.01},
    {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.1},
    {"optimizer": {"name": "adamw", "betas": [0.8, 0.9], "eps": 1e-4}, "learning_rate": 0.01, "weight_decay": 0.1},
    {"optimizer": "adagrad", "learning_rate": 0.05, "weight_decay": 0.1},
    {"optimizer": {"name": "rmsprop", "alpha": 0.9, "eps": 1e-4}, "learning_rate": 0.01},
]
SETTINGS = [
    {"schedule": {"name": "cosine", "rounds": 3, "warmup": 1}},
    {"schedule": {"name": "linear", "over": "steps", "end": 0.1}, "optimizer": "adam"},
    {"schedule": {"name": "step", "every": 1, "gamma": 0.3}, "momentum": 0.5},
    {"max_grad_norm": 0.05},
    {"class_weights": "balanced"},
    {"class_weights": [1.0, 0.0, 3.0], "label_smoothing": 0.2},
    {"micro_batch_size": 3, "max_grad_norm": 0.5},
]
ALL = [{"epochs": 2, **settings} for settings in (*OPTIMIZERS, *SETTINGS)]
BOTH = {"optimizer": "adam", "schedule": {"name": "linear", "over": "steps"}, "max_grad_norm": 0.1, "epochs": 2}
QUICK = {**BOTH, "class_weights": "balanced", "label_smoothing": 0.1, "micro_batch_size": 2}


def test_the_list_covers_all_optimizers_that_are_equal_in_all_frameworks():
    names = [o["optimizer"] if isinstance(o["optimizer"], str) else o["optimizer"]["name"] for o in OPTIMIZERS]
    assert set(names) == set(PORTABLE_OPTIMIZERS)


@pytest.mark.parametrize("local", [QUICK, *(pytest.param(local, marks=pytest.mark.slow) for local in ALL)], ids=str)
def test_torch_and_jax_train_equally(local):
    ends = [updates(build(framework), local) for framework in ("torch", "jax")]
    assert np.abs(ends[0] - ends[1]).max() <= 2e-5
    assert np.abs(ends[0]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("local", ALL, ids=str)
def test_jax_trains_clients_equally_in_turn_and_together(local):
    trainer = build("jax")
    assert np.abs(updates(trainer, local) - updates(trainer.with_batching("vmap"), local)).max() <= 1e-5


@pytest.mark.parametrize("local", [QUICK, *ALL], ids=str)
def test_torch_trains_clients_equally_in_turn_and_together(local):
    """Check that padded steps and the padding of a batch do not move weights."""
    trainer = build("torch")
    for rule in (plain_training, proximal(0.3)):
        ends = [updates(trainer.with_batching(batching), local, rule=rule) for batching in ("map", "vmap")]
        assert np.abs(ends[0] - ends[1]).max() <= 2e-6
        alone = [updates(trainer, local, rule=rule, work=[work])[0] for work in WORK]
        assert np.array_equal(ends[0], alone)


@pytest.mark.parametrize("local", [{"epochs": 2, **o} for o in OPTIMIZERS] + [QUICK], ids=str)
def test_numpy_has_the_optimizers_of_torch(local):
    local = {**local, "class_weights": None, "label_smoothing": 0.0, "micro_batch_size": None}
    data, numpy_trainer = linear_problem(), LinearTrainer(3)
    work = [ClientWork(client=k, examples=data.train(k)) for k in range(3)]

    trainers, start_D = (numpy_trainer, torch_linear()), np.linspace(-1, 1, 4, dtype=np.float32)
    ends = [updates(trainer, local, work=work, start_D=start_D) for trainer in trainers]
    assert np.abs(ends[0] - ends[1]).max() <= 1e-5


ADAFACTOR, ADAMAX = (partial(kind, lr=0.01) for kind in (torch.optim.Adafactor, torch.optim.Adamax))


def by_hand(trainer, optimizer_of, num_steps, *, max_norm=None, smoothing=0.0, weight=None, rates=None):
    """Train with torch alone, on all examples of the first usable client in each step."""
    x, y = map(torch.from_numpy, (WORK[1].examples.x, WORK[1].examples.y))
    module = trainer.network(trainer.init(1)).train()
    parameters = list(module.parameters())
    optimizer = optimizer_of(parameters)
    for step in range(num_steps):
        if rates is not None:
            optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.zero_grad()
        loss_B = torch.nn.functional.cross_entropy(module(x), y, label_smoothing=smoothing, reduction="none")
        (loss_B if weight is None else loss_B * weight[y]).mean().backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
    leaves = {name: p.detach().numpy() for name, p in module.named_parameters()}
    return trainer.layout.pack(leaves) - trainer.init(1)


@pytest.mark.parametrize(
    ("local", "expected"),
    [
        ({"optimizer": "radam", "learning_rate": 0.01}, {"optimizer_of": lambda p: torch.optim.RAdam(p, lr=0.01)}),
        (
            {"optimizer": {"name": "nadam", "betas": [0.8, 0.9]}, "learning_rate": 0.01},
            {"optimizer_of": lambda p: torch.optim.NAdam(p, lr=0.01, betas=(0.8, 0.9))},
        ),
        ({"optimizer": "adafactor", "learning_rate": 0.01}, {"optimizer_of": ADAFACTOR}),
        ({"optimizer": torch.optim.Adamax, "learning_rate": 0.01}, {"optimizer_of": ADAMAX}),
        ({"max_grad_norm": 0.1, "learning_rate": 0.1}, {"max_norm": 0.1}),
        ({"label_smoothing": 0.2, "learning_rate": 0.1}, {"smoothing": 0.2}),
        ({"class_weights": [1, 2, 0.5], "learning_rate": 0.1}, {"weight": torch.tensor([1, 2, 0.5])}),
        (
            {"schedule": {"name": "linear", "over": "steps"}, "learning_rate": 0.1},
            {"rates": [0.1, 0.1 * 3 / 4, 0.1 * 2 / 4, 0.1 / 4]},
        ),
    ],
    ids=range(8),
)  # fmt: skip
def test_training_equals_a_loop_in_torch(local, expected):
    trainer = build("torch")
    hand = {"optimizer_of": lambda p: torch.optim.SGD(p, lr=0.1), **expected}
    ours = updates(trainer, {"steps": 4, "batch_size": 100, **local}, work=[WORK[1]])[0]
    assert np.abs(ours - by_hand(trainer, hand.pop("optimizer_of"), 4, **hand)).max() <= 2e-6


def test_balanced_weights_follow_from_the_counts_of_each_client():
    y = np.array([0, 0, 0, 1, 0, 0], np.int64)
    work = [ClientWork(client=0, examples=Examples(examples(6, 1).x, y))]
    trainer, one_step = build("torch"), {"steps": 1, "batch_size": 6, "learning_rate": 0.1}
    expected = updates(trainer, {**one_step, "class_weights": [6 / (2 * 5), 6 / (2 * 1), 7.0]}, work=work)
    assert np.array_equal(updates(trainer, {**one_step, "class_weights": "balanced"}, work=work), expected)
    assert np.abs(updates(trainer, one_step, work=work) - expected).max() > 1e-3


@pytest.mark.slow
def test_smoothed_targets_of_two_classes_are_the_target_of_the_cross_entropy():
    trainer = build("torch", BINARY)
    assert trainer.task.name == "binary"
    ends = [updates(build(f, BINARY), {"label_smoothing": 0.2}, work=BINARY) for f in ("torch", "jax")]
    assert np.abs(ends[0] - ends[1]).max() <= 1e-5
    assert np.abs(updates(trainer, {}, work=BINARY) - ends[0]).max() > 1e-4


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_micro_batches_only_save_memory(framework):
    trainer = build(framework)
    whole = updates(trainer, {"epochs": 2})
    assert np.abs(updates(trainer, {"epochs": 2, "micro_batch_size": 3}) - whole).max() <= 1e-6


@pytest.mark.parametrize("framework", ["torch", "jax", "numpy"])
@pytest.mark.parametrize(
    "local",
    [
        {"optimizer": "adm"},
        {"optimizer": {"name": "adadelta", "rhoo": 1}},
        {"optimizer": print},
        {"optimizer": "lbfgs"},
    ],
    ids=str,
)
def test_a_trainer_refuses_an_unknown_optimizer_by_name(framework, local):
    trainer = LinearTrainer(3) if framework == "numpy" else build(framework)
    with pytest.raises(SettingError, match=r"local\.optimizer is"):
        trainer.check_local(LocalSettings(**local))


def test_changes_of_the_loss_need_classes():
    regression = TorchTrainer(torch.nn.Linear(3, 1), task="regression")
    for local in ({"class_weights": "balanced"}, {"label_smoothing": 0.1}):
        with pytest.raises(SettingError, match="local"):
            regression.check_local(LocalSettings(**local))
    own_loss = TorchTrainer(torch.nn.Linear(3, 2), task="multiclass", loss=lambda outputs, y: outputs[:, 0])
    own_loss.check_local(LocalSettings(class_weights="balanced"))
    with pytest.raises(SettingError, match="label_smoothing is"):
        own_loss.check_local(LocalSettings(label_smoothing=0.1))


def test_the_bound_on_the_gradient_comes_before_the_local_rule():
    trainer, local = build("torch"), {"steps": 1, "max_grad_norm": 1e-9, "learning_rate": 1.0}
    pull = LocalRule(correct=lambda grad, w, w_global: grad + 1)
    assert updates(trainer, local, rule=pull) == pytest.approx(-1, abs=1e-6)


def test_a_rate_that_changes_within_a_round_differs_between_clients():
    local = {"schedule": {"name": "linear", "over": "steps"}, "optimizer": "adam"}
    steps = [LocalSettings(batch_size=4, **local).num_steps(size) for size in SIZES]
    assert len(set(steps)) > 1
    trainer = build("torch")
    together, alone = updates(trainer.with_batching("vmap"), local), updates(trainer, local, work=[WORK[1]])
    assert np.array_equal(together[1], alone[0])


KEPT = [{"optimizer": "adam", "learning_rate": 0.01}, *OPTIMIZERS]


@pytest.mark.parametrize("local", KEPT, ids=str)
def test_a_kept_optimizer_state_continues_in_the_next_round(local):
    """Check that two rounds of two steps equal a round of four steps."""
    trainer, settings = build("torch"), {"batch_size": 100, "steps": 2, **local, "optimizer_state": "keep"}
    rule = with_optimizer_state(plain_training, LocalSettings(**settings))
    params_D, state = trainer.init(1), initial_rule_state(rule, trainer.layout, trainer.init(1))
    for _ in range(2):
        work = [WORK[1]._replace(client_state=state)]
        request = Request(round=2, seed=1, params_D=params_D, local=LocalSettings(**settings))
        result = trainer.fit(request, rule, work)
        params_D = params_D + np.asarray(result.delta_KD)[0]
        state = {name: v_K[0] for name, v_K in result.client_state.items()}
    whole = updates(trainer, {**settings, "steps": 4, "optimizer_state": "reset"}, work=[WORK[1]])[0]
    assert np.abs(params_D - trainer.init(1) - whole).max() <= 1e-6


def federated(trainer, local, *, batching="map", stop=None):
    """Return the model after three rounds; ``stop`` ends the run after this round and resumes it."""
    x, y = arrays(WORK)
    data = from_arrays(x, y, assignment=np.repeat(np.arange(len(WORK)), SIZES), task="multiclass")
    strategy, engine = strategies.fedprox(mu=0.1), vector(data, trainer, batching=batching)
    state = start(strategy, trainer.init(1), engine, seed=1)
    settings = LocalSettings(batch_size=4, epochs=2, optimizer_state="keep", **local)
    for last in (stop, 3) if stop else (3,):
        *_, done = federate(strategy, engine, state, schedule=Schedule(rounds=last), local=settings)
        state = done.state
    return state.params_D


@pytest.mark.parametrize("local", [KEPT[0], *(pytest.param(o, marks=pytest.mark.slow) for o in OPTIMIZERS)], ids=str)
def test_clients_keep_the_same_optimizer_state_in_all_batchings(local):
    model = federated(build("torch"), local)
    assert np.array_equal(model, federated(build("torch"), local, batching="vmap"))
    assert np.array_equal(model, federated(build("torch"), local, stop=1))


@pytest.mark.slow
@pytest.mark.parametrize("local", KEPT, ids=str)
def test_jax_keeps_the_optimizer_state_of_torch(local):
    model = federated(build("torch"), local)
    for framework, batching in (("jax", "map"), ("jax", "vmap"), ("mixed", "map")):
        assert np.abs(model - federated(build(framework), local, batching=batching)).max() <= 5e-5


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "rmsprop", {"name": "sgd", "nesterov": True}], ids=str)
def test_numpy_keeps_the_optimizer_state_of_torch(optimizer):
    data = linear_problem()
    local = {"optimizer": optimizer, "optimizer_state": "keep", "learning_rate": 0.01}
    local |= {"momentum": 0.9} if isinstance(optimizer, dict) else {}
    ends = []
    for trainer in (LinearTrainer(3), torch_linear()):
        strategy, engine = strategies.fedavg(), vector(data, trainer, batching="map")
        state = start(strategy, np.linspace(-1, 1, 4, dtype=np.float32), engine, seed=1)
        *_, done = federate(strategy, engine, state, schedule=Schedule(rounds=3), local=LocalSettings(**local))
        ends.append(done.state.params_D)
    assert np.abs(ends[0] - ends[1]).max() <= 1e-5


def test_only_portable_optimizers_keep_their_state():
    for optimizer in ("radam", torch.optim.Adam):
        with pytest.raises(SettingError, match="optimizer_state is keep"):
            LocalSettings(optimizer=optimizer, optimizer_state="keep")
    with pytest.raises(SettingError, match=r"local\.optimizer_state is keep"):
        with_optimizer_state(strategies.fedrep().local, LocalSettings(optimizer="adam", optimizer_state="keep"))
