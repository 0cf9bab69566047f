"""Build the app that Flower sends to the coordinator. It has the name of an installed app, and no code.

Flower also requires the name of a ClientApp. No node loads it: `fedlearn.deploy.node_side.messenger` takes its place.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import fedlearn
from fedlearn.flower.compat.programs import app_bundle

REQUEST_KEY = "request"  # setting of a run, as JSON: see `fedlearn.deploy.coordinator_side.server_app`
PERSON_KEY, NAME_KEY = "person", "name"  # settings that the coordinator adds: who started the run, name of the run
EXIT_MARKER = "fedlearn exit"  # a number follows: the exit code of a run, in Flower's details of the run

PYPROJECT = f"""\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "fedlearn-run"
version = "{fedlearn.__version__}"
description = "Runs fedlearn, which is installed at the coordinator and at each node"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41"]

[tool.flwr.app]
publisher = "fedlearn"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "fedlearn.deploy.coordinator_side.server_app:app"
clientapp = "fedlearn:no_client_app"

[tool.flwr.app.config]
{REQUEST_KEY} = ""
{PERSON_KEY} = ""
{NAME_KEY} = ""
"""

LICENSE = "Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"


def build_app_bundle() -> Any:
    """Return the app bundle (FAB). Equal versions of fedlearn give equal bytes."""
    content, record_of = app_bundle({"pyproject.toml": PYPROJECT.encode(), "LICENSE": LICENSE.encode()})
    return record_of(hashlib.sha256(content).hexdigest())


def parse_exit_code(details: str) -> int | None:
    """Return the exit code in Flower's details of a run; None if they have none.

    >>> parse_exit_code("ServerApp failed with exception: fedlearn exit 130")
    130
    """
    match = re.search(rf"{EXIT_MARKER} (\d+)", details)
    return int(match[1]) if match else None
