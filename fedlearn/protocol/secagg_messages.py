"""Messages of secure aggregation between a coordinator and a node with several clients: both ends side by side."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlearn.core.records import ClientId, Failure
from fedlearn.core.serialization import Payload, WireError, read_fields, select_prefix
from fedlearn.protocol.requests import RequestHeader, pack_request
from fedlearn.protocol.responses import failures_to_json, pack_response, read_failures


def pack_mask_request(
    header: RequestHeader, messages: Mapping[ClientId, bytes], registered: Mapping[ClientId, bytes], **facts: Any
) -> bytes:
    """One message for each client of a node, and whose keys the whole cohort has; an order may follow it."""
    told = {str(client): b64encode(message).decode() for client, message in messages.items()}
    keys = {str(client): key.hex() for client, key in registered.items()}
    return pack_request(header, messages=told, registered=keys, **facts)


def read_mask_request(payload: Payload, header: RequestHeader) -> tuple[dict[ClientId, bytes], dict[ClientId, bytes]]:
    """The message for each client, and the cohort's keys.

    Raises:
        WireError: they cannot be read, or are not for the clients that are asked.
    """
    given = read_fields(payload.metadata, messages=dict, registered=dict)
    try:
        messages = {int(client): b64decode(text, validate=True) for client, text in given["messages"].items()}
        registered = {int(client): bytes.fromhex(key) for client, key in given["registered"].items()}
    except (ValueError, TypeError, binascii.Error) as error:
        raise WireError(f"the messages of secure aggregation cannot be read: {error}") from error
    if sorted(messages) != list(header.clients):
        raise WireError(f"there are messages for clients {sorted(messages)}, expected {list(header.clients)}")
    return messages, registered


def pack_mask_response(
    header: RequestHeader, responses: Mapping[ClientId, bytes], failures: Sequence[Failure]
) -> bytes:
    """What clients say."""
    arrays = {f"response/{client}": np.frombuffer(answer, np.uint8) for client, answer in responses.items()}
    return pack_response(header, arrays, failures=failures_to_json(failures))


def read_mask_response(payload: Payload, header: RequestHeader) -> dict[ClientId, bytes | Failure]:
    """What each client said, or why it did not.

    Raises:
        WireError: the reply is not in the form of an answer to this request.
    """
    found: dict[ClientId, bytes | Failure] = {failure.client: failure for failure in read_failures(payload, header)}
    for name, answer in select_prefix(payload.arrays, "response/").items():
        if answer.dtype != np.uint8 or name not in map(str, header.clients) or int(name) in found:
            raise WireError(f"the reply speaks for client {name}, who was not asked, or speaks twice")
        found[int(name)] = answer.tobytes()
    return found
