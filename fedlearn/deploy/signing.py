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

from fedlearn.errors import FedlearnError
from fedlearn.records import ClientId

MASKING_KEY, IDENTITIES = "masking.key", "masking.pub"


@dataclass(frozen=True)
class Signing:
    """A node's own key, and everybody's.

    Args:
        secret: 32 bytes, Ed25519.
        known: public keys of the federation's nodes, this one's included.
    """

    secret: bytes = field(repr=False)
    known: frozenset[bytes]

    @property
    def public(self) -> bytes:
        """32 bytes, Ed25519."""
        return public_of(self.secret)

    def registered(self, told: Mapping[ClientId, bytes]) -> dict[ClientId, bytes]:
        """The public key of each client, as the coordinator tells them.

        Raises:
            FedlearnError: one is not among those agreed upon.
        """
        strangers = [client for client, key in told.items() if key not in self.known]
        if strangers:
            raise FedlearnError(f"the keys of clients {strangers} are not in this node's {IDENTITIES}")
        return dict(told)


def read_signing(folder: Path) -> Signing | None:
    """What lies in a node's folder of keys; None if it has no key for secure aggregation.

    Raises:
        FedlearnError: a file cannot be read, or the node's own key is not among those agreed upon.
    """
    if not (folder / MASKING_KEY).exists():
        return None
    try:
        secret = bytes.fromhex((folder / MASKING_KEY).read_text(encoding="ascii"))
        known = frozenset(read_identities(folder / IDENTITIES).values())
        signing = Signing(secret, known)
        mine = signing.public in known
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


def identity_lines(identities: Mapping[str, bytes]) -> str:
    """What `read_identities` reads."""
    return "".join(f"{key.hex()} {name}\n" for name, key in sorted(identities.items()))


def public_of(secret: bytes) -> bytes:
    """The public half of a secret key."""
    return Ed25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
