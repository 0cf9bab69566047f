"""Create the folders of persons in a folder with all keys, and list the persons."""

from __future__ import annotations

from pathlib import Path

from fedlearn.core.checkpoint import write_atomically
from fedlearn.deploy.key_files import CA, TOKEN, coordinator_part, read_key_bytes
from fedlearn.deploy.persons import PERSONS_FILE, add_person, read_persons
from fedlearn.deploy.processes import private_files

PERSONS = "persons"  # folder of the persons after the first one


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
    certificate, target = read_key_bytes(base / CA), folder / PERSONS / name
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
