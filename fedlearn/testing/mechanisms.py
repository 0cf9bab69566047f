"""Check a privacy mechanism: the noise that it adds, the contributions that it allows, and the events that it books.

Shapes: R draws of the noise, T rounds, D parameters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import exp, inf, log, sqrt

import numpy as np

from fedlearn.algorithm.aggregation import mean
from fedlearn.algorithm.client_selection import uniform
from fedlearn.algorithm.strategy import Strategy
from fedlearn.callbacks.formatting import guarantee_parts
from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import AnyEvent, Event, EventHistory, LaplaceEvent, Ledger, event_history
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import LocalSettings
from fedlearn.privacy.accounting import epsilon_bounds
from fedlearn.privacy.mechanisms.base import Mechanism, Population
from fedlearn.testing.mechanism_probe import BATCH, Probe, unmoved_server

SIGMAS = 5.0  # a check fails beyond this number of standard deviations
MIN_P_VALUE = 1e-9
SLACK = 1.01  # for rounding to a grid of numbers
DELTAS = (0.3, 0.1, 0.03, 0.01)
SELECTION_ROUNDS = 400


def check_mechanism(
    mechanism: Mechanism,
    *,
    strategy: Strategy | None = None,
    num_clients: int = 24,
    rounds: int = 3,
    num_draws: int = 128,
    seed: int = 0,
) -> None:
    """Check that noise, contributions and sampling of a mechanism agree with the events that it books.

    It applies the mechanism to a strategy, sends known updates through the real training loop, and checks:

    - the header has all fields, and the guarantee is plain JSON;
    - equal seeds give equal noise in a simulation, but the noise of a deployment does not follow from a seed;
    - every coordinate gets noise; noise of coordinates, rounds and clients is independent as far as the event assumes;
    - one client (or example) with any contribution moves the releases no further than the events allow at this noise;
    - for Gaussian and Laplace events, scale and shape of the noise are compared. For other events, an attack tries to
      separate two neighboring data sets by one number;
    - cohorts have the sampling rate and the variation that the events state;
    - each round that releases something is charged, a lost response is charged, and epsilon never falls;
    - the ledger survives JSON.

    Tests allow 5 standard deviations. Seeds are fixed, so the result is reproducible. The check finds a wrong noise
    scale of about 5 % for Gaussian and Laplace events, and of a factor of about 2 for other events.

    The check cannot prove a guarantee. It tries a few contributions, one model size, and marginal laws of cohorts. It
    does not cover the random numbers of the operating system, side channels, or values outside the training loop.

    Args:
        mechanism: the mechanism, as its builder returns it.
        strategy: strategy to protect; None takes the equally weighted mean of cohorts of half of the clients.
        num_clients: number of clients.
        rounds: number of rounds to observe.
        num_draws: number of draws of the noise; 128 parameters are observed in each.
        seed: seed of the check.

    Raises:
        AssertionError: a guarantee does not hold; the message names it.
    """
    strategy = unmoved_server(strategy or Strategy(select=uniform(num_clients // 2), aggregate=mean(weighting="equal")))
    local = LocalSettings(steps=1, batch_size=BATCH, learning_rate=1.0)
    probe = _protect(mechanism, strategy, local, num_clients=num_clients, rounds=rounds, seed=seed)
    _check_header(mechanism, probe.guarantee)
    if probe.guarantee.epsilon_of(probe.run(seed).ledgers[-1]) is None:
        _check_bounded(probe)
        return
    _check_randomness(probe)
    noise_RTD, ledgers = probe.noise(num_draws)
    movements = probe.movements()
    _check_coordinates(noise_RTD, movements)
    for t in range(1, len(ledgers) + 1):
        _check_events(probe.booked(ledgers[t - 1]), noise_RTD[:, :t], [moved_TD[:t] for moved_TD in movements])
    _check_charges(probe, ledgers)
    if probe.protects_examples:
        _check_batches(mechanism, strategy, num_clients, seed)
    else:
        _check_cohorts(probe, ledgers[0].federation)


def _protect(
    mechanism: Mechanism, strategy: Strategy, local: LocalSettings, *, num_clients: int, rounds: int, seed: int
) -> Probe:
    mechanism.validate(strategy, local)
    population = Population(clients=range(num_clients), rounds=rounds, num_examples_of=lambda client: BATCH)
    protected, local = mechanism.protect(strategy, local, population)
    return Probe(protected, local, num_clients, rounds, seed)


def _check_header(mechanism: Mechanism, guarantee: PrivacyGuarantee) -> None:
    texts = {name: getattr(guarantee, name) for name in ("kind", "adjacency", "sampling")}
    for name, text in texts.items():
        assert isinstance(text, str) and text.strip(), f"the guarantee must state {name}"  # noqa: PT018
    assert guarantee.kind == mechanism.kind, f"the guarantee says {guarantee.kind}, the mechanism {mechanism.kind}"
    assert guarantee.not_covered, "the guarantee must name releases that it does not cover, e.g. the evaluation"
    values = guarantee.to_json()
    assert json.loads(json.dumps(values)) == values, "the guarantee must be plain JSON"
    assert all(guarantee_parts({**values, "noise": "from the seed"})), "the header of a run must show the guarantee"


def _check_fields(guarantee: PrivacyGuarantee, booked: EventHistory) -> None:
    assert guarantee.delta is not None, "a guarantee with an epsilon must state delta"
    if booked and all(isinstance(event, Event) for event, _ in booked):
        stated = guarantee.noise_multiplier is not None and guarantee.clip_norm is not None
        assert stated, "a guarantee with Gaussian noise must state noise_multiplier and clip_norm"


def _check_bounded(probe: Probe) -> None:
    assert probe.guarantee.delta is None, "a guarantee that states delta must compute an epsilon"
    if probe.guarantee.clip_norm is not None:
        longest = [float(np.linalg.norm(moved_TD[0])) for moved_TD in probe.movements()]
        assert max(longest) <= 2 * probe.guarantee.clip_norm * SLACK, "clipping must bound the contribution of a client"


def _check_randomness(probe: Probe) -> None:
    first, again, other = (probe.observed(probe.run(seed)) for seed in (probe.seed, probe.seed, probe.seed + 1))
    assert np.array_equal(first, again), "equal seeds must give equal noise in a simulation"
    assert not np.array_equal(first, other), "another seed must give other noise: the releases carry no noise"
    real, repeated = (probe.observed(probe.run(probe.seed, deployed=True)) for _ in range(2))
    assert not np.array_equal(real, repeated), "noise in a deployment must come from the operating system"


def _check_coordinates(noise_RTD: np.ndarray, movements: Sequence[np.ndarray]) -> None:
    """Check that all coordinates that a client can move get independent noise."""
    num_draws = len(noise_RTD)
    moved_D = np.max([np.abs(moved_TD[0]) for moved_TD in movements], axis=0) > 0
    variance_D, overall = noise_RTD[:, 0].var(axis=0), float(noise_RTD[:, 0].var())
    least = float(variance_D[moved_D].min(initial=inf))
    assert overall > 0, "the releases carry no noise"
    assert least > overall * max(0.1, 1 - 6 * sqrt(2 / num_draws)), "every coordinate must get noise of the same scale"
    largest = float(np.linalg.norm(noise_RTD[:, 0], ord=2)) ** 2 / num_draws
    edge = (1 + sqrt(noise_RTD.shape[2] / num_draws)) ** 2  # limit for independent noise (Marchenko and Pastur)
    assert largest < 2 * edge * overall, "the noise of different coordinates must be independent"


def _check_events(booked: EventHistory, noise_RTD: np.ndarray, movements: Sequence[np.ndarray]) -> None:
    """Check that the releases cost at most the booked events."""
    moved = max(float(np.linalg.norm(moved_TD)) for moved_TD in movements)
    assert booked or moved == 0, "a round that released something must be charged"
    kinds = {type(event) for event, _ in booked}
    if kinds == {Event}:
        _check_gaussian(booked, noise_RTD, movements)
    elif kinds == {LaplaceEvent}:
        _check_laplace(booked, noise_RTD, movements)
    elif noise_RTD.shape[1] == 1:
        _check_by_attack(booked, noise_RTD[:, 0], [moved_TD[0] for moved_TD in movements])


def _check_gaussian(booked: EventHistory, noise_RTD: np.ndarray, movements: Sequence[np.ndarray]) -> None:
    """Compare the distance of two data sets, in units of the noise, with the booked events.

    All rounds together are one Gaussian release.
    """
    _check_shape("norm", noise_RTD[:, 0], "Gaussian")
    rows = noise_RTD.transpose(0, 2, 1).reshape(-1, noise_RTD.shape[1])
    covariance_TT = rows.T @ rows / len(rows)
    inverse_TT = np.linalg.pinv(covariance_TT, rcond=1e-6, hermitian=True)
    projection_TT = covariance_TT @ inverse_TT
    for moved_TD in movements:
        hidden = np.allclose(projection_TT @ moved_TD, moved_TD, atol=1e-3 * np.abs(moved_TD).max(initial=1e-9))
        assert hidden, "noise of different rounds must be independent, but a difference of rounds has no noise"
    apart = max(sqrt(float(np.sum(moved_TD * (inverse_TT @ moved_TD)))) for moved_TD in movements)
    allowed = sqrt(sum(count / event.noise_multiplier**2 for event, count in booked if isinstance(event, Event)))
    tolerance = SLACK * (1 + SIGMAS * sqrt(noise_RTD.shape[1] / (2 * len(rows))))
    numbers = f"booked noise multiplier {1 / allowed:.4g}, measured {1 / max(apart, 1e-12):.4g}"
    assert apart <= allowed * tolerance, (
        f"one record must move the releases no further than the event allows: {numbers}"
    )


def _check_laplace(booked: EventHistory, noise_RTD: np.ndarray, movements: Sequence[np.ndarray]) -> None:
    _check_shape("laplace", noise_RTD[:, 0], "Laplace")
    rounds, count = noise_RTD.shape[1], noise_RTD[:, 0].size
    for t in range(1, rounds):
        together = abs(float(np.corrcoef(noise_RTD[:, 0].ravel(), noise_RTD[:, t].ravel())[0, 1]))
        assert together < (SIGMAS + 1) / sqrt(count), "noise of different rounds must be independent"
    scale_T = np.abs(noise_RTD).mean(axis=(0, 2))  # the mean of |x| is the scale
    apart = max(float(np.sum(np.abs(moved_TD).sum(axis=1) / scale_T)) for moved_TD in movements)
    allowed = sum(count / event.noise_multiplier for event, count in booked if isinstance(event, LaplaceEvent))
    numbers = f"booked epsilon {allowed:.4g} without sampling, measured {apart:.4g}"
    tolerance = SLACK * (1 + SIGMAS / sqrt(count))
    assert apart <= allowed * tolerance, (
        f"one record must move the releases no further than the event allows: {numbers}"
    )


def _check_shape(law: str, noise_RD: np.ndarray, name: str) -> None:
    from scipy import stats

    values = noise_RD.ravel() / noise_RD.std()
    scale = {"norm": 1.0, "laplace": 1 / sqrt(2)}[law]
    result = stats.kstest(values, law, args=(0, scale))
    assert result.pvalue > MIN_P_VALUE, f"the noise is booked as {name}, but has another distribution"


def _check_by_attack(booked: EventHistory, noise_RD: np.ndarray, movements: Sequence[np.ndarray]) -> None:
    """Separate two neighboring data sets by a threshold on one number, and compare with (epsilon, delta)."""
    unsampled = event_history({_without_sampling(event): count for event, count in booked})
    sample, margin = np.sort(noise_RD.ravel()), sqrt(log(2 / MIN_P_VALUE) / (2 * noise_RD.size))
    shifts = [float(np.abs(moved_D).max()) for moved_D in movements]
    shifts += [float(np.linalg.norm(moved_D)) for moved_D in movements if np.count_nonzero(moved_D) > 1]
    shift = max(shifts)  # the noise along a direction is at most as wide as in one coordinate
    thresholds = np.quantile(sample, np.linspace(0.001, 0.999, 400)) + shift / 2
    without = 1 - np.searchsorted(sample, thresholds) / len(sample)
    with_it = 1 - np.searchsorted(sample, thresholds - shift) / len(sample)
    for delta in DELTAS:
        epsilon = epsilon_bounds(unsampled, delta=delta).value
        if epsilon > 20:
            continue
        excess = float(np.max(with_it - margin - exp(epsilon) * (without + margin)))
        numbers = f"epsilon {epsilon:.3g} at delta {delta:g} is booked, but an attack finds a delta of {excess:.3g}"
        assert excess <= delta, f"one record must move the releases no further than the event allows: {numbers}"


def _without_sampling(event: AnyEvent) -> AnyEvent:
    return replace(event, sampling="none", rate=1.0) if isinstance(event, Event | LaplaceEvent) else event


def _check_charges(probe: Probe, ledgers: Sequence[Ledger]) -> None:
    guarantee, before = probe.guarantee, 0.0
    for number, (ledger, cohort) in enumerate(zip(ledgers, probe.cohorts, strict=True), start=1):
        _check_fields(guarantee, probe.booked(ledger))
        assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == _compact(ledger), "a ledger must be JSON"
        spent = guarantee.epsilon_of(ledger)
        assert spent is not None, "epsilon_of must return an epsilon for each ledger"
        assert spent.value >= before * (1 - 1e-9), "epsilon must not fall when a round is charged"
        before = spent.value
        release = Release(round=number + 1, clients=tuple(sorted(cohort)))
        most, least = (guarantee.epsilon_of(charged) for charged in (guarantee.charge(ledger, release), ledger))
        assert most is not None
        assert least is not None
        assert most.value >= least.value * (1 - 1e-9), "epsilon must not fall when a round is charged"
    lost = Release(round=1, clients=(), dropouts=(probe.target,))
    charged = guarantee.epsilon_of(guarantee.charge(guarantee.initial_ledger, lost))
    assert charged is not None
    assert charged.value > 0, "a client with a lost response must be charged, because the response may have been read"


def _compact(ledger: Ledger) -> Ledger:
    return Ledger.from_json(ledger.to_json())


def _check_cohorts(probe: Probe, booked: EventHistory) -> None:
    """Check that cohorts have the rate and the variation of the booked sampling law."""
    sampled = [e for e, _ in booked if isinstance(e, Event | LaplaceEvent) and e.rate < 1]
    if not sampled:
        return
    select, clients = probe.strategy.select, range(probe.num_clients)
    rngs = (generator(probe.seed, Purpose.SELECT, round=t) for t in range(1, SELECTION_ROUNDS + 1))
    cohorts = [select.choose(t, clients, rng, **select.initial_state) for t, rng in enumerate(rngs, start=1)]
    sizes = np.array([len(cohort) for cohort in cohorts], np.float64)
    share = np.bincount([client for cohort in cohorts for client in cohort], minlength=len(clients)).max() / len(
        cohorts
    )
    rate = min(event.rate for event in sampled)
    limit = rate + (SIGMAS + 1) * sqrt(rate * (1 - rate) / len(cohorts))
    assert share <= limit, f"clients take part in {share:.3g} of the rounds, but the rate {rate:.3g} is booked"
    for event in sampled:
        if event.sampling == "fixed_size":
            fits = bool(np.all(sizes == round(event.rate * len(clients))))
            assert fits, "cohorts must have the fixed size that is booked"
        else:
            variance = len(clients) * event.rate * (1 - event.rate)
            fits = abs(float(sizes.var()) / variance - 1) < (SIGMAS + 1) * sqrt(2 / len(cohorts))
            assert fits, "cohorts must vary in size as independent draws do: Poisson sampling is booked"


def _check_batches(mechanism: Mechanism, strategy: Strategy, num_clients: int, seed: int) -> None:
    """Check that all steps of a client are booked, with the sampling rate of its batches."""
    local = LocalSettings(epochs=2, batch_size=BATCH // 4, learning_rate=0.0)
    probe = _protect(mechanism, strategy, local, num_clients=num_clients, rounds=1, seed=seed)
    booked = probe.booked(probe.run(seed).ledgers[0])
    rate, steps = local.batch_size / BATCH, int(local.num_steps(BATCH))
    total = sum(count for _, count in booked)
    assert total >= steps, f"a client took {steps} steps, but {total} are booked"
    least = min((e.rate for e, _ in booked if isinstance(e, Event | LaplaceEvent)), default=1.0)
    assert least >= rate * (1 - 1e-9), f"batches are drawn at the rate {rate:.3g}, but {least:.3g} is booked"
