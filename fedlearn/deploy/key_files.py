"""Name and read the files of keys, and the parts of a folder with all keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as formats
from filelock import FileLock

from fedlearn.core.checkpoint import write_atomically
from fedlearn.deploy.node_bindings import BINDINGS, NodeBinding, write_bindings
from fedlearn.deploy.node_side.masking_keys import IDENTITIES, format_identities, read_identities
from fedlearn.errors import FedlearnError

CA, CA_KEY, TOKEN = "ca.crt", "ca.key", "token"
CERTIFICATE, SERVER_KEY, SECRET, NODE_KEY = "server.crt", "server.key", "executor.secret", "node.key"
ALLOWED, REVOKED = "allowed", "revoked"  # folders of public keys, NAME.pub
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class KeysError(FedlearnError):
    """Report keys that are missing, invalid or already present."""


def exclusive(change: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return a function that changes a folder of keys, its first argument, while no other process does.

    Without the lock, two commands at a time could undo a revocation in ``masking.pub``.
    """

    @wraps(change)
    def locked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        folder = args[0] if args else kwargs["folder"]
        assert isinstance(folder, Path)
        is_present = coordinator_part(folder).is_dir()  # otherwise the function itself refuses the folder
        with FileLock(coordinator_part(folder) / ".lock", mode=0o600) if is_present else nullcontext():
            return change(*args, **kwargs)

    return locked


def coordinator_part(folder: Path) -> Path:
    """Return the coordinator's part of a folder with all keys, or the folder itself if it is this part."""
    return folder / "coordinator" if (folder / "coordinator").is_dir() else folder


def read_key_bytes(path: Path) -> bytes:
    """Return the bytes of a file of keys.

    Raises:
        KeysError: The file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        fix = "create the keys: python -m fedlearn.deploy.keys create --help"
        raise KeysError(f"{path} cannot be read: {error.strerror}\n  advice    {fix}") from error


def read_public(path: Path) -> bytes:
    """Return the public key (PEM) in a file.

    Raises:
        KeysError: The file is not a public key.
    """
    try:
        key = formats.load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        fix = "use a key that python -m fedlearn.deploy.keys add created"
        raise KeysError(f"{path} is not a public key: {error}\n  advice    {fix}") from error
    return key.public_bytes(formats.Encoding.PEM, formats.PublicFormat.SubjectPublicKeyInfo)


def read_admitted(folder: Path) -> dict[bytes, str]:
    """Return the public keys (PEM) and names of the nodes in the folder ``allowed``.

    Raises:
        KeysError: A file is not a public key.
    """
    return {read_public(path): path.stem for path in sorted(folder.glob("*.pub"))}


def masking_keys_of(folder: Path) -> dict[str, bytes]:
    """Return the public masking key of each node in a folder."""
    return read_identities(folder / IDENTITIES) if (folder / IDENTITIES).exists() else {}


def write_masking_keys(folder: Path, masking_keys: Mapping[str, bytes], bindings: Mapping[str, NodeBinding]) -> str:
    """Write the bindings, and the keys and clients that nodes trust in masked sums, into each part of a folder.

    Args:
        folder: folder with all keys, or the coordinator's part of it.
        masking_keys: name of a node -> public masking key.
        bindings: name of a node -> its clients.

    Returns:
        The text of ``masking.pub``.
    """
    base = coordinator_part(folder)
    write_bindings(base / BINDINGS, bindings)
    text = format_identities(masking_keys, {name: binding.clients for name, binding in bindings.items()})
    parts = {base} if base == folder else {folder, base, *(folder / "nodes").iterdir()}
    for part in parts:
        write_atomically(part / IDENTITIES, text)
    return text
