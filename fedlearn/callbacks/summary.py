"""What a run has measured so far: one line a round, as ``metrics.jsonl`` holds it.

Early stopping, the summary and the report all read these lines and nothing else, so that a resumed run decides and
sums up as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.run_history import History, best_metrics, final_metrics, final_personal_metrics, totals


def summarise(
    run: RunInfo, history: History, *, status: str, reason: str = "", parameters_sha256: str | None = None
) -> dict[str, Any]:
    """What ``summary.json`` holds.

    Args:
        run: what was planned.
        history: the lines of all rounds, those before a resume included.
        status: ``done``, ``early_stopped``, ``budget_exhausted``, ``stopped`` or ``failed``.
        reason: why it ended early; empty for a run that ended as planned.
        parameters_sha256: of the final model, so that two runs can be compared.

    *Guarantees*: a run that was resumed has the summary of one that was not, apart from its seconds.
    """
    return {
        "status": status,
        "reason": reason,
        "scenario": run.scenario,
        "task": run.task,
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
        "best": best_metrics(history),
        **totals(history),
        "epsilon": history[-1]["epsilon"] if history else None,
        "privacy": privacy_summary(run.privacy, history),
        "parameters_sha256": parameters_sha256,
    }


def privacy_summary(guarantee: Mapping[str, Any], history: History) -> dict[str, Any] | None:
    """What was promised, and ``epsilon`` and ``epsilon_rdp`` after the last round; None where nothing was."""
    if not guarantee:
        return None
    last = history[-1] if history else {"epsilon": 0.0, "epsilon_rdp": 0.0}
    return {**guarantee, "epsilon": last["epsilon"], "epsilon_rdp": last["epsilon_rdp"]}
