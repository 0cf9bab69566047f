"""Save checkpoints: the newest rounds, and the best round by the selection metric."""

from __future__ import annotations

import math

from safetensors.numpy import save as to_safetensors

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.run_history import best_metrics
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core import checkpoint
from fedlearn.core.arrays import as_numpy
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.metrics import higher_is_better
from fedlearn.core.records import Round, ServerState
from fedlearn.errors import is_count, require

CHECKPOINT_FOLDER, MODEL_FOLDER = "checkpoints", "model"
PARAMETERS_FILE = "parameters.safetensors"


class Checkpoints(Callback):
    """Save the state of the run in ``checkpoints/`` of the run folder.

    A round is saved if its number is a multiple of ``every``, if it is the best so far, or if it is the last. The
    newest ``keep`` checkpoints and the best checkpoint remain. The best round has the best value of
    `RunInfo.selection_metric` in the history. The earlier round wins a tie, and a value that is not finite never wins.

    Args:
        every: rounds between checkpoints, >= 1; default 1.
        keep: number of the newest checkpoints that remain, >= 1; default 2.

    *Guarantees*: the history alone determines the best round, so a resumed run keeps the same checkpoint. No other file
    marks the best round, because it could disagree with the history after a crash.
    """

    ends_run_on_error = True

    def __init__(self, *, every: int = 1, keep: int = 2) -> None:
        require(is_count(every), "every", every, "a whole number >= 1", "every=1")
        require(is_count(keep), "keep", keep, "a whole number >= 1", "keep=2")
        self.every, self.keep = every, keep
        self._run: RunInfo | None = None
        self._best: tuple[float, int] | None = None  # value and round
        self._last: ServerState | None = None
        self._saved_round = 0

    def on_start(self, run: RunInfo) -> None:
        """Find the best round in the history."""
        best = best_metrics(run.history).get(run.selection_metric)
        self._run, self._saved_round = run, run.start_round
        self._best = (best["value"], best["round"]) if best else None

    def on_round(self, round: Round) -> None:
        """Save the round if it is due, or the best so far."""
        self._last = round.state
        if self._is_best(round) or round.number % self.every == 0:
            self._save(round.state)

    def on_end(self, summary: object) -> None:
        """Save the last round, unless it is already saved. Write its parameters into ``model/``."""
        if self._last is not None and self._saved_round < self._last.round:
            self._save(self._last)
        if self._last is not None:
            self._write_parameters(self._last)

    def _write_parameters(self, state: ServerState) -> None:
        assert self._run is not None
        assert self._run.layout is not None
        path = self._run.folder / MODEL_FOLDER
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: array.copy() for name, array in self._run.layout.unpack(as_numpy(state.params_D)).items()}
        metadata = {"round": str(state.round), "layout": self._run.layout.digest}
        write_atomically(path / PARAMETERS_FILE, to_safetensors(tensors, metadata=metadata))

    def _is_best(self, round: Round) -> bool:
        assert self._run is not None
        metric = self._run.selection_metric
        value = round.evaluation.pooled.get(metric, math.nan) if round.evaluation else math.nan
        sign = 1 if higher_is_better(metric, self._run.task.lower_is_better) else -1
        if not math.isfinite(value) or (self._best and sign * value <= sign * self._best[0]):
            return False
        self._best = (float(value), round.number)
        return True

    def _save(self, state: ServerState) -> None:
        run = self._run
        assert run is not None
        assert run.layout is not None
        best = [self._best[1]] if self._best else []
        folder = run.folder / CHECKPOINT_FOLDER
        checkpoint.save(folder, state, run.client_states(), layout=run.layout, keep=self.keep, keep_rounds=best)
        self._saved_round = state.round
