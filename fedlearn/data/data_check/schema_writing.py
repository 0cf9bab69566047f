"""Describe the columns that a data check read in a schema, so that all sites read their files in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedlearn.data.cell_formats import DateFormat, NumberFormat
from fedlearn.data.data_check.settings import CheckSettings
from fedlearn.data.data_check.typed_columns import TypedColumns
from fedlearn.data.levels import to_categories
from fedlearn.data.schema import MISSING, ColumnSchema, TableSchema
from fedlearn.data.target_columns import read_targets
from fedlearn.errors import FedlearnError, require


def schema_of(
    typed: TypedColumns, taken_as: Mapping[str, str], settings: CheckSettings, classes: Sequence[object] | None = None
) -> TableSchema:
    """Return the schema with which a run reads these columns.

    It has names, types, formats and levels, and no statistics. Identifiers, free text and columns with too many levels
    are left out of the features.

    Args:
        typed: typed columns.
        taken_as: kind of each column in the data check.
        settings: roles of the columns.
        classes: classes of the target in order; None takes the classes in the data.

    Raises:
        SettingError: there are several targets.
    """
    fix = "target=COLUMN"
    require(len(settings.targets) < 2, "target", list(settings.targets), "one column, for a schema", fix)
    columns = {
        name: _column(typed, name, kind, settings, classes)
        for name, kind in taken_as.items()
        if name in typed.table.columns and name not in typed.row_labels
    }
    columns |= {name: ColumnSchema(type="ignore") for name in settings.ignore}
    markers = dict.fromkeys(cell for counts in typed.markers.values() for cell in counts)
    return TableSchema(
        columns=columns,
        target=next(iter(settings.targets), None),
        client=settings.client,
        missing=(*MISSING, *(cell for cell in markers if cell not in MISSING)),
    )


def _column(
    typed: TypedColumns, name: str, kind: str, settings: CheckSettings, classes: Sequence[object] | None
) -> ColumnSchema:
    format = typed.table.formats.get(name)
    if kind == "ignored":
        return ColumnSchema(type="ignore")
    if kind in ("id", "client"):
        return ColumnSchema(type="id")
    if kind == "target":
        levels = _classes(typed, name, settings, classes)
        if levels:
            return ColumnSchema(type="category", levels=levels)
    if isinstance(format, DateFormat):
        return ColumnSchema(type="date", format=format.format)
    if isinstance(format, NumberFormat):
        decimal = format.decimal if format.decimal != "." else None
        return ColumnSchema(type="number", unit=format.unit, decimal=decimal, thousands=format.thousands or None)
    if typed.table.columns[name].dtype != object:
        return ColumnSchema(type="number")
    if kind == "text" and name in settings.text:
        return ColumnSchema(type="text")
    if kind in ("category", "constant", "date", "target"):
        cells_N = to_categories(typed.table.columns[name])
        return ColumnSchema(type="category", levels=tuple(sorted({cell for cell in cells_N if cell is not None})))
    return ColumnSchema(type="ignore")


def _classes(
    typed: TypedColumns, name: str, settings: CheckSettings, classes: Sequence[object] | None
) -> tuple[str, ...]:
    """Return the classes in the order of a run; empty for a regression, and for a target with a fault."""
    try:
        found = read_targets(typed.table, name, task=settings.task, classes=classes, has_all_clients=True)
    except FedlearnError:
        return ()
    return found.classes
