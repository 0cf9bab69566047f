"""Records of published tables: the experiment of a row, its published values, and the gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from fedlearn.runner.run_result import RunResult

LEAST_TOLERANCE = 1.0  # points

# difference: at most the tolerance, in both directions; limit: each run has at most the published value;
# start: at most the tolerance below, for the first rounds of an experiment that takes its best round
Gate = Literal["difference", "limit", "start", "none"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Hold a published value, in the unit of its measure.

    Attributes:
        value: published value.
        deviation: published standard deviation; None if the source has none.
        source: file, page or table with the value.
        gate: ``difference`` for percentages, ``limit`` for rounds to a target, ``start`` for the best percentage of the
            first rounds of an experiment, or ``none``.
    """

    value: float
    deviation: float | None = None
    source: str
    gate: Gate = "difference"

    @property
    def tolerance(self) -> float:
        """Largest accepted difference: the published deviation, or one point."""
        return max(self.deviation or 0.0, LEAST_TOLERANCE)

    def accepts(self, values: Sequence[float | None]) -> bool:
        """Return whether the values of the seeds pass the gate. None is a seed without a value.

        >>> Published(value=97, source="Table 2").accepts([97.9]), Published(value=97, source="Table 2").accepts([98.1])
        (True, False)
        >>> rounds = Published(value=87, source="Table 2", gate="limit")
        >>> rounds.accepts([40, 87]), rounds.accepts([40, 88]), rounds.accepts([40, None])
        (True, False, False)
        >>> start = Published(value=97, source="Table 2", gate="start")
        >>> start.accepts([96.0]), start.accepts([99.0]), start.accepts([95.9])
        (True, True, False)
        """
        found = [value for value in values if value is not None]
        if self.gate == "limit":
            return len(found) == len(values) and max(found) <= self.value
        difference = mean(found) - self.value
        return (-difference if self.gate == "start" else abs(difference)) <= self.tolerance + 1e-9


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Describe a number of a run, and the published value.

    Attributes:
        name: name of the number with its unit, e.g. ``accuracy, %``.
        read: returns the number of a run; None if the run has no such number.
        published: published value; None if there is none, or if it could not be checked.
    """

    name: str
    read: Callable[[RunResult], float | None]
    published: Published | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """Describe one experiment of a table.

    Attributes:
        name: name in commands.
        label: name on the page.
        settings: settings of `simulations.run`, without the seed.
        seeds: seeds of the runs.
        measures: numbers of each run.
        note: reason for a failed gate, or a difference from the paper; empty if there is none.
        hours: processor time of a seed on one core, from the time of its first rounds; None if not measured.
        has_published: whether a paper has this experiment; False if there is nothing to compare with.
    """

    name: str
    label: str
    settings: Sequence[str]
    measures: Sequence[Measure]
    seeds: Sequence[int] = (1, 2, 3)
    note: str = ""
    has_published: bool = True
    hours: float | None = None

    @property
    def command(self) -> str:
        """Command that runs all seeds."""
        settings = " ".join(f"'{word}'" if set(word) & set("[]{}(),*~ ") else word for word in self.settings)
        return f"python -m simulations.run -m {settings} seed={','.join(map(str, self.seeds))}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Describe a published table.

    Attributes:
        name: name in commands.
        title: title on the page.
        paper: authors, title, venue, year and arXiv number.
        protocol: the experiment of the paper, and every difference here.
        rows: experiments.
        data: command that fetches the data; empty if the runs need no command.
    """

    name: str
    title: str
    paper: str
    protocol: str
    rows: Sequence[Row]
    data: str = ""


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation. The deviation of one value is None.

    >>> mean_and_deviation([1.0, 3.0]), mean_and_deviation([2.0])
    ((2.0, 1.4142135623730951), (2.0, None))
    """
    return mean(values), stdev(values) if len(values) > 1 else None
