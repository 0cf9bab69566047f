"""Run the command ``data inspect``: check files before training, at the place of the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedlearn.advice import assignment, label
from fedlearn.callbacks.data_check import check_as_json, print_check, print_line
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.command_line import DONE, UsageError
from fedlearn.data.data_check.inspection import Inspection, inspect_path
from fedlearn.data.data_check.schema_writing import schema_of
from fedlearn.data.data_check.settings import check_settings
from fedlearn.data.image_folders import ImageSettings
from fedlearn.data.schema_files import write_schema
from fedlearn.data.table_settings import TableSettings, table_settings
from fedlearn.errors import DataError, did_you_mean
from fedlearn.runner.compose import parse_overrides
from fedlearn.runner.conf_files import installed_options

FLAGGED = 1  # exit code of --strict for data with flags


def inspect_data(
    path: str, settings: Sequence[str], *, json_file: str | None, schema_file: str | None, strict: bool
) -> int:
    """Print the data check of a path, and return the exit code.

    Args:
        path: file, folder, or ``hf://owner/name``.
        settings: settings of ``scenario=folder``, e.g. ``target=sick``; the group ``scenario.`` may be left out.
        json_file: file for the whole check; None writes no file.
        schema_file: file for the schema of the columns; None writes no file.
        strict: whether the exit code is 1 if there is a flag.
    """
    values = read_settings(settings)
    stated = table_settings(**{name: values.get(name) for name in [field.name for field in fields(TableSettings)]})
    inspection = inspect_path(path, stated, images=_image_settings(values))
    print_check(inspection.check)
    if json_file is not None:
        write_atomically(Path(json_file), check_as_json(inspection.check))
    if schema_file is not None:
        _write_schema(inspection, stated, path, Path(schema_file))
    return FLAGGED if strict and inspection.check.flags else DONE


def read_settings(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of settings of ``scenario=folder``.

    Raises:
        UsageError: a word is not one of these settings.
    """
    known = [name for name in installed_options()["scenario"]["folder"] if not name.startswith("_") and name != "path"]
    values = {}
    for parsed in parse_overrides(overrides):
        name = parsed.setting.removeprefix("scenario.")
        if name not in known:
            near = did_you_mean(name, known)
            hint = f"\n  did you mean {near}?" if near else "\n  advice    target=COLUMN"
            raise UsageError(
                f"{parsed.text} is not a setting of this command{hint}\n  expected  one of {', '.join(known)}"
            )
        values[name] = parsed.value
    return values


def _write_schema(inspection: Inspection, stated: TableSettings, path: str, file: Path) -> None:
    if inspection.typed is None:
        fix = "scenario.layout=client/class"
        raise DataError(f"{path} has images, but a schema describes tables\n  expected  tables\n{label(fix)}")
    kinds = {column.name: column.taken_as for column in inspection.check.columns}
    settings = check_settings(stated, path, is_sampled=False)
    write_schema(schema_of(inspection.typed, kinds, settings, stated.classes), file)
    print_line(f"\nschema written to {file}; to use it at all sites: {assignment('scenario.schema', str(file))}")


def _image_settings(settings: Mapping[str, Any]) -> ImageSettings:
    """Return the settings of the reading of images, under the names of ``scenario=folder``."""
    return ImageSettings(
        size=settings.get("image_size"),
        channels=settings.get("image_channels"),
        layout=settings.get("layout"),
        clients=_as_texts(settings.get("clients")),
        classes=_as_texts(settings.get("classes")),
        file_column=settings.get("image"),
    )


def _as_texts(value: Any) -> tuple[str, ...]:
    return () if value is None else tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
