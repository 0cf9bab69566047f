"""Save checkpoints: the newest rounds, and the best round by the selection metric."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.run_history import best_metrics
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core import checkpoint
from fedlearn.core.arrays import as_numpy
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.metrics import higher_is_better
from fedlearn.core.records import ClientId, Round, ServerState, State
from fedlearn.core.tensor_bytes import tensor_parts
from fedlearn.errors import is_count, require

LARGE_BYTES = 16 * 2**20  # a smaller checkpoint takes milliseconds
MAX_WAIT_SECONDS = 60.0  # after an error or Ctrl-C
MAX_OLD_SHARE = 2.0  # states in the files, per current state
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

    A checkpoint has only the client states that changed. In a simulation, a thread writes a large checkpoint while the
    next round runs; an error then ends the run one round later. In a deployment, no round starts before the checkpoint
    is on disk.
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
        self._stored = StoredClientStates()
        self._writing: BackgroundCall | None = None

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
        self._wait()
        if self._last is not None:
            self._write_parameters(self._last)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, for at most `MAX_WAIT_SECONDS`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.wait(MAX_WAIT_SECONDS)

    def _write_parameters(self, state: ServerState) -> None:
        assert self._run is not None
        assert self._run.layout is not None
        path = self._run.folder / MODEL_FOLDER
        path.mkdir(parents=True, exist_ok=True)
        tensors = self._run.layout.unpack(as_numpy(state.params_D))
        metadata = {"round": str(state.round), "layout": self._run.layout.digest}
        write_atomically(path / PARAMETERS_FILE, tensor_parts(tensors, metadata))

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
        self._wait()
        best = [self._best[1]] if self._best else []
        states = dict(run.client_states())
        unchanged = self._stored.unchanged(states)
        folder = run.folder / CHECKPOINT_FOLDER
        save = partial(checkpoint.save, folder, state, states, layout=run.layout, keep=self.keep, keep_rounds=best)
        if run.deployed or _num_bytes(state, states, unchanged) < LARGE_BYTES:
            save(unchanged=unchanged)
        else:
            self._writing = BackgroundCall(partial(save, unchanged=unchanged))
        self._stored.record(states, unchanged, state.round)
        self._saved_round = state.round

    def _wait(self) -> None:
        """Wait for the checkpoint that is being written, and raise its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.wait()


class BackgroundCall:
    """Call a function in a thread, which does not keep the program alive."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the end of the call, and raise its error."""
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error


def _num_bytes(state: ServerState, states: Mapping[ClientId, State], unchanged: Mapping[ClientId, int]) -> int:
    """Return the approximate size of a checkpoint."""
    changed = len(states) - len(unchanged)
    first = next(iter(states.values()), {})
    arrays = [state.params_D, *state.server.values()]
    return sum(array.nbytes for array in arrays) + changed * sum(array.nbytes for array in first.values())


class StoredClientStates:
    """Remember which file has the state of each client.

    It compares objects, not values: engines replace the state of a client, and never change it in place.
    """

    def __init__(self) -> None:
        self._states: dict[ClientId, State] = {}
        self._files: dict[ClientId, int] = {}
        self._rows: Counter[int] = Counter()  # round of a file -> number of states in it

    def unchanged(self, states: Mapping[ClientId, State]) -> dict[ClientId, int]:
        """Return client -> round of the file with its state, for each client whose state did not change.

        If the files contain more old states than current states, it returns nothing. The next file then has all states.
        """
        same = {client: self._files[client] for client, each in states.items() if self._states.get(client) is each}
        rows = sum(self._rows[round] for round in set(same.values()))
        return same if rows <= MAX_OLD_SHARE * len(states) else {}

    def record(self, states: Mapping[ClientId, State], unchanged: Mapping[ClientId, int], round: int) -> None:
        """Record that the file of a round has the states of all other clients."""
        self._states = dict(states)
        self._files = {client: unchanged.get(client, round) for client in states}
        self._rows[round] = len(states) - len(unchanged)
