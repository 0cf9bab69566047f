"""Write the metrics, settings and figures of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.tracking import round_numbers, settings_as_typed
from fedlearn.core.records import Round
from fedlearn.errors import MissingExtra

__all__ = ["TensorBoard"]

FOLDER = "tensorboard"  # in the run folder
PNG_SIZE = slice(16, 24)  # bytes of a PNG file with width and height
RGBA = 4  # channels


class TensorBoard(Callback):
    """Write numbers, settings and figures to ``tensorboard/`` of the run folder.

    ``metrics.jsonl`` has the same numbers. The page HParams of TensorBoard compares the settings of runs. A resumed
    run continues the same curves: TensorBoard drops rounds after the checkpoint. In a sweep, each job writes to its run
    folder, whose name has the settings that vary; ``tensorboard --logdir multirun`` shows all. In a deployment, the
    coordinator writes.

    Raises:
        MissingExtra: tensorboardX is not installed.
    """

    reads_run_files = True

    def __init__(self) -> None:
        if find_spec("tensorboardX") is None:
            raise MissingExtra("callbacks=[tensorboard]", "tensorboard")
        self._writer: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Open the event file, and write the settings."""
        from tensorboardX import SummaryWriter

        self._run = run
        self._writer = SummaryWriter(
            # a new file for each part of a run, also for two parts in one second
            str(run.folder / FOLDER),
            purge_step=run.start_round + 1,
            filename_suffix=f".{run.start_round}",
        )
        if not run.start_round:
            lines = [f"    {name}: {value}" for name, value in settings_as_typed(run.config).items()]
            self._writer.add_text("settings", "\n".join(lines), 0)

    def on_round(self, round: Round) -> None:
        """Write the numbers of one round."""
        for name, value in round_numbers(round).items():
            if name != "round":
                self._writer.add_scalar(name, value, round.number)
        self._writer.flush()

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write figures, the place of the report, and the settings with the final metrics for the page HParams."""
        step, folder = summary["rounds"], self._run.folder
        if summary["status"] != "stopped":
            for path in sorted((folder / "figures").glob("*.png")):
                self._writer.file_writer.add_summary(_image(f"figures/{path.stem}", path), step)
            if (folder / "report.html").exists():
                self._writer.add_text("report", f"[report.html]({(folder / 'report.html').resolve().as_uri()})", step)
        self._add_settings(summary)
        self._writer.flush()

    def _add_settings(self, summary: Mapping[str, Any]) -> None:
        from tensorboardX.summary import hparams

        values = {name: _plain(value) for name, value in settings_as_typed(self._run.config).items()}
        final = {f"test/{name}": value for name, value in (summary.get("final") or {}).items() if value is not None}
        for part in hparams(values, final):
            self._writer.file_writer.add_summary(part, 0)

    def close(self) -> None:
        """Close the event file, if it is open."""
        if self._writer is not None:
            self._writer.close()


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _image(name: str, path: Path) -> Any:
    """Return a PNG file as a summary of TensorBoard, without decoding it."""
    from tensorboardX.proto.summary_pb2 import Summary

    content = path.read_bytes()
    size = content[PNG_SIZE]
    width, height = int.from_bytes(size[:4], "big"), int.from_bytes(size[4:], "big")
    image = Summary.Image(encoded_image_string=content, width=width, height=height, colorspace=RGBA)
    return Summary(value=[Summary.Value(tag=name, image=image)])
