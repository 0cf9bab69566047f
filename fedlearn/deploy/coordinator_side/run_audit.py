"""Write the start and the end of each run to the audit log of the coordinator."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlearn.core.plain_text import plain_line
from fedlearn.core.private_files import write_private_json
from fedlearn.deploy.audit_log import AuditLog
from fedlearn.deploy.coordinator_side.app_bundle import NAME_KEY, PERSON_KEY
from fedlearn.deploy.coordinator_side.ownership import DEPLOYMENT_FILE
from fedlearn.deploy.node_side.query_log import digest_of
from fedlearn.protocol.membership import Member

MEMBERS_FILE = "members.json"  # in the state folder: node -> its last description
SUMMARY_FIELDS = ("status", "rounds", "epsilon", "bytes_up", "bytes_down", "client_failures", "parameters_sha256")


def audited(execute: Callable[[], int], state: Path, request: Mapping[str, Any], *, number: int, folder: Path) -> int:
    """Execute a run between two lines of the audit log, and return its exit code.

    Args:
        execute: function that executes the run and returns the exit code.
        state: state folder of the coordinator.
        request: request with the name of the person.
        number: Flower's id of the run.
        folder: run folder.

    Raises:
        BaseException: The error of ``execute``.
    """
    log, person = AuditLog(state), request.get(PERSON_KEY, "")
    common = {"number": str(number), "folder": str(request.get("folder", "")), "person": person}
    settings = request.get("settings")
    details = {"settings": settings, "settings_sha256": digest_of(settings)} if isinstance(settings, dict) else {}
    changes = {"overrides": request["overrides"]} if isinstance(request.get("overrides"), list) else {}
    log.append("run.started", run=_name(request, folder), do=request.get("do"), **common, **details, **changes)
    reason, code = "", None
    try:
        code = execute()
        return code
    except BaseException as error:
        reason = plain_line(str(error) or type(error).__name__)
        raise
    finally:
        summary = _summary(folder)
        ending = {"reason": reason or str(summary.get("reason", ""))} if reason or summary.get("reason") else {}
        fields = {name: summary[name] for name in SUMMARY_FIELDS if name in summary}
        log.append("run.ended", run=_name(request, folder), exit_code=code, **common, **fields, **ending)


def record_member(state: Path, node: str, member: Member, *, run: str) -> None:
    """Write the description of a node that joined a run to the audit log and to `MEMBERS_FILE`."""
    fields: dict[str, Any] = {"framework": member.framework, "device": member.device, "version": member.version}
    fields |= {"run": run, "clients": list(member.clients)}
    AuditLog(state).append("node.joined", node=node, **fields)
    joined = datetime.now(UTC).isoformat(timespec="seconds")
    members = {**read_members(state), node: {**fields, "joined": joined}}
    write_private_json(state / MEMBERS_FILE, members)


def read_members(state: Path) -> dict[str, Any]:
    """Return the last description of each node; no node if there is no file."""
    try:
        return dict(json.loads((state / MEMBERS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _name(request: Mapping[str, Any], folder: Path) -> str:
    """Return the name of a run: of the request, or of the folder of a resumed run."""
    try:
        stored = json.loads((folder / DEPLOYMENT_FILE).read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        stored = ""
    return str(request.get(NAME_KEY) or stored)


def _summary(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
