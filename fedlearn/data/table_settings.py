"""Combine the settings about columns with a schema. A setting and a schema may not state the same thing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.advice import assignment, label
from fedlearn.data.cell_formats import CellFormat, TextFormat
from fedlearn.data.levels import to_category
from fedlearn.data.schema import TableSchema
from fedlearn.data.schema_files import read_schema
from fedlearn.data.tables import Table
from fedlearn.data.typed_tables import Reading, cell_format
from fedlearn.errors import DataError, did_you_mean, require


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """Hold the settings about the columns of tables.

    Args:
        target: column to predict, or columns.
        task: name of the task; None infers it.
        classes: values of the target in order; None takes the values in the data.
        client: column that names the client of each row.
        clients: names of all clients in order.
        ignore: columns to leave out.
        text: columns of text to learn from.
        order_by: column that orders the rows.
        scales: (centre, spread) of columns.
        categories: values of columns of categories.
        bounds: (minimum, maximum) of columns.
        schema: schema of all columns.
    """

    target: str | Sequence[str] | None = None
    task: str | None = None
    classes: tuple[Any, ...] | None = None
    client: str | None = None
    clients: tuple[Any, ...] | None = None
    ignore: tuple[str, ...] = ()
    text: str | Sequence[str] | None = None
    order_by: str | None = None
    scales: Mapping[str, Sequence[float]] = field(default_factory=dict)
    categories: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    bounds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    schema: TableSchema | None = None

    @property
    def reading(self) -> Reading:
        """Declared columns, for `fedlearn.data.typed_tables.type_table`."""
        targets = [self.target] if isinstance(self.target, str) else [*(self.target or ())]
        levels = {name: [*map(to_category, values)] for name, values in self.categories.items()}
        levels |= {name: [*map(to_category, self.classes)] for name in targets if self.classes is not None}
        texts = [*as_items(self.client or ()), *as_items(self.text or ())]
        used = [*self.scales, *self.bounds, *([self.order_by] if self.order_by else [])]
        return Reading(schema=self.schema, levels=levels, texts=texts, targets=targets, used=used)

    @property
    def formats(self) -> dict[str, CellFormat | TextFormat]:
        """Formats of cells that the schema states."""
        if self.schema is None:
            return {}
        columns = {name: self.schema.column(name) for name in self.schema.columns}
        return {name: cell_format(column) or TextFormat(missing=column.missing) for name, column in columns.items()}

    def require_names(self, table: Table, *, has_all_files: bool = True) -> None:
        """Refuse settings that name no column of the table.

        Args:
            table: table before its columns are typed.
            has_all_files: whether the files of all clients are here. If not, another client may have the columns to
                ignore.

        Raises:
            DataError: ``ignore``, ``scales``, ``categories`` or ``bounds`` names a column that no file has.
        """
        known = [*table.columns, *sorted(table.ignored)]
        for setting in (*(["ignore"] if has_all_files else []), "scales", "categories", "bounds"):
            for name in getattr(self, setting):
                if str(name) not in known:
                    closest = did_you_mean(str(name), known) or next(iter(table.columns))
                    others = [closest if item == name else item for item in getattr(self, setting)]
                    fix = assignment("scenario.ignore", others) if setting == "ignore" else f"the name {closest}"
                    raise DataError(
                        f"scenario.{setting} has the name {name}\n  expected  names of the columns {', '.join(known)}\n"
                        f"{label(fix)}"
                    )


def table_settings(*, schema: str | Path | None = None, **settings: Any) -> TableSettings:
    """Return the settings about columns, with the statements of a schema.

    Args:
        schema: path of a schema; None has no schema.
        settings: values of the other arguments of `TableSettings`. A single value for a list is a list of one item.

    Raises:
        SettingError: a setting and the schema state the same thing.
        DataError: the schema cannot be read.
    """
    values = {name: value for name, value in settings.items() if value is not None}
    for name in ("classes", "clients", "ignore"):
        if name in values:
            values[name] = as_items(values[name])
    values["ignore"] = tuple(map(str, values.get("ignore", ())))
    if "categories" in values:
        values["categories"] = {str(name): as_items(items) for name, items in values["categories"].items()}
    if schema is None:
        return TableSettings(**values)
    stated = _statements(read_schema(Path(schema).expanduser()), values["ignore"])
    for name, statement in stated.items():
        _refuse_both(name, values.get(name), statement)
        values[name] = {**values.get(name, {}), **statement} if isinstance(statement, Mapping) else statement
    return TableSettings(**values)


def as_items(value: Any) -> tuple[Any, ...]:
    """Return a list as a tuple, and a single value as a tuple of one item.

    >>> as_items("patient_age"), as_items([1, 2])
    (('patient_age',), (1, 2))
    """
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def _statements(schema: TableSchema, ignored: Sequence[str]) -> dict[str, Any]:
    """Return the settings that a schema states."""
    columns = {name: schema.column(name) for name in schema.features if name not in ignored}
    target = schema.target_column
    stated: dict[str, Any] = {"schema": schema, "target": schema.target, "client": schema.client}
    if target is not None and target.type in ("number", "date"):
        columns[str(schema.target)] = target
        stated["task"] = "regression"
    elif target is not None and target.levels:
        stated["classes"] = target.names or target.levels
    stated["scales"] = {name: column.constants for name, column in columns.items() if column.constants}
    stated["bounds"] = {name: column.range for name, column in columns.items() if column.range}
    stated["categories"] = {name: column.levels for name, column in columns.items() if column.levels}
    return {name: value for name, value in stated.items() if value}


def _refuse_both(name: str, value: Any, statement: Any) -> None:
    both = {*value} & {*statement} if isinstance(value, Mapping) and isinstance(statement, Mapping) else value
    setting = f"{name}.{sorted(both)[0]}" if isinstance(both, set) and both else name
    require(not both, setting, value, "null, because the schema states it", f"{name}=null")
