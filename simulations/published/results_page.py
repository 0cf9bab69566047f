"""Write the page of results from the declared tables and the stored results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from fedlearn.callbacks.tables import markdown_table
from simulations.published import TABLES
from simulations.published.records import Measure, Row, Table, mean_and_deviation
from simulations.published.stored_results import SeedResult, read_results

HEAD = """\
# Published results

This page compares runs of fedlearn with published tables. `python -m simulations.results` writes it from the
declarations in `simulations/published/` and the stored results in `docs/results/`. Do not edit it.

Each row is the mean and the standard deviation over its seeds. The gate is: the difference to the published value is
at most the published standard deviation, or one point if this is larger. A published number of rounds to a target has
another check: the target is `reached` if each seed reaches it by the published round, else `missed`. A run that needs
fewer rounds than published also reaches it, so look at both numbers. Some rows run the first rounds only of an
experiment that takes the best of all rounds. Their result is a lower bound: `reached` if it is at most the tolerance
below the published value, else `missed`. A published value without a source that could be read is `not checked`, and
has no gate.

A row without stored results is `not run`. The time beside it is an estimate for one seed on one core, from the
measured processor time of the first rounds. `processor s` is the processor time of one seed, start and evaluation
included. Older results have the duration of their rounds instead (`wall`), on two cores that other programs used at
the same time. Digests are the first digits of SHA-256 of the final parameters and of all examples, for the first
seed; `docs/results/` has all seeds in full. The digest of parameters can change with the version and the machine.

To run a row again, and to write this page:

```sh
python -m simulations.results --run flamby_heart/fedavg
```
"""
COLUMNS = ("row", "measure", "fedlearn", "seeds", "published", "gate", "processor s", "parameters", "data")
GATE_RESULTS = {"difference": ("pass", "fail"), "limit": ("reached", "missed"), "start": ("reached", "missed")}
DIGITS = 8


def results_page(folder: Path) -> str:
    """Return the page.

    Args:
        folder: folder with the stored results.
    """
    parts = [HEAD, "## Summary\n", _summary(folder)]
    return "\n".join([*parts, *(_section(table, folder) for table in TABLES.values())])


def result_file(table: Table, row: Row, folder: Path) -> Path:
    """Return the file with the stored results of a row."""
    return folder / table.name / f"{row.name}.json"


def gate_of(measure: Measure, results: Sequence[SeedResult]) -> str:
    """Return the result of the gate, e.g. ``pass`` or ``missed``, or the reason why there is no gate.

    Args:
        measure: measure with its published value.
        results: stored results of the row.
    """
    if not results:
        return "not run"
    published = measure.published
    if published is None or published.gate == "none":
        return "none"
    passed, failed = GATE_RESULTS[published.gate]
    return passed if published.accepts([result.values.get(measure.name) for result in results]) else failed


def _summary(folder: Path) -> str:
    words = list(dict.fromkeys(word for both in GATE_RESULTS.values() for word in both))
    rows: list[tuple[str, ...]] = [("table", "rows", "run", *words)]
    for table in TABLES.values():
        stored = {row.name: read_results(row, result_file(table, row, folder)) for row in table.rows}
        gates = [gate_of(measure, stored[row.name]) for row in table.rows for measure in row.measures]
        numbers = (len(table.rows), sum(map(bool, stored.values())), *map(gates.count, words))
        rows.append((f"[{table.title}](#{_anchor(table.title)})", *map(str, numbers)))
    return markdown_table(rows)


def _section(table: Table, folder: Path) -> str:
    stored = {row.name: read_results(row, result_file(table, row, folder)) for row in table.rows}
    lines = [line for row in table.rows for line in _lines(row, stored[row.name])]
    notes = [f"- {row.label}: {row.note}" for row in table.rows if row.note and stored[row.name]]
    parts = [f"## {table.title}\n", f"{table.paper}.\n", f"{table.protocol}\n"]
    parts += [f"Data: `{table.data}`.\n"] if table.data else []
    parts += [markdown_table([COLUMNS, *lines])]
    parts += [f"Source: {'; '.join(_sources(table))}.\n"] if _sources(table) else []
    parts += [*notes, ""] if notes else []
    parts += [f"Commands (`python -m simulations.results --run {table.name}` runs all):\n", "```text"]
    parts += [f"{row.name}: {row.command}" for row in table.rows]
    return "\n".join([*parts, "```\n"])


def _sources(table: Table) -> list[str]:
    published = [measure.published for row in table.rows for measure in row.measures]
    return list(dict.fromkeys(value.source for value in published if value is not None))


def _lines(row: Row, results: Sequence[SeedResult]) -> list[tuple[str, ...]]:
    first = results[0] if results else None
    digests = (first.parameters_sha256[:DIGITS], first.data_sha256[:DIGITS]) if first else ("–", "–")
    ends = (_seconds(results), *digests)
    return [
        (
            row.label if number == 0 else "",
            measure.name,
            *_cells(measure, row, results),
            *(ends if number == 0 else [""] * 3),
        )
        for number, measure in enumerate(row.measures)
    ]


def _cells(measure: Measure, row: Row, results: Sequence[SeedResult]) -> tuple[str, str, str, str]:
    values = _values(measure, results)
    ours = (
        _with_deviation(*mean_and_deviation(values)) if values else "not reached" if results else _not_run(measure, row)
    )
    ours += f" (reached by {len(values)})" if 0 < len(values) < len(results) else ""
    seeds = f"{len(results)} of {len(row.seeds)}" if results else "–"
    published = measure.published
    is_missing = row.has_published and not any(other.published for other in row.measures)
    unknown = "not checked" if is_missing else "none"
    theirs = _with_deviation(published.value, published.deviation) if published else unknown
    return ours, seeds, theirs, gate_of(measure, results)


def _not_run(measure: Measure, row: Row) -> str:
    if row.hours is None or measure is not row.measures[0]:
        return "not run"
    cost = f"{row.hours:g} h" if row.hours >= 1 else f"{60 * row.hours:.0f} min"
    return f"not run (about {cost} a seed)"


def _seconds(results: Sequence[SeedResult]) -> str:
    """Return the mean processor time of a seed, or the mean duration if no processor time is stored."""
    if not results:
        return "–"
    processor = [result.processor_seconds for result in results if result.processor_seconds is not None]
    return f"{mean(processor):.0f}" if processor else f"{mean(result.seconds for result in results):.0f} (wall)"


def _values(measure: Measure, results: Sequence[SeedResult]) -> list[float]:
    found = [result.values.get(measure.name) for result in results]
    return [value for value in found if value is not None]


def _with_deviation(value: float, deviation: float | None) -> str:
    """Return a value and its deviation.

    >>> _with_deviation(74.8, 2.68), _with_deviation(97, None)
    ('74.80 ± 2.68', '97.00')
    """
    return f"{value:.2f}" if deviation is None else f"{value:.2f} ± {deviation:.2f}"


def _anchor(title: str) -> str:
    """Return the anchor of a heading.

    >>> _anchor("Two malicious clients of ten, MNIST")
    'two-malicious-clients-of-ten-mnist'
    """
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -")
    return kept.replace(" ", "-")
