"""Exit codes of commands, and the error messages that go with them."""

from __future__ import annotations

import logging
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence

from fedlearn.callbacks.callback_list import CallbackError
from fedlearn.errors import FedlearnError, did_you_mean
from fedlearn.runner.builders import BuildError
from fedlearn.runner.interrupt import terminate_as_interrupt
from fedlearn.runner.run_folder import RunFolderWriteError

DONE, BAD_CONFIGURATION, FAILED, STOPPED = 0, 2, 3, 130


def exit_code(action: Callable[[], int]) -> int:
    """Run ``action``; turn its exceptions into a message and an exit code."""
    # stray log lines before there is a run.log: Python would print them
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        return action()
    except (BuildError, CallbackError, RunFolderWriteError) as error:
        return _tell(f"{error}{_place(error.__cause__)}", FAILED)
    except FedlearnError as error:
        return _tell(error, BAD_CONFIGURATION)
    except KeyboardInterrupt:
        return _tell("stopped", STOPPED)


def run_command(parser: ArgumentParser, action: Callable[..., int], argv: Sequence[str] | None = None) -> int:
    """Parse a command line and run ``action``.

    Args:
        parser: the parser of the command; the name of each argument is a keyword of ``action``.
        action: the command; returns an exit code.
        argv: words of the command line; None takes those of this process.

    Returns:
        The exit code.
    """
    try:
        options = vars(parser.parse_intermixed_args(argv))  # setting=value words may follow options
    except TypeError:  # argparse does not mix options and words of a parser with subcommands
        options = vars(parser.parse_args(argv))
    terminate_as_interrupt()
    return exit_code(lambda: action(**options))


def parse_settings(overrides: Sequence[str], known: Sequence[str], *, example: str) -> dict[str, str]:
    """Return ``setting=value`` words as a dict.

    Args:
        overrides: words of a command line.
        known: names of the settings of the command.
        example: word that works, for the error.

    Raises:
        FedlearnError: a word has another form, or an unknown name.
    """
    pairs = [word.partition("=") for word in overrides]
    for word, (name, _, value) in zip(overrides, pairs, strict=True):
        if name not in known or not value:
            near = did_you_mean(name, known)
            fix = f"{near}={value}" if near and value and near != name else example
            expected = " or ".join(f"{known_name}=..." for known_name in known)
            raise FedlearnError(f"{word} cannot be read\n  expected  {expected}\n  try       {fix}")
    return {name: value for name, _, value in pairs}


def _tell(message: object, code: int) -> int:
    sys.stderr.write(f"{message}\n")
    return code


def _place(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return f"\n  in        {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
