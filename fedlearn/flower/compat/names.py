"""Name the undocumented names of Flower that fedlearn uses, and the versions with which they were tried."""

from __future__ import annotations

from typing import Any

from fedlearn.core.private_names import PrivateNames

FLOWER = PrivateNames(
    library="flwr",
    tried=("1.41.0", "1.42.0"),
    lowest="1.41",
    below="1.43",
    extra="flower",
    names={
        "identity": tuple(f"flwr.supercore.task_identity:TaskIdentity.{name}_id" for name in ("run", "node", "task")),
        "grid": ("flwr.supercore.run:Run.create_empty", "flwr.clientapp.client_app:ClientAppException"),
        "messages": (
            "flwr.supercore.inflatable.inflatable_utils:ObjectPushError",
            "flwr.supercore.run:RunNotRunningException",
        ),
        "parts": (
            "flwr.app.message.arraychunk:ArrayChunk",
            "flwr.common.constant:FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE",
            "flwr.supercore.constant:HEAD_BODY_DIVIDER",
            "flwr.supercore.constant:HEAD_VALUE_DIVIDER",
            "flwr.supercore.inflatable.inflatable_object:get_object_children_ids_from_object_content",
            "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents",
            "flwr.supercore.inflatable.inflatable_utils:pull_objects",
            "flwr.supercore.inflatable.inflatable_utils:push_object_contents_from_iterable",
        ),
        "stalls": (
            "flwr.supercore.inflatable.inflatable_utils:ObjectPullError",
            "flwr.supercore.inflatable.inflatable_utils:ObjectUnavailableError",
            "flwr.supercore.inflatable.inflatable_utils:pull_objects",
            "flwr.superlink.grid.http_grid:inflate_object_from_contents",
            "flwr.superlink.grid.http_grid:pull_objects",
            "flwr.superlink.grid.http_grid:push_objects",
        ),
        "retries": (
            "flwr.supercore.inflatable.inflatable_utils:pull_objects.__kwdefaults__",
            "flwr.supercore.inflatable.inflatable_utils:pull_and_inflate_object_from_tree.__kwdefaults__",
        ),
        "fleet": (
            "flwr.app.message:remove_content_from_message",
            "flwr.common.serde:message_from_proto",
            "flwr.common.serde:message_to_proto",
            "flwr.proto.fleet_pb2:ActivateNodeRequest",
            "flwr.proto.fleet_pb2:DeactivateNodeRequest",
            "flwr.proto.fleet_pb2:PullMessagesRequest",
            "flwr.proto.fleet_pb2:PushMessagesRequest",
            "flwr.proto.heartbeat_pb2:SendNodeHeartbeatRequest",
            "flwr.proto.message_pb2:ConfirmMessageReceivedRequest",
            "flwr.proto.node_pb2:Node",
            "flwr.supercore.inflatable.inflatable_object:get_all_nested_objects",
            "flwr.supercore.inflatable.inflatable_object:get_object_tree",
            "flwr.supercore.inflatable.inflatable_object:iterate_object_tree",
            "flwr.supercore.inflatable.inflatable_object:no_object_id_recompute",
            "flwr.supercore.inflatable.inflatable_protobuf_utils:make_pull_object_fn_protobuf",
            "flwr.supercore.inflatable.inflatable_protobuf_utils:make_push_object_fn_protobuf",
            "flwr.supercore.inflatable.inflatable_utils:ObjectPullError",
            "flwr.supercore.inflatable.inflatable_utils:ObjectPushError",
            "flwr.supercore.inflatable.inflatable_utils:ObjectUnavailableError",
            "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor",
            "flwr.supercore.primitives.asymmetric:public_key_to_bytes",
            "flwr.supernode.fleet_http_client:FleetHttpClient.from_server_address",
            "flwr.supernode.node_auth_http_interceptor:NodeAuthHttpInterceptor",
        ),
        "superexec": (
            "flwr.supercore.cli:flower_superexec",
            "flwr.supercore.superexec.run_superexec:get_executor",
            "flwr.supercore.superexec.executor:LaunchResult.accepted",
            "flwr.supercore.superexec.executor.subprocess_executor:SubprocessExecutor.launch",
            "flwr.supercore.superexec.executor.subprocess_executor:SubprocessExecutor.reconcile",
        ),
        "superlink": (
            "flwr.common.constant:ACCESS_TOKEN_KEY",
            "flwr.superlink.auth_plugin:NoOpControlAuthnPlugin.validate_tokens_in_metadata",
            "flwr.superlink.cli.flower_superlink",
            "flwr.superlink.cli:flower_superlink",
            "flwr.superlink.main:_get_middleware",
            "uvicorn.protocols.http.h11_impl:H11Protocol.connection_made",
            "uvicorn.protocols.http.h11_impl:H11Protocol.connection_lost",
            "flwr.common.constant:SYSTEM_TIME_TOLERANCE",
            "flwr.common.constant:TIMESTAMP_HEADER",
            "flwr.common.constant:TIMESTAMP_TOLERANCE",
            "flwr.supercore.constant:FLEET_HTTP_PUBLIC_KEY_HEADER",
            "flwr.supercore.constant:FLEET_HTTP_SIGNATURE_HEADER",
            "flwr.supercore.primitives.asymmetric:bytes_to_public_key",
            "flwr.supercore.primitives.asymmetric:verify_signature",
        ),
        "objects": (
            "flwr.supercore.inflatable.inflatable_object:get_object_id",
            "flwr.supercore.inflatable.inflatable_utils:validate_object_content",
            "flwr.supercore.object_store.object_store_factory:SqlObjectStore",
            "flwr.supercore.object_store.sql_object_store:SqlObjectStore.initialize",
            "flwr.supercore.object_store.sql_object_store:SqlObjectStore.put",
            "flwr.supercore.object_store.sql_object_store:SqlObjectStore.get",
            "flwr.supercore.object_store.sql_object_store:SqlObjectStore.delete",
            "flwr.supercore.object_store.sql_object_store:SqlObjectStore.clear",
            "flwr.supercore.object_store.sql_object_store:SqlObjectStore.session",
        ),
        "readmission": (
            "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.create_node",
            "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.session",
            "flwr.supercore.constant:NodeStatus.UNREGISTERED",
            "flwr.supercore.state.schema.linkstate_models:Node.public_key",
            "flwr.supercore.state.schema.linkstate_models:Node.status",
        ),
        "server app": (
            "flwr.superlink.cli:flwr_serverapp",
            "flwr.supercore.constant:TaskType.SERVER_APP",
            "flwr.supercore.superexec.executor.types:ExecutionSpec",
        ),
        "bundle": ("flwr.cli.build:build_fab_from_files", "flwr.supercore.fab:Fab"),
        "control": (
            "flwr.common.serde:fab_to_proto",
            "flwr.common.serde:user_config_from_proto",
            "flwr.common.serde:user_config_to_proto",
            "flwr.common.constant:HEARTBEAT_PATIENCE",
            "flwr.proto.control_pb2:ListNodesRequest",
            "flwr.proto.control_pb2:ListRunsRequest",
            "flwr.proto.control_pb2:ListRunsResponse",
            "flwr.proto.control_pb2:RegisterNodeRequest",
            "flwr.proto.control_pb2:StartRunRequest",
            "flwr.proto.control_pb2:StartRunResponse",
            "flwr.proto.control_pb2:StopRunRequest",
            "flwr.proto.control_pb2:StreamLogsRequest",
            "flwr.proto.control_pb2:UnregisterNodeRequest",
            "flwr.supercore.control:ControlHttpClient.from_server_address",
            "flwr.supercore.interceptors:RuntimeVersionHttpInterceptor",
        ),
    },
)


def http_client_of(client: Any) -> Any:
    """Return the `httpx.Client` of a client of Flower."""
    if not hasattr(client, "_client"):
        raise FLOWER.incompatible(f"{type(client).__module__}:{type(client).__name__}._client")
    return client._client
