"""Create, copy and identify messages of Flower, and name its exceptions."""

from __future__ import annotations

from typing import Any

from fedlearn.flower.compat.names import FLOWER

SERVER = 1  # node id of the ServerApp in Flower


def identify_as_server() -> None:
    """Allow this process to create messages as a server, unless Flower has given it an identity."""
    FLOWER.verify("identity")
    from flwr.supercore.task_identity import TaskIdentity

    try:
        _ = TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id
    except RuntimeError:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER, 1


def identify_as_node(message: Any) -> None:
    """Allow this process to create responses to a message."""
    FLOWER.verify("identity")
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = (
        message.metadata.run_id,
        message.metadata.dst_node_id,
        1,
    )


def empty_run() -> Any:
    """Return Flower's description of a run with id 1 and no app."""
    FLOWER.verify("grid")
    from flwr.supercore.run import Run

    return Run.create_empty(run_id=1)


def client_app_error() -> type[Exception]:
    """Return the exception class with which Flower reports an error in a ClientApp."""
    FLOWER.verify("grid")
    from flwr.clientapp.client_app import ClientAppException

    return ClientAppException


def set_message_id(message: Any, number: str) -> None:
    """Set the id of a message, as Flower's transports do.

    Args:
        message: a Flower message.
        number: the id.

    Raises:
        IncompatibleVersion: messages of this version of Flower have no such field.
    """
    metadata = vars(message.metadata)
    if "_message_id" not in metadata:
        raise FLOWER.incompatible("flwr.app:Metadata._message_id")
    metadata["_message_id"] = number


def copy_message(message: Any) -> Any:
    """Return a copy of a message with separate metadata. Both messages share the content.

    Raises:
        IncompatibleVersion: messages of this version of Flower have no such field.
    """
    if "_metadata" not in vars(message):
        raise FLOWER.incompatible("flwr.app:Message._metadata")
    copied = shallow_copy(message, type(message))
    vars(copied)["_metadata"] = shallow_copy(message.metadata, type(message.metadata))
    return copied


def shallow_copy(value: Any, kind: type) -> Any:
    """Return a shallow copy of a message, its metadata or an array. It is three times as fast as Flower's copy.

    Args:
        value: object to copy.
        kind: class of the copy.
    """
    copied: Any = object.__new__(kind)
    copied.__dict__.update(value.__dict__)
    return copied


def upload_error() -> type[Exception]:
    """Return the exception class with which Flower reports an interrupted upload."""
    FLOWER.verify("messages")
    from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

    return ObjectPushError


def run_stopped_error() -> type[BaseException]:
    """Return the exception class with which Flower reports a stopped run."""
    FLOWER.verify("messages")
    from flwr.supercore.run import RunNotRunningException

    return RunNotRunningException
