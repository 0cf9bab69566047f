"""Create and change the folder with all keys of a federation: nodes, persons and certificates."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlearn.core.checkpoint import write_atomically
from fedlearn.deploy.certificates import (
    check_certificate_settings,
    expiry,
    hosts_of,
    new_authority,
    private_pem,
    server_certificate,
)
from fedlearn.deploy.key_files import (
    ALLOWED,
    CA,
    CA_KEY,
    CERTIFICATE,
    NODE_KEY,
    REVOKED,
    SECRET,
    SERVER_KEY,
    TOKEN,
    KeysError,
    coordinator_part,
    exclusive,
    masking_keys_of,
    read_key_bytes,
    write_masking_keys,
)
from fedlearn.deploy.node_bindings import (
    BINDINGS,
    NodeBinding,
    check_distinct,
    parse_node,
    read_bindings,
    write_bindings,
)
from fedlearn.deploy.node_side.masking_keys import IDENTITIES, MASKING_KEY, derive_public_key
from fedlearn.deploy.persons import PERSONS_FILE, add_person
from fedlearn.deploy.processes import private_files
from fedlearn.errors import require

FIRST_ADMIN = "operator"  # name and folder of the first person


@private_files()
def create(folder: Path, hosts: Sequence[str], nodes: Sequence[str], *, days: int = 365) -> None:
    """Create an authority, a server certificate, the token of a first admin, and a key pair for each node.

    Args:
        folder: folder for the keys; it is created if it is missing.
        hosts: names and IP addresses of the coordinator, as nodes and operators use them.
        nodes: names of nodes, with letters, digits, ``-``, ``_`` and ``.``, such as ``cleveland``. The ids of its
            clients may follow, and the largest number of examples of a client: ``cleveland=0-2:5000``.
        days: validity of the server certificate in days, >= 1. The certificate of the authority is valid for ten years.

    Guarantees:
        No file is overwritten. Only the owner can read private keys and secrets.

    Raises:
        KeysError: The folder already has an authority.
        SettingError: A host, a name or the number of days is invalid.
    """
    if (folder / CA_KEY).exists():
        fix = f"keys add, renew and revoke change this authority; or choose another folder than {folder}"
        raise KeysError(f"{folder} already has an authority\n  expected  a folder without keys\n  advice    {fix}")
    _parse_nodes(nodes, {})
    check_certificate_settings(hosts, days)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = new_authority(key)
    for part in (f"coordinator/{ALLOWED}", f"coordinator/{REVOKED}", "operator", "nodes"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CA_KEY, private_pem(key))
    for part in (".", "coordinator", "operator"):
        write_atomically(folder / part / CA, certificate.public_bytes(formats.Encoding.PEM))
    write_atomically(
        folder / FIRST_ADMIN / TOKEN, add_person(folder / "coordinator" / PERSONS_FILE, FIRST_ADMIN, "admin")
    )
    write_atomically(folder / "coordinator" / SECRET, secrets.token_bytes(32).hex().encode())
    renew(folder, hosts, days=days)
    add(folder, nodes)


@private_files()
def renew(folder: Path, hosts: Sequence[str] = (), *, days: int = 365) -> None:
    """Create a new server certificate and key; the keys of nodes and operators stay valid.

    Args:
        folder: folder with all keys.
        hosts: names and IP addresses of the coordinator; empty takes the hosts of the present certificate.
        days: validity of the certificate in days, >= 1.

    Raises:
        KeysError: The folder has no authority.
        SettingError: A host or the number of days is invalid.
    """
    read_key_bytes(folder / CA_KEY)
    target = folder / "coordinator"
    hosts = hosts or hosts_of(x509.load_pem_x509_certificate(read_key_bytes(target / CERTIFICATE)))
    check_certificate_settings(hosts, days)
    hosts = [*dict.fromkeys([*hosts, "localhost"])]  # processes of the coordinator connect to localhost
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = server_certificate(folder, key, hosts, days=days)
    write_atomically(target / SERVER_KEY, private_pem(key))
    write_atomically(target / CERTIFICATE, certificate.public_bytes(formats.Encoding.PEM))


@private_files()
@exclusive
def add(folder: Path, nodes: Sequence[str]) -> None:
    """Create key pairs for new nodes; a running coordinator admits these nodes within seconds.

    The list of keys for secure aggregation is rewritten for all nodes. Copy it to each node before the node takes part
    in a masked sum with the new nodes.

    Args:
        folder: folder with all keys.
        nodes: names of the new nodes, with or without client ids; see `create`.

    Raises:
        KeysError: A node of this name has keys, or had keys before it was revoked.
        BindingError: Another node has one of the clients.
        SettingError: A name is invalid.
    """
    bindings = _parse_nodes(nodes, read_bindings(folder / "coordinator" / BINDINGS))
    masking_keys, public_keys = masking_keys_of(folder), dict[Path, bytes]()
    for name in (parse_node(node)[0] for node in nodes):
        public = [folder / "coordinator" / kind / f"{name}.pub" for kind in (ALLOWED, REVOKED)]
        for path in (folder / "nodes" / name, *public):
            if path.exists():
                raise KeysError(f"{path} exists: a node of this name has or had a key\n  advice    choose another name")
        target = folder / "nodes" / name
        target.mkdir(parents=True, mode=0o700)
        key = ec.generate_private_key(ec.SECP384R1())
        write_atomically(target / NODE_KEY, _openssh(key))
        shutil.copyfile(folder / CA, target / CA)
        secret = Ed25519PrivateKey.generate().private_bytes_raw()
        write_atomically(target / MASKING_KEY, secret.hex().encode())
        masking_keys[name] = derive_public_key(secret)
        line = key.public_key().public_bytes(formats.Encoding.OpenSSH, formats.PublicFormat.OpenSSH)
        public_keys[public[0]] = line + f" {name}\n".encode()
    write_masking_keys(folder, masking_keys, bindings)  # once: it writes a file for each node
    for path, content in public_keys.items():
        write_atomically(path, content)


@private_files()
@exclusive
def bind(folder: Path, nodes: Sequence[str]) -> None:
    """Change the client ids and the largest number of examples of admitted nodes.

    A running coordinator uses them for each node that joins a run. If the folder has all keys, the list of keys for
    secure aggregation is rewritten for all nodes; copy it to each of them.

    Args:
        folder: folder with all keys, or the coordinator's part of it on the coordinator's machine.
        nodes: names with client ids, such as ``cleveland=0-2:5000``.

    Raises:
        KeysError: No admitted node has this name.
        BindingError: Another node has one of the clients.
        SettingError: A name or its ids are malformed, or the ids are missing.
    """
    base = coordinator_part(folder)
    bindings = _parse_nodes(nodes, read_bindings(base / BINDINGS))
    for node in nodes:
        name, binding = parse_node(node)
        require(binding is not None, "nodes", node, "a name with client ids", f"{name}=0-2")
        if not (base / ALLOWED / f"{name}.pub").exists():
            fix = f"admit the node first: python -m fedlearn.deploy.keys add FOLDER {name}"
            raise KeysError(f"{name} is not an admitted node\n  advice    {fix}")
    write_bindings(base / BINDINGS, bindings)
    if base != folder:
        write_masking_keys(folder, masking_keys_of(folder), bindings)


@private_files()
@exclusive
def revoke(folder: Path, nodes: Sequence[str]) -> None:
    """Revoke the keys of nodes; a running coordinator disconnects these nodes within seconds.

    Args:
        folder: folder with all keys, or the coordinator's part of it on the coordinator's machine.
        nodes: names of the nodes.

    Raises:
        KeysError: No admitted node has this name.
    """
    base = coordinator_part(folder)
    for name in nodes:
        allowed = base / ALLOWED / f"{name}.pub"
        if not allowed.exists():
            known = ", ".join(sorted(path.stem for path in allowed.parent.glob("*.pub"))) or "none"
            raise KeysError(f"{name} is not an admitted node\n  expected  one of {known}")
        os.replace(allowed, base / REVOKED / allowed.name)
    bindings = {name: value for name, value in read_bindings(base / BINDINGS).items() if name not in nodes}
    write_bindings(base / BINDINGS, bindings)
    if (folder / IDENTITIES).exists():  # otherwise the next approval would spread the revoked keys
        kept = {name: key for name, key in masking_keys_of(folder).items() if name not in nodes}
        write_masking_keys(folder, kept, bindings)


def describe(folder: Path) -> str:
    """Return a text with hosts, expiry dates, admitted nodes and revoked nodes."""
    base = coordinator_part(folder)
    bindings = read_bindings(base / BINDINGS)
    certificate = x509.load_pem_x509_certificate(read_key_bytes(base / CERTIFICATE))
    lines = [f"server    {', '.join(hosts_of(certificate))}   until {certificate.not_valid_after_utc:%Y-%m-%d}"]
    lines += [f"authority until {expiry(base / CA):%Y-%m-%d}"]
    for kind in (ALLOWED, REVOKED):
        names = sorted(path.stem for path in (base / kind).glob("*.pub"))
        lines += [f"{kind:<9} {name}" + (f"   {bindings[name]}" if name in bindings else "") for name in names]
    return "\n".join(lines)


def _parse_nodes(nodes: Sequence[str], bindings: Mapping[str, NodeBinding]) -> dict[str, NodeBinding]:
    """Return the present bindings and the bindings of further nodes."""
    named = {name: binding for name, binding in map(parse_node, nodes) if binding is not None}
    together = {**bindings, **named}
    check_distinct(together)
    return together


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(formats.Encoding.PEM, formats.PrivateFormat.OpenSSH, formats.NoEncryption())
