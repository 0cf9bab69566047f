"""Write the metrics of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.run_history import history_entry
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Round
from fedlearn.errors import MissingExtra

FOLDER = "tensorboard"  # in the run folder


class TensorBoard(Callback):
    """Write the numbers of ``metrics.jsonl`` and the settings to ``tensorboard/`` of the run folder.

    A resumed run continues the same curves: TensorBoard drops rounds after the checkpoint. In a sweep, each job writes
    to its run folder; ``tensorboard --logdir multirun`` shows all. In a deployment, the coordinator writes.

    Raises:
        MissingExtra: tensorboardX is not installed.
    """

    def __init__(self) -> None:
        if find_spec("tensorboardX") is None:
            raise MissingExtra("callbacks=[tensorboard]", "tensorboard")
        self._writer: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Open the event file, and write the settings."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(
            # a new file for each part of a run, also for two parts in one second
            str(run.folder / FOLDER),
            purge_step=run.start_round + 1,
            filename_suffix=f".{run.start_round}",
        )
        if not run.start_round:
            lines = [f"    {name}: {value}" for name, value in _leaves(run.config, "")]
            self._writer.add_text("settings", "\n".join(lines), 0)

    def on_round(self, round: Round) -> None:
        """Write the numbers of one round."""
        for name, value in _leaves(history_entry(round), ""):
            if name != "round" and isinstance(value, int | float) and not isinstance(value, bool):
                self._writer.add_scalar(name, value, round.number)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file, if it is open."""
        if self._writer is not None:
            self._writer.close()


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
