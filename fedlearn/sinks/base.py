"""What onlookers are told: the run before it starts, each round, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedlearn.data.federated import Task
from fedlearn.history import History
from fedlearn.metrics import main_metric
from fedlearn.records import ClientId, Round


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What is known before the first round, in the words that the header shows.

    Args:
        scenario: its name.
        task: ``binary``, ``multiclass`` or ``regression``.
        source: what the data are and where they came from; may be empty.
        metric: to lead with; empty takes the task's.
        num_clients: size of the population.
        names: what to call clients; the id where absent.
        examples: the smallest and the largest number of training examples at a client, or None if not counted.
        model: e.g. ``mlp 13-32-1``.
        num_parameters: D.
        bytes_per_update: what one client sends a round (of a codec: about); four bytes a parameter where it is None.
        strategy: its name.
        settings: its settings in few words, e.g. ``mu 0.1``; may be empty.
        cohort: e.g. ``all 4 of 4 clients a round``.
        privacy: the facts of the protection, see `fedlearn.privacy.protection.Protection`; empty for none.
        attack: which clients attack and how; empty where none does.
        compress: the codec that writes updates and its settings; empty for none.
        engine: its name, e.g. ``vector``.
        system: the model of clients' speed, in few words; empty for none.
        machine: what it runs on and how, e.g. ``torch · cpu, 2 cores · map, 4 at a time in 7.5 KiB``.
        framework: ``torch``, ``jax`` or ``numpy``.
        seed: of the run.
        rounds: the last round planned.
        folder: where the run leaves its files.
        start_round: rounds that were done before, > 0 in a resumed run.
        history: the lines of those rounds, see `fedlearn.history.resume_from`.
        again: the command that repeats this run.
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
    names: Mapping[ClientId, str] = field(default_factory=dict)
    examples: tuple[int, int] | None = None
    bytes_per_update: int | None = None
    settings: str = ""
    system: str = ""
    privacy: Mapping[str, Any] = field(default_factory=dict)
    attack: str = ""
    compress: str = ""
    start_round: int = 0
    history: History = ()
    again: str = ""

    @property
    def main(self) -> str:
        """The metric to lead with."""
        return self.metric or main_metric(self.task)

    def name(self, client: ClientId) -> str:
        """What to call a client."""
        return self.names.get(client, str(client))


class Sink(Protocol):
    """Looks on and changes nothing: ``start`` once, ``round`` after each, ``finish`` at the end, ``close`` always."""

    def start(self, run: RunInfo) -> None:
        """Before the first round."""
        ...

    def round(self, round: Round) -> None:
        """After each round, before its checkpoint is written, so that no checkpoint is ahead of the files."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """At the end, with what `fedlearn.history.summarise` gives."""
        ...

    def close(self) -> None:
        """Let go of files and the terminal; also after an error, and harmless when called twice."""
        ...
