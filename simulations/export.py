"""``python -m simulations.export RUN format=onnx``: export the model of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.runner.compose import UsageError
from fedlearn.runner.exit_codes import DONE, run_command
from simulations.analysis.export import export


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 for a folder without a model or a wrong setting."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.export",
        description="Exports the model of a run.",
        epilog="settings: format=safetensors|torch|onnx, out=FILE",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="e.g. format=onnx")
    return run_command(parser, export_model, argv)


def export_model(folder: Path, settings: Sequence[str]) -> int:
    """Export with ``setting=value`` words, and print the path of the file; return the exit code."""
    options = dict(map(parse_setting, settings))
    path = export(folder, options.get("format", "safetensors"), Path(options["out"]) if "out" in options else None)
    sys.stdout.write(f"{path}\n")
    return DONE


def parse_setting(word: str) -> tuple[str, str]:
    """Split ``format=...`` or ``out=...`` into name and value.

    Raises:
        UsageError: it is neither.
    """
    name, _, value = word.partition("=")
    if name not in ("format", "out") or not value:
        raise UsageError(f"{word} cannot be read\n  expected  format=... or out=...\n  try       format=onnx")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
