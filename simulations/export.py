"""``python -m simulations.export RUN format=onnx``: the model that a run has trained, for use elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.runner.compose import UsageError
from fedlearn.runner.exit_codes import exit_code
from simulations.analysis.export import _told


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says: 0 done, 2 for a folder without a model or a bad setting."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.export",
        description="Writes the model that a run has trained, for use elsewhere.",
        epilog="settings: format=safetensors|torch|onnx, out=FILE",
    )
    parser.add_argument("run", type=Path, help="the folder that the run saved")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="e.g. format=onnx")
    args = parser.parse_args(argv)
    return exit_code(lambda: _told(args))


def _pair(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    if name not in ("format", "out") or not value:
        raise UsageError(f"{word} cannot be read\n  expected  format=... or out=...\n  try       format=onnx")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
