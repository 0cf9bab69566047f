"""Run the command ``data inspect``: check files before training, at the place of the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlearn.callbacks.data_check import check_as_json, print_check
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.command_line import DONE, UsageError
from fedlearn.data.data_check import CheckSettings
from fedlearn.data.data_check.inspection import inspect_path
from fedlearn.data.data_check.settings import inspect_command
from fedlearn.data.image_folders import ImageSettings
from fedlearn.errors import did_you_mean
from fedlearn.runner.compose import parse_overrides
from fedlearn.runner.conf_files import installed_options

FLAGGED = 1  # exit code of --strict for data with flags


def inspect_data(path: str, settings: Sequence[str], *, json_file: str | None, strict: bool) -> int:
    """Print the data check of a path, and return the exit code.

    Args:
        path: file, folder, or ``hf://owner/name``.
        settings: settings of ``scenario=folder``, e.g. ``target=sick``; the group ``scenario.`` may be left out.
        json_file: file for the whole check; None writes no file.
        strict: whether the exit code is 1 if there is a flag.
    """
    values = read_settings(settings)
    roles = check_settings(values)
    check = inspect_path(path, replace(roles, command=inspect_command(path, roles)), images=_image_settings(values))
    print_check(check)
    if json_file is not None:
        write_atomically(Path(json_file), check_as_json(check))
    return FLAGGED if strict and check.flags else DONE


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
            hint = f"\n  did you mean {near}?" if near else "\n  try       target=COLUMN"
            raise UsageError(
                f"{parsed.text} is not a setting of this command{hint}\n  expected  one of {', '.join(known)}"
            )
        values[name] = parsed.value
    return values


def check_settings(settings: dict[str, Any]) -> CheckSettings:
    """Return the settings of the check from settings of ``scenario=folder``. A text is a list of one text."""
    return CheckSettings(
        targets=_as_list(settings.get("target")),
        client=_as_text(settings.get("client")),
        task=_as_text(settings.get("task")),
        ignore=_as_list(settings.get("ignore")),
        text=_as_list(settings.get("text")),
        categories=tuple(settings.get("categories") or ()),
        is_sampled=False,
    )


def _image_settings(settings: dict[str, Any]) -> ImageSettings:
    """Return the settings of the reading of images, under the names of ``scenario=folder``."""
    return ImageSettings(
        size=settings.get("image_size"),
        channels=settings.get("image_channels"),
        layout=settings.get("layout"),
        clients=_as_list(settings.get("clients")),
        classes=_as_list(settings.get("classes")),
        file_column=settings.get("image"),
    )


def _as_list(value: Any) -> tuple[str, ...]:
    return () if value is None else tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)
