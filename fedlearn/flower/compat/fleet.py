"""Receive messages and send responses through the Fleet API of a SuperLink."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlearn.core.spool import Spool, TooLarge
from fedlearn.flower.compat.messages import set_message_id
from fedlearn.flower.compat.names import FLOWER, http_client_of
from fedlearn.flower.compat.parts import inflate, pull_contents, push_contents

MIN_PULLS_OF_PART = 20  # attempts to receive a part of a message, about one per second


class MessageRefused(Exception):
    """Report a message that this node does not receive: it is too large, or the disk is full.

    Args:
        head: the message without content.
        reason: reason of the refusal.
    """

    def __init__(self, head: Any, reason: str) -> None:
        super().__init__(reason)
        self.head = head


class MissingParts(Exception):
    """Report a message whose parts are not at the SuperLink."""


class FleetClient:
    """Receive messages from a SuperLink and send responses, as an admitted node.

    Flower's SuperNode does the same, starts a program for each message, and loses messages when a connection breaks.

    Args:
        address: address of the SuperLink, ``host:port``.
        certificates: root certificates, PEM.
        private_key: private key of the node, in the format of OpenSSH.
        folder: folder on a disk for large messages; None: the system's folder for temporary files.
        max_bytes: largest number of bytes of a message.

    Raises:
        httpx.HTTPStatusError: from each method, if the SuperLink refuses the request.
        httpx.TransportError: from each method, if the SuperLink cannot be reached.
        MissingParts: The parts of a message are not at the SuperLink.
        MessageRefused: A message is too large, or the disk is full.
    """

    def __init__(
        self,
        address: str,
        *,
        certificates: bytes,
        private_key: bytes,
        folder: Path | None = None,
        max_bytes: int = 2**63,
    ) -> None:
        FLOWER.verify("fleet")
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        from fedlearn.flower.response_limits import limit_responses

        key: Any = load_ssh_private_key(private_key, None)
        self._public_key, self._folder, self._max_bytes = key.public_key(), folder, max_bytes
        self._client = FleetHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=certificates,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, self._public_key),
            ],
        )
        limit_responses(http_client_of(self._client))

    def activate(self, heartbeat_interval_s: float) -> int:
        """Connect the node, and return its id. Flower refuses a node that is connected already."""
        from flwr.proto.fleet_pb2 import ActivateNodeRequest
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes

        key = public_key_to_bytes(self._public_key)
        request = ActivateNodeRequest(public_key=key, heartbeat_interval=heartbeat_interval_s)
        return int(self._client.ActivateNode(request).node_id)

    def deactivate(self, node_id: int) -> None:
        """End the connection of a node. Flower then forgets which messages this node has received."""
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def heartbeat(self, node_id: int, heartbeat_interval_s: float) -> bool:
        """Report that the node is connected. Return False if the SuperLink does not know the node."""
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
        from flwr.proto.node_pb2 import Node

        request = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=heartbeat_interval_s)
        return bool(self._client.SendNodeHeartbeat(request).success)

    def pull(self, node_id: int) -> Any:
        """Return the next message with its parts, a `flwr.app.Message`; None if there is none.

        The sender may still upload the parts. So the time to wait for a part grows with their number.
        After a cut of the connection, the transfer continues with the part that was in progress.
        """
        from flwr.app import Message
        from flwr.common.serde import message_from_proto
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

        from fedlearn.flower.transfer import continue_after_cuts

        node = Node(node_id=node_id)
        response = self._client.PullMessages(PullMessagesRequest(node=node))
        if not response.messages_list:
            return None
        tree, head = response.message_object_trees[0], message_from_proto(response.messages_list[0])
        run_id, ids = head.metadata.run_id, [part.object_id for part in iterate_object_tree(tree)]
        pull = make_pull_object_fn_protobuf(continue_after_cuts(self._client.PullObject), node, run_id)
        spool, num_tries = Spool(self._folder, max_bytes=self._max_bytes), MIN_PULLS_OF_PART + len(ids) // 2
        try:
            contents = pull_contents(
                ids, pull, spool=spool, max_time=None, max_tries_per_object=num_tries, backoff_cap=1.0
            )
            message = inflate(tree.object_id, contents)
        except (ObjectPullError, ObjectUnavailableError) as error:
            raise MissingParts(str(error)) from error
        except (TooLarge, OSError) as error:
            raise MessageRefused(head, str(error)) from error
        if not isinstance(message, Message):
            raise TypeError(f"the coordinator sent a {type(message).__name__}, expected a message")
        request = ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=tree.object_id)
        self._client.ConfirmMessageReceived(request)
        set_message_id(message, tree.object_id)
        return message

    def push(self, node_id: int, response: Any) -> None:
        """Send a response with its parts. After a cut of the connection, it continues with the part in progress."""
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

        from fedlearn.flower.transfer import push_after_cuts

        node, run_id = Node(node_id=node_id), response.metadata.run_id
        head = remove_content_from_message(response) if response.has_content() else response
        with no_object_id_recompute():
            if not response.metadata.message_id:
                for message in {id(each): each for each in (response, head)}.values():
                    set_message_id(message, response.object_id)
            pushed = self._client.PushMessages(
                PushMessagesRequest(
                    node=node,
                    messages_list=[message_to_proto(head)],
                    message_object_trees=[get_object_tree(response)],
                    clientapp_runtime_list=[0.0],
                )
            )
            push = make_push_object_fn_protobuf(
                push_after_cuts(self._client.PushObject), node, run_id, pushed.session_id
            )
            try:
                push_contents(get_all_nested_objects(response), push, object_ids_to_push=set(pushed.objects_to_push))
            except ObjectPushError as error:
                raise MissingParts(str(error)) from error

    def close(self) -> None:
        """Close the connection to the SuperLink."""
        self._client.close()
