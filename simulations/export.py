"""``python -m simulations.export RUN format=onnx``: export the model of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import DONE, command_parser, read_settings, run_command
from simulations.analysis.export import export

EXAMPLES = {"format": "onnx", "checkpoint": "best", "out": Path("model.onnx")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 2 for a folder without a model or a wrong setting."""
    parser = command_parser(
        "simulations.export",
        "Export the model of a run.",
        epilog="settings: format=safetensors|torch|onnx|adapter|merged, checkpoint=last|best|ROUND, out=PATH",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("settings", nargs="*", default=[], metavar="setting=value", help="e.g. format=onnx")
    parser.add_argument("--client", metavar="NAME", help="client of a personal model; global for the global model")
    parser.add_argument("--base", metavar="PATH", help="folder or name of the pretrained model of the run")
    return run_command(parser, export_model, argv)


def export_model(folder: Path, settings: Sequence[str], client: str | None = None, base: str | None = None) -> int:
    """Export with settings of the form ``setting=value``, print the path of the file, and return the exit code."""
    options = read_settings(settings, EXAMPLES)
    path = export(
        folder,
        options.get("format", "safetensors"),
        options.get("out"),
        checkpoint=options.get("checkpoint", "last"),
        client=client,
        base=base,
    )
    sys.stdout.write(f"{path}\n")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
