"""Personal models beat the global one if clients differ, and personal parameters stay at their client."""

from dataclasses import replace

import numpy as np
import pytest

import strategies
from fedlearn import (
    CompositionError,
    Examples,
    FederatedData,
    LocalSettings,
    Scenario,
    Schedule,
    SettingError,
    Stage,
    Strategy,
    clip,
    expected_mean,
    federate,
    judge,
    start,
    uniform,
    vector,
)
from fedlearn.algorithm import Asynchrony
from fedlearn.core import ExampleDP
from fedlearn.core.layout import default_initial_parameters
from fedlearn.extend import as_numpy
from fedlearn.loop.local_aggregation import OLD_MODEL, WEIGHTS
from fedlearn.loop.local_training import PERSONAL_MODEL, PERSONAL_PARAMETERS
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.training_loop import next_request
from fedlearn.robust import squared_distances
from fedlearn.testing import LinearTrainer
from simulations import models
from strategies.fedamp import attention

BESIDE = {
    "ditto": strategies.ditto(penalty=0.1),
    "pfedme": strategies.pfedme(penalty=1.0, learning_rate=0.5),
    "apfl": strategies.apfl(),
}


@pytest.mark.parametrize("strategy", BESIDE.values(), ids=BESIDE)
def test_personal_models_beat_the_global_one_on_conflicting_clients(small, strategy):
    last, _ = small.run(strategy, small.two_clients(), rounds=15, steps=10)
    shared, personal = last.evaluation.per_client["loss"], last.evaluation.personal.per_client["loss"]
    assert (personal < 0.5 * shared).all()


def test_ditto_s_penalty_goes_from_training_alone_to_following_the_global_model(small):
    """Compare with the personal slope that minimizes (v - 1)^2 + penalty / 2 (v - w)^2."""
    for penalty in (0.0, 2.0):
        last, engine = small.run(strategies.ditto(penalty=penalty), small.two_clients(), rounds=40, steps=20)
        w, v = float(last.state.params_D[1]), float(engine.client_states[0][PERSONAL_MODEL][1])
        assert v == pytest.approx((2 + penalty * w) / (2 + penalty), abs=0.02)


def test_pfedme_s_personal_models_are_proximal_points_and_the_global_one_follows_their_mean(small):
    strategy = strategies.pfedme(penalty=2.0, learning_rate=0.25)
    last, engine = small.run(strategy, small.two_clients(), rounds=40, steps=40)
    w, (a, b) = float(last.state.params_D[1]), (float(engine.client_states[k][PERSONAL_MODEL][1]) for k in (0, 1))
    assert a == pytest.approx((2 + 2 * w) / 4, abs=0.01)
    assert b == pytest.approx((-8 + 2 * w) / 10, abs=0.01)
    assert w == pytest.approx((a + b) / 2, abs=0.01)


def test_apfl_predicts_with_the_mixture_and_trains_it(small):
    last, engine = small.run(strategies.apfl(alpha=0.25), small.two_clients(), rounds=40, steps=40, learning_rate=0.1)
    for k, wanted in ((0, 1.0), (1, -1.0)):
        mixture = 0.25 * engine.client_states[k][PERSONAL_MODEL][1] + 0.75 * last.state.params_D[1]
        assert mixture == pytest.approx(wanted, abs=0.1)
        assert last.evaluation.personal.per_client["loss"][k] < 0.05


def offsets(small):
    """Return clients with an equal slope, 1, and different offsets, -1 or 1."""
    x = np.linspace(-1, 1, 8)[:, None]
    return small.federation([(x, x[:, 0] + offset) for offset in (-1.0, 1.0)])


@pytest.mark.parametrize("name", ["fedper", "fedrep"])
def test_a_head_that_stays_beats_a_shared_one_on_conflicting_clients(small, name):
    last, engine = small.run(
        getattr(strategies, name)(personal_parameters="out.bias"), offsets(small), rounds=30, epochs=5
    )
    shared, _ = small.run(strategies.fedavg(), offsets(small), rounds=30, epochs=5)
    assert (last.evaluation.per_client["loss"] < 0.1 * shared.evaluation.per_client["loss"]).all()
    assert [float(engine.client_states[k][PERSONAL_PARAMETERS][0]) for k in (0, 1)] == pytest.approx([-1, 1], abs=0.1)
    assert last.state.params_D[1] == pytest.approx(1, abs=0.1)
    assert last.bytes_up == 2 * 4


def normed(framework) -> Trainer:
    pytest.importorskip(framework)
    if framework == "torch":
        from torch import nn

        from fedlearn.trainers.torch import TorchTrainer

        module = nn.Sequential()
        module.add_module("norm", nn.LayerNorm(4))
        module.add_module("out", nn.Linear(4, 1))
        return TorchTrainer(module, task="regression", initial=default_initial_parameters)
    from flax import linen

    from fedlearn.trainers.jax import JaxTrainer

    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(1, name="out")(linen.LayerNorm(name="norm", epsilon=1e-5)(x))

    return JaxTrainer(Normed(), task="regression", input_shape=(4,))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_fedbn_keeps_normalisation_layers_at_their_clients(small, framework):
    """Check features with a ten times larger mean at the second client: only its own scales can correct them."""
    trainer, x = normed(framework), np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    inner = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    y = inner[:, 0]
    clients = [Examples(x, 0.2 * y), Examples(x, 2 * y)]
    data = FederatedData(
        task="regression", num_classes=1, clients=range(2), train=clients.__getitem__, test=clients.__getitem__
    )
    settings = {"trainer": trainer, "epochs": 10, "batch_size": 8}
    current, engine = small.run(strategies.fedbn(), data, rounds=15, **settings)
    shared, _ = small.run(strategies.fedavg(), data, rounds=15, **settings)
    assert current.evaluation.pooled["loss"] < 0.3 * shared.evaluation.pooled["loss"]
    norms = trainer.layout.positions(("norm.*",))
    assert np.array_equal(as_numpy(current.state.params_D)[norms], trainer.init(1)[norms])
    assert not np.allclose(
        engine.client_states[0][PERSONAL_PARAMETERS], engine.client_states[1][PERSONAL_PARAMETERS], atol=0.1
    )
    assert current.bytes_up == 2 * 4 * 5


def test_ifca_recovers_two_planted_clusters(small):
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(20, 3)) for _ in range(6)]
    wanted = np.array([1.0, -2.0, 0.5])
    data = small.federation([(current, current @ (wanted if k % 2 else -wanted)) for k, current in enumerate(x)])
    last, engine = small.run(strategies.ifca(seed=1), data, rounds=30, steps=5, learning_rate=0.1)
    ends = np.stack([last.state.params_D[1:], last.state.aggregate["model_1"][1:]])
    assert np.allclose(np.sort(ends[:, 0]), [-1, 1], atol=0.05)
    assert np.allclose(ends[0], -ends[1], atol=0.1)
    assert last.evaluation.personal.worst("loss", higher_is_better=False) < 0.01
    assert last.evaluation.pooled["loss"] > 1, "one common model is wrong for half of the clients"
    assert last.bytes_down == 6 * 2 * 4 * 4
    assert last.bytes_up == 6 * 4 * 4
    assert len(engine.client_states) == 6


def clusters(small, *, num_examples=20, noise=0.0):
    """Return six clients of two groups with opposite slopes. Even clients have positive slopes."""
    rng, wanted = np.random.default_rng(0), np.array([1.0, -2.0, 0.5])
    x = [rng.normal(size=(num_examples, 3)) for _ in range(6)]
    signs = np.where(np.arange(6) % 2, 1, -1)
    y = [x_k @ (sign * wanted) + noise * rng.normal(size=num_examples) for x_k, sign in zip(x, signs, strict=True)]
    return small.federation(zip(x, y, strict=True))


def test_fedamp_attends_to_similar_clients_and_sends_each_client_its_mixture(small):
    data = clusters(small)
    last, engine = small.run(strategies.fedamp(sigma=1.0), data, rounds=20, steps=5, learning_rate=0.1)
    models_ND = last.state.aggregate["models"]
    weights_NN = attention(squared_distances(models_ND), alpha=1.0, sigma=1.0)
    same = np.add.outer(np.arange(6), np.arange(6)) % 2 == 0
    assert weights_NN[same].reshape(6, 3).sum(axis=1).min() > 0.999
    assert weights_NN[~same].max() < 1e-3
    assert last.evaluation.personal.worst("loss", higher_is_better=False) < 0.05
    assert last.evaluation.pooled["loss"] > 1, "one common model is wrong for half of the clients"
    assert last.bytes_down == 6 * 4 * 4, "each client receives one model"
    sent = next_request(strategies.fedamp(sigma=1.0), engine, last.state, LocalSettings(), (0, 3)).client_models
    assert np.allclose(sent[0], weights_NN[0] @ models_ND, atol=1e-6)
    assert list(sent) == [0, 3]


def test_fedamp_learns_from_similar_clients_what_few_noisy_examples_do_not_tell(small):
    """Compare with training alone: alpha near 0 sends each client its own model."""
    data = clusters(small, num_examples=5, noise=1.0)
    errors = []
    for alpha in (1.0, 1e-9):
        strategy = strategies.fedamp(alpha=alpha, sigma=3.0, penalty=alpha / 10)
        last, _ = small.run(strategy, data, rounds=20, steps=10, learning_rate=0.1)
        wanted = np.where(np.arange(6) % 2, 1, -1)[:, None] * np.array([1.0, -2.0, 0.5])
        errors.append(((last.state.aggregate["models"][:, 1:] - wanted) ** 2).sum(axis=1).mean())
    assert errors[0] < 0.3 * errors[1]


def test_fedamp_keeps_the_models_of_absent_clients(small):
    last, _ = small.run(strategies.fedamp(clients_per_round=2), clusters(small), rounds=12, steps=5)
    assert last.state.aggregate["clients"].tolist() == list(range(6))
    assert np.isfinite(last.state.aggregate["models"]).all()


@pytest.mark.parametrize(
    "fault", [{"asynchrony": Asynchrony(buffer_size=1, concurrency=1)}, {"stages": (Stage(needs_sum=True),)}]
)
def test_models_of_single_clients_are_refused_by_name_where_they_are_unsound(fault):
    with pytest.raises(CompositionError, match=r"sends each client its own model|only a sum removes the masks"):
        replace(strategies.fedamp(), **fault)


def test_a_strategy_that_sends_single_models_cannot_claim_privacy_by_noise_at_the_server():
    noisy = (clip(1.0), Stage(event=object(), is_nonexpansive=True))
    aggregate = expected_mean(4)._replace(client_models=lambda state, cohort: {})
    with pytest.raises(CompositionError, match="its own model"):
        Strategy(select=uniform(4), stages=noisy, aggregate=aggregate)


def test_fedala_starts_between_its_last_model_and_the_global_one_where_its_loss_is_small(small):
    """Check that two clients with opposite slopes reject the global slope, 0, and keep the common offset."""
    last, engine = small.run(
        strategies.fedala(adaptive_parameters="*", learning_rate=5.0, weighting="equal"),
        small.two_clients(steepness=(1.0, 1.0)),
        rounds=10,
        steps=5,
        learning_rate=0.1,
    )
    weights_K = [float(engine.client_states[k][WEIGHTS][1]) for k in (0, 1)]  # weight for the slope
    assert max(weights_K) < 0.1
    assert last.evaluation.personal.worst("loss", higher_is_better=False) < 0.05
    plain, _ = small.run(strategies.fedavg(weighting="equal"), small.two_clients(), rounds=10, steps=5)
    assert plain.evaluation.worst("loss", higher_is_better=False) > 0.5


def test_fedala_without_steps_of_its_weights_is_fedavg_bit_for_bit(small):
    ends = [
        small.run(strategy, small.two_clients(), rounds=5, steps=3)[0].state.params_D
        for strategy in (strategies.fedala(learning_rate=0.0), strategies.fedavg())
    ]
    assert np.allclose(*ends, rtol=0, atol=1e-6)


def test_fedala_first_trains_its_weights_until_the_loss_converges_then_for_one_pass(small):
    counts, passes = [], []

    class Counting(LinearTrainer):
        def fit(self, request, rule, work):
            passes.append(rule.client_state == (OLD_MODEL,))
            return super().fit(request, rule, work)

    strategy = strategies.fedala(adaptive_parameters="*", start_epochs=7, tolerance=0.0, learning_rate=0.01)
    for rounds in (1, 2, 3, 4):
        passes.clear()
        small.run(strategy, small.two_clients(), rounds=rounds, trainer=Counting(1), engine=vector, steps=2)
        counts.append(sum(passes))
    assert counts == [0, 7, 8, 9]


@pytest.mark.parametrize("builder", [strategies.fedala, strategies.fedamp])
def test_personal_models_beat_fedavg_on_clients_with_few_classes(builder, digits):
    pytest.importorskip("torch")
    x, y = digits
    parts = [np.flatnonzero((y == k) | (y == (k + 1) % 10))[:60] for k in range(10)]
    clients = [Examples(x[part], y[part]) for part in parts]
    data = FederatedData(
        task="multiclass", num_classes=10, clients=range(10), train=clients.__getitem__, test=clients.__getitem__
    )
    trainer = models.build_trainer("linear", data, input_shape=(8, 8, 1), framework="torch")[0]
    accuracy = {}
    for strategy in (builder(), strategies.fedavg()):
        engine = vector(data, trainer)
        state = start(strategy, trainer.init(1), engine, seed=1)
        evaluate = judge(Scenario(name="few", data=data, trainer=trainer, model="linear"))
        schedule, local = Schedule(rounds=2), LocalSettings(epochs=4, learning_rate=0.3)
        *_, last = federate(strategy, engine, state, schedule=schedule, local=local, evaluate=evaluate)
        chosen = last.evaluation.personal or last.evaluation
        accuracy[strategy.local.personal is not None] = chosen.pooled["accuracy"]
    assert accuracy[True] > accuracy[False] + 0.1


def test_fedala_refuses_example_dp_because_its_start_depends_on_data_without_noise(small):
    local = LocalSettings(example_dp=ExampleDP())
    with pytest.raises(SettingError, match="without noise"):
        small.run(strategies.fedala(), small.two_clients(), rounds=1, example_dp=local.example_dp)
