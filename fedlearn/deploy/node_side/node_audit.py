"""Write each request and each response of a node to its audit log, before the response leaves.

A line has names, sizes and digests, never a value of an update, a metric or a file. The name of the person is text of
the coordinator, which a node cannot verify.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.core.plain_text import plain_line
from fedlearn.core.records import Failure
from fedlearn.core.serialization import Payload
from fedlearn.deploy.audit_log import AuditLog
from fedlearn.deploy.node_side.disk_limits import RefusalLines
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.query_log import digest_of
from fedlearn.protocol.refusals import Refusal

HELLO = "hello"  # kind of the first request of a run
UNREADABLE = "request"  # code of the refusal of a message that is no request
MAX_NAMES = 40  # names of fields and arrays in a line
# fields of a request that determine the response
ORDER_FIELDS = ("kind", "run", "round", "layout", "clients", "state_rounds", "settings", "content", "shared")
ORIGIN_FIELDS = ("person", "folder")  # fields of a hello request


class NodeAudit:
    """The audit log of a node.

    Args:
        folder: folder of the client states.
    """

    def __init__(self, folder: Path) -> None:
        self.log, self._refusals = AuditLog(folder), RefusalLines()

    def record(
        self,
        order: Mapping[str, Any],
        content: Payload,
        *,
        num_results: int,
        failures: Sequence[Failure],
        refusal: Refusal | None,
        policy: Policy,
        epsilon: float | None,
        data: str = "",
    ) -> None:
        """Write a line for a request and its response.

        Beyond a number of refusals per hour, refusals get no line. The next line has their number for each code.

        Args:
            order: `ORDER_FIELDS` of the request.
            content: content of the response that is about to leave.
            num_results: number of clients with a result.
            failures: clients that failed.
            refusal: reason for a response without results.
            policy: policy in force.
            epsilon: largest privacy loss of a client so far, over all runs; None if the node has no ledger.
            data: digest of the data files in use, see `DataFiles.digest`; empty if they are unknown.

        Raises:
            OSError: The line cannot be written. Then the response must not leave.
        """
        if refusal and not self._refusals.allows(str(refusal.code)):
            return
        fields: dict[str, Any] = {
            "run": order["run"],
            "kind": str(order["kind"]),
            "round": order["round"],
            "clients": list(order["clients"]),
            "settings_sha256": digest_of(order["settings"]),
            "order_sha256": order_digest(order),
            "policy_sha256": policy_digest(policy),
            "data_digest": data,
            "epsilon": epsilon,
        }
        if isinstance(privacy := order["settings"].get("privacy"), Mapping):
            fields["privacy"] = str(privacy.get("name"))
        if order["kind"] == HELLO:
            fields |= _origin(order["content"].metadata) | {"settings": _summary(order["settings"])}
        fields |= self._refusals.take_omitted()
        if refusal:
            self.log.append("request.refused", **fields, code=str(refusal.code), reference=refusal.reference, sent={})
        else:
            stages = dict(Counter(str(failure.stage) for failure in failures))
            self.log.append("request", **fields, **_sent(content), num_results=num_results, failures=stages)

    def record_unreadable(self, reference: str) -> None:
        """Write a line for a message that is no request."""
        if self._refusals.allows(UNREADABLE):
            fields = {"code": UNREADABLE, "reference": reference, "sent": {}}
            self.log.append("request.refused", **fields, **self._refusals.take_omitted())

    def record_start(self, *, policy: Policy, clients: tuple[int, ...], version: str) -> None:
        """Write a line for the start of the trainer, with the policy in force."""
        self.log.append("node.started", policy_sha256=policy_digest(policy), clients=list(clients), version=version)


def policy_digest(policy: Policy) -> str:
    """Return a digest of all values of a policy. Comments and the order of the file do not change it."""
    return digest_of(_plain(asdict(policy)))


def order_digest(order: Mapping[str, Any]) -> str:
    """Return a digest of `ORDER_FIELDS` of a request, without its random id."""
    head = [str(order[name]) for name in ("kind", "run", "round", "layout", "state_rounds")]
    digest = hashlib.sha256("\n".join([*head, str(list(order["clients"])), digest_of(order["settings"])]).encode())
    for payload in (order["content"], order["shared"]):
        digest.update(digest_of(dict(payload.metadata)).encode())
        for name, array in sorted(payload.arrays.items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _sent(content: Payload) -> dict[str, Any]:
    """Return the names and sizes of all that a content has."""
    sizes = {name: int(array.nbytes) for name, array in sorted(content.arrays.items())}
    names = sorted(map(str, content.metadata))[:MAX_NAMES]
    return {"sent": dict(list(sizes.items())[:MAX_NAMES]), "sent_fields": names, "num_bytes": sum(sizes.values())}


def _origin(metadata: Mapping[str, Any]) -> dict[str, str]:
    return {name: plain_line(str(metadata[name])) for name in ORIGIN_FIELDS if isinstance(metadata.get(name), str)}


def _summary(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names of the options of a request, and the plain values of its privacy mechanism."""
    names = {group: settings[group].get("name") for group in settings if isinstance(settings[group], Mapping)}
    privacy = settings.get("privacy")
    values = privacy.items() if isinstance(privacy, Mapping) else ()
    plain = {str(name): value for name, value in values if isinstance(value, int | float | str | bool)}
    return {"options": {group: str(name)[:100] for group, name in names.items() if name}, "privacy": plain}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool) or value is None else str(value)
