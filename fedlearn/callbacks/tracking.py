"""Read settings, numbers and files of a run for trackers such as TensorBoard and MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlearn.advice import quote_value
from fedlearn.callbacks.checkpoints import MODEL_FOLDER
from fedlearn.callbacks.run_history import history_entry
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Round

__all__ = ["artifacts", "name_of_run", "numbers", "round_numbers", "settings_as_typed", "sweep_folder"]

REPORT_FILES = ("report.html", "model_card.md", "figures")
SWEEP_FILES = ("multirun.yaml", "tuning.json")  # in the folder of a sweep and of a tuning, before the first job
NOT_TRACKED = ("callbacks", "hydra")


def settings_as_typed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> value of all settings but callbacks, with the names that a user types.

    The name of an option stands for its builder. Lists and mappings are texts in the grammar of the command line.

    >>> settings_as_typed({"rounds": 2, "strategy": {"_target_": "strategies.fedprox", "mu": 0.1}, "metrics": ["a.b"]})
    {'rounds': 2, 'strategy': 'fedprox', 'strategy.mu': 0.1, 'metrics': '[a.b]'}
    """
    scenario = config.get("scenario")
    if isinstance(scenario, Mapping):  # without copies of top-level settings, such as seed and model
        missing = {name: value for name, value in scenario.items() if name not in config}
        config = {**config, "scenario": missing}
    return dict(_settings({name: value for name, value in config.items() if name not in NOT_TRACKED}, ""))


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return name -> value of all numbers in a line of ``metrics.jsonl``, e.g. ``test/accuracy``.

    >>> numbers({"round": 3, "test": {"loss": 0.5, "auc": None}, "failures": []})
    {'round': 3, 'test/loss': 0.5}
    """
    return {name: value for name, value in _leaves(entry, "") if _is_number(value)}


def round_numbers(round: Round) -> dict[str, float]:
    """Return name -> value of all numbers that ``metrics.jsonl`` has for a round."""
    return numbers(history_entry(round))


def artifacts(folder: Path) -> list[Path]:
    """Return the report, the model card, the figures and the folder of the trained model, as far as they exist."""
    return [path for name in (*REPORT_FILES, MODEL_FOLDER) if (path := folder / name).exists()]


def sweep_folder(run: RunInfo) -> Path | None:
    """Return the folder of the sweep or tuning to which the run belongs; None for a single run."""
    parents = list(run.folder.resolve().parents)[:3]
    return next((parent for parent in parents if any((parent / name).is_file() for name in SWEEP_FILES)), None)


def name_of_run(run: RunInfo) -> str:
    """Return scenario and strategy; in a sweep the folder, whose name has the settings that vary."""
    return run.folder.name if sweep_folder(run) else f"{run.scenario} {run.strategy}"


def _settings(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "_target_" in value:
            yield name, str(value["_target_"]).rpartition(".")[2]
            value = {inner: content for inner, content in value.items() if inner != "_target_"}
        if isinstance(value, Mapping):
            yield from _settings(value, f"{name}.")
        else:
            yield name, quote_value(value) if isinstance(value, list) else value


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
