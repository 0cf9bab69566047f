"""Personal models beat the global one if clients differ, and personal parameters stay at their client."""

import numpy as np
import pytest

import strategies
from fedlearn import Examples, FederatedData
from fedlearn.core.layout import default_initial_parameters
from fedlearn.extend import as_numpy
from fedlearn.loop.local_training import PERSONAL_MODEL, PERSONAL_PARAMETERS
from fedlearn.loop.protocols import Trainer

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
    own, engine = small.run(strategies.fedbn(), data, rounds=15, **settings)
    shared, _ = small.run(strategies.fedavg(), data, rounds=15, **settings)
    assert own.evaluation.pooled["loss"] < 0.3 * shared.evaluation.pooled["loss"]
    norms = trainer.layout.positions(("norm.*",))
    assert np.array_equal(as_numpy(own.state.params_D)[norms], trainer.init(1)[norms])
    assert not np.allclose(
        engine.client_states[0][PERSONAL_PARAMETERS], engine.client_states[1][PERSONAL_PARAMETERS], atol=0.1
    )
    assert own.bytes_up == 2 * 4 * 5


def test_ifca_recovers_two_planted_clusters(small):
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(20, 3)) for _ in range(6)]
    wanted = np.array([1.0, -2.0, 0.5])
    data = small.federation([(own, own @ (wanted if k % 2 else -wanted)) for k, own in enumerate(x)])
    last, engine = small.run(strategies.ifca(seed=1), data, rounds=30, steps=5, learning_rate=0.1)
    ends = np.stack([last.state.params_D[1:], last.state.aggregate["model_1"][1:]])
    assert np.allclose(np.sort(ends[:, 0]), [-1, 1], atol=0.05)
    assert np.allclose(ends[0], -ends[1], atol=0.1)
    assert last.evaluation.personal.worst("loss", higher_is_better=False) < 0.01
    assert last.evaluation.pooled["loss"] > 1, "one common model is wrong for half of the clients"
    assert last.bytes_down == 6 * 2 * 4 * 4
    assert last.bytes_up == 6 * 4 * 4
    assert len(engine.client_states) == 6
