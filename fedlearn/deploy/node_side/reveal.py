"""Define the facts about its examples that a node reveals."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log10

from fedlearn.errors import is_count, is_number, require

COUNT_PRECISIONS = ("exact", "rounded", "none")
NOISED = "noised"


@dataclass(frozen=True, kw_only=True)
class Reveal:
    """The facts about its examples that a node reveals besides the update.

    Args:
        num_examples: precision of the number of training examples, default ``exact``. ``rounded``: one digit. ``none``:
            the node sends 1, for strategies that weight clients equally. The number of local steps reveals the number
            of examples up to one batch, unless ``local.steps`` is set.
        metrics: evaluation metrics that may leave. True: exact metrics. False: none. ``noised``: metrics with noise,
            which the ledger of the node pays for. None, the default: exact metrics if the node requires no privacy,
            otherwise none.
        metrics_epsilon: privacy loss of one evaluation with ``noised``, > 0, default 0.1.
        min_test_examples: smallest number of held-out examples of a client whose exact metrics leave, >= 1, default 10.

    Raises:
        SettingError: A value is out of range.
    """

    num_examples: str = "exact"
    metrics: bool | str | None = None
    metrics_epsilon: float = 0.1
    min_test_examples: int = 10

    def __post_init__(self) -> None:
        expected = f"one of {', '.join(COUNT_PRECISIONS)}"
        require(
            self.num_examples in COUNT_PRECISIONS,
            "reveal.num_examples",
            self.num_examples,
            expected,
            "num_examples: exact",
        )
        is_valid = self.metrics is None or isinstance(self.metrics, bool) or self.metrics == NOISED
        require(is_valid, "reveal.metrics", self.metrics, "null, true, false or noised", "metrics: noised")
        epsilon = self.metrics_epsilon
        is_valid = is_number(epsilon, at_least=0) and 0 < epsilon <= 10
        require(is_valid, "reveal.metrics_epsilon", epsilon, "a number in (0, 10]", "metrics_epsilon: 0.1")
        minimum = self.min_test_examples
        require(is_count(minimum), "reveal.min_test_examples", minimum, "a whole number >= 1", "min_test_examples: 10")

    def reported_count(self, num_examples: int) -> int:
        """Return the number of examples that the node sends to the coordinator.

        >>> [Reveal(num_examples=precision).reported_count(227) for precision in ("exact", "rounded", "none")]
        [227, 200, 1]
        """
        if self.num_examples == "exact" or not num_examples:
            return num_examples
        return round(num_examples, -floor(log10(num_examples))) if self.num_examples == "rounded" else 1
