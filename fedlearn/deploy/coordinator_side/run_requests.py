"""Check the form of a run request, see `fedlearn.deploy.coordinator_side.server_app`, before the coordinator stores it.

All persons see a stored request in their lists of runs, and the coordinator reads it again after an interruption.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FIELDS: Mapping[str, tuple[type, ...]] = {  # fields of a person's request, with their types
    "do": (str,),
    "settings": (dict,),
    "folder": (str,),
    "chosen": (bool,),
    "overrides": (list,),
    "width": (int, type(None)),
    "rerun_command": (str,),
    "resume_command": (str,),
}
RECOVERY_FIELDS = dict.fromkeys(("continues", "attempts", "num_rounds"), (int,))  # fields of the coordinator alone
STOP_FIELDS = ("do", "run")


def read_request(text: str) -> dict[str, Any]:
    """Return a stored request as a mapping; empty if it is none."""
    try:
        request = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return request if isinstance(request, dict) else {}


def check_request(request: Mapping[str, Any], *, is_coordinator: bool) -> None:
    """Refuse a request with an unknown field, or with a value of another type.

    Args:
        request: the request.
        is_coordinator: True for a request of the coordinator, which continues an interrupted run.

    Raises:
        ValueError: The request is malformed.
    """
    if request.get("do") not in ("run", "resume", "stop"):
        raise ValueError("the task of the request is unknown")
    if request["do"] == "stop":
        if request.keys() - set(STOP_FIELDS):
            raise ValueError("a request to stop a run has its number only")
        return
    types = {**FIELDS, **(RECOVERY_FIELDS if is_coordinator else {})}
    is_valid = all(name in types and type(value) in types[name] for name, value in request.items())
    has_folder = bool(request.get("folder")) and str(request["folder"]).isprintable()
    if not (is_valid and has_folder and all(isinstance(text, str) for text in request.get("overrides", ()))):
        raise ValueError("the request of the run has an unknown field, no printable folder, or a value of another type")
