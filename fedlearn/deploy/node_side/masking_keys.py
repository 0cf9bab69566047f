"""A node's key for secure aggregation, and those of the nodes with which it agrees to be summed.

Both lie beside the node's other keys: ``masking.key``, which never leaves it, and ``masking.pub``, the same file at all
nodes: a line of a public key and a name for each. Who may be in a sum is agreed upon outside the protocol: a node takes
part only with clients whose keys are in its own file, whatever the coordinator says.
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
    """A node's own key, and everybody's.

    Args:
        private_key: 32 bytes, Ed25519.
        trusted_keys: public keys of the federation's nodes, this one's included.
    """

    private_key: bytes = field(repr=False)
    trusted_keys: frozenset[bytes]

    @property
    def public_key(self) -> bytes:
        """32 bytes, Ed25519."""
        return derive_public_key(self.private_key)

    def check_registered(self, public_keys: Mapping[ClientId, bytes]) -> dict[ClientId, bytes]:
        """The public key of each client, as the coordinator tells them.

        Raises:
            FedlearnError: one is not among those agreed upon.
        """
        strangers = [client for client, key in public_keys.items() if key not in self.trusted_keys]
        if strangers:
            raise FedlearnError(f"the keys of clients {strangers} are not in this node's {IDENTITIES}")
        return dict(public_keys)


def read_masking_keys(folder: Path) -> MaskingKeys | None:
    """What lies in a node's folder of keys; None if it has no key for secure aggregation.

    Raises:
        FedlearnError: a file cannot be read, or the node's own key is not among those agreed upon.
    """
    if not (folder / MASKING_KEY).exists():
        return None
    try:
        secret = bytes.fromhex((folder / MASKING_KEY).read_text(encoding="ascii"))
        known = frozenset(read_identities(folder / IDENTITIES).values())
        signing = MaskingKeys(secret, known)
        mine = signing.public_key in known
    except (OSError, ValueError) as error:
        raise FedlearnError(f"the masking keys in {folder} cannot be read: {error}") from error
    if not mine:
        fix = "the masking.pub that fedlearn.deploy.keys wrote with this node's masking.key"
        raise FedlearnError(f"{folder / IDENTITIES} does not hold this node's own key\n  try       {fix}")
    return signing


def read_identities(path: Path) -> dict[str, bytes]:
    """Name -> public key."""
    lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    return {name: bytes.fromhex(key) for key, name in lines}


def format_identities(identities: Mapping[str, bytes]) -> str:
    """What `read_identities` reads."""
    return "".join(f"{key.hex()} {name}\n" for name, key in sorted(identities.items()))


def derive_public_key(private_key: bytes) -> bytes:
    """The public half of a secret key."""
    return Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
