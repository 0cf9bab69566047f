"""Hold the settings of a data check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlearn.advice import assignment
from fedlearn.advice import command as typed_command
from fedlearn.data.table_settings import TableSettings
from fedlearn.data.target_columns import target_names


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """Hold the settings of ``scenario=folder`` that give columns their roles.

    Args:
        targets: columns to predict; empty if unknown.
        client: column with the client of each row.
        ignore: columns that the training omits.
        text: columns of text, which the training reads as words.
        categories: columns whose levels the settings declare.
        properties: columns that describe image files, and are no features.
        task: name of the task; None infers it from the target.
        is_sampled: whether a large table is checked in a sample.
        command: command that repeats the check.
    """

    targets: Sequence[str] = ()
    client: str | None = None
    ignore: Sequence[str] = ()
    text: Sequence[str] = ()
    categories: Sequence[str] = ()
    properties: Sequence[str] = ()
    task: str | None = None
    is_sampled: bool = True
    command: str = "python -m simulations.data inspect PATH"

    @property
    def listing(self) -> str:
        """Command that writes the check with row numbers into a file."""
        return f"{self.command} --json data_check.json"

    @property
    def schema_command(self) -> str:
        """Command that writes a schema of the columns."""
        return f"{self.command} --write-schema schema.yaml"

    def without(self, *names: str) -> str:
        """Return the setting that omits these columns, too."""
        return assignment("scenario.ignore", [*self.ignore, *names])


def check_settings(stated: TableSettings, path: str, *, is_sampled: bool) -> CheckSettings:
    """Return the settings of a check from settings of ``scenario=folder``.

    Args:
        stated: settings about columns.
        path: path as the user typed it.
        is_sampled: whether a large table is checked in a sample.
    """
    settings = CheckSettings(
        targets=target_names(stated.target or ()),
        client=stated.client,
        ignore=stated.ignore,
        text=target_names(stated.text or ()),
        categories=tuple(stated.reading.levels),
        task=stated.task,
        is_sampled=is_sampled,
    )
    return replace(settings, command=inspect_command(path, settings))


def inspect_command(path: str, settings: CheckSettings) -> str:
    """Return the command that checks a path with these roles of columns.

    >>> inspect_command("my data", CheckSettings(targets=("sick",), client="site"))
    "python -m simulations.data inspect 'my data' target=sick client=site"
    """
    targets = settings.targets[0] if len(settings.targets) == 1 else settings.targets
    roles = {"target": targets, "client": settings.client, "ignore": settings.ignore, "text": settings.text}
    words = [assignment(name, value) for name, value in roles.items() if value]
    return " ".join([typed_command("python -m simulations.data inspect", path), *words])
