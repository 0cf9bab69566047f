"""Enrol a site that makes its own keys. No private key leaves the site.

1. ``keys request`` at the site makes all private keys, and a request file with public keys and proofs of possession.
2. ``keys approve`` at the coordinator checks file and fingerprint, admits the node, and writes an approval file.
3. ``keys accept`` at the site checks the approval and its fingerprint, and stores root certificate and ``masking.pub``.

Both sides compare fingerprints over another channel, e.g. by telephone. So a party between them cannot replace a key.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from base64 import b64decode, b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedlearn.core.plain_text import plain_line
from fedlearn.core.private_files import write_private
from fedlearn.core.serialization import WireError, read_fields
from fedlearn.deploy.client_ids import format_client_ids
from fedlearn.deploy.key_files import (
    ALLOWED,
    CA,
    NODE_KEY,
    REVOKED,
    KeysError,
    coordinator_part,
    exclusive,
    masking_keys_of,
    read_admitted,
    write_masking_keys,
)
from fedlearn.deploy.node_bindings import BINDINGS, DEFAULT_MAX_EXAMPLES, check_distinct, parse_node, read_bindings
from fedlearn.deploy.node_side.masking_keys import IDENTITIES, MASKING_KEY, derive_public_key, read_identities

REQUEST_FORMAT, APPROVAL_FORMAT = "fedlearn request 1", "fedlearn approval 1"
REQUEST_DOMAIN = b"fedlearn proof of possession 1\n"  # no signature for another purpose is a proof
REQUESTS = "requests"  # folder of approved requests, in the coordinator's part of the keys
MAX_FILE_BYTES, MAX_NAME = 2**18, 64
REQUEST_FIELDS = {
    **dict.fromkeys(("format", "name", "clients", "node_key", "masking_key", "created", "nonce"), str),
    "max_examples": int,
}
APPROVAL_FIELDS = dict.fromkeys(("format", "name", "request", "ca", "masking_pub", "address", "created"), str)


def request(folder: Path, node: str) -> Path:
    """Make the keys of a site and its request file, and return the path of the file.

    Args:
        folder: folder for the keys of the node, at the site; it is created if it is missing.
        node: name of the node, with or without client ids, such as ``north=0-2:5000``.

    Raises:
        KeysError: The folder has keys.
        SettingError: The name or the client ids are malformed.
    """
    name, binding = parse_node(node)
    for file in (NODE_KEY, MASKING_KEY):
        if (folder / file).exists():
            raise KeysError(
                f"{folder} has keys\n  expected  a folder without {file}\n  advice    choose another folder"
            )
    node_key, masking_key = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
    public = node_key.public_key().public_bytes(formats.Encoding.OpenSSH, formats.PublicFormat.OpenSSH)
    content = {
        "format": REQUEST_FORMAT,
        "name": name,
        "clients": format_client_ids(binding.clients) if binding else "",
        "max_examples": binding.max_examples if binding else DEFAULT_MAX_EXAMPLES,
        "node_key": public.decode("ascii"),
        "masking_key": masking_key.public_key().public_bytes_raw().hex(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "nonce": secrets.token_hex(16),
    }
    message = REQUEST_DOMAIN + canonical(content)
    proofs = {
        "node_key": b64encode(node_key.sign(message, ec.ECDSA(hashes.SHA384()))).decode("ascii"),
        "masking_key": b64encode(masking_key.sign(message)).decode("ascii"),
    }
    pem = node_key.private_bytes(formats.Encoding.PEM, formats.PrivateFormat.OpenSSH, formats.NoEncryption())
    write_private(folder / NODE_KEY, pem)
    write_private(folder / MASKING_KEY, masking_key.private_bytes_raw().hex())
    path = folder / f"{name}.request.json"
    _write(path, content, proofs=proofs)
    return path


@exclusive
def approve(folder: Path, file: Path, *, fingerprint: str, address: str = "") -> Path:
    """Admit the node of a request file, and return the path of the approval file, beside the request.

    Args:
        folder: folder with all keys, or the coordinator's part of it.
        file: request file of the site.
        fingerprint: fingerprint that the site has stated over another channel.
        address: address of the coordinator, ``host:port``, for the approval.

    Guarantees:
        Nothing is written unless all checks succeed.

    Raises:
        KeysError: The file is no request, a proof is wrong, the fingerprint is another one, or a name or a key is or
            was in use.
        BindingError: Another node has one of the clients.
        SettingError: The name or the client ids are malformed.
    """
    content = read_request(file)
    _require_fingerprint(content, fingerprint)
    base, name = coordinator_part(folder), str(content["name"])
    node = f"{name}={content['clients']}:{content['max_examples']}" if content["clients"] else name
    binding = parse_node(node)[1]
    bindings = read_bindings(base / BINDINGS) | ({name: binding} if binding else {})
    _require_unused(folder, base, content)
    check_distinct(bindings)
    masking_keys = {**masking_keys_of(base), name: bytes.fromhex(content["masking_key"])}
    certificate = (base / CA).read_text(encoding="ascii")
    write_private(base / REQUESTS / f"{name}.json", file.read_bytes())
    text = write_masking_keys(folder, masking_keys, bindings)
    write_private(base / ALLOWED / f"{name}.pub", f"{content['node_key']} {name}\n")  # last: it admits the node
    approval = {
        "format": APPROVAL_FORMAT,
        "name": name,
        "request": _digest(content),
        "ca": certificate,
        "masking_pub": text,
        "address": address,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = file.with_name(f"{name}.approval.json")
    _write(path, approval)
    return path


def accept(folder: Path, file: Path, *, fingerprint: str) -> dict[str, Any]:
    """Store the root certificate and ``masking.pub`` of an approval file, and return the content of the approval.

    Args:
        folder: folder with the keys of the node, from `request`.
        file: approval file of the coordinator.
        fingerprint: fingerprint that the coordinator has stated over another channel.

    Raises:
        KeysError: The file is no approval of the request in this folder, the fingerprint is another one, or the folder
            has another root certificate.
    """
    content = read_approval(file)
    _require_fingerprint(content, fingerprint)
    sent = read_request(folder / f"{content['name']}.request.json")
    if not hmac.compare_digest(_digest(sent), content["request"]):
        raise KeysError(f"{file} approves another request\n  expected  the approval of the request in {folder}")
    known_key = derive_public_key(bytes.fromhex((folder / MASKING_KEY).read_text(encoding="ascii")))
    write_private(folder / f".{IDENTITIES}", content["masking_pub"])
    try:
        is_known = read_identities(folder / f".{IDENTITIES}").get(content["name"]) == known_key
    except ValueError as error:
        raise KeysError(f"{file} has no valid {IDENTITIES}: {error}") from error
    finally:
        (folder / f".{IDENTITIES}").unlink()
    if not is_known:
        raise KeysError(
            f"{IDENTITIES} of {file} does not have the masking key of this node\n"
            "  advice    ask the coordinator for a new approval"
        )
    if (folder / CA).exists() and (folder / CA).read_text(encoding="ascii") != content["ca"]:
        raise KeysError(f"{folder / CA} belongs to another authority\n  expected  one federation per folder")
    write_private(folder / IDENTITIES, content["masking_pub"])
    write_private(folder / CA, content["ca"])
    return content


def read_request(file: Path) -> dict[str, Any]:
    """Return the content of a request file, after a check of its form and of both proofs of possession.

    Raises:
        KeysError: The file is no request, or a proof is wrong.
    """
    content, document = _read(file, REQUEST_FIELDS, REQUEST_FORMAT, ("content", "proofs"))
    problem = f"{file} has a wrong proof of possession"
    try:
        proofs = {name: b64decode(text, validate=True) for name, text in _proofs(document["proofs"]).items()}
        key = formats.load_ssh_public_key(content["node_key"].encode("ascii"))
        masking_key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(content["masking_key"]))
        if masking_key.public_bytes_raw().hex() != content["masking_key"]:  # keys are compared as texts
            raise ValueError("the masking key has another spelling")
    except (ValueError, TypeError, KeyError, WireError) as error:
        raise KeysError(
            f"{file} has no valid keys: {plain_line(str(error))}\n  advice    ask the site for a new request"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise KeysError(f"{file} has another kind of node key\n  expected  an EC key on the curve P-384")
    message = REQUEST_DOMAIN + canonical(content)
    try:
        key.verify(proofs["node_key"], message, ec.ECDSA(hashes.SHA384()))
        masking_key.verify(proofs["masking_key"], message)
    except InvalidSignature:
        raise KeysError(
            f"{problem}\n  expected  the file as keys request wrote it\n  advice    ask the site for a new request"
        ) from None
    is_name = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", content["name"]) and len(content["name"]) <= MAX_NAME
    line = content["node_key"].split()
    if not is_name or len(line) != 2 or content["node_key"] != " ".join(line):
        raise KeysError(f"{file} has a malformed name or key\n  expected  the file as keys request wrote it")
    return content


def read_approval(file: Path) -> dict[str, Any]:
    """Return the content of an approval file, after a check of its form.

    Raises:
        KeysError: The file is no approval.
    """
    content, _ = _read(file, APPROVAL_FIELDS, APPROVAL_FORMAT, ("content",))
    try:
        x509.load_pem_x509_certificate(content["ca"].encode("ascii"))
    except ValueError as error:
        raise KeysError(f"{file} has no certificate\n  advice    ask the coordinator for a new approval") from error
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", content["name"]):
        raise KeysError(f"{file} has a malformed name\n  advice    ask the coordinator for a new approval")
    return content


def fingerprint_of(content: Mapping[str, Any]) -> str:
    """Return 128 bits of the digest of a request or an approval, in groups for the telephone."""
    digest = _digest(content)[:32]
    return " ".join(digest[i : i + 4] for i in range(0, 32, 4))


def canonical(content: Mapping[str, Any]) -> bytes:
    """Return the bytes that are signed and hashed."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()


def _require_fingerprint(content: Mapping[str, Any], fingerprint: str) -> None:
    typed = re.sub(r"[\s:-]", "", fingerprint).lower()
    if not hmac.compare_digest(typed.encode(), fingerprint_of(content).replace(" ", "").encode()):
        expected, fix = (
            "the fingerprint that the other side sees",
            "ask the other side over another channel, e.g. by telephone",
        )
        raise KeysError(f"the file has another fingerprint\n  expected  {expected}\n  advice    {fix}")


def _require_unused(folder: Path, base: Path, content: Mapping[str, Any]) -> None:
    """Refuse a name or a key that is or was in use."""
    name = content["name"]
    used = [base / kind / f"{name}.pub" for kind in (ALLOWED, REVOKED)] + [folder / "nodes" / name]
    for path in [*used, base / REQUESTS / f"{name}.json"]:
        if path.exists():
            raise KeysError(f"{path} exists: a node of this name has or had a key\n  advice    choose another name")
    key = formats.load_ssh_public_key(content["node_key"].encode("ascii"))
    pem = key.public_bytes(formats.Encoding.PEM, formats.PublicFormat.SubjectPublicKeyInfo)
    owners = {**read_admitted(base / REVOKED), **read_admitted(base / ALLOWED)}
    masking = {key.hex(): owner for owner, key in masking_keys_of(base).items()}
    for path in (base / REQUESTS).glob("*.json"):
        masking[str(read_request(path)["masking_key"])] = path.stem
    owner = owners.get(pem) or masking.get(content["masking_key"])
    if owner:
        fix = "new keys: python -m fedlearn.deploy.keys request FOLDER NAME"
        raise KeysError(f"a key of {name} is or was the key of {owner}\n  expected  new keys\n  advice    {fix}")


def _proofs(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or value.keys() != {"node_key", "masking_key"}:
        raise WireError("the proofs are incomplete")
    return read_fields(value, node_key=str, masking_key=str)


def _read(
    file: Path, fields: Mapping[str, type], kind: str, parts: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content and the whole document of a file that another party wrote."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
        document = json.loads(data.decode("ascii")) if len(data) <= MAX_FILE_BYTES else None
        if not isinstance(document, dict) or document.keys() != set(parts):
            raise WireError("it has other parts")
        content = read_fields(document["content"], **fields)
        if document["content"].keys() != fields.keys() or content["format"] != kind:
            raise WireError("it has other fields, or another format")
    except (OSError, ValueError, RecursionError, WireError) as error:
        detail = plain_line(str(error))
        raise KeysError(f"{file} cannot be read: {detail}\n  expected  a file with the format {kind}") from error
    return content, document


def _write(path: Path, content: Mapping[str, Any], **parts: Any) -> None:
    write_private(path, json.dumps({"content": content, **parts}, indent=1) + "\n")
