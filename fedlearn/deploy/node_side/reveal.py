"""Define the facts about its examples that a node reveals."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log10

from fedlearn.errors import is_count, require

COUNT_PRECISIONS = ("exact", "rounded", "none")


@dataclass(frozen=True, kw_only=True)
class Reveal:
    """The facts about its examples that a node reveals besides the update.

    Args:
        num_examples: precision of the number of training examples, default ``exact``. ``rounded``: one digit. ``none``:
            the node sends 1, for strategies that weight clients equally. The number of local steps reveals the number
            of examples up to one batch, unless ``local.steps`` is set.
        metrics: True if evaluation metrics and the number of held-out examples may leave; default True.
        min_test_examples: smallest number of held-out examples of a client whose metrics leave, >= 1, default 10.

    Raises:
        SettingError: A value is out of range.
    """

    num_examples: str = "exact"
    metrics: bool = True
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
        require(isinstance(self.metrics, bool), "reveal.metrics", self.metrics, "true or false", "metrics: true")
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
