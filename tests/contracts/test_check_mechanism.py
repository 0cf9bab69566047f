"""`check_mechanism` accepts each mechanism of this repository, and rejects planted faults."""

from dataclasses import replace

import numpy as np
import pytest
from needs import needs

from fedlearn.algorithm.aggregation import expected_mean, mean
from fedlearn.algorithm.client_selection import poisson, uniform
from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Stage, Transform, clip_norm
from fedlearn.core.arrays import as_numpy
from fedlearn.core.privacy_guarantee import Neighbors, PrivacyGuarantee
from fedlearn.core.privacy_ledger import EpsilonDeltaEvent, Event, LaplaceEvent, RenyiEvent
from fedlearn.core.random import Purpose, generator, secret_uniforms
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.privacy.mechanisms import central, distributed, example, ftrl, local, none, secagg
from fedlearn.privacy.mechanisms.base import Mechanism
from fedlearn.testing import check_mechanism

needs("dp_accounting", reason="needs fedlearn[privacy]")

OURS = {
    "central, poisson": lambda: central(noise_multiplier=1.0),
    "central, fixed size": lambda: central(noise_multiplier=1.0, sampling="fixed_size"),
    "central, adaptive": lambda: central(noise_multiplier=0.8, clip="adaptive"),
    "local": lambda: local(noise_multiplier=2.0),
    "ftrl": lambda: ftrl(noise_multiplier=1.0, matrix="tree"),
    "ftrl, separated": lambda: ftrl(noise_multiplier=1.0, matrix="tree", separation=2),
    "example": lambda: example(noise_multiplier=1.0),
    "distributed": lambda: distributed(noise_multiplier=1.0),
    "secagg": lambda: secagg(),
}


LONG = ("central, adaptive", "ftrl, separated")  # variants


@pytest.mark.parametrize(
    "make", [pytest.param(make, id=name, marks=[pytest.mark.slow] * (name in LONG)) for name, make in OURS.items()]
)
def test_every_mechanism_of_ours_passes(make):
    check_mechanism(make())


SINGLE = Event(1.0)
QUICK = {"num_clients": 12, "rounds": 2, "num_draws": 64}


def normals(rng, size):
    return rng.standard_normal(size)


def laplacian(rng, size):
    return rng.laplace(size=size)


def l2(update, bound):
    return clip_norm(update, bound)


def l1(update, bound):
    length = np.abs(as_numpy(update)).sum(axis=-1, keepdims=True)
    return update * (bound / np.maximum(length, bound)).astype(np.float32)


def mine(
    *, applied=1.0, booked=SINGLE, draw=normals, clipped=l2, where=slice(None), select=None, aggregate=None,
    charges=lambda number: True, rng_of=None, **texts,
):  # fmt: skip
    """Build a user's mechanism: clip to 1, add noise of a scale to the mean, charge one event per round."""

    def source(context):
        if context.deployed:
            return np.random.default_rng(int(secret_uniforms((1,))[0] * 2**53))
        return generator(context.seed, Purpose.NOISE, round=context.round)

    def protect(strategy, local, population):
        cohort = strategy.select.law.size if strategy.select.law.size else len(population.clients)

        def clip(update, state, context):
            return clipped(update, 1.0), state

        def add_noise(update, state, context):
            noise = np.zeros(len(update))
            noise[where] = draw((rng_of or source)(context), len(update))[where]
            return (as_numpy(update) + applied / cohort * noise).astype(np.float32), state

        fields = {
            "kind": "mine", "unit": "client", "adjacency": "one client more or less", "delta": 1e-5,
            "noise_multiplier": applied, "clip_norm": 1.0, "not_covered": ("the evaluation",),
            "charge": lambda ledger, release: ledger.charge_federation(booked) if charges(release.round) else ledger,
            "epsilon_of": lambda ledger: max_epsilon_bounds([ledger.federation], delta=1e-5),
        }  # fmt: skip
        stage = Stage(client=Transform(update=clip), server=Transform(update=add_noise))
        return replace(
            strategy,
            select=select or strategy.select,
            aggregate=aggregate or expected_mean(cohort),
            stages=(stage,),
            privacy_guarantee=PrivacyGuarantee(**fields | texts),
        ), local

    return Mechanism(validate=lambda strategy, local: None, protect=protect, kind="mine")


def noise_at_clients(**settings):
    """Add noise at each client; replacing a client moves its upload by twice the clip norm."""

    def protect(strategy, local, population):
        def clip_and_noise(update_KD, state, context):
            seeds = [(generator(context.seed, Purpose.NOISE, round=context.round, client=c)) for c in context.clients_K]
            if context.deployed:
                seeds = [np.random.default_rng(int(u * 2**53)) for u in secret_uniforms((len(update_KD),))]
            noise_KD = np.stack([rng.standard_normal(update_KD.shape[1]) for rng in seeds])
            return (clip_norm(as_numpy(update_KD), 1.0) + noise_KD).astype(np.float32), state

        protected, local = mine(**settings).protect(strategy, local, population)
        return replace(protected, stages=(Stage(client=Transform(update=clip_and_noise)),)), local

    return Mechanism(validate=lambda strategy, local: None, protect=protect, kind="mine")


GOOD = {
    "gaussian": lambda: mine(),
    "more noise than booked": lambda: mine(applied=1.5, booked=Event(1.2)),
    "laplace": lambda: mine(
        applied=2.0, booked=LaplaceEvent(2.0), draw=laplacian, clipped=l1, noise_multiplier=None
    ),
    "stated epsilon": lambda: mine(
        applied=1.0, booked=EpsilonDeltaEvent(1.0), draw=laplacian, clipped=l1, noise_multiplier=None
    ),
    "stated divergences": lambda: mine(booked=RenyiEvent((2.0, 8.0), (1.0, 4.0)), noise_multiplier=None),
    "poisson": lambda: mine(booked=Event(1.0, "poisson", 0.5), select=poisson(rate=0.5), aggregate=expected_mean(6)),
    "noise at the clients": lambda: noise_at_clients(booked=Event(0.5), neighbors=Neighbors.REPLACE),
}  # fmt: skip


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_an_honest_mechanism_of_a_user_passes(make):
    check_mechanism(make(), **QUICK)


def falling():
    spent = iter([*range(9, 0, -1)] * 99)
    return mine(charges=lambda number: True, epsilon_of=lambda ledger: max_epsilon_bounds([((Event(30.0 / next(spent)), 1),)], delta=1e-5))  # fmt: skip # noqa: E501


def booking_another(mechanism, charge):
    def protect(strategy, local, population):
        protected, local = mechanism.protect(strategy, local, population)
        guarantee = protected.privacy_guarantee
        return replace(protected, privacy_guarantee=replace(guarantee, charge=charge(guarantee.charge))), local

    return replace(mechanism, protect=protect)


def first_noise_again(context):
    return generator(context.seed, Purpose.NOISE)


FAULTS = {
    "books a multiplier of 2, applies 1": (lambda: mine(booked=Event(2.0)), "booked noise multiplier 2"),
    "books 10 % too much noise": (lambda: mine(booked=Event(1.1)), "booked noise multiplier 1.1"),
    "books Laplace noise as Gaussian": (lambda: mine(draw=laplacian, booked=Event(1.0)), "another distribution"),
    "books Gaussian noise as Laplace": (lambda: mine(booked=LaplaceEvent(1.0), clipped=l1), "another distribution"),
    "clips the wrong norm for Laplace noise": (
        lambda: mine(draw=laplacian, booked=LaplaceEvent(1.0), noise_multiplier=None), "booked epsilon",
    ),
    "books half the epsilon": (
        lambda: mine(draw=laplacian, clipped=l1, booked=LaplaceEvent(2.0), noise_multiplier=None), "booked epsilon",
    ),
    "states an epsilon that is too small": (
        lambda: mine(draw=laplacian, clipped=l1, booked=EpsilonDeltaEvent(0.3)), "an attack finds",
    ),
    "states divergences that are too small": (
        lambda: mine(booked=RenyiEvent((2.0, 8.0), (0.05, 0.2))), "an attack finds",
    ),
    "books Poisson sampling, draws a fixed size": (lambda: mine(booked=Event(1.0, "poisson", 0.5)), "vary in size"),
    "books a rate that is too low": (
        lambda: mine(booked=Event(1.0, "poisson", 0.1), select=poisson(rate=0.5), aggregate=expected_mean(6)),
        "the rate 0.1 is booked",
    ),
    "books a fixed size, draws by Poisson": (
        lambda: mine(booked=Event(0.5, "fixed_size", 0.5), neighbors=Neighbors.REPLACE, select=poisson(rate=0.5),
                     aggregate=expected_mean(6)), "fixed size",
    ),
    "does not charge": (lambda: mine(charges=lambda number: False), "must be charged"),
    "does not charge the second round": (lambda: mine(charges=lambda number: number != 2), "booked noise multiplier"),
    "spares half of the coordinates": (lambda: mine(where=slice(0, 64)), "every coordinate"),
    "spares one coordinate": (lambda: mine(where=slice(1, None)), "every coordinate"),
    "adds one number to all coordinates": (
        lambda: mine(draw=lambda rng, size: np.full(size, rng.standard_normal())), "different coordinates",
    ),
    "adds no noise": (lambda: mine(applied=0.0), "carry no noise"),
    "adds the same noise in each round": (lambda: mine(rng_of=first_noise_again), "from the operating system"),
    "draws the noise of real clients from the seed": (
        lambda: mine(rng_of=lambda c: generator(c.seed, Purpose.NOISE, round=c.round)), "from the operating system",
    ),
    "does not clip": (lambda: mine(clipped=lambda update, bound: update), "booked noise multiplier"),
    "clips each coordinate": (lambda: mine(clipped=lambda update, bound: np.clip(update, -1, 1)), "booked noise"),
    "clips to twice the norm": (lambda: mine(clipped=lambda u, bound: clip_norm(u, 2.0)), "booked noise"),
    "divides by the responses": (lambda: mine(aggregate=mean(weighting="equal")), "booked noise multiplier"),
    "forgets that replacement doubles the sensitivity": (
        lambda: noise_at_clients(booked=Event(1.0), neighbors=Neighbors.REPLACE), "booked noise multiplier",
    ),
    "states no adjacency": (lambda: mine(adjacency=" "), "must state adjacency"),
    "states no delta": (lambda: mine(delta=None), "must state delta"),
    "states no noise multiplier": (lambda: mine(noise_multiplier=None), "must state noise_multiplier"),
    "states nothing that is not covered": (lambda: mine(not_covered=()), "does not cover"),
    "has another name in the header": (lambda: mine(kind="yours"), "the mechanism mine"),
    "cannot be shown": (lambda: mine(settings={"law": {1, 2}}), "JSON"),
    "has an epsilon that falls": (falling, "must not fall"),
    "has no guarantee": (none, "privacy_guarantee"),
    "does not charge lost responses": (
        lambda: booking_another(local(noise_multiplier=2.0), lambda charge: lambda ledger, release:
                                charge(ledger, replace(release, dropouts=()))), "lost response must be charged",
    ),
    "books more noise than DP-SGD adds": (
        lambda: booking_another(example(noise_multiplier=1.0), lambda charge: lambda ledger, release:
                                ledger.charge_clients({c: (Event(2.0), 1) for c in release.clients})), "booked noise",
    ),
    "books one step of DP-SGD per round": (
        lambda: booking_another(example(noise_multiplier=1.0), lambda charge: lambda ledger, release:
                                ledger.charge_clients({c: (Event(1.0), 1) for c in release.clients or (0,)})),
        r"took 8 steps|lost",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_rejected(make, message):
    with pytest.raises((AssertionError, TypeError), match=message):
        check_mechanism(make(), **QUICK)


def test_the_noise_of_each_round_is_compared_together():
    """Check that correlated noise is found when it is charged as independent noise."""

    def half_again(context):
        return generator(context.seed, Purpose.NOISE, round=(context.round + 1) // 2)

    def secret(context):
        return np.random.default_rng(int(secret_uniforms((1,))[0] * 2**53)) if context.deployed else half_again(context)

    with pytest.raises(AssertionError, match="different rounds must be independent"):
        check_mechanism(mine(rng_of=secret), **QUICK)


def test_another_strategy_is_checked_too():
    strategy = Strategy(select=uniform(5), aggregate=mean(weighting="equal"))
    check_mechanism(local(noise_multiplier=2.0), strategy=strategy, num_clients=10, rounds=2, num_draws=64)
