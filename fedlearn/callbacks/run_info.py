"""What onlookers are told: the run before it starts, each round, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.callbacks.run_history import History
from fedlearn.core.federated_data import Task
from fedlearn.core.metrics import main_metric
from fedlearn.core.records import ClientId


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known before the first round, in the words that the header shows.

    Args:
        scenario: its name.
        task: ``binary``, ``multiclass`` or ``regression``.
        source: what the data are and where they came from; may be empty.
        metric: to lead with; empty takes the task's.
        num_clients: size of the population.
        client_names: what to call clients; the id where absent.
        examples_per_client: the smallest and the largest number of training examples at a client, or None if not counted.
        model: e.g. ``mlp 13-32-1``.
        num_parameters: D.
        bytes_per_update: what one client sends a round (of a codec: about); four bytes a parameter where it is None.
        strategy: its name.
        strategy_settings: its settings in few words, e.g. ``mu 0.1``; may be empty.
        cohort: e.g. ``all 4 of 4 clients a round``.
        privacy: the facts of the protection, see `fedlearn.core.privacy_guarantee.PrivacyGuarantee`; empty for none.
        poisoning: which clients attack and how; empty where none does.
        compress: the codec that writes updates and its settings; empty for none.
        engine: its name, e.g. ``vector``.
        system: the model of clients' speed, in few words; empty for none.
        machine: what it runs on and how, e.g. ``torch · cpu, 2 cores · map, 4 at a time in 7.5 KiB``.
        framework: ``torch``, ``jax`` or ``numpy``.
        seed: of the run.
        rounds: the last round planned.
        folder: where the run leaves its files.
        start_round: rounds that were done before, > 0 in a resumed run.
        history: the lines of those rounds, see `fedlearn.callbacks.run_history.truncate_history`.
        rerun_command: the command that repeats this run.
    """

    scenario: str
    task: Task
    num_clients: int
    model: str
    num_parameters: int
    strategy: str
    cohort: str
    engine: str
    framework: str
    seed: int
    rounds: int
    folder: Path
    metric: str = ""
    machine: str = ""
    source: str = ""
    client_names: Mapping[ClientId, str] = field(default_factory=dict)
    examples_per_client: tuple[int, int] | None = None
    bytes_per_update: int | None = None
    strategy_settings: str = ""
    system: str = ""
    privacy: Mapping[str, Any] = field(default_factory=dict)
    poisoning: str = ""
    compress: str = ""
    start_round: int = 0
    history: History = ()
    rerun_command: str = ""

    @property
    def main_metric(self) -> str:
        """The metric to lead with."""
        return self.metric or main_metric(self.task)

    def name(self, client: ClientId) -> str:
        """What to call a client."""
        return self.client_names.get(client, str(client))
