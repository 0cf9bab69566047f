"""Imports from the folder of this installation, and from the user's working folder only after it."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from fedlearn.errors import FedlearnError

PACKAGES = ("fedlearn", "strategies", "simulations")
WORKING_FOLDER_ENV = "FEDLEARN_WORKING_FOLDER"
ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the packages: site-packages, or a checkout


class ShadowedPackage(FedlearnError):
    """Another package has the name of a package of fedlearn, and comes first on the import path."""


def search_working_folder_last() -> None:
    """Let the user's modules be imported from the working folder, after all installed packages.

    The environment variable ``FEDLEARN_WORKING_FOLDER`` names the folder for processes that start elsewhere.
    """
    for folder in (str(ROOT), os.environ.get(WORKING_FOLDER_ENV) or os.getcwd()):
        if folder not in sys.path:
            sys.path.append(folder)


def is_working_folder_last() -> bool:
    """Return whether this process imports from the working folder, but only after the installed packages."""
    folder, installed = os.getcwd(), str(ROOT)
    return folder in sys.path and installed in sys.path and sys.path.index(folder) > sys.path.index(installed)


def require_not_shadowed(package: str) -> None:
    """Raise unless Python imports a package of fedlearn from this installation.

    Args:
        package: name at the top level; names of other packages pass.

    Raises:
        ShadowedPackage: it comes from elsewhere; the message has both places.
    """
    if package not in PACKAGES:
        return
    spec, ours = find_spec(package), ROOT / package
    found = list(spec.submodule_search_locations or [spec.origin or ""]) if spec else []
    if [Path(place).resolve() for place in found] != [ours]:
        raise ShadowedPackage(
            f"the package {package} is {', '.join(found) or 'missing'}, which is not a part of fedlearn\n"
            f"  expected  {ours}\n"
            "  try       another name for it, or the command fedlearn, which searches the working folder last"
        )


def shadowing_folder(package: str) -> Path | None:
    """Return what has the name of a package of fedlearn in the user's working folder; None: nothing."""
    if package not in PACKAGES or Path.cwd() == ROOT:
        return None
    return next((path for path in (Path.cwd() / package, Path.cwd() / f"{package}.py") if path.exists()), None)
