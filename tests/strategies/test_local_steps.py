"""Strategies with a second gradient, a teacher or statistics of a batch: arithmetic, engines, claims, refusals."""

from functools import partial

import numpy as np
import pytest

import strategies
from fedlearn import (
    LocalRule,
    LocalSettings,
    Schedule,
    SettingError,
    Strategy,
    everyone,
    federate,
    serial,
    start,
    vector,
)
from fedlearn.algorithm.local_rule import HOOKS
from fedlearn.core import ClientWork, Request
from fedlearn.core.records import ExampleDP
from fedlearn.data.from_arrays import from_arrays
from fedlearn.loop.rule_support import require_support
from fedlearn.privacy.mechanisms import central, example
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.testing import LinearTrainer, check_strategy, linear_problem
from fedlearn.trainers.base import BaseTrainer
from simulations.models import build_trainer

torch = pytest.importorskip("torch")

SIZES, FEATURES, CLASSES = (31, 9, 20), 8, 4  # batches of 8 that are not full, in each client
NAMES = ("fedsam", "fedspeed", "fedntd", "fedgkd", "feddecorr", "fedcm", "proxskip")
SAMPLE = ("fedsam", "fedgkd", "feddecorr")  # a gradient, a teacher, a statistic of the batch
STRATEGIES = {name: getattr(strategies, name)() for name in NAMES}


def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, sum(SIZES)).astype(np.int64)
    return from_arrays(x, y, assignment=np.repeat(np.arange(3), SIZES), task="multiclass")


DATA = problem()


def build(framework="torch"):
    return build_trainer("mlp", DATA, input_shape=(FEATURES,), hidden=(5,), framework=framework)[0]


def end(strategy, trainer, engine=serial, *, stop=None, **local):
    """Return the model after three rounds; ``stop`` ends the run after this round and resumes it."""
    engine = engine(DATA, trainer)
    state = start(strategy, trainer.init(1), engine, seed=1)
    settings = LocalSettings(**{"batch_size": 8, "learning_rate": 0.1, **local})
    for last in (stop, 3) if stop else (3,):
        *_, done = federate(strategy, engine, state, schedule=Schedule(rounds=last), local=settings)
        state = done.state
    engine.close()
    return np.asarray(state.params_D)


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_clients_train_equally_in_turn_and_together(name):
    """Check that the padding of a block of clients does not enter a statistic, a teacher or a gradient."""
    strategy, trainer = STRATEGIES[name], build()
    model = end(strategy, trainer)
    assert np.abs(model - end(strategy, trainer, partial(vector, batching="vmap"))).max() <= 1e-6
    assert np.array_equal(model, end(strategy, trainer, stop=1))
    assert np.abs(model - end(strategies.fedavg(weighting="equal"), trainer)).max() > 1e-4


@pytest.mark.parametrize("name", ["scaffold", "fednova"])
def test_frameworks_weight_gradients_with_momentum_equally(name):
    """Check unequal numbers of steps, so that each client has another weight."""
    strategy, local = getattr(strategies, name)(momentum=0.9), {"momentum": 0.9, "epochs": 3}
    model = end(strategy, build(), **local)
    assert np.array_equal(model, end(strategy, build(), stop=1, **local))
    for framework, batching in (("torch", "vmap"), ("jax", "map"), ("jax", "vmap"), ("mixed", "map")):
        other = end(strategy, build(framework), partial(vector, batching=batching), **local)
        assert np.abs(model - other).max() <= 1e-5, (framework, batching)
    plain = end(getattr(strategies, name)(), build(), epochs=3)
    assert np.abs(model - plain).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_frameworks_and_processes_train_equally(name):
    strategy, trainer = STRATEGIES[name], build()
    model = end(strategy, trainer)
    assert np.array_equal(model, end(strategy, trainer, partial(vector, batching="process_pool")))
    for framework, batching in (("jax", "map"), ("jax", "vmap"), ("mixed", "map")):
        other = end(strategy, build(framework), partial(vector, batching=batching))
        assert np.abs(model - other).max() <= 1e-5, (framework, batching)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "feddecorr"])
def test_micro_batches_only_save_memory(name):
    for framework, batching in (("torch", "map"), ("torch", "vmap"), ("jax", "map")):
        trainer, engine = build(framework), partial(vector, batching=batching)
        ends = [end(STRATEGIES[name], trainer, engine, micro_batch_size=size) for size in (None, 3)]
        assert np.abs(ends[0] - ends[1]).max() <= 1e-6, (framework, batching)


# one local step against the loss of the paper, in torch alone


def one_step(rule, *, state=None, broadcast=None, learning_rate=0.1):
    """Return the global model, the model after one step on all examples of client 0, and their gradient."""
    trainer, examples = build(), DATA.train(0)
    params_D = trainer.init(1)
    local = LocalSettings(steps=1, batch_size=100, learning_rate=learning_rate)
    request = Request(round=1, seed=1, params_D=params_D, local=local, broadcast=broadcast or {})
    work = ClientWork(client=0, examples=examples, client_state=state or {})
    delta_D = np.asarray(trainer.fit(request, rule, [work]).delta_KD)[0]
    return params_D, -delta_D / learning_rate


def gradient_by_hand(params_D, loss):
    """Return the gradient of ``loss(module, outputs, features, y)`` at the parameters."""
    trainer, examples = build(), DATA.train(0)
    module, seen = trainer.network(params_D), []
    module.out.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    outputs = module(torch.from_numpy(examples.x))
    loss(outputs, seen[0], torch.from_numpy(examples.y)).backward()
    return trainer.layout.pack({name: p.grad.numpy() for name, p in module.named_parameters()})


def outputs_of(params_D):
    return torch.from_numpy(build().predict(params_D, DATA.train(0).x))


def cross_entropy(outputs, features, y):
    return torch.nn.functional.cross_entropy(outputs, y)


def test_fedsam_takes_the_gradient_at_the_worst_point_of_the_neighborhood():
    params_D, gradient_D = one_step(strategies.fedsam(rho=0.5).local)
    first_D = gradient_by_hand(params_D, cross_entropy)
    second_D = gradient_by_hand(params_D + 0.5 * first_D / np.linalg.norm(first_D), cross_entropy)
    assert np.allclose(gradient_D, second_D, atol=1e-5)
    assert np.abs(first_D - second_D).max() > 1e-3


def test_fedspeed_mixes_two_gradients_and_sends_the_corrected_model():
    strategy = strategies.fedspeed(rho=0.5, alpha=0.3, penalty=2.0)
    prox_D = np.linspace(-0.1, 0.1, build().layout.num_parameters, dtype=np.float32)
    params_D, gradient_D = one_step(strategy.local, state={"prox": prox_D})
    first_D = gradient_by_hand(params_D, cross_entropy)
    second_D = gradient_by_hand(params_D + 0.5 * first_D, cross_entropy)
    assert np.allclose(gradient_D, 0.7 * first_D + 0.3 * second_D - prox_D, atol=1e-5)
    delta_KD = np.ones((1, 3), np.float32)
    state, _ = strategy.local.after_training(delta_KD, np.ones(1), 0.1, prox=0.5 * delta_KD)
    assert np.allclose(state["prox"], 0.5 - 2.0)
    assert np.allclose(strategy.local.send(delta_KD, **state), 1 + 1.5 / 2.0)


def test_fedntd_distils_the_not_true_classes():
    from fedlearn.core.random import Purpose, generator

    trainer = build()
    teacher_D = trainer.init(1)
    start_D = teacher_D + generator(0, Purpose.INIT).normal(0, 0.3, len(teacher_D)).astype(np.float32)
    rule = strategies.fedntd(beta=0.7, tau=2.0).local
    examples = DATA.train(0)
    local = LocalSettings(steps=1, batch_size=100, learning_rate=0.1)
    work = ClientWork(client=0, examples=examples, start_D=start_D)
    request = Request(round=1, seed=1, params_D=teacher_D, local=local)
    gradient_D = -np.asarray(trainer.fit(request, rule, [work]).delta_KD)[0] / 0.1

    def loss(outputs, features, y):
        keep = torch.ones_like(outputs, dtype=torch.bool).scatter_(1, y[:, None], False)
        student, teacher = (z[keep].view(len(y), CLASSES - 1) / 2.0 for z in (outputs, outputs_of(teacher_D)))
        kl = torch.nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
        return cross_entropy(outputs, features, y) + 0.7 * kl

    assert np.allclose(gradient_D, gradient_by_hand(start_D, loss), atol=1e-5)


def test_fedgkd_distils_the_mean_of_the_last_global_models():
    """Check the mean that the server sends against the models of a run, and the loss of a step."""
    strategy, trainer = strategies.fedgkd(gamma=3.0, num_models=3), build()
    engine = serial(DATA, trainer)
    state = start(strategy, trainer.init(1), engine, seed=1)
    models = [state.params_D] * 3
    local = LocalSettings(batch_size=8, learning_rate=0.3)
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=5), local=local):
        models = [done.state.params_D, *models[:2]]
        lag_D = np.asarray(strategy.server.broadcast(done.state.server)["lag"])
        assert np.allclose(models[0] - lag_D, np.mean(models, axis=0), atol=1e-6)
    params_D, gradient_D = one_step(strategy.local, broadcast={"lag": lag_D})

    def loss(outputs, features, y):
        teacher = outputs_of(params_D - lag_D).softmax(1)
        kl = torch.nn.functional.kl_div(outputs.log_softmax(1), teacher, reduction="batchmean")
        return cross_entropy(outputs, features, y) + 1.5 * kl

    assert np.allclose(gradient_D, gradient_by_hand(params_D, loss), atol=1e-5)


def test_feddecorr_penalizes_the_correlation_of_features():
    params_D, gradient_D = one_step(strategies.feddecorr(beta=5.0).local)

    def loss(outputs, features, y):
        scaled = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-8).sqrt()
        correlation = scaled.T @ scaled / len(y)
        return cross_entropy(outputs, features, y) + 5.0 * (correlation**2).mean()

    assert np.allclose(gradient_D, gradient_by_hand(params_D, loss), atol=1e-5)


# claims of the papers


def trained(strategy, *, rounds=10, **local):
    trainer = build()
    engine = serial(DATA, trainer)
    state = start(strategy, trainer.init(1), engine, seed=1)
    settings = LocalSettings(**{"batch_size": 8, "learning_rate": 0.3, "epochs": 2, **local})
    *_, done = federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=settings)
    return done.state.params_D


@pytest.mark.slow
def test_fedsam_ends_in_a_flatter_minimum():
    x, y = (torch.from_numpy(np.concatenate([getattr(DATA.train(k), name) for k in range(3)])) for name in ("x", "y"))

    def sharpness(params_D, radius=0.5):
        """Return the rise of the loss along the gradient."""
        trainer = build()
        module = trainer.network(params_D)
        loss = torch.nn.functional.cross_entropy(module(x), y)
        parts = torch.autograd.grad(loss, list(module.parameters()))
        names = [name for name, _ in module.named_parameters()]
        grad_D = trainer.layout.pack({n: g.numpy() for n, g in zip(names, parts, strict=True)})
        outputs = torch.from_numpy(trainer.predict(params_D + radius * grad_D / np.linalg.norm(grad_D), x.numpy()))
        return float((torch.nn.functional.cross_entropy(outputs, y) - loss).detach())

    assert sharpness(trained(strategies.fedsam(rho=0.5))) < 0.8 * sharpness(trained(strategies.fedavg()))


@pytest.mark.slow
def test_feddecorr_keeps_the_features_apart():
    def correlation(strategy):
        module, seen = build().network(trained(strategy)), []
        module.out.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach().numpy()))
        module(torch.from_numpy(DATA.train(0).x))
        return float(np.mean(np.corrcoef(seen[0].T) ** 2))

    assert correlation(strategies.feddecorr(beta=1.0)) < 0.8 * correlation(strategies.fedavg())


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [strategies.fedntd(beta=3.0), strategies.fedgkd(gamma=6.0)], ids=["fedntd", "fedgkd"]
)
def test_a_distilled_client_forgets_less_of_the_global_model(strategy):
    """Check the outputs for classes that a client does not have, after its local training."""
    trainer, model_D = build(), trained(strategies.fedavg(), rounds=20)
    examples = DATA.train(0)
    rows = np.flatnonzero(examples.y < 2)
    mine, others = type(examples)(examples.x[rows], examples.y[rows]), DATA.train(2).x
    local = LocalSettings(batch_size=8, learning_rate=0.1, epochs=20)
    request = Request(round=1, seed=1, params_D=model_D, local=local, broadcast={"lag": 0 * model_D})

    def change(rule):
        delta_D = np.asarray(trainer.fit(request, rule, [ClientWork(client=0, examples=mine)]).delta_KD)[0]
        rare = [torch.from_numpy(trainer.predict(p, others)).softmax(1)[:, 2:] for p in (model_D, model_D + delta_D)]
        return float((rare[0] - rare[1]).abs().mean())

    assert change(strategy.local) < 0.9 * change(LocalRule())


OPTIMUM = -0.6  # slope of least mean loss of two clients: (w - 1)^2 + 4 (w + 1)^2


def slope(small, strategy, **settings):
    last, _ = small.run(strategy, small.two_clients(), **{"rounds": 60, "steps": 20, **settings})
    return float(last.state.params_D[1])


def test_proxskip_reaches_the_optimum_where_federated_averaging_does_not(small):
    """Check clients with different optima, and random numbers of local steps."""
    settings = {"rounds": 150, "steps": None, "learning_rate": 0.02}
    assert abs(slope(small, strategies.fedavg()) - OPTIMUM) > 0.3
    assert slope(small, strategies.proxskip(probability=0.1), **settings) == pytest.approx(OPTIMUM, abs=1e-3)


@pytest.mark.slow
def test_fedspeed_reaches_the_optimum_of_different_clients(small):
    strategy = strategies.fedspeed(rho=0.0, penalty=1.0)
    assert slope(small, strategy, rounds=100) == pytest.approx(OPTIMUM, abs=1e-3)


def test_fedcm_drifts_less_than_federated_averaging(small):
    drifts = [
        abs(slope(small, s) - OPTIMUM) for s in (strategies.fedcm(alpha=0.1), strategies.fedavg(weighting="equal"))
    ]
    assert drifts[1] > 0.2
    assert drifts[0] < 0.3 * drifts[1]


def test_fedcm_sends_the_mean_direction_of_a_local_step(small):
    last, _ = small.run(strategies.fedcm(alpha=1.0), small.two_clients(), rounds=1, steps=3)
    start_D = LinearTrainer(1).init(1)
    momentum_D = np.asarray(last.state.server["momentum"])
    assert np.allclose(momentum_D, (start_D - last.state.params_D) / (3 * 0.05), atol=1e-5)


# refusals


class Solver(LinearTrainer):
    """Train with a solver of its own, which reads no local rule."""

    def fit_client(self, request, rule, work):
        return super().fit_client(request, LocalRule(), work)


HOOKED = {
    "correct": LocalRule(correct=lambda grad, w, w_global: 2 * grad),
    "adjust_logits": LocalRule(adjust_logits=lambda outputs, counts: outputs),
    "penalty": LocalRule(penalty=lambda batch, w_global: 0),
    "gradient": LocalRule(gradient=lambda gradient_at, w, w_global: gradient_at(w)),
    "frozen_parameters": LocalRule(frozen_parameters=("out.*",)),
}


def test_the_list_covers_all_hooks():
    assert set(HOOKED) == set(HOOKS)
    for name, rule in HOOKED.items():
        assert rule.hooks == (name,)


@pytest.mark.parametrize("name", HOOKS)
def test_a_trainer_refuses_each_hook_that_it_does_not_apply(name):
    trainer = BaseTrainer()
    trainer.rule_hooks = frozenset(HOOKS) - {name}
    with pytest.raises(SettingError, match=f"without LocalRule.{name}"):
        require_support(trainer, HOOKED[name], LocalSettings())
    trainer.rule_hooks = frozenset({name})
    require_support(trainer, HOOKED[name], LocalSettings())


def test_a_run_refuses_a_rule_before_the_first_round():
    """Check a trainer without a declaration, which would ignore the rule."""

    class Ignorant:
        def __init__(self):
            self.inner = LinearTrainer(3)

        def __getattr__(self, name):
            if name == "rule_hooks":
                raise AttributeError(name)
            return getattr(self.inner, name)

    data = linear_problem()
    for rule in (HOOKED["gradient"], HOOKED["penalty"]):
        strategy = Strategy(select=everyone(), local=rule)
        engine = serial(data, Ignorant())
        state = start(strategy, engine.trainer.init(1), engine, seed=1)
        with pytest.raises(SettingError, match="which the numpy trainer does not apply"):
            next(federate(strategy, engine, state, schedule=Schedule(rounds=1)))


@pytest.mark.parametrize(
    "strategy", [strategies.fedprox(), strategies.fedsam(), strategies.feddyn()], ids=["fedprox", "fedsam", "feddyn"]
)
def test_a_solver_of_its_own_is_no_plain_training_in_silence(strategy):
    trainer, data = Solver(3), linear_problem()
    engine = serial(data, trainer)
    state = start(strategy, trainer.init(1), engine, seed=1)
    with pytest.raises(SettingError, match="which the numpy trainer does not apply"):
        next(federate(strategy, engine, state, schedule=Schedule(rounds=1)))
    Stated = type("Stated", (Solver,), {"fit_client": Solver.fit_client, "rule_hooks": frozenset({"correct"})})
    assert Stated.rule_hooks == {"correct"}


def settings_of(name):
    return LocalSettings(example_dp=ExampleDP()) if name == "dp" else LocalSettings(micro_batch_size=2)


@pytest.mark.parametrize("name", ["fedsam", "fedspeed", "fedntd", "fedgkd", "feddecorr", "proxskip"])
def test_noise_on_gradients_of_examples_is_refused_by_name(name):
    with pytest.raises(Exception, match="privacy=example"):
        example(noise_multiplier=1.0).validate(STRATEGIES[name], LocalSettings())
    if name != "proxskip":
        with pytest.raises(SettingError, match=r"local\.example_dp"):
            require_support(build(), STRATEGIES[name].local, settings_of("dp"))


def test_micro_batches_of_a_coupled_penalty_are_refused():
    with pytest.raises(SettingError, match=r"local\.micro_batch_size"):
        require_support(build(), STRATEGIES["feddecorr"].local, settings_of("micro"))


@pytest.mark.parametrize("local", [{"steps": 3}, {"epochs": 2}], ids=str)
def test_a_strategy_that_draws_its_steps_refuses_others(local):
    with pytest.raises(SettingError, match="draws the number of local steps"):
        end(STRATEGIES["proxskip"], build(), **local)


def test_fedcm_needs_steps_that_the_server_knows():
    strategy, trainer = STRATEGIES["fedcm"], build()
    population = Population(clients=DATA.clients, rounds=3)
    private, _ = central(noise_multiplier=1.0).protect(strategy, LocalSettings(), population)
    with pytest.raises(SettingError, match=r"local\.steps is None"):
        end(private, trainer)
    assert np.isfinite(end(private, trainer, steps=2)).all()


def test_buffers_of_the_client_are_refused_with_a_teacher():
    from fedlearn.algorithm import with_buffer_policy
    from fedlearn.core.layout import Layout

    layout = Layout.from_shapes([("out.weight", (1, 3))], [("norm.running_mean", (1,))])
    assert with_buffer_policy(STRATEGIES["fedntd"], layout, "average").buffers == "average"
    with pytest.raises(SettingError, match="buffers is local"):
        with_buffer_policy(STRATEGIES["fedntd"], layout, "local")


# the kit


def mask_ignored(batch, w_global):
    return 0.1 * ((batch.features - batch.features.mean(0)) ** 2).mean()


def coupled(batch, w_global):
    return batch.mean(batch.features**2).sum() + 0 * batch.outputs[:, 0]


def strategy_of(penalty, **fields):
    return Strategy(select=everyone(), local=LocalRule(penalty=penalty, **fields))


def test_the_kit_finds_a_penalty_that_reads_padding():
    with pytest.raises(AssertionError, match="rows of padding"):
        check_strategy(strategy_of(mask_ignored, couples_examples=True))


def test_the_kit_finds_a_coupled_penalty_that_is_not_declared():
    with pytest.raises(AssertionError, match="couples_examples=True"):
        check_strategy(strategy_of(coupled))


@pytest.mark.parametrize("framework", ["numpy", pytest.param("torch", marks=pytest.mark.slow)])
def test_the_kit_runs_padded_batches(framework, monkeypatch):
    """Check the run alone, without the direct check of the penalty."""
    from fedlearn.testing import strategies as kit

    monkeypatch.setattr(kit, "check_hooks", lambda rule, rng: None)
    problem = {} if framework == "numpy" else {"data": DATA, "trainer": build()}
    with pytest.raises(AssertionError, match="padding of batches changes the result"):
        check_strategy(strategy_of(mask_ignored, couples_examples=True), **problem)


@pytest.mark.slow
def test_the_kit_names_its_arguments_where_its_problem_does_not_fit():
    rule = LocalRule(penalty=lambda batch, w_global: 0 * batch.features[:, 0])

    def refuse(batch, w_global):
        raise SettingError("model", "this", "another model", "model=mlp")

    with pytest.raises(AssertionError, match=r"data=\.\.\., trainer=\.\.\."):
        check_strategy(Strategy(select=everyone(), local=rule._replace(gradient=lambda *a, **k: refuse(*a[:2]))))


def test_a_second_gradient_has_the_same_draws_and_keeps_the_statistics():
    """Check dropout and batch norm: the gradient at the same point is the same, and statistics change once."""
    from fedlearn.trainers.torch import TorchTrainer

    net = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5), torch.nn.Linear(6, CLASSES)
    )
    trainer = TorchTrainer(net, task="multiclass")
    local = LocalSettings(batch_size=8, epochs=2)
    request = Request(round=1, seed=1, params_D=trainer.init(1), local=local)
    work = [ClientWork(client=k, examples=DATA.train(k)) for k in range(3)]
    twice = LocalRule(gradient=lambda gradient_at, w, w_global: (gradient_at(w) + gradient_at(w)) / 2)
    plain, hooked = (np.asarray(trainer.fit(request, rule, work).delta_KD) for rule in (LocalRule(), twice))
    assert np.abs(plain - hooked).max() <= 1e-6


@pytest.mark.slow
def test_a_second_gradient_has_the_same_draws_and_keeps_the_statistics_in_jax():
    nn = pytest.importorskip("flax.linen")
    from fedlearn.trainers.jax import JaxTrainer

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
            return nn.Dense(CLASSES)(nn.Dropout(0.5, deterministic=not train)(x))

    trainer = JaxTrainer(Net(), task="multiclass", input_shape=(FEATURES,))
    request = Request(round=1, seed=1, params_D=trainer.init(1), local=LocalSettings(batch_size=8, epochs=2))
    work = [ClientWork(client=k, examples=DATA.train(k)) for k in range(3)]
    twice = LocalRule(gradient=lambda gradient_at, w, w_global: (gradient_at(w) + gradient_at(w)) / 2)
    zero = LocalRule(penalty=lambda batch, w_global: 0 * batch.outputs[:, 0])
    plain, *hooked = (np.asarray(trainer.fit(request, rule, work).delta_KD) for rule in (LocalRule(), twice, zero))
    assert max(np.abs(plain - other).max() for other in hooked) <= 1e-6
