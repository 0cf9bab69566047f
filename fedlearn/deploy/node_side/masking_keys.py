"""Read a node's private key for secure aggregation, and the public keys that the node trusts.

The folder of the node's keys has two files. ``masking.key`` has the private key, which never leaves the node.
``masking.pub`` is the same at all nodes: each line has a public key and the name of a node. The sites agree on this
file outside the protocol. A node takes part in a sum only with clients whose keys are in its own ``masking.pub``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlearn.core.records import ClientId
from fedlearn.errors import FedlearnError

MASKING_KEY, IDENTITIES = "masking.key", "masking.pub"


@dataclass(frozen=True)
class MaskingKeys:
    """The keys of a node for secure aggregation.

    Args:
        private_key: private Ed25519 key of this node, 32 bytes.
        trusted_keys: public keys of all nodes that this node trusts, its own key included.
    """

    private_key: bytes = field(repr=False)
    trusted_keys: frozenset[bytes]

    @property
    def public_key(self) -> bytes:
        """Public Ed25519 key of this node, 32 bytes."""
        return derive_public_key(self.private_key)

    def check_registered(self, public_keys: Mapping[ClientId, bytes]) -> dict[ClientId, bytes]:
        """Return the public key of each client if this node trusts all these keys.

        Args:
            public_keys: client -> public key, from the coordinator.

        Raises:
            FedlearnError: This node does not trust a key.
        """
        untrusted = [client for client, key in public_keys.items() if key not in self.trusted_keys]
        if untrusted:
            raise FedlearnError(
                f"the keys of clients {untrusted} are not in this node's {IDENTITIES}; "
                "if the sites agree on these clients, copy their new masking.pub to this node"
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
        trusted = frozenset(read_identities(folder / IDENTITIES).values())
        keys = MaskingKeys(secret, trusted)
        is_included = keys.public_key in trusted
    except (OSError, ValueError) as error:
        raise FedlearnError(f"the masking keys in {folder} cannot be read: {error}") from error
    if not is_included:
        fix = "the masking.pub that fedlearn.deploy.keys wrote with this node's masking.key"
        raise FedlearnError(f"{folder / IDENTITIES} does not have the public key of this node\n  try       {fix}")
    return keys


def read_identities(path: Path) -> dict[str, bytes]:
    """Return the public key of each node in a ``masking.pub`` file: name -> key."""
    lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    return {name: bytes.fromhex(key) for key, name in lines}


def format_identities(identities: Mapping[str, bytes]) -> str:
    """Return the text of a ``masking.pub`` file, which `read_identities` reads."""
    return "".join(f"{key.hex()} {name}\n" for name, key in sorted(identities.items()))


def derive_public_key(private_key: bytes) -> bytes:
    """Return the public key of a private Ed25519 key, 32 bytes each."""
    return Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
