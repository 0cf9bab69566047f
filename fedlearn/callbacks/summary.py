"""Build the content of ``summary.json`` at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.callbacks.judgement import result_warnings
from fedlearn.callbacks.run_history import History, best_metrics, final_metrics, final_personal_metrics, totals
from fedlearn.callbacks.run_info import RunInfo


def summarise(
    run: RunInfo, history: History, *, status: str, reason: str = "", parameters_sha256: str | None = None
) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    Args:
        run: description of the run.
        history: lines of all rounds, including the rounds before a resume.
        status: ``done``, ``early_stopped``, ``budget_exhausted``, ``stopped`` or ``failed``.
        reason: cause of an early end; empty for a run that ended as planned.
        parameters_sha256: digest of the final model, by which two runs can be compared; None if unknown.

    *Guarantees*: a resumed run and an uninterrupted run have the same summary, except for ``seconds``.
    """
    best = best_metrics(history)
    selected = {"metric": run.selection_metric, **best[run.selection_metric]} if run.selection_metric in best else None
    return {
        "status": status,
        "reason": reason,
        "scenario": run.scenario,
        "task": run.task.name,
        "metric": run.main_metric,
        "strategy": run.strategy,
        "framework": run.framework,
        "engine": run.engine,
        "seed": run.seed,
        "rounds": history[-1]["round"] if history else run.start_round,
        "rounds_planned": run.rounds,
        "num_clients": run.num_clients,
        "num_parameters": run.num_parameters,
        "final": final_metrics(history),
        "personal": final_personal_metrics(history),
        "best": best,
        "best_checkpoint": selected,
        "warnings": result_warnings(history, run.classes),
        **totals(history),
        "epsilon": history[-1]["epsilon"] if history else None,
        "privacy": privacy_summary(run.privacy, history),
        "parameters_sha256": parameters_sha256,
    }


def privacy_summary(guarantee: Mapping[str, Any], history: History) -> dict[str, Any] | None:
    """Return the guarantee, with ``epsilon`` and ``epsilon_rdp`` after the last round; None without a guarantee."""
    if not guarantee:
        return None
    last = history[-1] if history else {"epsilon": 0.0, "epsilon_rdp": 0.0}
    return {**guarantee, "epsilon": last["epsilon"], "epsilon_rdp": last["epsilon_rdp"]}
