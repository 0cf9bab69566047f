"""Each strategy of this repository fulfills the contract, with NumPy and in both frameworks."""

import inspect
from copy import copy
from dataclasses import replace

import numpy as np
import pytest

import strategies
from fedlearn import Examples, FederatedData, Schedule, Strategy, federate, poisson, start, vector
from fedlearn.algorithm import min_separation
from fedlearn.extend import as_numpy
from fedlearn.testing import LOCAL_SETTINGS, check_strategy
from fedlearn.testing.problems import problem_for
from simulations import models

BUILDERS = [getattr(strategies, name) for name in strategies.__all__]
VARIANTS = [{}, {"clients_per_round": 3}, {"weighting": "equal"}]
SMALL = {"personal_parameters": "out.bias", "frozen_parameters": "out.bias"}  # for a model with one layer


def accepted_settings(builder, settings):
    """Return the settings that this strategy accepts."""
    return {name: settings[name] for name in settings.keys() & inspect.signature(builder).parameters.keys()}


@pytest.mark.parametrize(
    ("builder", "settings"),
    [
        pytest.param(builder, settings, id=f"{builder.__name__}-{settings}")
        for builder in BUILDERS
        for settings in VARIANTS
        if accepted_settings(builder, settings) == settings
    ],
)
def test_every_strategy_keeps_the_contract(builder, settings):
    check_strategy(builder(**settings))


@pytest.mark.parametrize(
    "strategy",
    [
        strategies.fedavg(clients_per_round=30),
        strategies.fedbuff(buffer_size=14),
        strategies.fltrust(root_client=5, num_root_examples=1000),
        strategies.fedper(personal_parameters=("hidden.*", "out.*", "norm[12].?eight")),
        strategies.bulyan(num_malicious=2),
        Strategy(select=poisson(rate=0.1)),
        Strategy(select=min_separation(3, 5)),
    ],
    ids=["large cohort", "large buffer", "root examples", "personal parameters", "malicious", "Poisson", "separation"],
)
def test_the_kit_chooses_a_problem_that_meets_the_needs_of_a_strategy(strategy):
    check_strategy(strategy)


ONE_LAYER = {"personal_parameters": "out.*", "frozen_parameters": "out.*"}
# strategies that change each part of a compiled program; the slow run compiles the others
COMPILED = ("fedavg", "fedprox", "fedlc", "scaffold", "moon", "fedper", "ifca", "qfedavg")
PAIRS = [
    pytest.param(
        framework,
        builder,
        id=f"{framework}-{builder.__name__}",
        marks=[pytest.mark.slow] if framework == "jax" and builder.__name__ not in COMPILED else [],
    )
    for framework in ("torch", "jax")
    for builder in BUILDERS
    if builder is not strategies.flora  # needs adapters; tests/trainers/test_mergeable_adapters.py has both frameworks
]


@pytest.fixture(scope="module")
def problem(request, digits):
    pytest.importorskip(request.param)
    return some_digits(digits, request.param)


def some_digits(digits, framework):
    """Return a small federation of uneven clients, and a trainer of one framework."""
    x, y = digits
    ends = np.cumsum([12, 40, 25, 33, 8, 20])
    clients = [Examples(x[a:b], y[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    data = FederatedData(
        task="multiclass", num_classes=10, clients=range(6), train=clients.__getitem__, test=clients.__getitem__
    )
    return data, models.build_trainer("mlp", data, input_shape=(8, 8, 1), framework=framework)[0]


@pytest.mark.parametrize(("problem", "builder"), PAIRS, indirect=["problem"])
def test_every_strategy_keeps_the_contract_in_both_frameworks(builder, problem):
    data, trainer = problem
    check_strategy(
        builder(**accepted_settings(builder, {"clients_per_round": 4, **ONE_LAYER})),
        data=data,
        trainer=trainer,
    )


@pytest.mark.parametrize(
    "builder",
    [
        strategies.fedrep,
        strategies.apfl,
        strategies.ifca,
        strategies.moon,
        pytest.param(strategies.fedala, marks=pytest.mark.slow),
        pytest.param(strategies.fedamp, marks=pytest.mark.slow),
    ],
    ids=lambda b: b.__name__,
)
def test_what_clients_keep_and_choose_is_the_same_in_both_frameworks(builder, digits):
    ends = []
    for framework in ("torch", "jax"):
        pytest.importorskip(framework)
        data, trainer = some_digits(digits, framework)
        engine = vector(data, trainer, batching="map")
        state = start(builder(), trainer.init(1), engine, seed=1)
        *_, last = federate(builder(), engine, state, schedule=Schedule(rounds=3), local=LOCAL_SETTINGS)
        memories = [v for client in data.clients for v in engine.client_states[client].values()]
        ends.append(np.concatenate([as_numpy(last.state.params_D), *memories]))
    # the weights of fedala are quotients of small differences
    assert np.allclose(*ends, atol=1e-4 if builder is strategies.fedala else 1e-5)


def elsewhere(trainer, as_library):
    """Return a copy of a trainer with updates as arrays of another library, as a trainer on a GPU has."""
    copied, fit = copy(trainer), trainer.fit

    def fit_elsewhere(order, rule, work):
        updates = fit(order, rule, work)
        return replace(updates, delta_KD=as_library(updates.delta_KD))

    copied.fit = fit_elsewhere
    return copied


@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_every_strategy_takes_updates_of_any_array_library(builder, library):
    xp, ends = pytest.importorskip(library), []
    strategy = builder(**accepted_settings(builder, SMALL))
    data, numpy_trainer = problem_for(strategy)
    for trainer in (numpy_trainer, elsewhere(numpy_trainer, xp.asarray)):
        engine = vector(data, trainer, block_size=4)
        state = start(strategy, trainer.init(1), engine, seed=1)
        *_, last = federate(strategy, engine, state, schedule=Schedule(rounds=3), local=LOCAL_SETTINGS)
        ends.append(as_numpy(last.state.params_D))
    assert np.allclose(*ends, atol=1e-5)
