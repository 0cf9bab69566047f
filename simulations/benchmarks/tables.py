"""Tables of the results: medians over repeats, and ratios within a repeat."""

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
    "processor s / round",
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
    """Ratio of our time per round to the time of another system. Below 1, ours is faster.

    Attributes:
        framework: ``torch`` or ``jax``.
        other: name of the other system.
        values: ratio of the median rounds, one value per repeat in which both systems ran.
        best: ratio of the fastest rounds over all repeats; it is more reliable if others use the machine too.
        processor: ratio of the processor times of a round, median over repeats. A system that waits uses little.
    """

    framework: str
    other: str
    values: tuple[float, ...]
    best: float
    processor: float

    def __str__(self) -> str:
        middle, low, high = median(self.values), min(self.values), max(self.values)
        faster = f", {1 / middle:.3g} times as fast" if middle < 0.95 else ""
        return (
            f"{self.framework}: ours / {self.other} {middle:.3g} ({low:.3g}-{high:.3g}; best {self.best:.3g}){faster}; "
            f"processor time {self.processor:.3g}"
        )


def groups(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """Group the runs by framework and system, in the order of the first repeat."""
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.repeat):
        grouped.setdefault((run.framework, run.system), []).append(run)
    return grouped


def rows(runs: Sequence[Run], workload: Workload) -> list[tuple[str, ...]]:
    """Return a row of `COLUMNS` per framework and system. A failed system has its error in the third column."""
    table = []
    for (framework, system), repeats in groups(runs).items():
        good = [run for run in repeats if not run.error]
        cells = _numbers(good, workload) if good else (repeats[0].error.splitlines()[0],)
        failed = f" ({len(repeats) - len(good)} of {len(repeats)} failed)" if good and len(good) < len(repeats) else ""
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
        f"{middle(lambda run: run.processor_per_round):.4g}",
        f"{1 / seconds:.3g}",
        f"{workload.cohort_size / seconds:,.0f}",
        f"{middle(lambda run: run.examples_per_second):,.0f}",
        f"{middle(lambda run: run.seconds[0]):.3g}",
        f"{middle(lambda run: run.seconds_to_first_round):.3g}",
        f"{middle(lambda run: run.memory_mib):.0f}{more}",
        f"{middle(lambda run: run.loss):.4f} after {len(good[0].seconds)}",
    )


def ratios(runs: Sequence[Run]) -> list[Ratio]:
    """Return the ratio of our time to that of each other system with the same framework."""
    grouped = groups([run for run in runs if not run.error])
    result = []
    for (framework, system), repeats in grouped.items():
        ours = {run.repeat: run.seconds_per_round for run in grouped.get((framework, "ours"), [])}
        values = tuple(ours[run.repeat] / run.seconds_per_round for run in repeats if run.repeat in ours)
        if system != "ours" and values:
            best = _best(grouped[framework, "ours"]) / _best(repeats)
            mine = [run.processor_per_round for run in grouped[framework, "ours"]]
            processor = median(mine) / max(1e-9, median(run.processor_per_round for run in repeats))
            ratio = Ratio(framework=framework, other=system, values=values, best=best, processor=processor)
            result.append(ratio)
    return result


def _best(repeats: Sequence[Run]) -> float:
    return min(min(run.seconds) for run in repeats)


def variants(runs: Sequence[Run]) -> list[str]:
    """Return a line per system with its method, processes and threads."""
    return [
        f"{framework} {system}: {repeats[0].variant}"
        for (framework, system), repeats in groups(runs).items()
        if repeats[0].variant
    ]


def markdown(runs: Sequence[Run], workload: Workload, *, machine: str) -> str:
    """Return all results as a Markdown page."""
    padded = [(*row, *("",) * (len(COLUMNS) - len(row))) for row in rows(runs, workload)]
    lines = [f"# {workload}", "", machine, "", markdown_table([COLUMNS, *padded])]
    lines += [
        "Ratio of seconds per round, ours / other: median over repeats (range; ratio of the fastest rounds):",
        "",
    ]
    lines += [f"- {ratio}" for ratio in ratios(runs)] + [""]
    lines += [f"- {variant}" for variant in variants(runs)]
    return "\n".join([*lines, "", *NOTES, ""])


NOTES = (
    "Times are medians over repeats of medians over rounds. They exclude the first round of a process, which compiles",
    "programs and starts workers. The time to the first round starts with the process and includes imports.",
    "Memory is the peak of the process plus the peak of its largest child; shared memory counts twice.",
    "Loss is the mean loss on a thousand examples after the given number of rounds.",
)
