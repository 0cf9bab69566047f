"""Read a node's private key for secure aggregation, and the public keys that the node trusts.

The folder of the node's keys has two files. ``masking.key`` has the private key, which never leaves the node.
``masking.pub`` is the same at all nodes. Each line has a public key, the name of a node, and the ids of its clients:
``5f3a... north 0-2,7``. A line without ids accepts all ids that no other line has. The sites agree on this file outside
the protocol. A node takes part in a sum only with clients whose keys are in its own ``masking.pub``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlearn.core.records import ClientId
from fedlearn.deploy.client_ids import format_client_ids, parse_client_ids
from fedlearn.errors import FedlearnError

MASKING_KEY, IDENTITIES = "masking.key", "masking.pub"


@dataclass(frozen=True)
class MaskingKeys:
    """The keys of a node for secure aggregation.

    Args:
        private_key: private Ed25519 key of this node, 32 bytes.
        trusted_keys: public keys of all nodes that this node trusts, its own key included.
        clients: public key -> ids of the clients of its node, for nodes with known ids.
    """

    private_key: bytes = field(repr=False)
    trusted_keys: frozenset[bytes]
    clients: Mapping[bytes, frozenset[ClientId]] = field(default_factory=dict)

    @property
    def public_key(self) -> bytes:
        """Public Ed25519 key of this node, 32 bytes."""
        return derive_public_key(self.private_key)

    def check_registered(
        self, public_keys: Mapping[ClientId, bytes], node_clients: Sequence[ClientId]
    ) -> dict[ClientId, bytes]:
        """Return the public key of each client if this node accepts all of them.

        Args:
            public_keys: client -> public key, from the coordinator.
            node_clients: clients of this node. They have its key, and no other client has it.

        Raises:
            FedlearnError: This node does not trust a key, or knows the client under another key.
        """
        untrusted = [client for client, key in public_keys.items() if key not in self.trusted_keys]
        if untrusted:
            raise FedlearnError(
                f"the keys of clients {untrusted} are not in this node's {IDENTITIES}\n"
                "  advice    copy the new masking.pub of the sites to this node"
            )
        key_of = {client: key for key, clients in self.clients.items() for client in clients}
        key_of |= dict.fromkeys(node_clients, self.public_key)
        has_knnode_clients = {*self.clients, self.public_key}
        wrong = [c for c, key in public_keys.items() if key_of.get(c, key) != key]
        wrong += [c for c, key in public_keys.items() if c not in key_of and key in has_knnode_clients]
        if wrong:
            raise FedlearnError(
                f"in this node's {IDENTITIES}, the keys of clients {wrong} belong to other clients\n"
                "  advice    copy the new masking.pub of the sites to this node"
            )
        return dict(public_keys)


def read_masking_keys(folder: Path) -> MaskingKeys | None:
    """Return the masking keys in a node's folder of keys; None if it has no key for secure aggregation.

    Raises:
        FedlearnError: A file cannot be read, or the trusted keys do not include the node's own key.
    """
    if not (folder / MASKING_KEY).exists():
        return None
    try:
        secret = bytes.fromhex((folder / MASKING_KEY).read_text(encoding="ascii"))
        trusted, clients = frozenset(read_identities(folder / IDENTITIES).values()), read_clients(folder / IDENTITIES)
        keys = MaskingKeys(secret, trusted, clients)
        is_included = keys.public_key in trusted
    except (OSError, ValueError) as error:
        raise FedlearnError(f"the masking keys in {folder} cannot be read: {error}") from error
    if not is_included:
        fix = "the masking.pub that fedlearn.deploy.keys wrote with this node's masking.key"
        raise FedlearnError(f"{folder / IDENTITIES} does not have the public key of this node\n  advice    {fix}")
    return keys


def read_identities(path: Path) -> dict[str, bytes]:
    """Return the public key of each node in a ``masking.pub`` file: name -> key.

    Raises:
        ValueError: A line is malformed, or two lines have the same key.
    """
    keys = {name: key for key, name, _ in _lines(path)}
    if len(set(keys.values())) < len(keys):
        raise ValueError("two nodes have the same key")
    return keys


def read_clients(path: Path) -> dict[bytes, frozenset[ClientId]]:
    """Return the client ids of each node with ids in a ``masking.pub`` file: key -> ids.

    Raises:
        ValueError: A line is malformed, or two nodes have the same client.
    """
    clients = {key: frozenset(parse_client_ids(ids)) for key, _, ids in _lines(path) if ids}
    if len(frozenset().union(*clients.values())) < sum(map(len, clients.values())):
        raise ValueError("two nodes have the same client")
    return clients


def format_identities(identities: Mapping[str, bytes], clients: Mapping[str, Sequence[ClientId]]) -> str:
    """Return the text of a ``masking.pub`` file.

    Args:
        identities: name of a node -> public key.
        clients: name of a node -> ids of its clients; may leave out nodes.
    """
    ids = {name: format_client_ids(clients.get(name, ())) for name in identities}
    return "".join(f"{key.hex()} {name} {ids[name]}".strip() + "\n" for name, key in sorted(identities.items()))


def _lines(path: Path) -> list[tuple[bytes, str, str]]:
    words = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    if not all(2 <= len(line) <= 3 for line in words):
        raise ValueError("expected lines with a key, a name and client ids")
    return [(bytes.fromhex(key), name, "".join(ids)) for key, name, *ids in words]


def derive_public_key(private_key: bytes) -> bytes:
    """Return the public key of a private Ed25519 key, 32 bytes each."""
    return Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
