"""Results of rows as files: one JSON file per row, with a record for each seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedlearn.core.checkpoint import write_atomically
from fedlearn.runner.compose import CONF_DIR
from fedlearn.runner.run_result import RunResult
from simulations.published.records import Row


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """Hold the numbers of one run.

    Attributes:
        seed: seed of the run.
        values: name of the measure -> number; None if the run has no such number.
        rounds: number of completed rounds.
        seconds: duration of the rounds.
        processor_seconds: processor time of the run and of its child processes; None if it was not measured.
        parameters_sha256: digest of the final parameters.
        data_sha256: digest of the digests of all training and test examples.
        packages: versions of the packages that compute.
    """

    seed: int
    values: Mapping[str, float | None]
    rounds: int
    seconds: float
    parameters_sha256: str
    data_sha256: str
    packages: Mapping[str, str]
    processor_seconds: float | None = None


def read_run(row: Row, seed: int, folder: Path, *, processor_seconds: float) -> SeedResult:
    """Return the numbers of a completed run of a row."""
    run = RunResult(folder=folder)
    versions = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["packages"]
    return SeedResult(
        seed=seed,
        values={measure.name: measure.read(run) for measure in row.measures},
        rounds=int(run.summary["rounds"]),
        seconds=round(float(run.summary["seconds"]), 1),
        processor_seconds=round(processor_seconds, 1),
        parameters_sha256=run.summary["parameters_sha256"],
        data_sha256=hashlib.sha256((folder / "data_digests.json").read_bytes()).hexdigest(),
        packages={name: versions[name] for name in ("fedlearn", "numpy", "torch", "jax") if name in versions},
    )


def recipe_digest(row: Row) -> str:
    """Return the digest of the settings in the recipe of a row, without comments."""
    name = next(word.partition("=")[2] for word in row.settings if word.startswith("experiment="))
    recipe = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "experiment" / f"{name}.yaml"))
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def read_results(row: Row, file: Path) -> list[SeedResult]:
    """Return the stored results of a row in order of seeds.

    Results of other settings or of another recipe, and of seeds that the row does not have, are left out.
    """
    if not file.exists():
        return []
    content = json.loads(file.read_text(encoding="utf-8"))
    if (content["settings"], content.get("recipe_sha256")) != (list(row.settings), recipe_digest(row)):
        return []
    results = [SeedResult(**record) for record in content["runs"]]
    return sorted((result for result in results if result.seed in row.seeds), key=lambda result: result.seed)


def store_results(row: Row, results: Sequence[SeedResult], file: Path) -> None:
    """Write the results of a row."""
    content: dict[str, Any] = {
        "settings": list(row.settings),
        "recipe_sha256": recipe_digest(row),
        "runs": [asdict(result) for result in sorted(results, key=lambda result: result.seed)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(content, indent=1) + "\n")
