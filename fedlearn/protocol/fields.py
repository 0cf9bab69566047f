"""Read fields of messages from untrusted JSON values; each function returns a checked value or raises `WireError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlearn.core.records import ClientId, Failure, FailureStage, Updates
from fedlearn.core.serialization import WireError, read_fields, read_text

MAX_REASON_LENGTH = 2000  # characters
MAX_NUMBER = 2**53  # bound of client ids, rounds and counts


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A reason for a response without results: of the node, or of the connection to it."""

    stage: FailureStage
    reason: str


def read_number(value: Any, name: str, *, at_least: int = 0) -> int:
    """Return a whole number from ``at_least`` to 2**53."""
    if type(value) is not int or not at_least <= value <= MAX_NUMBER:
        raise WireError(f"the field {name} has {value!r:.60}, expected a whole number from {at_least} to 2**53")
    return value


def read_numbers(values: Any, name: str) -> tuple[int, ...]:
    """Return a list of whole numbers >= 0."""
    if type(values) is not list:
        raise WireError(f"the field {name} is {values!r:.60}, expected a list")
    return tuple(read_number(value, name) for value in values)


def read_client_ids(values: Any) -> tuple[ClientId, ...]:
    """Return client ids, each of which occurs once."""
    clients = read_numbers(values, "clients")
    if len(set(clients)) != len(clients):
        raise WireError("a client occurs twice in the field clients")
    return clients


def read_failures(values: Sequence[Any]) -> tuple[Failure, ...]:
    """Return the failures of clients."""
    failures = []
    for value in values:
        client = read_number(read_fields(value, client=int)["client"], "client")
        failures.append(Failure(client=client, stage=_stage(value), reason=_reason(value)))
    return tuple(failures)


def read_refusal(value: Any) -> Refusal | None:
    """Return the refusal of a request, or None."""
    return None if value is None else Refusal(stage=_stage(value), reason=_reason(value))


def failure_to_json(failure: Failure | Refusal) -> dict[str, Any]:
    """Return stage and reason of a failure or refusal, and the client of a failure; a traceback stays at the node."""
    client = {"client": failure.client} if isinstance(failure, Failure) else {}
    reason = read_text(failure.reason, "reason", max_length=MAX_REASON_LENGTH)
    return {**client, "stage": failure.stage, "reason": reason}


def require_requested(clients: Sequence[ClientId], failures: Sequence[Failure], requested: Sequence[ClientId]) -> None:
    """Refuse results for clients that are not in the request, and several results for one client.

    Raises:
        WireError: there is such a client.
    """
    present = [*clients, *(failure.client for failure in failures)]
    unknown = sorted(set(present) - set(requested))
    if unknown:
        raise WireError(f"the response has clients {unknown[:5]}, which are not in the request")
    if len(set(present)) != len(present):
        raise WireError("the response has several results for one of its clients")


def client_of(result: Any) -> ClientId:
    """Return the client of a result, e.g. of an update with one row or of a failure."""
    return int(result.clients_K[0]) if isinstance(result, Updates) else result.client


def _reason(value: Mapping[str, Any]) -> str:
    return read_text(read_fields(value, reason=str)["reason"], "reason", max_length=MAX_REASON_LENGTH)


def _stage(value: Mapping[str, Any]) -> FailureStage:
    """Return the stage that a node names; a stage that no node may name counts as `FailureStage.NODE`."""
    name = read_fields(value, stage=str)["stage"]
    stage = FailureStage(name) if name in set(FailureStage) else FailureStage.NODE
    return stage if stage.may_be_named_by_node else FailureStage.NODE
