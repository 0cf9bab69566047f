"""Read fields of messages from untrusted JSON values. Each function returns a checked value or raises `WireError`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedlearn.core.records import ClientId, Failure, Updates
from fedlearn.core.serialization import WireError, read_fields
from fedlearn.protocol.refusals import failure_reason, read_stage

MAX_NUMBER = 2**53  # bound of client ids, rounds and counts


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


def read_failures(values: Sequence[Any], reference: str) -> tuple[Failure, ...]:
    """Return the failures of clients from an untrusted list. The reasons follow from the stages.

    Args:
        values: untrusted list.
        reference: reference of the failures in the log of the node.
    """
    failures = []
    for value in values:
        client, stage = read_number(read_fields(value, client=int)["client"], "client"), read_stage(value)
        failures.append(Failure(client=client, stage=stage, reason=failure_reason(stage, reference)))
    return tuple(failures)


def failure_to_json(failure: Failure) -> dict[str, Any]:
    """Return client and stage of a failure. Its reason and its traceback stay at the node."""
    return {"client": failure.client, "stage": failure.stage}


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
