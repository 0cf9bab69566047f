"""Read options of a command from a YAML file, such as ``node.yaml``. Options on the command line take precedence.

The keys are the names of the options, with ``_`` or ``-``: ``connect_timeout: 30`` is ``--connect-timeout 30``.
Relative paths are relative to the folder of the file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedlearn.advice import quote_value
from fedlearn.core.command_line import CommandParser, UsageError
from fedlearn.core.plain_text import plain_line
from fedlearn.errors import did_you_mean

CONFIG, SETTINGS = "config", "settings"  # the option, and the key with the settings of an experiment
NOT_IN_FILES = (CONFIG, "help", "version")
MAX_FILE_BYTES = 2**20


def add_config_option(parser: CommandParser, example: str, *, has_settings: bool = False) -> None:
    """Add the option ``--config FILE`` to a parser, which then reads the file before the other words.

    Args:
        parser: parser of the command.
        example: usual name of the file, e.g. ``node.yaml``.
        has_settings: True if the file may have the key ``settings``: settings of an experiment, as on the command line.
    """
    text = f"YAML file with options of this command, e.g. {example}"
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=text)

    def expand(words: Sequence[str]) -> list[str]:
        return expand_config(parser, words, has_settings=has_settings)

    parser.expand = expand


def expand_config(parser: CommandParser, arguments: Sequence[str], *, has_settings: bool = False) -> list[str]:
    """Return the words of a command line, with the options of its configuration file before them.

    Raises:
        UsageError: The file cannot be read, a key is unknown, or a value has a wrong form.
    """
    file, rest = _take_file(arguments, has_settings=has_settings)
    if file is None:
        return [*arguments]
    content = _read(file)
    options, flags = _options(parser), {word.partition("=")[0] for word in rest}
    expanded = list[str]()
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if has_settings and key == SETTINGS:
            expanded += _settings(file, value, rest)
        elif name not in options or name in NOT_IN_FILES:
            raise UsageError(_unknown(file, str(key), [*options, *([SETTINGS] if has_settings else [])]))
        elif f"--{name}" not in flags:  # a list on the command line replaces the list of the file
            expanded += _words(file, name, value, options[name])
    return [*expanded, *rest]


def _take_file(words: Sequence[str], *, has_settings: bool) -> tuple[Path | None, list[str]]:
    """Return the configuration file, and all other words. With settings, a first word ``study.yaml`` is the file."""
    rest = [*words]
    if has_settings and rest and re.fullmatch(r"[^=-][^=]*\.ya?ml", rest[0]):
        return Path(rest[0]), rest[1:]
    for i, word in enumerate(rest):
        if word == f"--{CONFIG}" and i + 1 < len(rest):
            return Path(rest[i + 1]), rest[:i] + rest[i + 2 :]
        if word.startswith(f"--{CONFIG}="):
            return Path(word.partition("=")[2]), rest[:i] + rest[i + 1 :]
    return None, rest


def _read(file: Path) -> Mapping[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES)
        content = yaml.safe_load(data.decode("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        detail = plain_line(str(getattr(error, "strerror", "") or error))
        expected = "a YAML file with options of this command"
        raise UsageError(f"--config {file} cannot be read: {detail}\n  expected  {expected}") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {file} has no keys\n  expected  lines such as state: /var/lib/fedlearn")
    return content


def _options(parser: CommandParser) -> dict[str, argparse.Action]:
    names = ((name, action) for action in parser._actions for name in action.option_strings)
    return {name.removeprefix("--"): action for name, action in names if name.startswith("--")}


def _unknown(file: Path, key: str, known: Sequence[str]) -> str:
    names = [name.replace("-", "_") for name in known if name not in NOT_IN_FILES]
    near = did_you_mean(key.replace("-", "_"), names, cutoff=0.5)
    hint = f"\n  did you mean {near}?" if near else ""
    return f"{plain_line(key)} in {file} is not an option of this command{hint}\n  expected  one of {', '.join(names)}"


def _words(file: Path, name: str, value: Any, action: argparse.Action) -> list[str]:
    """Return an option and its value as words of a command line."""
    if value is None:
        return []
    if action.nargs == 0:  # a flag
        _require(isinstance(value, bool), file, name, value, "true or false")
        return [f"--{name}"] if value else []
    values = value if isinstance(value, list) else [value]
    is_repeated = isinstance(action, argparse._AppendAction)
    is_plain = all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in values)
    _require(is_plain and (is_repeated or not isinstance(value, list)), file, name, value, "a text or a number")
    texts = (str(file.parent / item if action.type is Path else item) for item in values)
    return [f"--{name}={text}" for text in texts]


def _settings(file: Path, settings: Any, rest: Sequence[str]) -> list[str]:
    """Return the settings of a file as overrides; a setting on the command line replaces it."""
    _require(isinstance(settings, dict), file, SETTINGS, settings, "lines such as scenario: heart")
    typed = {word.partition("=")[0].lstrip("+~") for word in rest}
    names = {str(name): value for name, value in settings.items()}
    return [f"{name}={quote_value(value)}" for name, value in names.items() if name.lstrip("+~") not in typed]


def _require(condition: bool, file: Path, name: str, value: Any, expected: str) -> None:
    if not condition:
        text = plain_line(repr(value))
        raise UsageError(f"{name.replace('-', '_')} in {file} is {text}\n  expected  {expected}")
