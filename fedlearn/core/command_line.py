"""Parse command lines, with one format of errors and one set of exit codes for all commands.

Settings are ``key=value`` words. Options of a command are ``--name``.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import traceback
from bdb import BdbQuit
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlearn.core.version import VERSION
from fedlearn.errors import FedlearnError, SettingError, did_you_mean

DONE, BAD_CONFIGURATION, FAILED, STOPPED = 0, 2, 3, 130
VERSION_LINE = f"fedlearn {VERSION}"
CONSOLE_SCRIPTS = ("fedlearn", "fedlearn.exe")  # names of the installed console command
SETTINGS = ("settings", "overrides")  # arguments that take key=value words; the second name is Hydra's
EXPECTED = {int: "a whole number", float: "a number"}
INVALID_VALUE = re.compile(r"invalid (\w+) value: '(.*)'")
INVALID_CHOICE = re.compile(r"invalid choice: (.*) \(choose from (.*)\)")
MISSING_VALUE = re.compile(r"expected (one argument|at least one argument|\d+ arguments)")
MISSING_ARGUMENTS = re.compile(r"the following arguments are required: (.*)")


class UsageError(FedlearnError):
    """A word, an option or a setting of the command line is invalid."""


class CommandParser(argparse.ArgumentParser):
    """Parser of the options of one command. An invalid word raises `UsageError`.

    Args:
        passes_on: parser for the words that this parser does not know; None to refuse such words.
        options: keyword arguments of `argparse.ArgumentParser`.

    Attributes:
        expand: function that adds the words of a configuration file to the words of the command line; None: no file.
    """

    expand: Callable[[Sequence[str]], list[str]] | None = None

    def __init__(self, *, passes_on: argparse.ArgumentParser | None = None, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "exit_on_error": False, **options})
        self.passes_on = passes_on
        self._typed: list[str] = []

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse all words. If the command takes settings, words after an option count as settings."""
        parsed, rest = self.parse_known_args(args, namespace)
        settings = next((name for name in SETTINGS if name in parsed), None)
        if settings:
            setattr(parsed, settings, [*getattr(parsed, settings), *rest])
        elif rest:
            raise UsageError(f"{rest[0]} is not expected\n  expected  {self._usage()}\n  try       {self.prog} --help")
        return parsed

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse the known words, and return the other words. Unknown options raise `UsageError`."""
        self._typed = list(sys.argv[1:] if args is None else args)
        if self.expand:
            args = self._typed = self.expand(self._typed)
        try:
            parsed, rest = super().parse_known_args(args, namespace)
            parse = argparse.ArgumentParser.parse_known_args
            unknown = parse(self.passes_on, rest)[1] if self.passes_on else rest
        except argparse.ArgumentError as error:
            if error.argument_name is None:  # Python 3.13 raises this error, where earlier versions call `error`
                self.error(error.message)
            raise UsageError(self._explain(error)) from error
        for word in unknown:
            if word.startswith("-"):
                raise UsageError(self._explain_unknown(word, accepts_settings=any(name in parsed for name in SETTINGS)))
        return parsed, rest

    def error(self, message: str) -> Any:
        """Raise `UsageError` for a message of argparse. The message names misspelled options before missing ones."""
        known = {*self._known_options(), "--help"}
        for word in self._typed:
            if word.startswith("--") and word.partition("=")[0] not in known:
                raise UsageError(self._explain_unknown(word, accepts_settings=False))
        missing = MISSING_ARGUMENTS.match(message)
        problem = f"{missing[1]} {'are' if ',' in missing[1] else 'is'} missing" if missing else message
        raise UsageError(f"{problem}\n  expected  {self._usage()}\n  try       {self.prog} --help")

    def format_help(self) -> str:
        """Return the help text, with the commands in the form that the user typed."""
        return as_called(super().format_help())

    def _known_options(self) -> list[str]:
        return option_names(self) + (option_names(self.passes_on) if self.passes_on else [])

    def _usage(self) -> str:
        return " ".join(self.format_usage().removeprefix("usage: ").split())

    def _explain(self, error: argparse.ArgumentError) -> str:
        name, fix = (error.argument_name or "").partition("/")[0], f"{self.prog} --help"
        if value := INVALID_VALUE.match(error.message):
            kinds = {kind.__name__: text for kind, text in EXPECTED.items()}
            return f"{name} is {value[2]}\n  expected  {kinds.get(value[1], value[1])}\n  try       {fix}"
        if choice := INVALID_CHOICE.match(error.message):
            typed, known = choice[1].strip("'"), [word.strip("'") for word in choice[2].split(", ")]
            near = did_you_mean(typed, known) or known[0]
            fix = f"{name} {near}" if name.startswith("-") else f"{self.prog} {near}"
            return f"{name} is {typed}\n  expected  one of {', '.join(known)}\n  try       {fix}"
        if count := MISSING_VALUE.match(error.message):
            return f"{name} has no value\n  expected  {count[1]} after {name}\n  try       {fix}"
        return f"{name}: {error.message}\n  expected  {self._usage()}\n  try       {fix}"

    def _explain_unknown(self, word: str, *, accepts_settings: bool) -> str:
        known = self._known_options()
        settings = accepts_settings or self.passes_on is not None
        near = did_you_mean(word.partition("=")[0], known, cutoff=0.8 if settings else 0.5)
        if near is None and settings and "=" in word:
            near = word.lstrip("-")
        also = "setting=value, or " if settings else ""
        lines = [f"{word} is not an option", f"  expected  {also}one of {', '.join(known)}"]
        lines.insert(1, f"  did you mean {near}?") if near else lines.append(f"  try       {self.prog} --help")
        return "\n".join(lines)


def command_parser(module: str, description: str, **options: Any) -> CommandParser:
    """Return the parser of a command, with ``--help`` and ``--version``.

    Args:
        module: dotted name of the command's module, e.g. ``simulations.compare``.
        description: text above the options in the help.
        options: keyword arguments of `CommandParser`.
    """
    shape = {"formatter_class": argparse.RawDescriptionHelpFormatter, "conflict_handler": "resolve"}
    parser = CommandParser(prog=command_name(module), description=description, **{**shape, **options})
    parser.add_argument("--version", action="version", version=VERSION_LINE, help="show the version of fedlearn")
    return parser


def run_command(parser: argparse.ArgumentParser, action: Callable[..., int], argv: Sequence[str] | None = None) -> int:
    """Parse a command line, run ``action``, and return the exit code.

    Args:
        parser: parser of the command; the name of each argument is a keyword of ``action``.
        action: function that runs the command and returns an exit code.
        argv: words of the command line; None for the words of this process.
    """
    terminate_as_interrupt()
    return exit_code(lambda: action(**vars(parser.parse_args(argv))))


def exit_code(action: Callable[[], int]) -> int:
    """Run ``action``, and convert its exceptions to a message and an exit code.

    Returns:
        The result of ``action``; the ``exit_code`` of a `FedlearnError`, which is 2 or 3; 130 after an interrupt.
    """
    # without a handler, Python prints log lines that come before the run.log exists
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        return action()
    except FedlearnError as error:
        place = _place(error.__cause__) if error.exit_code == FAILED else ""
        sys.stderr.write(f"{as_called(f'{error.on_command_line()}{place}')}\n")
        return error.exit_code
    except (KeyboardInterrupt, BdbQuit):  # Ctrl-C, or the command q of a debugger
        sys.stderr.write("stopped\n")
        return STOPPED
    except BrokenPipeError:  # the reader of a pipe has closed it, e.g. ``| head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the exit of Python fails
        return DONE


def terminate_as_interrupt() -> None:
    """Make SIGTERM end this process in the same way as Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def take_settings(arguments: Sequence[str], examples: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of some settings, and all other words of a command line.

    Args:
        arguments: words of a command line.
        examples: a valid value of each setting; values get its type. A list accepts values with commas.

    Raises:
        UsageError: A word has the group of these settings, but is not one of them.
        SettingError: A value has another type.

    >>> take_settings(["audit.rounds=3", "strategy=fedprox"], {"audit.rounds": 1})
    ({'audit.rounds': 3}, ['strategy=fedprox'])
    """
    groups = {name.partition(".")[0] for name in examples}
    matching = [word for word in arguments if re.split("[.=]", word)[0] in groups]
    return read_settings(matching, examples), [word for word in arguments if word not in matching]


def read_settings(arguments: Sequence[str], examples: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of ``name=value`` words.

    Args:
        arguments: settings as typed; the last value of a name is used.
        examples: see `take_settings`.

    Raises:
        UsageError: A word is not one of these settings.
        SettingError: A value has another type.
    """
    values = {}
    for word in arguments:
        name, equals, text = word.partition("=")
        if name not in examples:
            near = did_you_mean(name, examples)
            hint = f"\n  did you mean {near}{equals}{text}?" if near else ""
            fix = "" if near else f"\n  try       {_typed(next(iter(examples)), examples)}"
            raise UsageError(f"{word} is not a setting{hint}\n  expected  one of {', '.join(examples)}{fix}")
        if not text:
            raise UsageError(f"{word} has no value\n  expected  {name}=value\n  try       {_typed(name, examples)}")
        values[name] = _convert(name, text, examples)
    return values


def _convert(name: str, text: str, examples: Mapping[str, Any]) -> Any:
    example = examples[name]
    parts = text.strip("[]").split(",") if isinstance(example, list) else [text]
    kind = type(example[0] if isinstance(example, list) else example)
    try:
        values = [kind(part.strip()) for part in parts]
    except ValueError:
        expected = EXPECTED[kind] + (", or several with commas" if isinstance(example, list) else "")
        raise SettingError(name, text, expected, _typed(name, examples)) from None
    return values if isinstance(example, list) else values[0]


def _typed(name: str, examples: Mapping[str, Any]) -> str:
    example = examples[name]
    return f"{name}={','.join(map(str, example)) if isinstance(example, list) else example}"


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser in long form, in the order of its usage text."""
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][\w-]*", parser.format_usage())))


def command_name(module: str) -> str:
    """Return the command that starts a module, in the form that the user types.

    >>> command_name("simulations.privacy_attack")
    'python -m simulations.privacy_attack'
    """
    return as_called(f"python -m {module}")


def as_called(text: str) -> str:
    """Return a text with the user's form of commands.

    In the console command, ``python -m simulations.run`` becomes ``fedlearn run``.
    """
    if Path(sys.argv[0]).name not in CONSOLE_SCRIPTS:
        return text
    return re.sub(r"\bpython -m ((?:simulations|fedlearn)(?:\.\w+)+)", lambda found: console_name(found[1]), text)


def console_name(module: str) -> str:
    """Return the console command of a module.

    >>> console_name("simulations.privacy_attack"), console_name("fedlearn.deploy.node_side.policy")
    ('fedlearn privacy-attack', 'fedlearn deploy policy')
    """
    top, *groups, name = module.split(".")
    words = ["fedlearn", *(groups[:1] if top == "fedlearn" else []), name]
    return " ".join(words).replace("_", "-")


def _place(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return f"\n  in        {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
