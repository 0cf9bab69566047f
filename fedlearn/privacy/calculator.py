"""``python -m fedlearn.privacy.calculator``: how much noise, how many rounds, which epsilon, before anything is run.

    python -m fedlearn.privacy.calculator clients=1000000 cohort=1000 rounds=2000 epsilon=2 delta=1e-7

Of epsilon, noise_multiplier and rounds any two are given and the third is found.
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
    """Ask a planning question for client-level central privacy; the value that is None is computed.

    Args:
        clients: in the population, >= 1.
        cohort: clients a round (on average, for ``poisson``), >= 1 and at most ``clients``.
        rounds: >= 1.
        noise_multiplier: standard deviation of the noise on the sum of clipped updates over the clip norm, > 0.
        epsilon: > 0.
        delta: in (0, 1).
        sampling: ``poisson``, ``fixed_size`` (one client's data replaced) or ``none``.

    Raises:
        SettingError: a value is out of range, or not exactly one of the three is sought.
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
        given = [name for name in ("epsilon", "noise_multiplier", "rounds") if getattr(self, name) is not None]
        expected = "two of epsilon, noise_multiplier and rounds: the third is found"
        fix = "rounds=2000 epsilon=2" if len(given) < 2 else f"without {given[-1]}"
        require(len(given) == 2, "the question", " ".join(given) or "empty", expected, fix)

    def history(self, noise: float, rounds: int) -> EventHistory:
        """What so many rounds with so much noise release."""
        rate = self.cohort / self.clients
        if self.sampling == "fixed_size" and rate < 1:
            return event_history({Event(noise / 2, "fixed_size", rate): rounds})
        sampled = self.sampling == "poisson" and rate < 1
        halved = noise / 2 if self.sampling == "fixed_size" else noise
        return event_history({(Event(noise, "poisson", rate) if sampled else Event(halved)): rounds})


@dataclass(frozen=True, kw_only=True)
class PrivacyEstimate:
    """Hold a privacy query with all values found, and its cost."""

    rounds: int
    noise_multiplier: float
    epsilon: Epsilon


@lru_cache(maxsize=256)
def solve(query: PrivacyQuery) -> PrivacyEstimate:
    """Find what is sought.

    Raises:
        SettingError: not even one round fits the budget.
    """
    noise, rounds, budget, delta = query.noise_multiplier, query.rounds, query.epsilon, query.delta
    if noise is None:
        assert rounds is not None
        assert budget is not None
        planned = rounds
        noise = calibrate_noise_multiplier(lambda z: [query.history(z, planned)], epsilon=budget, delta=delta)
    elif rounds is None:
        assert budget is not None
        given = noise
        rounds = calibrate_num_rounds(
            lambda t: [query.history(given, t)], epsilon=budget, delta=delta, max_rounds=MAX_ROUNDS
        )
        expected = f"a budget for at least one round; one costs {_cost(query, noise, 1).value:.4g}"
        require(rounds > 0, "epsilon", budget, expected, f"noise_multiplier={2 * noise:g}")
    assert rounds is not None
    return PrivacyEstimate(rounds=rounds, noise_multiplier=noise, epsilon=_cost(query, noise, rounds))


def result_rows(query: PrivacyQuery) -> list[tuple[str, str]]:
    """(what, how much) of an answer."""
    found, clients, cohort = solve(query), query.clients, query.cohort
    rdp_only = " (by RDP: this sampling law has no PLD)" if found.epsilon.pld is None else ""
    rows = [
        ("clients", f"{clients:,}"),
        ("cohort", f"{cohort:,} a round, {query.sampling} sampling, rate {cohort / clients:.4g}"),
        ("rounds", f"{found.rounds:,}" + _at_most(found.rounds)),
        ("noise multiplier", f"{found.noise_multiplier:.6g}"),
        ("noise on the mean", f"{found.noise_multiplier / cohort:.4g} clip norms in each coordinate"),
        ("epsilon", f"{found.epsilon.value:.6g}{rdp_only}"),
        ("epsilon by RDP", f"{found.epsilon.rdp:.6g}"),
        ("delta", f"{query.delta:g}"),
        ("adjacency", "one client's data replaced" if query.sampling == "fixed_size" else "one client more or less"),
    ]
    if query.delta >= 1 / clients:
        rows.append(("warning", f"delta is not below 1/{clients:,}"))
    return rows


def draw(query: PrivacyQuery, path: Path) -> None:
    """Draw the noise on the mean against cohort and rounds, at the epsilon of the answer.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise MissingExtra("a plot", "report") from missing
    found = solve(query)
    target = query.epsilon or found.epsilon.value
    at = replace(query, rounds=found.rounds, epsilon=target, noise_multiplier=None)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_cohort, by_rounds = figure.subplots(1, 2, sharey=True)
    cohorts = [size for factor in (0.1, 0.3, 1, 3, 10) if 1 <= (size := round(at.cohort * factor)) <= at.clients]
    rounds = [count for factor in (0.1, 0.3, 1, 3, 10) if (count := round(found.rounds * factor)) >= 1]
    noises = [solve(replace(at, cohort=size)).noise_multiplier / size for size in cohorts]
    by_cohort.loglog(cohorts, noises, "o-", color="#0072b2")
    by_cohort.set(xlabel="clients a round", ylabel="noise on the mean (clip norms)", title=f"{found.rounds:,} rounds")
    noises = [solve(replace(at, rounds=count)).noise_multiplier / at.cohort for count in rounds]
    by_rounds.loglog(rounds, noises, "o-", color="#0072b2")
    by_rounds.set(xlabel="rounds", title=f"{at.cohort:,} clients a round")
    figure.suptitle(f"epsilon {target:.4g}, delta {at.delta:g}, {at.clients:,} clients")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a question that has no answer."""
    parser = command_parser(
        "fedlearn.privacy.calculator",
        "Answer planning questions on client-level central privacy, without a run.",
        epilog="give two of epsilon, noise_multiplier and rounds, e.g. "
        "clients=1000000 cohort=1000 rounds=2000 epsilon=2 delta=1e-7",
    )
    parser.add_argument("settings", nargs="+", metavar="setting=value", help=f"settings: {', '.join(EXAMPLES)}")
    parser.add_argument("--plot", type=Path, help="also draw noise against cohort and rounds into this file")
    return run_command(parser, print_solution, argv)


def print_solution(settings: Sequence[str], *, plot: Path | None) -> int:
    """Print the solution of a query; return the exit code."""
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


def _cost(question: PrivacyQuery, noise: float, rounds: int) -> Epsilon:
    return epsilon_of(question.history(noise, rounds), delta=question.delta)


def _at_most(rounds: int) -> str:
    return " (the most that is looked for)" if rounds == MAX_ROUNDS else ""


if __name__ == "__main__":
    sys.exit(main())
