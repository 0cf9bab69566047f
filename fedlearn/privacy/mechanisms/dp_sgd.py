"""Example-level differential privacy: clients train with DP-SGD, and each client pays for its own steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.gradient_settings import refuse_with_example_dp
from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import Event, EventHistory, Ledger, event_history
from fedlearn.core.records import ExampleDP, LocalSettings
from fedlearn.errors import SettingError
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.privacy.mechanisms.base import (
    EVALUATION_NOT_COVERED,
    FAILURES_NOT_COVERED,
    Mechanism,
    NoiseCalibration,
    Population,
    delta_warnings,
    refuse_if,
    replace_parts,
    require_clip_norm,
)

MAX_COUNTED_CLIENTS = 10_000  # clients whose examples are counted for a warning


def example(
    *,
    clip: float = 1.0,
    noise_multiplier: float | None = None,
    epsilon: float | None = None,
    delta: float = 1e-5,
) -> Mechanism:
    """Protect each example at each client against all parties except its client.

    A client of N examples draws Poisson batches of rate ``q = min(1, batch_size / N)`` and takes
    ``epochs * ceil(N / batch_size)`` steps per round (or ``steps``). It pays for all steps of its own rounds only.
    Clients hold different examples, so the epsilon of the federation is the largest epsilon of a client, not the sum.
    Client selection gives no amplification.

    Args:
        clip: L2 bound on the gradient of an example, > 0.
        noise_multiplier: standard deviation of the noise on the sum of clipped gradients divided by ``clip``, > 0. None
            for the smallest value that satisfies ``epsilon`` if the most expensive client takes part in every planned
            round.
        epsilon: budget; the run stops before a client exceeds this. None for no limit.
        delta: in (0, 1), below 1 over the number of examples of a client.

    *Guarantees*: all that a client sends is (epsilon, delta)-private, if its trainer keeps the contract of
    `fedlearn.ExampleDP`. The adjacency is one example, or a blank in its place; a blank has a gradient of zero. The
    number of examples of a client is public. It determines the sampling rate, the number of steps and the denominator,
    so an observer can derive it from the noise.

    Reference: Abadi et al., *Deep Learning with Differential Privacy*, CCS 2016, arXiv:1607.00133.

    Raises:
        SettingError: A number is out of range, or is NaN.
    """
    ExampleDP(clip=clip)
    require_clip_norm(clip)
    budget = NoiseCalibration(noise_multiplier=noise_multiplier, epsilon=epsilon, delta=delta)
    return Mechanism(validate=_refuse, protect=partial(_protect, clip, budget), kind="example")


def sampling_rate(local: LocalSettings, num_examples: int) -> float:
    """Return the probability that a batch contains an example, in (0, 1]."""
    return min(1.0, local.batch_size / num_examples)


def _refuse(strategy: Strategy, local: LocalSettings) -> None:
    reason = "privacy=example sets local.example_dp itself, so that training and ledger use the same noise"
    refuse_if(local.example_dp is not None, reason, "privacy.clip=... privacy.noise_multiplier=...")
    reason = "privacy=example accounts for the steps of local.epochs, but this strategy takes further steps"
    refuse_if(bool(strategy.local.personal_epochs), reason, "strategy=fedper, or privacy=central")
    reason = "privacy=example clips gradients of the loss of the task, but this strategy trains with another loss"
    refuse_if(strategy.local.has_custom_loss, reason, "strategy=fedavg, or privacy=central")
    reason = "privacy=example accounts for one gradient per step, but this strategy takes several"
    refuse_if(strategy.local.gradient is not None, reason, "strategy=fedavg, or privacy=central")
    reason = "privacy=example accounts for the steps of local.epochs, but this strategy draws the number of steps"
    refuse_if(strategy.local.num_steps is not None, reason, "strategy=fedavg, or privacy=central")
    refuse_with_example_dp(local)


def _protect(
    clip: float, budget: NoiseCalibration, strategy: Strategy, local: LocalSettings, population: Population
) -> tuple[Strategy, LocalSettings]:
    sizes = _sizes(population) if budget.epsilon is not None else ()
    if budget.epsilon is not None and not sizes:
        expected = "null if the numbers of examples are unknown, because the sampling rates depend on them"
        raise SettingError(
            "privacy.epsilon", budget.epsilon, expected, "privacy.epsilon=null privacy.noise_multiplier=1"
        )

    def planned(noise: float) -> list[EventHistory]:
        return [
            event_history({_event(local, noise, size): population.rounds * local.num_steps(size)}) for size in sizes
        ]

    noise = budget.resolve_noise_multiplier(planned)
    private = replace(local, example_dp=ExampleDP(clip=clip, noise_multiplier=noise))
    guarantee = _guarantee(clip, noise, budget, private, population)
    return replace_parts(strategy, privacy_guarantee=guarantee), private


def _sizes(population: Population) -> tuple[int, ...]:
    """Return the distinct numbers of examples of the clients, ascending, without 0."""
    if population.num_examples_of is None:
        return ()
    return tuple(sorted({population.num_examples_of(client) for client in population.clients} - {0}))


def _event(local: LocalSettings, noise: float, num_examples: int) -> Event:
    rate = sampling_rate(local, num_examples)
    return Event(noise, "poisson", rate) if rate < 1 else Event(noise)


def _guarantee(
    clip: float, noise: float, budget: NoiseCalibration, local: LocalSettings, population: Population
) -> PrivacyGuarantee:
    delta, size_of = budget.delta, population.num_examples_of

    def cost(size: int, steps: int) -> tuple[Event, int]:
        return _event(local, noise, size), steps

    def charge(ledger: Ledger, release: Release) -> Ledger:
        reported = zip(
            release.clients, release.num_examples or (), release.num_steps or (), strict=release.num_steps is not None
        )
        charges = {client: cost(size, steps) for client, size, steps in reported}
        if size_of is not None:  # clients without a response: before the round, or if the response was lost
            expected = {
                client: size_of(client) for client in (*release.clients, *release.dropouts) if client not in charges
            }
            charges |= {client: cost(size, local.num_steps(size)) for client, size in expected.items() if size}
        return ledger.charge_clients(charges)

    return PrivacyGuarantee(
        charge=charge,
        epsilon_of=lambda ledger: max_epsilon_bounds(ledger.histories, delta=delta),
        max_epsilon=budget.epsilon,
        holds_against_server=True,
        withheld=frozenset({"metrics"}),
        covers_extra_vectors=True,  # they are functions of private gradients
        kind="example",
        unit="example",
        adjacency="one example, or a blank in its place",
        sampling="Poisson batches at each client; the largest epsilon of a client is reported",
        delta=delta,
        noise_multiplier=noise,
        clip_norm=clip,
        clip="per example",
        not_covered=(EVALUATION_NOT_COVERED, FAILURES_NOT_COVERED, "the number of examples of each client"),
        warnings=tuple(_warnings(delta, population)),
    )


def _warnings(delta: float, population: Population) -> list[str]:
    """Return the warnings for the client with the most examples, which needs the smallest delta."""
    is_counted = population.num_examples_of is not None and population.num_clients <= MAX_COUNTED_CLIENTS
    return delta_warnings(delta, max(_sizes(population), default=1)) if is_counted else []
