"""Bind the client ids and weights of a run to the keys of its nodes.

Flower authenticates a node by its key, and the operator has given each key a name. Two rules apply to a node:

- If ``nodes.yaml`` has its name, the node may describe the clients of this entry only, within its number of examples.
- Otherwise its clients are fixed when it first joins a run, and stored with its key. They must be free: no other node
  has them in ``nodes.yaml``, or joined with them before. It may have `MAX_CLIENTS` clients, each with
  `DEFAULT_MAX_EXAMPLES` examples.

So no node gets the clients of another node, also after a restart. All runs of a coordinator share the stored clients.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.records import ClientId
from fedlearn.core.serialization import WireError
from fedlearn.deploy.client_ids import format_client_ids, parse_client_ids
from fedlearn.deploy.coordinator_side.run_audit import record_member
from fedlearn.deploy.node_bindings import BindingError, NodeBinding, read_bindings
from fedlearn.deploy.node_side.masking_keys import read_identities
from fedlearn.protocol.membership import Member

NODES_FILE, CLIENTS_FILE = "nodes.json", "clients.json"  # in the coordinator's --state folder
MAX_CLIENTS = 16  # clients of a node without an entry in nodes.yaml
BIND_COMMAND = "python -m fedlearn.deploy.keys bind FOLDER {name}={ids}"


class NodeKey(NamedTuple):
    """The name of an admitted node, and the digest of its public key."""

    name: str
    digest: str


def write_nodes(state: Path, nodes: Mapping[int, tuple[str, bytes]]) -> None:
    """Write the admitted nodes to the coordinator's state folder: Flower's id of the node -> name and public key."""
    content = {str(node_id): [name, hashlib.sha256(key).hexdigest()] for node_id, (name, key) in nodes.items()}
    write_atomically(state / NODES_FILE, json.dumps(content))


class Admission:
    """Check the descriptions of nodes that join a run.

    Args:
        state: state folder of the coordinator, with the admitted nodes and the stored clients of keys.
        bindings: path of ``nodes.yaml``.
        identities: path of the coordinator's copy of ``masking.pub``; None: masking keys are not checked.
        run: name of the run, for the audit log.
    """

    def __init__(self, state: Path, bindings: Path, identities: Path | None = None, *, run: str = "") -> None:
        self.state, self.bindings, self.identities, self.run = state, bindings, identities, run

    def check(self, member: Member) -> None:
        """Accept a description, and store the clients of a node that joins for the first time.

        Raises:
            WireError: The node may not have one of these clients, as many clients or examples, or this masking key.
        """
        node = self._node(member.node_id)
        self._check_masking_key(node, member)
        try:
            bindings = read_bindings(self.bindings)
        except BindingError as error:
            raise WireError(str(error)) from error
        binding = bindings.get(node.name)
        with FileLock(self.state / f"{CLIENTS_FILE}.lock"):
            if binding is None:
                binding = self._bind_by_first_use(node, member, bindings)
        extra = sorted(set(member.clients) - set(binding.clients))
        if extra:
            fix = _fix(node.name, member.clients)
            raise WireError(
                f"node {node.name} describes clients {extra[:10]}, but it has {binding}; to change it: {fix}"
            )
        for client, count in member.num_examples.items():
            if count > binding.max_examples:
                fix = _fix(node.name, binding.clients, f":{count}")
                raise WireError(
                    f"client {client} of node {node.name} reports {count} examples, expected at most "
                    f"{binding.max_examples}; to change it: {fix}"
                )
        record_member(self.state, node.name, member, run=self.run)

    def _node(self, node_id: int) -> NodeKey:
        try:
            nodes = json.loads((self.state / NODES_FILE).read_text(encoding="utf-8"))
            return NodeKey(*nodes[str(node_id)])
        except (OSError, KeyError) as error:
            raise WireError(f"a connected node has no key in {NODES_FILE} of this coordinator") from error

    def _check_masking_key(self, node: NodeKey, member: Member) -> None:
        """Refuse the masking key of another node, because the clients of both nodes would count as one party."""
        if self.identities is None or not member.masking_key or not self.identities.exists():
            return
        key = read_identities(self.identities).get(node.name)
        if key is not None and key.hex() != member.masking_key:
            raise WireError(f"the masking key of node {node.name} is not its key in {self.identities.name}")

    def _bind_by_first_use(self, node: NodeKey, member: Member, bindings: Mapping[str, NodeBinding]) -> NodeBinding:
        stored = self._stored()
        owners = {client: name for name, binding in bindings.items() for client in binding.clients}
        for digest, (name, clients) in stored.items():
            if digest != node.digest and name not in bindings:
                owners |= dict.fromkeys(clients, name)
        _refuse_taken(node, member, owners)
        if node.digest in stored:
            return NodeBinding(clients=stored[node.digest][1])
        if len(member.clients) > MAX_CLIENTS:
            fix = _fix(node.name, member.clients)
            raise WireError(
                f"node {node.name} has {len(member.clients)} clients, expected at most {MAX_CLIENTS}; {fix}"
            )
        content = {digest: [name, format_client_ids(ids)] for digest, (name, ids) in stored.items()}
        content[node.digest] = [node.name, format_client_ids(member.clients)]
        write_atomically(self.state / CLIENTS_FILE, json.dumps(content, indent=1))
        return NodeBinding(clients=member.clients)

    def _stored(self) -> dict[str, tuple[str, tuple[ClientId, ...]]]:
        path = self.state / CLIENTS_FILE
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {digest: (name, parse_client_ids(ids)) for digest, (name, ids) in content.items()}


def _refuse_taken(node: NodeKey, member: Member, owners: Mapping[ClientId, str]) -> None:
    for client in member.clients:
        if client in owners:
            raise WireError(
                f"node {node.name} describes client {client}, which belongs to node {owners[client]}; to change it: "
                f"{_fix(node.name, [client])}"
            )


def _fix(name: str, clients: Sequence[ClientId], limit: str = "") -> str:
    return BIND_COMMAND.format(name=name, ids=format_client_ids(clients) + limit)
