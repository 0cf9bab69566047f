"""Check the model of an experiment before its first round, and notice parameters that do not train.

Noise moves untrained parameters too, so loss and epsilon of a private run can look right.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import Layout
from fedlearn.core.model_report import ModelReport, ModelWarning
from fedlearn.core.records import Array, Examples, ServerState
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.example_sensitivity import untrained_leaves
from fedlearn.trainers.contract import check_data, list_names

NUM_EXAMPLES = 4  # examples of the gradient check; one step on them takes a small part of a round
NUM_ROUNDS = 2  # in LoRA with one local step, the first factor moves in round 2 only
log = logging.getLogger(__name__)


def check_scenario(scenario: Scenario) -> ModelReport:
    """Check the model of a scenario on examples of its first client.

    Raises:
        SettingError: The model or its loss does not fit the data. The error names the wrong argument.
    """
    preprocessing = scenario.preprocessing
    classes = preprocessing.target.classes if preprocessing else ()
    return check_data(scenario.trainer, scenario.data, num_classes=len(classes) or None)


@contextmanager
def reported_warnings() -> Iterator[None]:
    """Write each warning about the model to the log and to the terminal, once."""
    written: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", ModelWarning)
        show = warnings.showwarning

        def write(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            if not issubclass(category, ModelWarning):
                show(message, category, *args, **kwargs)
            elif str(message) not in written:
                written.add(str(message))
                write_warning(str(message))

        warnings.showwarning = write
        yield


def write_warning(text: str) -> None:
    """Write a warning to the log and to the terminal."""
    log.warning(text)
    sys.stderr.write(f" warning   {text}\n")


def with_gradient_warning(strategy: Strategy, trainer: Trainer, examples: Examples) -> Strategy:
    """Return a strategy with DP-SGD, with a warning about parameters whose clipped gradient is zero.

    Args:
        strategy: strategy with a privacy guarantee.
        trainer: trainer with DP-SGD.
        examples: examples of a client, at least one.

    Raises:
        SettingError: no parameter has a gradient, so the run would train nothing but noise.
    """
    guarantee, few = strategy.privacy_guarantee, Examples(examples.x[:NUM_EXAMPLES], examples.y[:NUM_EXAMPLES])
    names = untrained_leaves(trainer, few, private=True)
    if not names or guarantee is None:
        return strategy
    expected = "a model with trainable parameters: with DP-SGD, no parameter has a gradient"
    trains = len(names) < len(trainer.layout.trainable.leaves)
    require(trains, "model", f"one whose parameters ({list_names(names)}) train nothing", expected, "privacy=central")
    text = f"DP-SGD adds only noise to these parameters, because their gradient is zero: {list_names(names)}"
    return replace(strategy, privacy_guarantee=replace(guarantee, warnings=(*guarantee.warnings, text)))


class MovementCheck:
    """Warn after the first rounds of a run about parameters that did not move.

    Args:
        strategy: strategy of the run. With noise, each parameter moves, so the check does nothing.
        layout: layout of the model.
        state: server state before the first round; the check does nothing for a resumed run.
        rounds: number of planned rounds.
        known: names of parameters without a gradient, about which the run has already warned.
    """

    def __init__(
        self,
        strategy: Strategy,
        layout: Layout,
        state: ServerState,
        rounds: int,
        *,
        known: tuple[str, ...] = (),
    ) -> None:
        has_noise = strategy.privacy_guarantee is not None
        self._layout = layout
        self._start = None if has_noise or state.round else _digests(layout, state.params_D)
        self._shared = {leaf.name for leaf in strategy.shared_layout(layout).leaves} - set(known)
        self._due = min(NUM_ROUNDS, rounds)

    def __call__(self, state: ServerState) -> None:
        """Write a warning to the log and to the terminal, once."""
        if self._start is None or state.round < self._due:
            return
        start, now, self._start = self._start, _digests(self._layout, state.params_D), None
        trained = [leaf.name for leaf in self._layout.trainable.leaves if leaf.name in self._shared]
        if names := [name for name in trained if start[name] == now[name]]:
            write_warning(f"these parameters did not move in {self._due} rounds: {list_names(names)}")


def _digests(layout: Layout, params_D: Array) -> dict[str, bytes]:
    """Return a digest of each leaf; a copy of a large model would take its memory for the first rounds."""
    leaves = layout.unpack(as_numpy(params_D)).items()
    return {
        name: hashlib.blake2b(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data).digest()
        for name, leaf in leaves
    }
