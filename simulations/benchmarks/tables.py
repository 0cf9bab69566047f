"""What was measured, as rows: medians over repeats, and ratios within a repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from fedlearn.callbacks.tables import markdown_table
from simulations.benchmarks.measure import Run
from simulations.benchmarks.workloads import Workload

COLUMNS = (
    "framework",
    "system",
    "s / round",
    "best",
    "rounds / s",
    "client updates / s",
    "examples / s",
    "first round, s",
    "to first round, s",
    "memory, MiB",
    "loss",
)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How long ours takes, as a share of what another takes: below 1, ours is faster.

    Attributes:
        framework, other: which.
        values: one for each repeat in which both ran, of the medians over rounds.
        best: of the fastest round of either in any repeat, which tells more where others use the machine too.
    """

    framework: str
    other: str
    values: tuple[float, ...]
    best: float

    def __str__(self) -> str:
        middle, low, high = median(self.values), min(self.values), max(self.values)
        faster = f", {1 / middle:.3g} times as fast" if middle < 0.95 else ""
        return (
            f"{self.framework}: ours / {self.other} {middle:.3g} ({low:.3g}-{high:.3g}; best {self.best:.3g}){faster}"
        )


def groups(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """The runs of each framework and system, in the order in which they were asked for."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.repeat):
        found.setdefault((run.framework, run.system), []).append(run)
    return found


def rows(runs: Sequence[Run], workload: Workload) -> list[tuple[str, ...]]:
    """The table, one row for each framework and system, after `COLUMNS`; what failed says why in its third column."""
    table = []
    for (framework, system), own in groups(runs).items():
        good = [run for run in own if not run.error]
        cells = _numbers(good, workload) if good else (own[0].error.splitlines()[0],)
        failed = f" ({len(own) - len(good)} of {len(own)} failed)" if good and len(good) < len(own) else ""
        table.append((framework, system + failed, *cells))
    return table


def _numbers(good: Sequence[Run], workload: Workload) -> tuple[str, ...]:
    def middle(value: Callable[[Run], float]) -> float:
        return median(value(run) for run in good)

    seconds = middle(lambda run: run.seconds_per_round)
    children = middle(lambda run: run.child_memory_mib)
    more = f" + {children:.0f}" if children else ""
    return (
        f"{seconds:.4g}",
        f"{_best(good):.4g}",
        f"{1 / seconds:.3g}",
        f"{workload.cohort_size / seconds:,.0f}",
        f"{middle(lambda run: run.examples_per_second):,.0f}",
        f"{middle(lambda run: run.seconds[0]):.3g}",
        f"{middle(lambda run: run.seconds_to_first_round):.3g}",
        f"{middle(lambda run: run.memory_mib):.0f}{more}",
        f"{middle(lambda run: run.loss):.4f} after {len(good[0].seconds)}",
    )


def ratios(runs: Sequence[Run]) -> list[Ratio]:
    """Ours against each other system of the same framework, repeat by repeat."""
    found = groups([run for run in runs if not run.error])
    out = []
    for (framework, system), own in found.items():
        ours = {run.repeat: run.seconds_per_round for run in found.get((framework, "ours"), [])}
        values = tuple(ours[run.repeat] / run.seconds_per_round for run in own if run.repeat in ours)
        if system != "ours" and values:
            best = _best(found[framework, "ours"]) / _best(own)
            out.append(Ratio(framework=framework, other=system, values=values, best=best))
    return out


def _best(own: Sequence[Run]) -> float:
    return min(min(run.seconds) for run in own)


def variants(runs: Sequence[Run]) -> list[str]:
    """How each system went about it."""
    return [
        f"{framework} {system}: {own[0].variant}" for (framework, system), own in groups(runs).items() if own[0].variant
    ]


def markdown(runs: Sequence[Run], workload: Workload, *, machine: str) -> str:
    """The whole result as a page."""
    padded = [(*row, *("",) * (len(COLUMNS) - len(row))) for row in rows(runs, workload)]
    lines = [f"# {workload}", "", machine, "", markdown_table([COLUMNS, *padded])]
    lines += [
        "Seconds a round, ours over the other's: median over repeats (range; ratio of the fastest rounds):",
        "",
    ]
    lines += [f"- {ratio}" for ratio in ratios(runs)] + [""]
    lines += [f"- {variant}" for variant in variants(runs)]
    return "\n".join([*lines, "", *NOTES, ""])


NOTES = (
    "Medians over repeats of medians over rounds; the first round of a process, in which programs are compiled and",
    "workers started, stands apart. Time to the first round counts from the start of the process, imports included.",
    "Memory is the peak of the process, plus that of the largest of its children; what they share counts twice.",
    "Loss is that of the model on a thousand examples after so many rounds.",
)
