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
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.core.plain_text import plain_line
from fedlearn.deploy import enrolment
from fedlearn.deploy.key_files import KeysError, coordinator_part
from fedlearn.deploy.key_folders import add, bind, create, describe, renew, revoke
from fedlearn.deploy.person_keys import add_person_to, describe_persons
from fedlearn.deploy.persons import PERSONS_FILE, ROLES, revoke_person
from fedlearn.deploy.processes import private_files

NODES_HELP = "names of nodes; client ids and the largest number of examples may follow, as in cleveland=0-2:5000"


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
    sys.stdout.write(f"fingerprint {enrolment.fingerprint_of(content)}\n")
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
