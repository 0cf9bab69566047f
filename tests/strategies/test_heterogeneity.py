"""Claims of the papers on heterogeneous clients, on problems with known solutions."""

import numpy as np
import pytest

import strategies
from fedlearn import Examples, FederatedData, LocalRule, LocalSettings, SettingError, Strategy, everyone
from fedlearn.core import ClientWork, Request
from fedlearn.extend import gradient_weight
from fedlearn.testing import LinearTrainer
from simulations import models

torch = pytest.importorskip("torch")

OPTIMUM = -0.6  # slope of least mean loss of two clients: (w - 1)^2 + 4 (w + 1)^2


def slope(small, strategy, *, rounds=60, data=None, **local):
    last, _ = small.run(strategy, data or small.two_clients(), rounds=rounds, **{"steps": 20, **local})
    return float(last.state.params_D[1])


def test_many_local_steps_lead_federated_averaging_astray(small):
    assert abs(slope(small, strategies.fedavg()) - OPTIMUM) > 0.3


@pytest.mark.parametrize("strategy", [strategies.scaffold(), strategies.feddyn(alpha=1.0)], ids=["scaffold", "feddyn"])
def test_drift_is_removed_and_the_true_optimum_reached(small, strategy):
    assert slope(small, strategy) == pytest.approx(OPTIMUM, abs=1e-3)


def test_scaffold_remembers_each_client_s_gradient_at_the_optimum(small):
    """Check the fixed point: c_k is the client's own gradient, 2 (w - 1) or 8 (w + 1), and their mean c is zero."""
    last, engine = small.run(strategies.scaffold(), small.two_clients(), rounds=60, steps=20)
    assert engine.client_states[0]["client_control"][1] == pytest.approx(2 * (OPTIMUM - 1), abs=1e-2)
    assert engine.client_states[1]["client_control"][1] == pytest.approx(8 * (OPTIMUM + 1), abs=1e-2)
    assert last.state.server["server"][1] == pytest.approx(0, abs=1e-2)
    assert last.bytes_up == 2 * 2 * last.bytes_up // 4 == 2 * 2 * 2 * 4, "control changes are counted"


@pytest.mark.parametrize(("weighting", "optimum"), [("equal", 0.0), ("examples", -0.6)])
def test_scaffold_reaches_the_optimum_of_its_weights(small, weighting, optimum):
    """Check two equally steep clients; the second has four times as many examples. The mean control stays zero."""
    data = small.two_clients(steepness=(1, 1), copies=(1, 4))
    last, _ = small.run(strategies.scaffold(weighting=weighting), data, rounds=60, steps=20)
    assert last.state.params_D[1] == pytest.approx(optimum, abs=1e-3)
    assert last.state.server["server"][1] == pytest.approx(0, abs=1e-2)


def test_unequal_numbers_of_steps_do_not_bias_fednova(small):
    """Check two clients with one and four steps per pass; the objective weighs them 1 to 4."""
    data = small.two_clients(steepness=(1, 1), copies=(1, 4))
    settings = {"rounds": 150, "data": data, "steps": None, "batch_size": 2, "learning_rate": 0.01}
    assert slope(small, strategies.fedavg(), **settings) < -0.8
    assert slope(small, strategies.fednova(), **settings) == pytest.approx(-0.6, abs=0.02)


def test_fednova_is_fedavg_where_all_take_the_same_steps(small):
    data = small.two_clients(copies=(1, 4))
    ends = [slope(small, s, rounds=5, data=data, steps=3) for s in (strategies.fedavg(), strategies.fednova())]
    assert ends[0] == pytest.approx(ends[1], abs=1e-6)


MOMENTUM = 0.9


def test_the_gradient_weight_is_the_update_of_constant_gradients():
    """Check the closed form against SGD with momentum on gradients of one."""
    for momentum in (0.0, 0.5, 0.9):
        velocity = total = 0.0
        for steps in range(1, 30):
            velocity = momentum * velocity + 1
            total += velocity
            assert gradient_weight(steps, momentum) == pytest.approx(total)
            weight_K = gradient_weight(torch.tensor([steps, 2.0 * steps]), momentum)
            assert weight_K[0].item() == pytest.approx(total, rel=1e-5)


def test_momentum_does_not_bias_fednova_with_unequal_numbers_of_steps(small):
    """Check the optimum, and that the number of steps as the weight would miss it."""
    data = small.two_clients(steepness=(1, 1), copies=(1, 4))
    settings = {"rounds": 300, "data": data, "steps": None, "batch_size": 2, "learning_rate": 0.002}
    settings["momentum"] = MOMENTUM
    counted = Strategy(select=everyone(), local=LocalRule(), aggregate=strategies.fednova().aggregate)
    assert slope(small, strategies.fednova(momentum=MOMENTUM), **settings) == pytest.approx(OPTIMUM, abs=0.02)
    assert abs(slope(small, counted, **settings) - OPTIMUM) > 0.05


@pytest.mark.parametrize("weighting", ["equal", "updates", "examples"])
def test_scaffold_removes_drift_with_momentum(small, weighting):
    """Check the optimum and the fixed point: each control variate is the gradient of its client."""
    strategy = strategies.scaffold(momentum=MOMENTUM, weighting=weighting)
    last, engine = small.run(
        strategy, small.two_clients(), rounds=400, steps=20, momentum=MOMENTUM, learning_rate=0.002
    )
    assert last.state.params_D[1] == pytest.approx(OPTIMUM, abs=1e-2)
    assert engine.client_states[0]["client_control"][1] == pytest.approx(2 * (OPTIMUM - 1), abs=0.05)
    assert engine.client_states[1]["client_control"][1] == pytest.approx(8 * (OPTIMUM + 1), abs=0.05)


@pytest.mark.parametrize("name", ["scaffold", "fednova"])
def test_a_strategy_with_momentum_refuses_other_momentum(small, name):
    strategy, data = getattr(strategies, name)(momentum=MOMENTUM), small.two_clients()
    for local, setting in [
        ({}, "local.momentum"),
        ({"momentum": 0.5}, "local.momentum"),
        ({"momentum": MOMENTUM, "optimizer": {"name": "sgd", "nesterov": True}}, "local.optimizer"),
        ({"momentum": MOMENTUM, "optimizer_state": "keep"}, "local.optimizer_state"),
        ({"momentum": MOMENTUM, "schedule": {"name": "linear", "over": "steps"}}, "local.schedule"),
    ]:
        with pytest.raises(SettingError) as error:
            slope(small, strategy, data=data, rounds=1, steps=1, **local)
        assert error.value.setting == setting
    for momentum in (1.0, -0.1, "0.9"):
        with pytest.raises(SettingError):
            getattr(strategies, name)(momentum=momentum)


def losses(small, strategy, **local):
    last, _ = small.run(strategy, small.two_clients(), rounds=200, **{"steps": 1, "learning_rate": 0.02, **local})
    return last.evaluation.per_client["loss"]


def test_q_fedavg_narrows_the_spread_of_losses(small):
    spreads = [np.ptp(losses(small, strategies.qfedavg(q=q, lipschitz=50))) for q in (0.0, 1.0, 5.0)]
    assert spreads[0] > 1.5
    assert spreads[0] > 1.5 * spreads[1] > 1.5**2 * spreads[2]
    assert np.allclose(losses(small, strategies.qfedavg(q=0)), losses(small, strategies.fedavg(weighting="equal")))


def test_minimax_leaves_no_client_worse_off_than_another(small):
    """Check that both losses are equal at the slope -1/3, the best for the worse client."""
    fair, mean = losses(small, strategies.afl(learning_rate=0.05)), losses(small, strategies.fedavg())
    assert fair.max() < mean.max() - 0.5
    assert fair == pytest.approx(16 / 9, abs=0.1)


def test_minimax_weights_are_a_distribution_on_the_clients(small):
    last, _ = small.run(strategies.afl(), small.two_clients(), rounds=20, steps=1)
    (memory,) = last.state.stages
    assert memory["clients"].tolist() == [0, 1]
    assert memory["weights"].sum() == pytest.approx(1)
    assert (memory["weights"] >= 0).all()
    plain = strategies.afl(learning_rate=0.0)
    assert np.allclose(losses(small, plain), losses(small, strategies.fedavg(weighting="equal")), atol=1e-5)


def test_extrapolation_is_faster_where_one_model_fits_all(small):
    """Check eight clients that know one coordinate each: the mean is one eighth of the step of each client."""
    data = small.federation([(np.eye(8)[k : k + 1], [1.0 + k]) for k in range(8)])

    def left(strategy):
        last, _ = small.run(strategy, data, rounds=10, steps=10, learning_rate=0.2)
        return last.evaluation.pooled["loss"]

    assert left(strategies.fedexp(epsilon=1e-6)) < 0.2 * left(strategies.fedavg())


def test_the_extrapolated_step_is_never_shorter_than_the_mean():
    rng = np.random.default_rng(0)
    aggregate = strategies.fedexp().aggregate
    from fedlearn import Updates

    for spread in (0.0, 0.1, 3.0):
        delta_KD = (1 + spread * rng.normal(size=(6, 5))).astype(np.float32)
        counts = np.ones(6, np.int64)
        updates = Updates(clients_K=np.arange(6), delta_KD=delta_KD, num_examples_K=counts, num_steps_K=counts)
        step_D, mean_D = aggregate.finalize(aggregate.add(aggregate.init(None), updates)), delta_KD.mean(axis=0)
        eta = np.sum(delta_KD**2) / (12 * (np.sum(mean_D**2) + 0.001))
        assert np.allclose(step_D, max(1, eta) * mean_D, rtol=1e-5)


@pytest.fixture(scope="module")
def skewed(digits):
    """Return five clients with 40 examples each of two of the ten digits.

    Each has 2 examples of each other digit, except for the first, which has its two digits only.
    """
    x, y = digits
    rng, clients = np.random.default_rng(0), []
    for k in range(5):
        counts = [40 if digit // 2 == k else 2 * (k > 0) for digit in range(10)]
        rows = [rng.choice(np.flatnonzero(y[:1200] == digit), n, replace=False) for digit, n in enumerate(counts)]
        clients.append(Examples(x[np.concatenate(rows)], y[np.concatenate(rows)]))
    return FederatedData(
        task="multiclass",
        num_classes=10,
        clients=range(5),
        train=clients.__getitem__,
        test=clients.__getitem__,
        pooled_test=lambda: Examples(x[1200:], y[1200:]),
    )


def trainer_of(data, framework, *, model="linear"):
    pytest.importorskip(framework)
    return models.build_trainer(model, data, input_shape=(8, 8, 1), framework=framework)[0]


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_calibrated_logits_unlearn_no_class_that_a_client_has_not(skewed, framework):
    trainer = trainer_of(skewed, framework)
    work = [ClientWork(client=0, examples=skewed.train(0))]
    order = Request(round=1, seed=1, params_D=trainer.init(1), local=LocalSettings(epochs=3, learning_rate=0.1))

    def moved(rule):
        delta_D = np.asarray(trainer.fit(order, rule, work).delta_KD)[0]
        return np.abs(trainer.layout.unpack(delta_D)["out.bias"])

    plainly, calibrated = moved(LocalRule()), moved(strategies.fedlc().local)
    assert (plainly[2:] > 0.005).all()
    assert (calibrated[2:] < 1e-6).all()
    assert (calibrated[:2] > 0.01).all()


def test_calibrated_logits_are_the_same_in_both_frameworks_alone_and_together(skewed):
    built = [trainer_of(skewed, "torch"), trainer_of(skewed, "jax"), trainer_of(skewed, "torch").with_batching("vmap")]
    work = [ClientWork(client=k, examples=skewed.train(k)) for k in range(5)]
    order = Request(round=1, seed=1, params_D=built[0].init(1), local=LocalSettings(learning_rate=0.1))
    item, *others = [np.asarray(trainer.fit(order, strategies.fedlc().local, work).delta_KD) for trainer in built]
    assert all(np.allclose(item, other, atol=1e-5) for other in others)


def test_calibrated_logits_help_where_labels_are_skewed_and_clients_train_long(small, skewed):
    trainer = trainer_of(skewed, "torch", model="mlp")

    def accuracy(strategy):
        last, _ = small.run(strategy, skewed, rounds=2, trainer=trainer, epochs=10, batch_size=16, learning_rate=0.3)
        return last.evaluation.pooled["accuracy"]

    assert accuracy(strategies.fedlc()) > accuracy(strategies.fedavg()) + 0.03


def test_calibrated_logits_are_refused_where_there_are_no_classes(small):
    from fedlearn.core.tasks import as_task
    from fedlearn.trainers.base import class_counts

    with pytest.raises(SettingError, match="a scenario with classes"):
        class_counts(LinearTrainer(1), as_task("regression"), None, ())


def test_where_training_begins_is_where_an_update_is_counted_from(skewed):
    """Check each trainer and batching: a client with a start of its own moves as if it had received that model."""
    built = [trainer_of(skewed, "torch"), trainer_of(skewed, "torch").with_batching("vmap"), trainer_of(skewed, "jax")]
    params_D = built[0].init(1)
    there_D = built[0].init(2)
    local = LocalSettings(learning_rate=0.1)
    for trainer in built:
        order, other = (Request(round=1, seed=1, params_D=sent_D, local=local) for sent_D in (params_D, there_D))
        mixed = [
            ClientWork(client=0, examples=skewed.train(0)),
            ClientWork(client=1, examples=skewed.train(1), start_D=there_D),
        ]
        plainly = [ClientWork(client=k, examples=skewed.train(k)) for k in (0, 1)]
        found = np.asarray(trainer.fit(order, LocalRule(), mixed).delta_KD)
        assert np.allclose(found[0], np.asarray(trainer.fit(order, LocalRule(), plainly).delta_KD)[0], atol=1e-6)
        assert np.allclose(found[1], np.asarray(trainer.fit(other, LocalRule(), plainly).delta_KD)[1], atol=1e-6)


def test_losses_are_told_to_the_aggregator_alone_without_protection():
    assert Strategy(select=everyone(), local=strategies.qfedavg().local).local.evaluate_models == ("w_global",)
