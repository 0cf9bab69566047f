"""``python -m simulations.watch FOLDER``: show the runs in a folder on a live page of this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import DONE, command_parser, run_command
from fedlearn.errors import DataError, MissingExtra

DEFAULT_PORT = 8765


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 after Ctrl-C, or 2 for a folder or port that cannot be used."""
    parser = command_parser(
        "simulations.watch", "Show the runs in a folder, with live curves, on a page that only this machine can open."
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("outputs"), metavar="FOLDER", help="default: outputs"
    )
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"port, default {DEFAULT_PORT}; 0 takes a free port"
    )
    return run_command(parser, watch, argv)


def watch(folder: Path, port: int) -> int:
    """Serve the page until Ctrl-C, and return the exit code.

    Raises:
        DataError: the folder is missing.
        FedlearnError: the port cannot be used, or the extra ``web`` is not installed.
    """
    if not folder.is_dir():
        expected = "a folder with run folders"
        raise DataError(f"{folder} is not a folder\n  expected  {expected}\n  try       fedlearn watch .")
    try:
        from fedlearn.web.app import build_app
    except ImportError as missing:
        raise MissingExtra("fedlearn watch", "web") from missing
    from fedlearn.web.security import accepted_hosts
    from fedlearn.web.server import LOOPBACK, Listener, listen, serve
    from fedlearn.web.sources import FolderSource

    socket = listen(LOOPBACK, port)
    port = socket.getsockname()[1]
    hosts = accepted_hosts(("localhost", LOOPBACK), port)
    app = build_app(FolderSource(folder), hosts=hosts, same_user=True)
    text = f"watching  {folder.resolve()}\npage      http://{LOOPBACK}:{port}   (Ctrl-C ends it)\n"
    try:
        serve([Listener(app=app, socket=socket)], lambda: _print(text))
    except KeyboardInterrupt:
        _print("stopped\n")
    return DONE


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
