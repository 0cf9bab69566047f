"""Refuse to resume a run whose training data have changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedlearn.core.checkpoint import write_atomically
from fedlearn.data.digests import changes, digests_of_clients
from fedlearn.errors import DataError
from fedlearn.loop.scenario import Scenario
from fedlearn.runner.model_folder import PREPROCESSING_FILE
from fedlearn.runner.run_folder import DIGESTS_FILE, HELD_OUT_FILE

MAX_SHOWN = 5


def write_data_digests(folder: Path, scenario: Scenario) -> None:
    """Write digests of the training data into a run folder. A coordinator has no data, so it writes no file."""
    if scenario.data.num_train is None:
        write_atomically(folder / DIGESTS_FILE, json.dumps(_digests(scenario), indent=1) + "\n")


def write_held_out_rows(folder: Path, scenario: Scenario) -> None:
    """Write client, file and rows of the held-out rows. A coordinator has no data, so it writes no file."""
    if scenario.data.num_train is None and scenario.held_out_table:
        write_atomically(folder / HELD_OUT_FILE, scenario.held_out_table)


def require_same_data(folder: Path, scenario: Scenario) -> None:
    """Refuse training data that differ from the data at the start of the run.

    Raises:
        DataError: rows, columns or labels have changed; the message names files and columns, or clients.
    """
    path = folder / DIGESTS_FILE
    if scenario.data.num_train is not None or not path.exists():
        return
    changed = changes(json.loads(path.read_text(encoding="utf-8")), _digests(scenario))
    if not changed:
        return
    more = f" and {len(changed) - MAX_SHOWN} more" if len(changed) > MAX_SHOWN else ""
    shown = ", ".join(changed[:MAX_SHOWN]) + more
    raise DataError(
        f"the training data of {folder} have changed: {shown}\n"
        "  expected  the data at the start of the run\n  advice    the earlier data, or a new run"
    )


def _digests(scenario: Scenario) -> Mapping[str, str]:
    preprocessing = scenario.preprocessing
    encoding = {PREPROCESSING_FILE: preprocessing.digest} if preprocessing is not None else {}
    data = scenario.data_digests or digests_of_clients(scenario.data)
    return {**data, **encoding}
