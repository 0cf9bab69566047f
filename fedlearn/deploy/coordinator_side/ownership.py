"""Find the owner of a run folder, and refuse other persons. Admins may use all folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fedlearn.deploy.coordinator_side.app_bundle import PERSON_KEY
from fedlearn.deploy.coordinator_side.environment import PERSONS_ENV
from fedlearn.deploy.persons import COORDINATOR_NAME, Role, may_submit, read_persons
from fedlearn.runner.run_folder import RunFolderError

DEPLOYMENT_FILE = "deployment.json"  # in the run folder: name, person and commands of the run


def require_owner(path: Path, person: str | None) -> None:
    """Refuse a path in the run folder of another person, unless the person is an admin.

    Args:
        path: a run folder, or a file in it; links are resolved.
        person: name of the person; None: a caller within this process.

    Raises:
        RunFolderError: The folder belongs to another person, or its owner is unknown.
    """
    if person is None or is_admin(person):
        return
    if owner_of(path) != person:
        expected = f"a run of {person}, or a request of an admin"
        fix = "python -m fedlearn.deploy.runs"
        raise RunFolderError(f"{path.name} is a run of another person\n  expected  {expected}\n  try       {fix}")


def require_submitter(person: str) -> None:
    """Refuse a run of a person who may not start runs any more, e.g. because the token was revoked meanwhile.

    Args:
        person: name of the person; empty: a caller within this process.

    Raises:
        RunFolderError: The person may not start runs.
    """
    if person and not may_submit(Path(os.environ[PERSONS_ENV]), person):
        expected, fix = "a submitter or an admin with a valid token", "a request to an admin"
        raise RunFolderError(f"{person} may not start runs any more\n  expected  {expected}\n  advice    {fix}")


def require_outside_runs(folder: Path, runs: Path) -> None:
    """Refuse a new run folder inside the folder of another run.

    Raises:
        RunFolderError: A parent of the folder is a run folder.
    """
    for parent in folder.resolve().parents:
        if parent == runs.resolve():
            return
        if (parent / DEPLOYMENT_FILE).exists():
            fix = f"hydra.run.dir={folder.name}"
            raise RunFolderError(
                f"the folder {folder.name} is inside the folder of another run\n"
                f"  expected  a folder outside other runs\n  try       {fix}"
            )


def owner_of(path: Path) -> str | None:
    """Return the name of the person who started the run of a folder or file; None if it is unknown."""
    path = path.resolve()
    for folder in (path, *path.parents):
        file = folder / DEPLOYMENT_FILE
        if file.is_file():
            try:
                return str(json.loads(file.read_text(encoding="utf-8"))[PERSON_KEY])
            except (OSError, ValueError, KeyError, TypeError):
                return None
    return None


def is_admin(name: str) -> bool:
    """Return whether a person has the rights of an admin at this moment."""
    if name == COORDINATOR_NAME:
        return True
    person = read_persons(Path(os.environ[PERSONS_ENV])).get(name)
    return person is not None and not person.revoked and person.role.includes(Role.ADMIN)
