"""Plan the noise, the number of rounds or the epsilon of central privacy, without a run.

    python -m fedlearn.privacy.calculator clients=1000000 cohort=1000 rounds=2000 epsilon=2 delta=1e-7

The user sets any two of epsilon, noise_multiplier and rounds. The calculator computes the third.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from pathlib import Path

from fedlearn.core.command_line import DONE, command_parser, read_settings, run_command
from fedlearn.core.privacy_ledger import Epsilon, Event, EventHistory, event_history
from fedlearn.errors import MissingExtra, is_count, is_number, require
from fedlearn.privacy.accounting import calibrate_noise_multiplier, calibrate_num_rounds, require_delta, require_epsilon
from fedlearn.privacy.accounting import epsilon_bounds as epsilon_of

SAMPLINGS = ("poisson", "fixed_size", "none")
EXAMPLES = {
    "clients": 1000,
    "cohort": 100,
    "rounds": 1000,
    "epsilon": 2.0,
    "noise_multiplier": 1.0,
    "delta": 1e-5,
    "sampling": "poisson",
}
MAX_ROUNDS = 10**7


@dataclass(frozen=True, kw_only=True)
class PrivacyQuery:
    """Planning question about client-level central privacy.

    Exactly one of ``rounds``, ``noise_multiplier`` and ``epsilon`` is None; `solve` computes it.

    Args:
        clients: number of clients in the population, >= 1.
        cohort: clients per round (on average for ``poisson``), >= 1 and at most ``clients``.
        delta: in (0, 1).
        rounds: number of rounds, >= 1.
        noise_multiplier: standard deviation of the noise on the sum of clipped updates divided by the clip norm, > 0.
        epsilon: budget, > 0.
        sampling: ``poisson``, ``fixed_size`` (adjacency: one client's data replaced) or ``none``.

    Raises:
        SettingError: A value is out of range, or not exactly two of the three values are set.
    """

    clients: int
    cohort: int
    delta: float
    rounds: int | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    sampling: str = "poisson"

    def __post_init__(self) -> None:
        require(is_count(self.clients), "clients", self.clients, "a whole number >= 1", "clients=1000")
        fits = is_count(self.cohort) and self.cohort <= self.clients
        require(fits, "cohort", self.cohort, f"a whole number from 1 to clients={self.clients}", "cohort=100")
        require_delta(self.delta)
        if self.epsilon is not None:
            require_epsilon(self.epsilon)
        rounds, noise = self.rounds, self.noise_multiplier
        require(rounds is None or is_count(rounds), "rounds", rounds, "a whole number >= 1", "rounds=1000")
        positive = noise is None or (is_number(noise, at_least=0) and 0 < noise < inf)
        require(positive, "noise_multiplier", noise, "a finite number > 0", "noise_multiplier=1.0")
        known = self.sampling in SAMPLINGS
        require(known, "sampling", self.sampling, f"one of {', '.join(SAMPLINGS)}", "sampling=poisson")
        is_set = [name for name in ("epsilon", "noise_multiplier", "rounds") if getattr(self, name) is not None]
        expected = "exactly two of epsilon, noise_multiplier and rounds"
        fix = "rounds=2000 epsilon=2" if len(is_set) < 2 else f"without {is_set[-1]}"
        require(len(is_set) == 2, "the query", " ".join(is_set) or "empty", expected, fix)

    def history(self, noise: float, rounds: int) -> EventHistory:
        """Return the events of ``rounds`` rounds with the noise multiplier ``noise``."""
        rate = self.cohort / self.clients
        if self.sampling == "fixed_size" and rate < 1:
            return event_history({Event(noise / 2, "fixed_size", rate): rounds})
        sampled = self.sampling == "poisson" and rate < 1
        halved = noise / 2 if self.sampling == "fixed_size" else noise
        return event_history({(Event(noise, "poisson", rate) if sampled else Event(halved)): rounds})


@dataclass(frozen=True, kw_only=True)
class PrivacyEstimate:
    """Answer to a privacy query.

    Attributes:
        rounds: number of rounds, from the query or computed.
        noise_multiplier: noise multiplier, from the query or computed.
        epsilon: epsilon of these rounds with this noise.
    """

    rounds: int
    noise_multiplier: float
    epsilon: Epsilon


@lru_cache(maxsize=256)
def solve(query: PrivacyQuery) -> PrivacyEstimate:
    """Return the answer to a privacy query.

    Raises:
        SettingError: One round costs more than the budget.
    """
    noise, rounds, budget, delta = query.noise_multiplier, query.rounds, query.epsilon, query.delta
    if noise is None:
        assert rounds is not None
        assert budget is not None
        planned = rounds
        noise = calibrate_noise_multiplier(lambda z: [query.history(z, planned)], epsilon=budget, delta=delta)
    elif rounds is None:
        assert budget is not None
        fixed_noise = noise
        rounds = calibrate_num_rounds(
            lambda t: [query.history(fixed_noise, t)], epsilon=budget, delta=delta, max_rounds=MAX_ROUNDS
        )
        expected = f"at least {_cost(query, noise, 1).value:.4g}, the cost of one round"
        require(rounds > 0, "epsilon", budget, expected, f"noise_multiplier={2 * noise:g}")
    assert rounds is not None
    return PrivacyEstimate(rounds=rounds, noise_multiplier=noise, epsilon=_cost(query, noise, rounds))


def result_rows(query: PrivacyQuery) -> list[tuple[str, str]]:
    """Return the answer to a query as (name, value) rows of text."""
    answer, clients, cohort = solve(query), query.clients, query.cohort
    rows = [
        ("clients", f"{clients:,}"),
        ("cohort", f"{cohort:,} per round, {query.sampling} sampling, rate {cohort / clients:.4g}"),
        ("rounds", f"{answer.rounds:,}" + _limit_note(answer.rounds)),
        ("noise multiplier", f"{answer.noise_multiplier:.6g}"),
        ("noise on the mean", f"{answer.noise_multiplier / cohort:.4g} clip norms in each coordinate"),
        ("epsilon", f"{answer.epsilon.value:.6g}"),
        ("epsilon by RDP", f"{answer.epsilon.rdp:.6g}"),
        ("delta", f"{query.delta:g}"),
        (
            "adjacency",
            "one client's data replaced" if query.sampling == "fixed_size" else "one client added or removed",
        ),
    ]
    if query.delta >= 1 / clients:
        rows.append(("warning", f"delta is not below 1/{clients:,}"))
    return rows


def draw(query: PrivacyQuery, path: Path) -> None:
    """Plot the noise on the mean against cohort and rounds, at the epsilon of the answer.

    Args:
        query: query with the population, the cohort and delta.
        path: file of the figure.

    Raises:
        MissingExtra: The package matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtra("a plot", "report") from missing
    answer = solve(query)
    target = query.epsilon or answer.epsilon.value
    at = replace(query, rounds=answer.rounds, epsilon=target, noise_multiplier=None)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_cohort, by_rounds = figure.subplots(1, 2, sharey=True)
    cohorts = [size for factor in (0.1, 0.3, 1, 3, 10) if 1 <= (size := round(at.cohort * factor)) <= at.clients]
    rounds = [count for factor in (0.1, 0.3, 1, 3, 10) if (count := round(answer.rounds * factor)) >= 1]
    noises = [solve(replace(at, cohort=size)).noise_multiplier / size for size in cohorts]
    by_cohort.loglog(cohorts, noises, "o-", color="#0072b2")
    by_cohort.set(
        xlabel="clients per round", ylabel="noise on the mean (clip norms)", title=f"{answer.rounds:,} rounds"
    )
    noises = [solve(replace(at, rounds=count)).noise_multiplier / at.cohort for count in rounds]
    by_rounds.loglog(rounds, noises, "o-", color="#0072b2")
    by_rounds.set(xlabel="rounds", title=f"{at.cohort:,} clients per round")
    figure.suptitle(f"epsilon {target:.4g}, delta {at.delta:g}, {at.clients:,} clients")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return exit code 0, or 2 for a query without an answer."""
    parser = command_parser(
        "fedlearn.privacy.calculator",
        "Plan the noise, the rounds or the epsilon of client-level central privacy, without a run.",
        epilog="Set two of epsilon, noise_multiplier and rounds, e.g. "
        "clients=1000000 cohort=1000 rounds=2000 epsilon=2 delta=1e-7",
    )
    parser.add_argument("settings", nargs="+", metavar="setting=value", help=f"settings: {', '.join(EXAMPLES)}")
    parser.add_argument("--plot", type=Path, help="file for a plot of the noise against cohort and rounds")
    return run_command(parser, print_solution, argv)


def print_solution(settings: Sequence[str], *, plot: Path | None) -> int:
    """Print the answer to a query. Return the exit code."""
    values = read_settings(settings, EXAMPLES)
    for name in ("clients", "cohort", "delta"):
        require(name in values, name, "missing", "a value", f"{name}={EXAMPLES[name]}")
    query = PrivacyQuery(**values)
    rows = result_rows(query)
    if plot:
        draw(query, plot)
        rows.append(("plot", str(plot)))
    sys.stdout.writelines(f"{label:<19}{value}\n" for label, value in rows)
    return DONE


def _cost(query: PrivacyQuery, noise: float, rounds: int) -> Epsilon:
    return epsilon_of(query.history(noise, rounds), delta=query.delta)


def _limit_note(rounds: int) -> str:
    return " (the largest number that is tried)" if rounds == MAX_ROUNDS else ""


if __name__ == "__main__":
    sys.exit(main())
