"""Store the persons who may call a coordinator, with their roles. Each person has a token.

The file ``persons.json`` in the coordinator's folder of keys has the SHA-256 digest of each token, never a token. A
token has 256 random bits, so its digest cannot be inverted by guessing, and needs no salt.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedlearn.core.private_files import write_private_json
from fedlearn.core.serialization import WireError, read_fields
from fedlearn.errors import FedlearnError, did_you_mean, require

PERSONS_FILE = "persons.json"
COORDINATOR_NAME = "coordinator"  # name of the coordinator's own process in the audit log
MAX_TOKEN_BYTES = 512


class PersonsError(FedlearnError):
    """Report a list of persons that cannot be read, or a name that is unknown or taken."""


class Role(StrEnum):
    """The rights of a person. Each role has all rights of the roles below it."""

    VIEWER = "viewer"  # sees nodes, runs, their output and the history
    SUBMITTER = "submitter"  # also starts runs; stops, resumes and fetches the runs of this person
    ADMIN = "admin"  # also stops, resumes and fetches the runs of all persons
    COORDINATOR = "coordinator"  # only the process of the coordinator: also admits nodes

    def includes(self, other: Role) -> bool:
        """Return whether this role has all rights of another role."""
        order = [*Role]
        return order.index(self) >= order.index(other)


ROLES = (Role.VIEWER, Role.SUBMITTER, Role.ADMIN)  # roles that a person can have


@dataclass(frozen=True, kw_only=True)
class Person:
    """A person who may call the coordinator.

    Attributes:
        name: name, as in the audit log.
        role: rights of the person.
        token_sha256: SHA-256 digest of the token, in hexadecimal digits.
        added: time at which the person was added, UTC, in ISO 8601.
        revoked: time at which the token was revoked; empty if it is valid.
    """

    name: str
    role: Role
    token_sha256: str
    added: str = ""
    revoked: str = ""


class Persons:
    """The persons in a file. Changes of the file take effect at the next call.

    Args:
        path: path of ``persons.json``.
        local_digest: SHA-256 digest of the token of the coordinator's own process; empty if it has none.
    """

    def __init__(self, path: Path, local_digest: str = "") -> None:
        self.path = path
        self._local = [Person(name=COORDINATOR_NAME, role=Role.COORDINATOR, token_sha256=local_digest)]
        self._read: tuple[Person, ...] = ()
        self._version: object = None

    def authenticate(self, token: bytes) -> Person | None:
        """Return the person with a token; None if no valid person has it.

        All digests are compared, each in constant time. So the duration says nothing about a token or a person. If the
        file is missing or damaged, no person is accepted.
        """
        digest, found = token_digest(token[:MAX_TOKEN_BYTES]), None
        for person in (*self._current(), *self._local):
            if hmac.compare_digest(person.token_sha256, digest) and not person.revoked:
                found = person
        return found

    def find(self, headers: Mapping[str, str]) -> Person | None:
        """Return the person whose token is in the headers of a request (``authorization: Bearer TOKEN``)."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        return self.authenticate(token.strip().encode()) if kind.lower() == "bearer" else None

    def _current(self) -> tuple[Person, ...]:
        try:
            status = self.path.stat()
            version = (status.st_mtime_ns, status.st_size, status.st_ino)
            if version != self._version:
                self._read, self._version = tuple(read_persons(self.path).values()), version
        except (OSError, PersonsError):
            self._read, self._version = (), None
        return self._read


def token_digest(token: bytes) -> str:
    """Return the SHA-256 digest of a token in hexadecimal digits."""
    return hashlib.sha256(token).hexdigest()


def new_token() -> str:
    """Return a random token of 256 bits."""
    return secrets.token_urlsafe(32)


def read_persons(path: Path) -> dict[str, Person]:
    """Return the persons in a file by name; no persons if there is no file.

    Raises:
        PersonsError: The file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"persons": []}
        persons = [_person(entry) for entry in content["persons"]]
    except (OSError, ValueError, KeyError, TypeError, WireError) as error:
        raise PersonsError(f"{path} cannot be read: {error}\n  advice    restore a backup of this file") from error
    if len({person.name for person in persons}) < len(persons):
        raise PersonsError(f"{path} has a name twice\n  advice    restore a backup of this file")
    return {person.name: person for person in persons}


def may_submit(path: Path, name: str) -> bool:
    """Return whether a person may start runs at this moment; False after a revocation, and without a readable file."""
    if name == COORDINATOR_NAME:
        return True
    try:
        person = read_persons(path).get(name)
    except PersonsError:
        return False
    return person is not None and not person.revoked and person.role.includes(Role.SUBMITTER)


def add_person(path: Path, name: str, role: str) -> str:
    """Add a person to a file, and return the token, which is stored nowhere else.

    Raises:
        PersonsError: The name is or was in use; the audit log must not mix two persons.
        SettingError: The name or the role is invalid.
    """
    is_valid = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", name) is not None and name != COORDINATOR_NAME
    require(is_valid, "NAME", repr(name)[:80], "up to 64 letters, digits, - _ and .", "another name")
    known = [str(each) for each in ROLES]
    fix = f"--role {did_you_mean(role, known) or Role.SUBMITTER}"
    require(role in known, "--role", role, f"one of {', '.join(known)}", fix)
    with _locked(path):
        persons = read_persons(path)
        if name in persons:
            state, expected = "was revoked" if persons[name].revoked else "exists", "a name that was never used"
            raise PersonsError(f"person {name} {state}\n  expected  {expected}\n  advice    choose another name")
        token = new_token()
        person = Person(name=name, role=Role(role), token_sha256=token_digest(token.encode()), added=_now())
        _write(path, {**persons, name: person})
    return token


def revoke_person(path: Path, name: str) -> None:
    """Revoke the token of a person; a running coordinator refuses it at once.

    Raises:
        PersonsError: No person with a valid token has this name.
    """
    with _locked(path):
        persons = read_persons(path)
        valid = [person.name for person in persons.values() if not person.revoked]
        if name not in valid:
            raise PersonsError(f"{name} has no valid token\n  expected  one of {', '.join(valid) or 'none'}")
        _write(path, {**persons, name: replace(persons[name], revoked=_now())})


def _locked(path: Path) -> FileLock:
    """Return a lock of a file of persons. Without it, two commands at a time could undo a revocation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f".{path.name}.lock"), mode=0o600)


def _write(path: Path, persons: Mapping[str, Person]) -> None:
    write_private_json(path, {"persons": [asdict(person) for person in persons.values()]})


def _person(entry: Any) -> Person:
    fields = read_fields(entry, name=str, role=str, token_sha256=str, added=str, revoked=str)
    if fields["role"] not in ROLES or not re.fullmatch(r"[0-9a-f]{64}", fields["token_sha256"]):
        raise ValueError("a role or a digest is invalid")
    return Person(**{**fields, "role": Role(fields["role"])})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
