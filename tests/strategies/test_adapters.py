"""Strategies for low-rank adapters keep the claims of their papers."""

from dataclasses import replace

import numpy as np
import pytest

import strategies
from fedlearn import Examples, LocalSettings, Schedule, SettingError, federate, serial, start, vector
from fedlearn.algorithm import CompositionError, LocalRule, Strategy, everyone, identity, stacked
from fedlearn.core import ExampleDP
from fedlearn.core.records import ClientWork, Request
from fedlearn.loop.client_update import initial_client_state
from fedlearn.loop.local_training import PERSONAL_PARAMETERS, train
from fedlearn.loop.training_loop import next_request
from fedlearn.privacy.mechanisms import central, distributed, example, ftrl, secagg
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.testing import LinearTrainer, check_strategy, linear_problem
from fedlearn.testing.adapters import FACTOR_A, FACTOR_B, MERGED, AdapterTrainer
from fedlearn.testing.problems import class_problem
from simulations import models

LOCAL = LocalSettings(batch_size=8, steps=6, learning_rate=0.5)
EXACT = {"weighting": "equal"}


def problem(num_clients=6, **settings):
    data = class_problem(num_clients=num_clients, num_features=5, num_classes=4)
    return data, AdapterTrainer(5, 4, **settings)


def run(strategy, data, trainer, *, rounds=1, local=LOCAL, engine=serial, params_D=None):
    """Return the last round and the engine."""
    used = engine(data, trainer)
    state = start(strategy, trainer.init(1) if params_D is None else params_D, used, seed=1)
    *_, last = federate(strategy, used, state, schedule=Schedule(rounds=rounds), local=local)
    return last, used


def client_products(strategy, data, trainer, params_D):
    """Return the matrix of the layer after local training at each client, in round 1."""
    used = serial(data, trainer)
    request = next_request(strategy, used, start(strategy, params_D, used, seed=1), LOCAL)
    full = replace(strategy, local=LocalRule(frozen_parameters=strategy.local.frozen_parameters))
    work = [ClientWork(c, data.train(c), initial_client_state(full, trainer.layout, params_D)) for c in data.clients]
    updates = trainer.fit(request, full.local, work)
    return np.stack([trainer.product(params_D + delta_D) for delta_D in updates.delta_KD])


def trained(data, trainer):
    """Return parameters at which no factor is zero."""
    return run(strategies.fedavg(), data, trainer, rounds=3)[0].state.params_D


def distance_to_mean_of_products(strategy):
    data, trainer = problem()
    params_D = trained(data, trainer)
    last, _ = run(strategy, data, trainer, params_D=params_D)
    exact = client_products(strategy, data, trainer, params_D).mean(axis=0)
    moved = np.abs(exact - trainer.product(params_D)).max()
    return np.abs(trainer.product(last.state.params_D) - exact).max() / moved


def test_ffa_lora_aggregates_the_products_exactly_and_fedit_does_not():
    assert distance_to_mean_of_products(strategies.ffa_lora(**EXACT)) < 1e-5
    assert distance_to_mean_of_products(strategies.fedit(**EXACT)) > 1e-2


def test_fedit_is_the_mean_of_each_factor():
    data, trainer = problem()
    ends = [run(builder(), data, trainer, rounds=3)[0] for builder in (strategies.fedit, strategies.fedavg)]
    assert np.array_equal(*(end.state.params_D for end in ends))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_factors_keep_their_initial_values_and_do_not_travel(optimizer):
    data, trainer = problem()
    strategy, local = strategies.ffa_lora(), replace(LOCAL, optimizer=optimizer, weight_decay=0.1)
    last, _ = run(strategy, data, trainer, rounds=3, local=local)
    first, end = (trainer.layout.unpack(np.asarray(v)) for v in (trainer.init(1), last.state.params_D))
    assert np.array_equal(first[FACTOR_A], end[FACTOR_A])
    assert np.abs(end[FACTOR_B]).max() > 0.1
    assert last.bytes_up == 6 * 4 * end[FACTOR_B].size
    assert [leaf.name for leaf in strategy.shared_layout(trainer.layout).leaves] == [FACTOR_B]


def noise_in_product(builder, noise_multiplier=0.7):
    """Return the mean squared distance of the product to the run without noise, over seeds."""
    data, trainer = problem(num_clients=12)
    params_D, errors = trained(data, trainer), []
    mechanism = central(clip_norm=1.0, noise_multiplier=noise_multiplier, sampling="fixed_size")
    population = Population(clients=data.clients, rounds=5)
    strategy, local = mechanism.protect(builder(clients_per_round=6, **EXACT), LOCAL, population)
    quiet = replace(strategy, stages=tuple(s._replace(server=identity, event=None) for s in strategy.stages))
    for seed in range(6):
        ends = []
        for each in (strategy, quiet):
            used = serial(data, trainer)
            state = start(each, params_D, used, seed=seed)
            *_, last = federate(each, used, state, schedule=Schedule(rounds=5), local=local)
            ends.append(trainer.product(last.state.params_D))
        errors.append(np.square(ends[0] - ends[1]).sum())
    return float(np.mean(errors))


def test_noise_damages_the_product_of_ffa_lora_less():
    assert noise_in_product(strategies.ffa_lora) < 0.7 * noise_in_product(strategies.fedit)


MECHANISMS = {
    "central": central(noise_multiplier=1.0, sampling="fixed_size"),
    "secagg": secagg(),
    "distributed": distributed(noise_multiplier=1.0),
    "example": example(noise_multiplier=1.0),
}
SUMS = {**MECHANISMS, "ftrl": ftrl(noise_multiplier=1.0)}
BUILDERS = ("fedit", "ffa_lora", "fedsa_lora", "diloco")
QUICK = {("ffa_lora", "central"), ("ffa_lora", "distributed"), ("fedsa_lora", "example"), ("fedit", "secagg")}
COMBINATIONS = [
    pytest.param(builder, kind, marks=() if (builder, kind) in QUICK else pytest.mark.slow)
    for builder in BUILDERS
    for kind in MECHANISMS
]


@pytest.mark.parametrize(("builder", "kind"), COMBINATIONS)
def test_strategies_for_adapters_run_with_each_mechanism(builder, kind):
    data, trainer = problem()
    strategy, population = (
        getattr(strategies, builder)(**EXACT, clients_per_round=6),
        Population(clients=data.clients, rounds=2),
    )
    strategy, local = MECHANISMS[kind].protect(strategy, replace(LOCAL, steps=2), population)
    last, _ = run(strategy, data, trainer, rounds=2, local=local)
    assert np.isfinite(last.state.params_D).all()


def test_dp_sgd_spends_no_clip_norm_on_frozen_factors():
    data, trainer = problem()
    params_D = trained(data, trainer)
    local = replace(LOCAL, steps=1, learning_rate=1.0, example_dp=ExampleDP(clip=1e-3, noise_multiplier=0.0))
    rule = strategies.ffa_lora().local
    used = serial(data, trainer)
    request = next_request(
        Strategy(select=everyone()), used, start(Strategy(select=everyone()), params_D, used, seed=1), local
    )
    work = [ClientWork(0, Examples(data.train(0).x[:1], data.train(0).y[:1]))]
    delta_D = trainer.fit(replace(request, local=replace(local, batch_size=1)), rule, work).delta_KD[0]
    assert np.linalg.norm(delta_D) == pytest.approx(1e-3, rel=1e-4)  # all of the bound belongs to B


def test_fedsa_lora_keeps_b_at_each_client_and_shares_a():
    data, trainer = problem()
    strategy = strategies.fedsa_lora()
    last, used = run(strategy, data, trainer, rounds=3)
    kept = [used.client_states[c][PERSONAL_PARAMETERS] for c in data.clients]
    assert all(np.abs(a - b).max() > 1e-2 for i, a in enumerate(kept) for b in kept[:i])
    assert [leaf.name for leaf in strategy.shared_layout(trainer.layout).leaves] == [FACTOR_A]
    assert not np.allclose(
        trainer.layout.unpack(np.asarray(last.state.params_D))[FACTOR_A],
        trainer.layout.unpack(trainer.init(1))[FACTOR_A],
    )


def test_diloco_is_fedavg_with_adamw_without_outer_momentum():
    data, trainer = problem()
    local = replace(LOCAL, optimizer="adamw", learning_rate=0.05)
    ends = [
        run(strategy, data, trainer, rounds=3, local=local)[0].state.params_D
        for strategy in (strategies.diloco(learning_rate=1.0, momentum=0.0), strategies.fedavg(**EXACT))
    ]
    assert np.array_equal(*ends)


@pytest.mark.framework
def test_diloco_steps_with_the_momentum_of_nesterov_in_torch():
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.zeros(3))
    outer = torch.optim.SGD([w], lr=0.7, momentum=0.9, nesterov=True)
    server, state, w_D = strategies.diloco().server, {"v": np.zeros(3, np.float32)}, np.zeros(3, np.float32)
    for update_D in np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32):
        w.grad = torch.tensor(-update_D)
        outer.step()
        step_D, state = server.update(update_D, state, None)
        w_D = w_D + step_D
    assert np.allclose(w.detach().numpy(), w_D, atol=1e-6)


def rounds_to_loss(strategy, target, most=30):
    data, trainer = problem()
    local, used = replace(LOCAL, optimizer="adamw", learning_rate=0.01), serial(data, trainer)
    state = start(strategy, trainer.init(1), used, seed=1)
    for done in federate(strategy, used, state, schedule=Schedule(rounds=most), local=local):
        losses = [
            trainer.example_gradients(done.state.params_D, data.train(c).x, data.train(c).y)[0] for c in data.clients
        ]
        if np.concatenate(losses).mean() < target:
            return done.state.round
    return most + 1


def test_diloco_needs_fewer_rounds_than_fedavg_for_an_equal_loss():
    assert rounds_to_loss(strategies.diloco(), 0.9) < 0.6 * rounds_to_loss(strategies.fedavg(**EXACT), 0.9)


@pytest.mark.framework
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_torch_and_jax_freeze_the_same_parameters(optimizer):
    data, ends = class_problem(num_features=5, num_classes=4), []
    strategy = strategies.ffa_lora(frozen_parameters="hidden_0.weight")
    local = replace(LOCAL, optimizer=optimizer, learning_rate=0.05, weight_decay=0.1)
    for framework, engine in (("torch", serial), ("torch", vector), ("jax", serial)):
        pytest.importorskip(framework)
        trainer, _ = models.build_trainer("mlp", data, input_shape=(5,), framework=framework)
        last, _ = run(strategy, data, trainer, rounds=2, local=local, engine=engine)
        frozen = trainer.layout.slices["hidden_0.weight"]
        assert np.array_equal(trainer.init(1)[frozen], np.asarray(last.state.params_D)[frozen])
        ends.append(np.asarray(last.state.params_D))
    assert np.array_equal(ends[0], ends[1])
    assert np.allclose(ends[0], ends[2], atol=1e-5)


@pytest.mark.framework
def test_dp_sgd_with_frozen_parameters_clips_the_others_in_torch_and_is_refused_in_jax():
    data = class_problem(num_features=5, num_classes=4)
    local = replace(
        LOCAL, steps=1, learning_rate=1.0, batch_size=1, example_dp=ExampleDP(clip=1e-3, noise_multiplier=0)
    )
    rule, item = LocalRule(frozen_parameters=("hidden_0.*",)), Examples(data.train(1).x[:1], data.train(1).y[:1])
    trainer, _ = models.build_trainer("mlp", data, input_shape=(5,), framework="torch")
    request = Request(round=1, seed=1, params_D=trainer.init(1), local=local)
    delta_D = trainer.fit(request, rule, [ClientWork(0, item)]).delta_KD[0]
    assert np.linalg.norm(delta_D) == pytest.approx(1e-3, rel=1e-3)
    assert not delta_D[trainer.layout.positions(rule.frozen_parameters)].any()
    pytest.importorskip("jax")
    trainer, _ = models.build_trainer("mlp", data, input_shape=(5,), framework="jax")
    with pytest.raises(SettingError, match="framework=torch"):
        trainer.fit(request, rule, [ClientWork(0, item)])


def test_a_model_without_adapters_is_refused_with_its_names():
    for builder, setting in (
        (strategies.ffa_lora, "frozen_parameters"),
        (strategies.fedsa_lora, "personal_parameters"),
    ):
        with pytest.raises(SettingError, match=f"strategy.{setting} is .*lora"):
            run(builder(), linear_problem(), LinearTrainer(3))


# FLoRA: adapters of different ranks.

RANKS = (1, 2, 4)


def mergeable_problem(num_clients=6, rank=4, **settings):
    return problem(num_clients, rank=rank, scale=2.0, is_mergeable=True, **settings)


def products_of_ranks(strategy, data, trainer, params_D):
    """Return the matrix of the layer after local training at each client, and the number of its trained factors."""
    used = serial(data, trainer)
    request = next_request(strategy, used, start(strategy, params_D, used, seed=1), LOCAL)
    work = [
        ClientWork(c, data.train(c), initial_client_state(strategy, trainer.layout, params_D)) for c in data.clients
    ]
    starts = [strategy.local.start(trainer.layout, params_D, c) for c in data.clients]
    models = [s + d for s, d in zip(starts, train(trainer, strategy.local, request, work).delta_KD, strict=True)]
    ranks = [int(trainer.layout.unpack(model)[FACTOR_A].any(axis=1).sum()) for model in models]
    return np.stack([trainer.product(model) for model in models]), ranks


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_flora_aggregates_the_products_of_different_ranks_exactly(weighting):
    data, trainer = mergeable_problem()
    strategy = strategies.flora(ranks=RANKS, weighting=weighting)
    params_D = run(strategy, data, trainer, rounds=2)[0].state.params_D
    products, ranks = products_of_ranks(strategy, data, trainer, params_D)
    assert ranks == [1, 2, 4, 1, 2, 4]
    sizes = [len(data.train(c)) if weighting == "examples" else 1 for c in data.clients]
    exact = np.average(products, axis=0, weights=sizes)
    end_D = run(strategy, data, trainer, params_D=params_D)[0].state.params_D
    assert np.abs(trainer.product(end_D) - exact).max() < 1e-5 * np.abs(exact - trainer.product(params_D)).max()
    assert np.linalg.matrix_rank(exact - trainer.product(params_D), tol=1e-5) > 2  # the stack has a higher rank


def test_the_mean_of_padded_factors_differs_from_the_stack():
    data, trainer = mergeable_problem()
    strategy = strategies.flora(ranks=RANKS, **EXACT)
    params_D = np.asarray(trainer.init(1))
    products, _ = products_of_ranks(strategy, data, trainer, params_D)
    padded = replace(
        strategies.fedit(**EXACT),
        local=strategy.local,
        stages=(),
        aggregate=mean_of_models(strategy, trainer, params_D),
    )
    end_D = run(padded, data, trainer, params_D=params_D)[0].state.params_D
    assert np.abs(trainer.product(end_D) - products.mean(axis=0)).max() > 1e-2 * np.abs(products).max()


def mean_of_models(strategy, trainer, params_D):
    """Return an aggregator that takes the mean of zero-padded factors, as FedIT with different ranks would."""
    shared = strategy.shared_positions(trainer.layout)

    def rule(updates, state, context):
        starts = [strategy.local.start(trainer.layout, params_D, c)[shared] for c in updates.clients_K]
        return (np.stack(starts) + updates.delta_KD).mean(axis=0) - params_D[shared], state

    return stacked(rule, reads=("clients_K",))


def test_flora_starts_each_round_with_a_fresh_adapter_and_sends_no_merged_matrix():
    data, trainer = mergeable_problem()
    strategy, used = strategies.flora(ranks=RANKS), serial(data, trainer)
    state, firsts = start(strategy, trainer.init(1), used, seed=1), []
    for done in federate(strategy, used, state, schedule=Schedule(rounds=3), local=LOCAL):
        leaves = trainer.layout.unpack(np.asarray(done.state.params_D))
        assert not leaves[FACTOR_B].any()
        assert leaves[MERGED].any()
        assert done.bytes_up == 6 * 4 * (leaves[FACTOR_A].size + leaves[FACTOR_B].size)
        firsts.append(leaves[FACTOR_A])
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(firsts) for b in firsts[:i])


def test_flora_with_equal_ranks_is_the_exact_mean_of_fedit_products():
    data, trainer = mergeable_problem()
    ends = [
        run(strategy, data, trainer)[0].state.params_D
        for strategy in (strategies.flora(), strategies.flora(ranks=[4]), strategies.flora(ranks=(4, 4)))
    ]
    assert all(np.array_equal(ends[0], end) for end in ends)


@pytest.mark.framework
def test_flora_keeps_the_guarantees_of_a_strategy_with_different_ranks():
    data, trainer = mergeable_problem(num_clients=12)
    check_strategy(strategies.flora(ranks=RANKS, clients_per_round=9), data=data, trainer=trainer)


@pytest.mark.parametrize("ranks", [[], [0], [1.5], "4", [True]])
def test_flora_refuses_ranks_that_are_no_counts(ranks):
    with pytest.raises(SettingError, match="ranks"):
        strategies.flora(ranks=ranks)


def test_flora_names_the_settings_of_the_model_that_it_needs():
    data, trainer = problem()
    with pytest.raises(SettingError, match=r"model.mergeable is False(.|\n)*try +model.mergeable=true"):
        run(strategies.flora(), data, trainer)
    data, trainer = mergeable_problem(rank=2)
    with pytest.raises(SettingError, match=r"strategy.ranks is \[1, 2, 4\](.|\n)*at most 2(.|\n)*model.rank=4"):
        run(strategies.flora(ranks=RANKS), data, trainer)


@pytest.mark.parametrize("kind", ["central", "secagg", "distributed", "ftrl"])
def test_flora_refuses_mechanisms_that_need_a_sum_of_updates(kind):
    population = Population(clients=range(6), rounds=2)
    message = r"multiplies the factors of each client(.|\n)*strategy=ffa_lora"
    with pytest.raises(CompositionError, match=message):
        SUMS[kind].protect(strategies.flora(ranks=RANKS, clients_per_round=6), LOCAL, population)


def test_flora_with_dp_sgd_needs_equal_ranks():
    data, trainer = mergeable_problem()
    population = Population(clients=data.clients, rounds=2)
    for ranks in (None, RANKS):
        strategy = strategies.flora(ranks=ranks, clients_per_round=6)
        strategy, local = MECHANISMS["example"].protect(strategy, replace(LOCAL, steps=2), population)
        if ranks is None:
            assert np.isfinite(run(strategy, data, trainer, local=local)[0].state.params_D).all()
            continue
        with pytest.raises(SettingError, match=r"local.example_dp(.|\n)*strategy.ranks=null"):
            run(strategy, data, trainer, local=local)
