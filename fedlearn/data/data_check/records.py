"""Hold the result of a data check: a summary of each column, and flags for probable faults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fedlearn.advice import assignment

# kinds of flags, the most harmful first
FLAG_KINDS = (
    "unreadable",
    "columns",
    "leakage",
    "units",
    "not numbers",
    "missing markers",
    "placeholder numbers",
    "spelling",
    "levels by site",
    "duplicates across sites",
    "duplicates across splits",
    "duplicates",
    "contradictions",
    "classes by site",
    "imbalance",
    "rows by site",
    "empty column",
    "missing by site",
    "identifier",
    "date",
    "free text",
    "many levels",
    "constant",
    "constant at a site",
    "outliers",
    "image sizes",
    "image channels",
    "image depth",
)

MAX_OF_A_KIND = 5  # columns that people see with a flag of the same kind
KINDS_TO_IGNORE = ("leakage", "empty column", "identifier", "free text", "many levels", "constant")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """Describe one probable fault of the data, and one thing to try.

    Args:
        kind: one of `FLAG_KINDS`.
        message: description of the fault, which starts with the column.
        advice: setting or command that works as typed.
        column: name of the column; empty for a fault of rows, sites or files.
        sites: names of the sites with the fault; empty for all sites.
        rows: places of the rows or files with the fault, e.g. ``north.csv, row 7``; at most 1,000.
    """

    kind: str
    message: str
    advice: str
    column: str = ""
    sites: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Place of this flag in a list that starts with the most harmful kind."""
        return FLAG_KINDS.index(self.kind)


@dataclass(frozen=True, kw_only=True)
class SiteSummary:
    """Summarize one column at one site.

    Args:
        site: name of the site.
        num_rows: number of rows.
        num_missing: number of missing cells.
        median: median of the numbers; None for other columns.
        iqr: interquartile range of the numbers; None for other columns.
        counts: number of cells of each level; empty for numbers.
    """

    site: str
    num_rows: int
    num_missing: int
    median: float | None = None
    iqr: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ColumnSummary:
    """Summarize one column.

    Args:
        name: name of the column.
        taken_as: role or kind of the column in training, e.g. ``target`` or ``number``.
        format: format of the cells, e.g. ``decimal comma``; empty for the usual format.
        content: levels, or median and range from the 1st to the 99th percentile, as text.
        num_missing: number of missing cells.
        share_missing: their share of all cells, in [0, 1].
        by_site: differences between sites, as text; empty without a difference.
        sites: summary of each site.
    """

    name: str
    taken_as: str
    content: str
    num_missing: int
    share_missing: float
    format: str = ""
    by_site: str = ""
    sites: tuple[SiteSummary, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """Hold the result of a data check.

    Args:
        source: name of the file or folder.
        num_rows: number of rows or images.
        num_checked: number of rows that were checked; less than ``num_rows`` for a sample.
        rows_by_site: number of rows of each site.
        columns: summary of each column, in the order of the file.
        flags: probable faults, the most harmful first.
        unit: ``rows`` or ``images``.
        ignored: columns that the settings omit.
        notes: decisions about the reading of files and cells.
    """

    source: str
    num_rows: int
    num_checked: int
    rows_by_site: Mapping[str, int]
    columns: tuple[ColumnSummary, ...] = ()
    flags: tuple[Flag, ...] = ()
    unit: str = "rows"
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_sample(self) -> bool:
        """True if the check read a part of the rows only."""
        return self.num_checked < self.num_rows

    @property
    def suggested_ignore(self) -> tuple[str, ...]:
        """Columns that training should leave out: identifiers, free text, constants, and leaking or empty columns."""
        return tuple(dict.fromkeys(flag.column for flag in self.flags if flag.kind in KINDS_TO_IGNORE))

    @property
    def short_flags(self) -> tuple[Flag, ...]:
        """Flags for people: more than `MAX_OF_A_KIND` flags of columns of the same kind become a single flag."""
        kinds = dict.fromkeys(flag.kind for flag in self.flags)
        groups = [[flag for flag in self.flags if flag.kind == kind] for kind in kinds]
        return tuple(
            flag for group in groups for flag in (group if len(group) <= MAX_OF_A_KIND else [self._merge(group)])
        )

    def _merge(self, flags: Sequence[Flag]) -> Flag:
        columns = list(dict.fromkeys(flag.column for flag in flags))
        names = f"{', '.join(columns[:MAX_OF_A_KIND])} and {len(columns) - MAX_OF_A_KIND} more"
        is_ignored = "scenario.ignore=" in flags[0].advice
        advice = assignment("scenario.ignore", [*self.ignored, *columns]) if is_ignored else flags[0].advice
        message = f"{len(columns)} columns: {names}; e.g. {flags[0].message}"
        return replace(flags[0], column="", sites=(), rows=(), message=message, advice=advice)

    def to_json(self) -> dict[str, Any]:
        """Return this check as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> DataCheck:
        """Return the check that `to_json` described.

        Raises:
            TypeError: the content has other names.
        """
        columns = tuple(
            ColumnSummary(**{**column, "sites": tuple(SiteSummary(**site) for site in column["sites"])})
            for column in content["columns"]
        )
        flags = tuple(
            Flag(**{**flag, "sites": tuple(flag["sites"]), "rows": tuple(flag["rows"])}) for flag in content["flags"]
        )
        lists = {name: tuple(content[name]) for name in ("notes", "ignored")}
        return cls(**{**content, **lists, "columns": columns, "flags": flags})
