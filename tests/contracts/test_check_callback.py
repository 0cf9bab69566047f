"""`check_callback` accepts the callbacks of this repository, and rejects broken ones."""

from __future__ import annotations

import os
import random
import sys
import threading
import time

import numpy as np
import pytest

from fedlearn.callbacks import Callback
from fedlearn.callbacks.checkpoints import Checkpoints
from fedlearn.callbacks.console import Console
from fedlearn.callbacks.early_stopping import EarlyStopping
from fedlearn.callbacks.report import Report
from fedlearn.callbacks.run_files import RunFiles
from fedlearn.callbacks.run_history import metric_values
from fedlearn.testing import callbacks as kit
from fedlearn.testing import check_callback

BUILT_IN = {
    "base class": Callback,
    "console": Console,
    "console on a terminal": lambda: Console(terminal=True),
    "files": RunFiles,
    "checkpoints": Checkpoints,
    "rare checkpoints": lambda: Checkpoints(every=4, keep=1),
    "report": Report,
    "no report": lambda: Report(enabled=False),
    "no early stopping": EarlyStopping,
    "early stopping": lambda: EarlyStopping(metric="loss", patience=1, min_delta=0.5),
    "patient early stopping": lambda: EarlyStopping(metric="rmse", patience=2, min_delta=0.5),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_callbacks_pass(name):
    check_callback(BUILT_IN[name])


def test_an_instance_that_cannot_be_copied_is_refused_with_the_other_form():
    class Connects(Callback):
        def __init__(self):
            self.lock = threading.Lock()

    with pytest.raises(AssertionError, match=r"check_callback\(lambda: Connects"):
        check_callback(Connects())
    check_callback(Connects)


def test_an_instance_is_copied():
    check_callback(Console())
    seen = EarlyStopping(metric="loss", patience=1)
    check_callback(seen)
    assert not seen._history


class ChangesParameters(Callback):
    def on_round(self, round):
        round.state.params_D[:] = 0


class ChangesParametersBehindTheView(Callback):
    def on_round(self, round):
        base = round.state.params_D.base
        base[:] = 0


class ChangesMetrics(Callback):
    def on_round(self, round):
        round.metrics["loss"] = 0.0


class ChangesConfig(Callback):
    def on_start(self, run):
        run.config["seed"] = 2


class ChangesSummary(Callback):
    def on_end(self, summary):
        del summary["status"]


class DrawsFromNumPy(Callback):
    def on_round(self, round):
        np.random.rand()  # noqa: NPY002


class DrawsFromPython(Callback):
    def on_start(self, run):
        random.random()


class SeedsTorch(Callback):
    def on_round(self, round):
        if "torch" in sys.modules:
            sys.modules["torch"].manual_seed(round.number)
        else:
            random.seed(round.number)


class NeedsEvaluation(Callback):
    def on_round(self, round):
        self.loss = round.evaluation.pooled["loss"]


class NeedsDefinedMetrics(Callback):
    def on_round(self, round):
        if round.evaluation:
            int(1000 * round.evaluation.pooled["loss"])


class NeedsTerminal(Callback):
    def on_start(self, run):
        self.width = os.get_terminal_size().columns


class NeedsAnswer(Callback):
    def on_start(self, run):
        input("Continue? ")


class CountsAfterResume(Callback):
    """Ends the run after three rounds, by a count that is lost on resume."""

    count = 0

    def on_round(self, round):
        self.count += 1
        return "three rounds" if self.count == 3 else None


class ForgetsTheEnd(Callback):
    """Reads the history, but does not end a run that was killed after its last round."""

    def on_start(self, run):
        self.count = len(run.history)

    def on_round(self, round):
        self.count += 1
        return "three rounds" if self.count == 3 else None


class ReturnsNumber(Callback):
    def on_round(self, round):
        return sys.stdout.write(f"{round.number}\n")


class ReturnsTrue(Callback):
    def on_round(self, round):
        return round.number == 3


class FailsToCloseTwice(Callback):
    def on_start(self, run):
        self.file = run.file("losses.csv").open("w")

    def close(self):
        self.file.close()
        del self.file


class NeedsOneRound(Callback):
    def on_start(self, run):
        self.losses = []

    def on_round(self, round):
        self.losses.append(round.metrics["loss"])

    def on_end(self, summary):
        self.mean = sum(self.losses) / len(self.losses)


class NeedsSuccess(Callback):
    def on_end(self, summary):
        if summary["status"] != "done":
            raise RuntimeError("not done")


class Exits(Callback):
    def on_round(self, round):
        sys.exit(0)


class ChangesFolder(Callback):
    def on_start(self, run):
        os.chdir(run.folder)


class Hangs(Callback):
    def close(self):
        time.sleep(60)


FAULTS = {
    ChangesParameters: "on_round must not fail in round 1: ValueError",
    ChangesParametersBehindTheView: "on_round must not change",
    ChangesMetrics: "on_round must not change its argument",
    ChangesConfig: "on_start must not change its argument",
    ChangesSummary: "on_end must not change its argument",
    DrawsFromNumPy: "random state of NumPy",
    DrawsFromPython: "random state of Python",
    SeedsTorch: "random state of",
    NeedsEvaluation: "on_round must not fail in round 1",
    NeedsDefinedMetrics: "undefined metrics",
    NeedsTerminal: "on_start must not fail",
    NeedsAnswer: "on_start must not fail",
    CountsAfterResume: "must end after round 3",
    ForgetsTheEnd: "resume from round 3, the run must end after round 3",
    ReturnsNumber: "must return None or the reason",
    ReturnsTrue: "must return None or the reason",
    FailsToCloseTwice: "close must not fail",
    NeedsOneRound: "on_end must not fail",
    NeedsSuccess: "with status stopped",
    Exits: "SystemExit",
    ChangesFolder: "the working directory",
    Hangs: "close must not fail",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_and_named(fault, monkeypatch):
    if fault is Hangs:
        monkeypatch.setattr(kit, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.chdir(os.getcwd())
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_callback(fault)


def test_a_callback_that_ends_the_run_and_reads_the_history_passes():
    class TwoGoodEvaluations(Callback):
        def on_start(self, run):
            self.values = [value for _, value in metric_values(run.history, "loss")]
            return self.reason()

        def on_round(self, round):
            self.values += [round.evaluation.pooled["loss"]] if round.evaluation else []
            return self.reason()

        def reason(self):
            return "two evaluations" if len(self.values) >= 2 else None

    check_callback(TwoGoodEvaluations)


def test_another_object_is_no_callback():
    with pytest.raises(AssertionError, match="subclass"):
        check_callback(dict)
