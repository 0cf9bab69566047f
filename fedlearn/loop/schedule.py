"""Set the rounds of a run, the rounds that evaluate, and the tolerated failures."""

from __future__ import annotations

from dataclasses import dataclass

from fedlearn.errors import is_count, require
from fedlearn.loop.failure_limit import require_failure_limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Set the number of rounds, the rounds that evaluate, and the tolerated failures.

    Args:
        rounds: number of all rounds, including the rounds before a resume, >= 1.
        evaluate_every: n, to evaluate each n-th round and the last round, >= 1; default 1.
        evaluate_clients: maximum number of clients to evaluate, >= 1; default 1000. Larger populations are sampled once
            per run.
        max_failures: largest number of clients of a round that may fail. A whole number is a count, and a float in
            [0, 1] is a share of the cohort. So 1 is one client, and 1.0 is all clients. None, the default, is 30 % of
            the cohort, and at least one client. A round without any update always stops the run.
    """

    rounds: int
    evaluate_every: int = 1
    evaluate_clients: int = 1000
    max_failures: float | None = None

    def __post_init__(self) -> None:
        require(is_count(self.rounds), "rounds", self.rounds, "a whole number >= 1", "rounds=20")
        every, most = self.evaluate_every, self.evaluate_clients
        require(is_count(every), "evaluate_every", every, "a whole number >= 1", "evaluate_every=1")
        require(is_count(most), "evaluate_clients", most, "a whole number >= 1", "evaluate_clients=1000")
        require_failure_limit(self.max_failures)

    def is_evaluation_round(self, round: int) -> bool:
        """Return whether the schedule evaluates this round."""
        return round % self.evaluate_every == 0 or round == self.rounds
