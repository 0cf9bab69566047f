"""Find runs of a coordinator by name, and fetch their files. All bytes are checked before they are kept."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import httpx

from fedlearn.core.plain_text import plain_line
from fedlearn.core.serialization import WireError, read_fields
from fedlearn.deploy.connectivity import ConnectionProblem, explained_errors, read_key_file
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient, RunState
from fedlearn.deploy.coordinator_side.request_limits import API_PREFIX
from fedlearn.deploy.key_files import CA, TOKEN
from fedlearn.errors import FedlearnError, did_you_mean

TIMEOUT_S = 60.0  # seconds without a byte
MAX_LISTED_FILES = 10_000


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a run at the coordinator."""

    path: str
    size: int
    sha256: str


class RunClient:
    """A connection to the requests of `fedlearn.deploy.coordinator_side.run_api`.

    Args:
        address: address of the coordinator, ``host:port``.
        keys: folder with the root certificate and the token of a person.

    Raises:
        ConnectionProblem: A call of a method failed; the message has the cause and one thing to try.
    """

    def __init__(self, address: str, keys: Path) -> None:
        self.address = address
        try:
            context = ssl.create_default_context(cadata=read_key_file(keys / CA))
        except ssl.SSLError as error:
            raise ConnectionProblem(f"{keys / CA} is not a certificate: {error}") from error
        token = read_key_file(keys / TOKEN)
        url, headers = f"https://{address}{API_PREFIX}", {"authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=url, verify=context, headers=headers, timeout=TIMEOUT_S)

    def get(self, request: str, **query: str) -> Any:
        """Return the JSON answer to a request."""
        with explained_errors(self.address, ValueError):
            response = self._client.get(request, params=query)
            response.raise_for_status()
            return _printable(response.json())

    def files(self, folder: str) -> list[RemoteFile]:
        """Return the files of a run.

        Raises:
            FedlearnError: The answer names a path that leaves the run folder, or is malformed.
        """
        entries = self.get("files", folder=folder)
        try:
            if not isinstance(entries, list) or len(entries) > MAX_LISTED_FILES:
                raise WireError("the list of files is malformed or too long")
            files = [RemoteFile(**read_fields(entry, path=str, size=int, sha256=str)) for entry in entries]
        except WireError as error:
            raise FedlearnError(f"{self.address} sent no valid list of files: {error}") from error
        for file in files:
            _require_inside(file.path)
        return files

    def download(self, folder: str, file: RemoteFile, target: Path) -> None:
        """Write a file of a run to a new file; size and digest are checked, and no other file is touched.

        Raises:
            FedlearnError: The file exists, or its bytes differ from the list of files.
        """
        digest, size, draft = hashlib.sha256(), 0, target.with_name(f".{target.name}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        try:
            with explained_errors(self.address, ValueError), draft.open("xb") as out:
                query = {"folder": folder, "path": file.path}
                with self._client.stream("GET", "file", params=query) as response:
                    if response.is_error:
                        response.read()
                        response.raise_for_status()
                    for part in response.iter_bytes():
                        size += len(part)
                        if size > file.size:
                            break
                        digest.update(part)
                        out.write(part)
            if size != file.size or digest.hexdigest() != file.sha256:
                raise FedlearnError(f"{plain_line(file.path)} was changed in transit, or the run still writes it")
            if target.exists():
                raise FedlearnError(f"{target} exists\n  expected  a new folder\n  advice    choose another --to")
            draft.rename(target)
        finally:
            draft.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the connection to the coordinator."""
        self._client.close()


def find_run(runs: Sequence[RunState], text: str) -> RunState:
    """Return the newest run with a name, a number or a folder, or with the only name that starts with the text.

    Raises:
        FedlearnError: No run has it.
    """
    matching = [run for run in runs if text in (run.name, str(run.id), run.folder) and text]
    names = {run.name for run in runs if text and run.name.startswith(text)}
    matching = matching or [run for run in runs if len(names) == 1 and run.name in names]
    if matching:
        return matching[0]
    near = did_you_mean(text, [run.name for run in runs if run.name])
    hint = f"\n  did you mean {near}?" if near else ""
    expected = "the name, number or folder of a run"
    raise FedlearnError(
        f"no run is {plain_line(text)}{hint}\n  expected  {expected}\n  try       python -m fedlearn.deploy.runs"
    )


def list_runs(address: str, keys: Path) -> list[RunState]:
    """Return all runs of a coordinator, the newest first."""
    control = CoordinatorClient(address, keys)
    try:
        return control.run_states()
    finally:
        control.close()


def read_progress(client: RunClient, runs: Sequence[RunState]) -> Mapping[str, Mapping[str, Any]]:
    """Return the progress of the run of each folder; see `fedlearn.deploy.coordinator_side.run_files.Progress`."""
    folders = list(dict.fromkeys(run.folder for run in runs if run.folder))
    answer = client.get("runs", folder="\n".join(folders)) if folders else {}
    return {folder: values for folder, values in answer.items() if isinstance(values, dict)}


def _printable(value: Any) -> Any:
    """Return JSON values of the coordinator with printable texts only."""
    if isinstance(value, str):
        return plain_line(value, max_length=2000)
    if isinstance(value, dict):
        return {plain_line(str(key), max_length=2000): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


def _require_inside(path: str) -> None:
    """Refuse a path of the coordinator that leaves the folder of the run, on any system."""
    parts = (PurePosixPath(path), PureWindowsPath(path))
    is_safe = path.isprintable() and path and not any(p.is_absolute() or p.drive or ".." in p.parts for p in parts)
    if not is_safe or "\\" in path or ":" in path or any(part.startswith(".") for part in parts[0].parts):
        raise FedlearnError(f"the coordinator names an unsafe path: {plain_line(path)}\n  expected  a path in the run")
