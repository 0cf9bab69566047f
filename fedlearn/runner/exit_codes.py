"""How a command ends: a message for what went wrong, and an exit code."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable

from fedlearn.errors import FedlearnError
from fedlearn.runner.builders import BuildError
from fedlearn.runner.run_folder import RunFolderWriteError

DONE, BAD_CONFIGURATION, FAILED, STOPPED = 0, 2, 3, 130


def exit_code(action: Callable[[], int]) -> int:
    """Do what a command is for, turning what it raises into a message and an exit code."""
    # stray log lines before there is a run.log: Python would print them
    logging.getLogger().addHandler(logging.NullHandler())
    try:
        return action()
    except (BuildError, RunFolderWriteError) as error:
        return _tell(f"{error}{_place(error.__cause__)}", FAILED)
    except FedlearnError as error:
        return _tell(error, BAD_CONFIGURATION)
    except KeyboardInterrupt:
        return _tell("stopped", STOPPED)


def _tell(message: object, code: int) -> int:
    sys.stderr.write(f"{message}\n")
    return code


def _place(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error else []
    return f"\n  in        {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
