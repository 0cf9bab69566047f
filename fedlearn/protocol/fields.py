"""Read fields of messages from untrusted JSON values. Each function returns a checked value or raises `WireError`."""

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
    """A reason for a response without results, from the node or from the connection to the node.

    Attributes:
        stage: stage at which the request failed.
        reason: text, at most `MAX_REASON_LENGTH` characters from a node.
    """

    stage: FailureStage
    reason: str


def read_number(value: Any, name: str, *, at_least: int = 0) -> int:
    """Return a whole number from ``at_least`` to 2**53.

    Args:
        value: untrusted value.
        name: name of the field, for the error.
        at_least: smallest accepted number, default 0.
    """
    if type(value) is not int or not at_least <= value <= MAX_NUMBER:
        raise WireError(f"the field {name} has {value!r:.60}, expected a whole number from {at_least} to 2**53")
    return value


def read_numbers(values: Any, name: str) -> tuple[int, ...]:
    """Return a list of whole numbers >= 0."""
    if type(values) is not list:
        raise WireError(f"the field {name} is {values!r:.60}, expected a list")
    return tuple(read_number(value, name) for value in values)


def read_client_ids(values: Any) -> tuple[ClientId, ...]:
    """Return distinct client ids from an untrusted list."""
    clients = read_numbers(values, "clients")
    if len(set(clients)) != len(clients):
        raise WireError("a client occurs twice in the field clients")
    return clients


def read_failures(values: Sequence[Any]) -> tuple[Failure, ...]:
    """Return the failures of clients from an untrusted list."""
    failures = []
    for value in values:
        client = read_number(read_fields(value, client=int)["client"], "client")
        failures.append(Failure(client=client, stage=_stage(value), reason=_reason(value)))
    return tuple(failures)


def read_refusal(value: Any) -> Refusal | None:
    """Return the refusal of a request from an untrusted value; None for no refusal."""
    return None if value is None else Refusal(stage=_stage(value), reason=_reason(value))


def failure_to_json(failure: Failure | Refusal) -> dict[str, Any]:
    """Return stage and reason of a failure or refusal, and the client of a failure. Tracebacks are left out."""
    client = {"client": failure.client} if isinstance(failure, Failure) else {}
    reason = read_text(failure.reason, "reason", max_length=MAX_REASON_LENGTH)
    return {**client, "stage": failure.stage, "reason": reason}


def require_requested(clients: Sequence[ClientId], failures: Sequence[Failure], requested: Sequence[ClientId]) -> None:
    """Refuse results for clients that are not in the request, and several results for one client.

    Raises:
        WireError: The response has such a client.
    """
    present = [*clients, *(failure.client for failure in failures)]
    unknown = sorted(set(present) - set(requested))
    if unknown:
        raise WireError(f"the response has clients {unknown[:5]}, which are not in the request")
    if len(set(present)) != len(present):
        raise WireError("the response has several results for one of its clients")


def client_of(result: Any) -> ClientId:
    """Return the client of a result, for example an update with one row or a failure."""
    return int(result.clients_K[0]) if isinstance(result, Updates) else result.client


def _reason(value: Mapping[str, Any]) -> str:
    return read_text(read_fields(value, reason=str)["reason"], "reason", max_length=MAX_REASON_LENGTH)


def _stage(value: Mapping[str, Any]) -> FailureStage:
    """Return the failure stage in a message. A node may name some stages only; other stages become `NODE`."""
    name = read_fields(value, stage=str)["stage"]
    stage = FailureStage(name) if name in set(FailureStage) else FailureStage.NODE
    return stage if stage.may_be_named_by_node else FailureStage.NODE
