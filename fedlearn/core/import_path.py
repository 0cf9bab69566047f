"""Set the import path: the folder of this installation first, the user's working folder last."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from fedlearn.errors import FedlearnError

PACKAGES = ("fedlearn", "strategies", "simulations")
WORKING_FOLDER_ENV = "FEDLEARN_WORKING_FOLDER"
ROOT = Path(__file__).resolve().parents[2]  # folder of the packages: site-packages, or a checkout


class ShadowedPackage(FedlearnError):
    """Another package has the name of a package of fedlearn, and precedes it on the import path."""


def search_working_folder_last() -> None:
    """Add the user's working folder to the import path, after all installed packages.

    The environment variable ``FEDLEARN_WORKING_FOLDER`` sets this folder for processes that start in another folder.
    """
    for folder in (str(ROOT), os.environ.get(WORKING_FOLDER_ENV) or os.getcwd()):
        if folder not in sys.path:
            sys.path.append(folder)


def is_working_folder_last() -> bool:
    """Return whether the working folder is on the import path, after the installed packages."""
    folder, installed = os.getcwd(), str(ROOT)
    return folder in sys.path and installed in sys.path and sys.path.index(folder) > sys.path.index(installed)


def require_not_shadowed(package: str) -> None:
    """Raise an error unless Python imports a package of fedlearn from this installation.

    Args:
        package: name of a top-level package; packages of others are not checked.

    Raises:
        ShadowedPackage: The package is in another folder; the message names both folders.
    """
    if package not in PACKAGES:
        return
    spec, expected = find_spec(package), ROOT / package
    places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
    if [Path(place).resolve() for place in places] != [expected]:
        # the command fedlearn searches the working folder last
        raise ShadowedPackage(
            f"the package {package} is {', '.join(places) or 'missing'}, which is not a part of fedlearn\n"
            f"  expected  {expected}\n"
            "  advice    another name for that package, or the command fedlearn"
        )


def shadowing_folder(package: str) -> Path | None:
    """Return the file or folder in the working folder that has the name of a package of fedlearn, or None."""
    if package not in PACKAGES or Path.cwd() == ROOT:
        return None
    return next((path for path in (Path.cwd() / package, Path.cwd() / f"{package}.py") if path.exists()), None)
