"""Create and renew keys, admit nodes and revoke them: ``python -m fedlearn.deploy.keys``.

One folder has all keys. Its parts go to different machines::

    keys/ca.key              signs server certificates; stays on the machine that runs this command

    keys/coordinator/        certificate and key of the server, secrets, public keys of the admitted nodes, and the
                             client ids of each node (nodes.yaml)

    keys/nodes/NAME/         private keys of a node, its root certificate, and the keys that it trusts in masked sums

    keys/operator/           root certificate and token of the first person, an admin

    keys/persons/NAME/       root certificate and token of each further person
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from filelock import FileLock

from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.core.plain_text import plain_line
from fedlearn.deploy.node_bindings import (
    BINDINGS,
    NodeBinding,
    check_distinct,
    parse_node,
    read_bindings,
    write_bindings,
)
from fedlearn.deploy.node_side.masking_keys import (
    IDENTITIES,
    MASKING_KEY,
    derive_public_key,
    format_identities,
    read_identities,
)
from fedlearn.deploy.persons import PERSONS_FILE, ROLES, add_person, read_persons, revoke_person
from fedlearn.deploy.processes import private_files
from fedlearn.errors import FedlearnError, is_count, require

CA, CA_KEY, TOKEN = "ca.crt", "ca.key", "token"
CERTIFICATE, SERVER_KEY, SECRET, NODE_KEY = "server.crt", "server.key", "executor.secret", "node.key"
ALLOWED, REVOKED = "allowed", "revoked"  # folders of public keys, NAME.pub
FIRST_ADMIN, PERSONS = "operator", "persons"  # name and folder of the first person, folder of further persons
CA_DAYS = 3650
NODES_HELP = "names of nodes; client ids and the largest number of examples may follow, as in cleveland=0-2:5000"
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
CLOCK_SKEW = timedelta(minutes=5)  # a node with a slow clock must accept a new certificate


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
    _check_certificate_settings(hosts, days)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = _authority(key)
    for part in (f"coordinator/{ALLOWED}", f"coordinator/{REVOKED}", "operator", "nodes"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CA_KEY, _pem(key))
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
    authority_key, authority = _load_authority(folder)
    target = folder / "coordinator"
    hosts = hosts or hosts_of(x509.load_pem_x509_certificate(_read(target / CERTIFICATE)))
    _check_certificate_settings(hosts, days)
    hosts = [*dict.fromkeys([*hosts, "localhost"])]  # processes of the coordinator connect to localhost
    key = ec.generate_private_key(ec.SECP384R1())
    alternatives = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    certificate = (
        _unsigned(f"fedlearn coordinator {hosts[0]}"[:64], authority.subject, key.public_key(), timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(alternatives, critical=False)
        .add_extension(usage, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA384())
    )
    write_atomically(target / SERVER_KEY, _pem(key))
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
        write_masking_keys(folder, {**masking_keys_of(folder), name: derive_public_key(secret)}, bindings)
        line = key.public_key().public_bytes(formats.Encoding.OpenSSH, formats.PublicFormat.OpenSSH)
        write_atomically(public[0], line + f" {name}\n".encode())


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


@private_files()
def add_person_to(folder: Path, name: str, role: str) -> Path:
    """Add a person, and return the folder with the token and the root certificate for this person.

    Args:
        folder: folder with all keys, or the coordinator's part of it on the coordinator's machine.
        name: name of the person, as in the audit log.
        role: ``admin``, ``submitter`` or ``viewer``.

    Raises:
        PersonsError: The name is or was in use.
        SettingError: The name or the role is invalid.
    """
    base = coordinator_part(folder)
    certificate, target = _read(base / CA), folder / PERSONS / name
    token = add_person(base / PERSONS_FILE, name, role)
    target.mkdir(parents=True, mode=0o700, exist_ok=True)
    write_atomically(target / CA, certificate)
    write_atomically(target / TOKEN, token)
    return target


def describe_persons(folder: Path) -> str:
    """Return a text with one line per person: name, role, and the time of the addition or of the revocation."""
    persons = read_persons(coordinator_part(folder) / PERSONS_FILE).values()
    lines = (
        f"{person.name:<20} {person.role:<10} "
        + (f"revoked {person.revoked}" if person.revoked else f"since {person.added}")
        for person in persons
    )
    return "\n".join(lines) or "no person: python -m fedlearn.deploy.keys person add FOLDER NAME --role submitter"


def expiry(certificate: Path) -> datetime:
    """Return the time at which a certificate expires, in UTC.

    Raises:
        KeysError: The file is missing or is not a certificate.
    """
    try:
        return x509.load_pem_x509_certificate(_read(certificate)).not_valid_after_utc
    except ValueError as error:
        fix = "renew the certificate: python -m fedlearn.deploy.keys renew FOLDER"
        raise KeysError(f"{certificate} is not a certificate: {error}\n  advice    {fix}") from error


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """Return the names and IP addresses in a server certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def read_admitted(folder: Path) -> dict[bytes, str]:
    """Return the public keys (PEM) and names of the nodes in the folder ``allowed``.

    Raises:
        KeysError: A file is not a public key.
    """
    return {read_public(path): path.stem for path in sorted(folder.glob("*.pub"))}


def describe(folder: Path) -> str:
    """Return a text with hosts, expiry dates, admitted nodes and revoked nodes."""
    base = coordinator_part(folder)
    bindings = read_bindings(base / BINDINGS)
    certificate = x509.load_pem_x509_certificate(_read(base / CERTIFICATE))
    lines = [f"server    {', '.join(hosts_of(certificate))}   until {certificate.not_valid_after_utc:%Y-%m-%d}"]
    lines += [f"authority until {expiry(base / CA):%Y-%m-%d}"]
    for kind in (ALLOWED, REVOKED):
        names = sorted(path.stem for path in (base / kind).glob("*.pub"))
        lines += [f"{kind:<9} {name}" + (f"   {bindings[name]}" if name in bindings else "") for name in names]
    return "\n".join(lines)


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


def coordinator_part(folder: Path) -> Path:
    """Return the coordinator's part of a folder with all keys, or the folder itself if it is this part."""
    return folder / "coordinator" if (folder / "coordinator").is_dir() else folder


def _parse_nodes(nodes: Sequence[str], bindings: Mapping[str, NodeBinding]) -> dict[str, NodeBinding]:
    """Return the present bindings and the bindings of further nodes."""
    named = {name: binding for name, binding in map(parse_node, nodes) if binding is not None}
    together = {**bindings, **named}
    check_distinct(together)
    return together


def _authority(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = "fedlearn authority"
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = dict.fromkeys(("key_encipherment", "data_encipherment", "key_agreement", "content_commitment"), False)
    usage |= dict.fromkeys(("digital_signature", "encipher_only", "decipher_only"), False)
    return (
        _unsigned(name, issuer, key.public_key(), timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .sign(key, hashes.SHA384())
    )


def _unsigned(
    name: str, issuer: x509.Name, public: ec.EllipticCurvePublicKey, valid: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + valid)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _load_authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = formats.load_pem_private_key(_read(folder / CA_KEY), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, x509.load_pem_x509_certificate(_read(folder / CA))


def _read(path: Path) -> bytes:
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


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(formats.Encoding.PEM, formats.PrivateFormat.PKCS8, formats.NoEncryption())


def _openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(formats.Encoding.PEM, formats.PrivateFormat.OpenSSH, formats.NoEncryption())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _check_certificate_settings(hosts: Sequence[str], days: int) -> None:
    require(is_count(days), "--days", days, "a whole number >= 1", "--days 365")
    expected = "names or IP addresses of the coordinator"
    is_valid = bool(hosts) and all(re.fullmatch(r"[A-Za-z0-9.:_-]+", host) for host in hosts)
    require(is_valid, "--host", " ".join(hosts) or "missing", expected, "--host coordinator.example.org")


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser("fedlearn.deploy.keys", "Create and renew keys; admit nodes and revoke them.")
    commands = parser.add_subparsers(dest="command", required=True)
    descriptions = {
        "create": "create an authority, a server certificate, the token of a first admin, and a key pair per node",
        "renew": "create a new server certificate; restart the coordinator to use it",
        "add": "create key pairs for further nodes",
        "bind": "set the client ids of admitted nodes: NAME=0-2, or NAME=0-2:5000 with a limit of examples",
        "revoke": "revoke the keys of nodes",
        "show": "show admitted and revoked nodes, and the expiry dates of certificates",
    }
    for command, text in descriptions.items():
        subparser = commands.add_parser(command, help=text, description=text)
        subparser.add_argument("folder", type=Path, help="folder with all keys")
        if command in ("create", "renew"):
            subparser.add_argument(
                "--host", action="append", default=[], help="name or IP address of the coordinator; repeat"
            )
            subparser.add_argument("--days", type=int, default=365, help="validity of the server certificate in days")
        if command == "create":
            subparser.add_argument("--nodes", nargs="*", default=[], help=NODES_HELP)
        if command in ("add", "bind", "revoke"):
            subparser.add_argument("nodes", nargs="+", help=NODES_HELP if command != "revoke" else "names of nodes")
    _add_enrolment_commands(commands)
    _add_person_commands(commands.add_parser("person", help="add, revoke and list persons with their roles"))
    return parser


def _add_enrolment_commands(commands: Any) -> None:
    text = "at a site: make the keys of a node, and a request file with its public keys"
    subparser = commands.add_parser("request", help=text, description=text)
    subparser.add_argument("folder", type=Path, help="new folder for the keys of the node")
    subparser.add_argument("nodes", nargs=1, metavar="NAME", help="name of the node; client ids may follow: north=0-2")
    for command, text in {
        "approve": "at the coordinator: admit the node of a request file, and write an approval file",
        "accept": "at a site: store root certificate and masking.pub of an approval file",
    }.items():
        subparser = commands.add_parser(command, help=text, description=text)
        subparser.add_argument("folder", type=Path, help="folder with the keys")
        subparser.add_argument("file", type=Path, help="file of the other side")
        subparser.add_argument("--fingerprint", default="", help="fingerprint that the other side reads out")
        if command == "approve":
            subparser.add_argument("--address", default="", metavar="HOST:PORT", help="coordinator, for the approval")


def _add_person_commands(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="person_command", required=True)
    for command, text in {"add": "add a person", "revoke": "revoke a token", "list": "list all persons"}.items():
        subparser = commands.add_parser(command, help=text, description=text)
        subparser.add_argument("folder", type=Path, help="folder with all keys, or the coordinator's part of it")
        if command != "list":
            subparser.add_argument("name", help="name of the person")
        if command == "add":
            subparser.add_argument("--role", required=True, choices=[str(role) for role in ROLES], help="rights")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 refused."""
    return run_command(build_parser(), manage_keys, argv)


def manage_keys(
    *,
    command: str,
    folder: Path,
    host: Sequence[str] = (),
    nodes: Sequence[str] = (),
    days: int = 365,
    **more: Any,
) -> int:
    """Run one subcommand, print admitted and revoked nodes or persons, and return the exit code."""
    if command in ("request", "approve", "accept"):
        return _enrol(command, folder, nodes, **more)
    if command == "person":
        return _manage_persons(folder, **more)
    if command == "create":
        create(folder, host, nodes, days=days)
    elif command == "renew":
        renew(folder, host, days=days)
    elif command in ("add", "bind", "revoke"):
        {"add": add, "bind": bind, "revoke": revoke}[command](folder, nodes)
    sys.stdout.write(f"{describe(folder)}\n")
    return DONE


def _enrol(
    command: str,
    folder: Path,
    nodes: Sequence[str] = (),
    *,
    file: Path = Path(),
    fingerprint: str = "",
    address: str = "",
) -> int:
    from fedlearn.deploy import enrolment  # it uses this module

    with private_files():
        if command == "request":
            file = enrolment.request(folder, *nodes)
            content = enrolment.read_request(file)
            sys.stdout.write(f"send       {file}\n")
        else:
            content = (enrolment.read_request if command == "approve" else enrolment.read_approval)(file)
            shown = {name: content[name] for name in ("name", "clients", "address", "created") if content.get(name)}
            sys.stdout.write("".join(f"{name:<10} {plain_line(value)}\n" for name, value in shown.items()))
            if not fingerprint:
                _print_fingerprint(content)
                expected, fix = "the value that the other side reads out", "compare both values, then add --fingerprint"
                raise KeysError(f"--fingerprint is missing\n  expected  {expected}\n  advice    {fix}")
            if command == "accept":
                enrolment.accept(folder, file, fingerprint=fingerprint)
                sys.stdout.write(f"keys of {content['name']} are complete in {folder}\n")
                return DONE
            approval = enrolment.approve(folder, file, fingerprint=fingerprint, address=address)
            content = enrolment.read_approval(approval)
            sys.stdout.write(f"send back  {approval}\n")
    _print_fingerprint(content)
    return DONE


def _print_fingerprint(content: Mapping[str, Any]) -> None:
    from fedlearn.deploy.enrolment import fingerprint_of

    sys.stdout.write(f"fingerprint {fingerprint_of(content)}\n")
    sys.stdout.flush()


def _manage_persons(folder: Path, *, person_command: str, name: str = "", role: str = "") -> int:
    if person_command == "add":
        target = add_person_to(folder, name, role)
        sys.stdout.write(f"token and root certificate for {name} are in {target}; send them over a private channel\n")
    elif person_command == "revoke":
        revoke_person(coordinator_part(folder) / PERSONS_FILE, name)
    sys.stdout.write(f"{describe_persons(folder)}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
