"""Describe a run to its callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlearn.callbacks.run_history import History
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientId, State
from fedlearn.core.tasks import TaskField
from fedlearn.data.data_check.records import DataCheck
from fedlearn.errors import SettingError


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Description of a run before its first round.

    Args:
        scenario: name of the scenario.
        task: task of the scenario, with its metrics, or the name of a shipped task. The attribute is a `Task`.
        source: partition and origin of the data; may be empty.
        metric: main metric; empty selects the main metric of the task.
        num_clients: size of the population.
        client_names: names of clients by id; a client without an entry is shown by its id.
        examples_per_client: smallest and largest number of training examples at a client; None if not counted.
        model: name and size of the model, e.g. ``mlp 13-32-1``.
        num_parameters: number of parameters, D.
        bytes_per_update: size of an update in bytes (approximate with a codec); None is four bytes per parameter.
        strategy: name of the strategy.
        strategy_settings: short form of its settings, e.g. ``mu 0.1``; may be empty.
        cohort: short form of the client selection, e.g. ``all 4 of 4 clients per round``.
        training: optimizer and learning rate, if they are defaults of the scenario; may be empty.
        privacy: description of the guarantee, see `fedlearn.core.privacy_guarantee.PrivacyGuarantee`; empty for none.
        poisoning: malicious clients and kind of poisoning; empty for none.
        compress: codec of updates and its settings; empty for none.
        engine: name of the engine, e.g. ``vector``.
        system: short form of the system model; empty for none.
        machine: hardware and batching, e.g. ``torch · cpu, 2 cores · map, 4 at a time in 7.5 KiB``.
        framework: ``torch``, ``jax`` or ``numpy``.
        seed: seed of the run.
        rounds: number of the last planned round.
        folder: run folder.
        start_round: number of completed rounds, > 0 in a resumed run.
        history: lines of the completed rounds, see `fedlearn.callbacks.run_history.truncate_history`.
        initialization: source of the initial parameters, e.g. ``weights drawn from the seed``; may be empty.
        rerun_command: command that repeats this run.
        resume_command: command that resumes this run.
        config: all settings of the run as plain values.
        layout: names and shapes of the parameters in ``params_D``.
        target: ``name``, ``unit`` and ``classes`` of the target; empty if unknown. If there are two
            classes, the second is positive.
        partition: see `fedlearn.callbacks.run_files.partition_summary`; None in a deployment.
        data_check: summary of the columns and flags for probable faults; None without a check, and in a deployment.
        deployed: True if real nodes train; default False.
        client_states: function that returns the client states after the last round; empty in a deployment.
    """

    scenario: str
    task: TaskField = TaskField()  # noqa: RUF009 - a descriptor, without a default
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
    training: str = ""
    system: str = ""
    privacy: Mapping[str, Any] = field(default_factory=dict)
    poisoning: str = ""
    compress: str = ""
    start_round: int = 0
    history: History = ()
    rerun_command: str = ""
    initialization: str = ""
    resume_command: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout | None = None
    target: Mapping[str, Any] = field(default_factory=dict)
    partition: Mapping[str, Any] | None = None
    data_check: DataCheck | None = None
    deployed: bool = False
    client_states: Callable[[], Mapping[ClientId, State]] = dict

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers; empty if unknown, and for other tasks."""
        return tuple(self.target.get("classes", ()))

    @property
    def main_metric(self) -> str:
        """Name of the metric that tables show first."""
        return self.metric or self.task.main_metric

    @property
    def selection_metric(self) -> str:
        """Metric that selects the best checkpoint: ``early_stop.metric``, or the main metric if that is null."""
        return (self.config.get("early_stop") or {}).get("metric") or self.main_metric

    def name(self, client: ClientId) -> str:
        """Return the name of a client, or its id if it has no name."""
        return self.client_names.get(client, str(client))

    def file(self, name: str) -> Path:
        """Return the path of a file in the run folder.

        Raises:
            SettingError: the path is outside the run folder.
        """
        folder = self.folder.resolve()
        path = (folder / name).resolve()
        if path == folder or not path.is_relative_to(folder):
            raise SettingError("file", name, "a path inside the run folder", f"{Path(name).name or 'losses.csv'}")
        return path
