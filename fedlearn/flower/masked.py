"""Messages of secure aggregation between a coordinator and a node with several clients: both ends side by side."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlearn.flower.parcel import Parcel, WireError, fields_of, group
from fedlearn.flower.replies import failures_as_facts, failures_of, reply
from fedlearn.flower.wire import Ask, request
from fedlearn.records import ClientId, Failure


def mask_request(
    ask: Ask, messages: Mapping[ClientId, bytes], registered: Mapping[ClientId, bytes], **facts: Any
) -> bytes:
    """One message for each client of a node, and whose keys the whole cohort has; an order may follow it."""
    told = {str(client): b64encode(message).decode() for client, message in messages.items()}
    keys = {str(client): key.hex() for client, key in registered.items()}
    return request(ask, messages=told, registered=keys, **facts)


def messages_of(parcel: Parcel, ask: Ask) -> tuple[dict[ClientId, bytes], dict[ClientId, bytes]]:
    """The message for each client, and the cohort's keys.

    Raises:
        WireError: they cannot be read, or are not for the clients that are asked.
    """
    given = fields_of(parcel.facts, messages=dict, registered=dict)
    try:
        messages = {int(client): b64decode(text, validate=True) for client, text in given["messages"].items()}
        registered = {int(client): bytes.fromhex(key) for client, key in given["registered"].items()}
    except (ValueError, TypeError, binascii.Error) as error:
        raise WireError(f"the messages of secure aggregation cannot be read: {error}") from error
    if sorted(messages) != list(ask.clients):
        raise WireError(f"there are messages for clients {sorted(messages)}, expected {list(ask.clients)}")
    return messages, registered


def mask_reply(ask: Ask, answers: Mapping[ClientId, bytes], failures: Sequence[Failure]) -> bytes:
    """What clients say."""
    arrays = {f"answer/{client}": np.frombuffer(answer, np.uint8) for client, answer in answers.items()}
    return reply(ask, arrays, failures=failures_as_facts(failures))


def masked_of(parcel: Parcel, ask: Ask) -> dict[ClientId, bytes | Failure]:
    """What each client said, or why it did not.

    Raises:
        WireError: the reply is not in the form of an answer to this request.
    """
    found: dict[ClientId, bytes | Failure] = {failure.client: failure for failure in failures_of(parcel, ask)}
    for name, answer in group(parcel.arrays, "answer/").items():
        if answer.dtype != np.uint8 or name not in map(str, ask.clients) or int(name) in found:
            raise WireError(f"the reply speaks for client {name}, who was not asked, or speaks twice")
        found[int(name)] = answer.tobytes()
    return found
