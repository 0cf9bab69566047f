"""Audit a privacy mechanism: canaries give a lower bound on epsilon, which is compared with the claimed epsilon.

If the privacy unit is a client, canaries are clients, see `simulations.analysis.canary_clients`. If the unit is an
example, canaries are examples, see `simulations.analysis.canary_examples`. Both run the model, the strategy and the
mechanism of the settings.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from fedlearn.callbacks import figure_style
from fedlearn.core.command_line import DONE, FAILED
from fedlearn.errors import is_count, require
from fedlearn.privacy.audit import SIGNIFICANCE, AuditResult, Scores, audit_scores
from simulations.analysis.analysis_run import AnalysisRun, draw_with_style, save_results, write_report_page
from simulations.analysis.audited_run import AuditedRun, join
from simulations.analysis.canary_clients import audit_clients
from simulations.analysis.canary_examples import audit_examples
from simulations.analysis.sentence_exposure import measure_exposure

DEFAULTS = {"canaries": 1000, "rounds": 1, "examples": 8, "sentences": 0, "copies": 4}
MIN_CANARIES = 100


def audit(analysis: AnalysisRun) -> tuple[AuditedRun, AuditResult]:
    """Run the audited rounds and measure the lower bound.

    Raises:
        SettingError: A setting is out of range, or an audit does not support the settings.
        MissingExtra: The library jax-privacy is not installed.
    """
    canaries, rounds = analysis.settings["canaries"], analysis.settings["rounds"]
    enough, planned = is_count(canaries, at_least=MIN_CANARIES), analysis.plan.schedule.rounds
    require(enough, "audit.canaries", canaries, f"a whole number >= {MIN_CANARIES}", "audit.canaries=1000")
    fits = is_count(rounds) and rounds <= planned
    expected = f"a whole number in 1..{planned}, the number of planned rounds"
    require(fits, "audit.rounds", rounds, expected, "rounds=20")
    is_example_level = analysis.plan.privacy.kind == "example"
    audited = audit_examples(analysis) if is_example_level else audit_clients(analysis)
    return audited, audit_scores(audited.scores, delta=audited.delta, gaussian=audited.is_gaussian)


def verdict(audited: AuditedRun, result: AuditResult) -> str:
    """Return the conclusion, in one or two sentences."""
    if faults := audited.faults(result):
        return f"ALARM: {'; '.join(faults)}. The guarantee does not hold."
    bound = f"epsilon is at least {result.epsilon_lower_bound:.3g} with {1 - SIGNIFICANCE:.0%} confidence"
    if audited.claimed_epsilon is None:
        return f"The run claims no epsilon; {bound}."
    claim = f"the claimed epsilon is {audited.claimed_epsilon:.4g}"
    if audited.claimed_epsilon >= result.max_lower_bound:
        return f"No contradiction: {bound}, and {claim}. This number of canaries is too small to refute it."
    return f"The claim holds: {bound}, and {claim}. The largest provable bound is {result.max_lower_bound:.3g}."


def run_audit(analysis: AnalysisRun) -> int:
    """Audit, write results and report page, and return the exit code. It is 3 if the claim is refuted."""
    audited, result = audit(analysis)
    exposure = measure_exposure(analysis)
    text, is_alarm = verdict(audited, result), bool(audited.faults(result))
    numbers = _to_json(analysis, audited, result, text) | {"sentences": exposure and exposure.to_json()}
    save_results(analysis, "audit", numbers, {"scores": draw_with_style(lambda: plot_audit(audited, result))})
    claim = "–" if audited.claimed_epsilon is None else f"{audited.claimed_epsilon:.4g}"
    rows = _rows(analysis, audited, result)
    rows += [] if exposure is None else [("Sentences", exposure.text)]
    page = write_report_page(
        analysis,
        title=f"Audit of privacy={analysis.plan.privacy.kind}",
        verdict=text,
        is_alarm=is_alarm,
        rows=rows,
        table=[
            ("", "epsilon ≥", "claimed ≤", "provable", "AUC", "TPR at 1 % FPR"),
            (
                f"one {audited.privacy_unit}",
                f"{result.epsilon_lower_bound:.3g}",
                claim,
                f"{result.max_lower_bound:.3g}",
                f"{result.auc:.3f}",
                f"{result.tpr:.1%}",
            ),
        ],
        captions={"scores": caption(audited)},
    )
    lines = [f" {name.lower():<17} {value}" for name, value in [*rows, ("Saved", analysis.folder), ("Report", page)]]
    sys.stdout.write("\n".join([text, *lines]) + "\n")
    return FAILED if is_alarm else DONE


def _to_json(analysis: AnalysisRun, audited: AuditedRun, result: AuditResult, text: str) -> dict[str, Any]:
    sensitivity, noise = audited.sensitivity, audited.noise
    return {
        "privacy": analysis.plan.privacy.kind,
        "unit": audited.privacy_unit,
        "canaries": analysis.settings["canaries"],
        "rounds": audited.num_rounds,
        "delta": audited.delta,
        "claimed_epsilon": audited.claimed_epsilon,
        **asdict(result),
        "movement": None if sensitivity is None else sensitivity.movement,
        "movement_case": None if sensitivity is None else sensitivity.case,
        "noise_multiplier": None if noise is None else noise.multiplier,
        "accounted_noise_multiplier": None if noise is None else noise.accounted,
        "canary_signal": audited.signal,
        "significance": SIGNIFICANCE,
        "alarm": bool(audited.faults(result)),
        "verdict": text,
        "exercised": list(audited.exercised),
        "not_exercised": list(audited.not_exercised),
    }


def _rows(analysis: AnalysisRun, audited: AuditedRun, result: AuditResult) -> list[tuple[str, str]]:
    included, excluded = len(audited.scores.included), len(audited.scores.excluded)
    rows = [
        ("Mechanism", analysis.plan.privacy.kind),
        ("Canaries", f"{included + excluded:,} {audited.privacy_unit}s, {included:,} of them included"),
        ("Rounds", f"{audited.num_rounds:,}"),
        ("Delta", f"{audited.delta:g}"),
        ("Bound", f"one run, {1 - SIGNIFICANCE:.0%} confidence, assumed mechanism: {result.assumption}"),
        ("AUC", f"{result.auc:.3f}"),
    ]
    if audited.signal is not None:
        rows.append(("Canary", f"contributes {audited.signal:.3g} clip norms per step (median)"))
    if audited.sensitivity is not None:
        found = audited.sensitivity
        rows.append(
            ("Movement", f"{found.movement:.3f} clip norms by one example, in {found.num_pairs} pairs of batches")
        )
    if audited.noise is not None:
        measured, accounted = audited.noise.multiplier, audited.noise.accounted
        rows.append(("Noise", f"measured multiplier {measured:.4g}, accounted {accounted:.4g}"))
    return [*rows, ("Exercised", join(audited.exercised)), ("Not exercised", join(audited.not_exercised))]


def caption(audited: AuditedRun) -> str:
    """Return the caption of the figure."""
    return (
        f"Left: the released value along the contribution of each canary {audited.privacy_unit}, in multiples of this "
        "contribution, for included and excluded canaries. Right: the measured lower bound on "
        "epsilon, the claimed epsilon, and the largest epsilon that this number of canaries can prove."
    )


def plot_audit(audited: AuditedRun, result: AuditResult) -> figure_style.Figure:
    """Draw the scores of included and excluded canaries, and the measured bound beside the claim."""
    figure = figure_style.new_figure(figure_style.WIDTH_INCHES, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _histograms(left, audited.scores)
    _bars(right, audited, result)
    return figure


def _histograms(axis: Any, scores: Scores) -> None:
    gap = float(np.median(scores.included) - np.median(scores.excluded)) or 1.0
    middle = float(np.median(scores.excluded))
    groups = {
        "excluded": (scores.excluded, figure_style.CLIENTS_COLOR),
        "included": (scores.included, figure_style.WORST_COLOR),
    }
    scaled = {name: ((values - middle) / abs(gap), color) for name, (values, color) in groups.items()}
    low, high = np.quantile(np.concatenate([values for values, _ in scaled.values()]), [0.001, 0.999])
    edges = np.linspace(low - 0.1, high + 0.1, 45)
    for name, (values, color) in scaled.items():
        axis.hist(np.clip(values, edges[0], edges[-1]), edges, color=color, alpha=0.6, label=name)
    axis.set(title="Canaries", xlabel="score", ylabel="canaries")
    axis.legend()


def _bars(axis: Any, audited: AuditedRun, result: AuditResult) -> None:
    claimed = audited.claimed_epsilon
    alarm = claimed is not None and result.epsilon_lower_bound > claimed
    bars = [
        ("proved", result.epsilon_lower_bound, figure_style.WORST_COLOR if alarm else figure_style.POOLED_COLOR),
        ("provable", result.max_lower_bound, "#BBBBBB"),
    ]
    if claimed is not None:
        bars.insert(1, ("claimed", claimed, figure_style.TEXT_COLOR))
    names, values, colors = zip(*bars, strict=True)
    places = np.arange(len(bars))
    axis.bar(places, values, color=colors, width=0.62)
    for place, value in zip(places, values, strict=True):
        axis.annotate(f"{value:.2f}", (place, value), xytext=(0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(places, names)
    axis.tick_params(axis="x", length=0)
    axis.margins(y=0.12)
    axis.set_title("Epsilon")
