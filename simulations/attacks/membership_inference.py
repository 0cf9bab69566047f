"""Membership inference: was an example among those that a client trained on? Asked of the model that it sends.

Shapes: M models, N examples, D parameters laid flat.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlearn import everyone, mean
from fedlearn.algorithm.strategy import Strategy
from fedlearn.callbacks import figures
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Examples
from fedlearn.errors import is_count, is_number, require
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.gradient_inversion_attack import Roc, confidence, lira, roc
from fedlearn.privacy.mechanisms.base import Mechanism, none
from fedlearn.runner.config import Experiment, build_experiment
from simulations.analysis.analysis_run import AnalysisRun, draw_with_style, save_results, write_report_page
from simulations.attacks.observed_updates import apply_mechanism, observe_updates

DEFAULTS = {"members": 300, "shadows": 24, "label_noise": 0.15}
DEFAULT_OVERRIDES = ("scenario=digits", "local.optimizer=adamw", "local.learning_rate=0.01", "local.epochs=30")
ATTACKED_MECHANISMS = ("none", "example", "local")
FPR = 0.01


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Examples, each of which some models were trained on."""

    examples: Examples
    is_member_MN: np.ndarray


@dataclass(frozen=True, kw_only=True)
class MembershipResult:
    """How far members can be told from others.

    Attributes:
        defense: in words.
        roc_curves: of each attack, by name.
        epsilon, delta: claimed; None without a claim.
        accuracy: of the models, on examples that they were not trained on.
    """

    defense: str
    roc_curves: Mapping[str, Roc]
    epsilon: float | None
    delta: float | None
    accuracy: float

    def max_tpr(self, fpr: Any) -> Any:
        """What the claim allows: ``tpr <= e^epsilon fpr + delta``."""
        assert self.epsilon is not None
        assert self.delta is not None
        return np.minimum(1.0, np.exp(min(self.epsilon, 50.0)) * np.asarray(fpr) + self.delta)


def run_membership_inference(analysis: AnalysisRun) -> int:
    """Train models on random halves, attack each, unprotected and as asked for, and write it up."""
    kind = analysis.plan.privacy.kind
    expected = "none, example or local: what a client sends is attacked, which the others do not protect"
    require(kind in ATTACKED_MECHANISMS, "privacy", kind, expected, "privacy=example privacy.noise_multiplier=1")
    made, pool = _experiment(analysis)
    try:
        results = [_inferred("no protection", none(), made, pool)]
        if kind != "none":
            results.append(_inferred(f"privacy={kind}", analysis.plan.privacy, made, pool))
    finally:
        made.engine.close()
    text = verdict(results)
    numbers = {
        "kind": "membership_inference",
        "verdict": text,
        **analysis.settings,
        "results": [_plain(result) for result in results],
    }
    save_results(analysis, "privacy_attack", numbers, {"members": draw_with_style(lambda: plot_roc_curves(results))})
    return _written(analysis, results, text)


def verdict(results: list[MembershipResult]) -> str:
    """What follows, in a sentence."""
    said = [f"{r.defense}: AUC {r.roc_curves['LiRA'].auc:.2f}" + _claim(r) for r in results]
    return f"Who was a member, told by the likelihood ratio attack. {'; '.join(said)}."


def _claim(result: MembershipResult) -> str:
    if result.epsilon is None:
        return ""
    found, allowed = result.roc_curves["LiRA"].tpr_at(FPR), float(result.max_tpr(FPR))
    word = "within" if found <= allowed else "ABOVE"
    return f", {found:.1%} of members at {FPR:.0%} false, {word} the {allowed:.1%} of epsilon {result.epsilon:.3g}"


def _plain(result: MembershipResult) -> dict[str, Any]:
    attacks = {
        name: {"auc": curve.auc, "tpr_at_1_percent": curve.tpr_at(FPR)} for name, curve in result.roc_curves.items()
    }
    allowed = None if result.epsilon is None else float(result.max_tpr(FPR))
    return {
        "defense": result.defense,
        "epsilon": result.epsilon,
        "delta": result.delta,
        "allowed_tpr_at_1_percent": allowed,
        "accuracy": result.accuracy,
        "attacks": attacks,
    }


def _written(asked: AnalysisRun, results: list[MembershipResult], text: str) -> int:
    table = [("protection", "attack", "AUC", "found at 1 % false", "allowed", "epsilon", "accuracy")]
    for result in results:
        allowed = "–" if result.epsilon is None else f"{float(result.max_tpr(FPR)):.1%}"
        epsilon = "–" if result.epsilon is None else f"{result.epsilon:.3g}"
        table += [
            (result.defense, name, f"{curve.auc:.3f}", f"{curve.tpr_at(FPR):.1%}", allowed, epsilon,
             f"{result.accuracy:.1%}")
            for name, curve in result.roc_curves.items()
        ]  # fmt: skip
    own = asked.settings
    written = write_report_page(
        asked,
        title="Membership inference",
        verdict=text,
        is_alarm=False,
        rows=[
            ("Target", f"the model that a client with {own['members']} examples sends, each model in turn"),
            ("Shadows", f"{own['shadows']} models trained alike on other random halves of the same examples"),
            ("Labels", f"{own['label_noise']:.0%} of them wrong, which only memory can fit"),
            ("Accuracy", "on examples that a model was not trained on, wrong labels included"),
        ],
        table=table,
        captions={
            "members": "Share of members found against the share of others taken for members, on logarithmic axes: "
            "what counts is the left end. Dotted: the most that the claimed epsilon allows; dashed: guessing."
        },
    )
    sys.stdout.write(f"{text}\n saved     {asked.folder}\n report    {written}\n")
    return 0


def _experiment(asked: AnalysisRun) -> tuple[Experiment, Pool]:
    """A client for each model, with a random half of the pool."""
    own, plan, pools = asked.settings, asked.plan, list[Pool]()
    share = own["label_noise"]
    require(
        is_count(own["members"], at_least=10),
        "privacy_attack.members",
        own["members"],
        ">= 10",
        "privacy_attack.members=300",
    )
    require(
        is_count(own["shadows"], at_least=8),
        "privacy_attack.shadows",
        own["shadows"],
        ">= 8",
        "privacy_attack.shadows=24",
    )
    fits = is_number(share, at_least=0, below=1)
    require(fits, "privacy_attack.label_noise", share, "a share in [0, 1)", "privacy_attack.label_noise=0.15")

    def staged(scenario: Scenario) -> Scenario:
        pools.append(_pool(scenario.data, own, plan.seed))
        return replace(scenario, data=_halves(scenario.data, pools[0]))

    strategy = Strategy(select=everyone(), aggregate=mean(weighting="equal"), local=plan.strategy.local)
    return build_experiment(
        asked.cfg, replace(plan, strategy=strategy, privacy=none()), transform_scenario=staged
    ), pools[0]


def _pool(data: FederatedData, own: Mapping[str, Any], seed: int) -> Pool:
    """Examples of all clients together, some of them mislabelled, and who was trained on which."""
    classifies = data.task in ("binary", "multiclass")
    require(classifies, "scenario", data.task, "one that classifies", "scenario=digits")
    parts, rng = [data.train(client) for client in data.clients], generator(seed, Purpose.SHADOWS)
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    count, half = 2 * own["members"], own["members"]
    expected = f"at most {len(y) // 2}: twice as many are drawn from {len(y)} training examples"
    require(count <= len(y), "privacy_attack.members", half, expected, f"privacy_attack.members={len(y) // 2}")
    rows = rng.choice(len(y), count, replace=False)
    wrong_N = (y[rows] + rng.integers(1, data.num_classes, size=count)) % data.num_classes
    y_N = np.where(rng.random(count) < own["label_noise"], wrong_N, y[rows])
    chosen = [rng.permutation(count) < half for _ in range(own["shadows"] + 1)]
    return Pool(examples=Examples(x[rows], y_N), is_member_MN=np.stack(chosen))


def _halves(data: FederatedData, pool: Pool) -> FederatedData:
    whole = pool.examples

    def half(client: int) -> Examples:
        return Examples(whole.x[pool.is_member_MN[client]], whole.y[pool.is_member_MN[client]])

    def nothing(client: int) -> Examples:
        return Examples(whole.x[:0], whole.y[:0])

    return replace(data, clients=range(len(pool.is_member_MN)), names={}, train=half, test=nothing)


def _inferred(words: str, mechanism: Mechanism, made: Experiment, pool: Pool) -> MembershipResult:
    size = int(pool.is_member_MN[0].sum())
    strategy, local, epsilon, delta = apply_mechanism(mechanism, made, num_examples=size)
    models_MD = made.scenario.trainer.init(made.plan.seed) + observe_updates(made, strategy, local)
    seen_MN = np.stack([_confidence(made, model_D, pool) for model_D in models_MD.astype(np.float32)])
    scores = {"LiRA": lira(seen_MN, pool.is_member_MN), "loss": seen_MN}
    curves = {name: roc(of_attack, pool.is_member_MN) for name, of_attack in scores.items()}
    right_MN = seen_MN[~pool.is_member_MN] > 0
    return MembershipResult(
        defense=words, roc_curves=curves, epsilon=epsilon, delta=delta, accuracy=float(np.mean(right_MN))
    )


def _confidence(made: Experiment, model_D: np.ndarray, pool: Pool) -> np.ndarray:
    return confidence(made.scenario.trainer.predict(model_D, pool.examples.x), pool.examples.y)


def plot_roc_curves(results: list[MembershipResult]) -> figures.Figure:
    """ROC curves of the likelihood ratio attack, and what the claim allows."""
    figure = figures.new_figure(0.62 * figures.WIDTH_INCHES, 0.56 * figures.WIDTH_INCHES)
    axis = figure.subplots()
    smallest = 1e-3
    grid = np.geomspace(smallest, 1, 200)
    axis.plot(grid, grid, color="#999999", linewidth=1, linestyle=(0, (4, 2)), label="guessing")
    for result, color in zip(results, (figures.WORST_COLOR, figures.POOLED_COLOR), strict=False):
        for (name, curve), width in zip(result.roc_curves.items(), (1.9, 0.9), strict=True):
            label = f"{result.defense}, {name} (AUC {curve.auc:.2f})"
            axis.plot(np.maximum(curve.fpr, smallest / 10), curve.tpr, color=color, linewidth=width, label=label)
        if result.epsilon is not None:
            allowed = f"most at epsilon {result.epsilon:.3g}"
            axis.plot(grid, result.max_tpr(grid), color=color, linewidth=1, linestyle=":", label=allowed)
    axis.set(xscale="log", yscale="log", xlim=(smallest, 1), ylim=(smallest, 1.05))
    axis.set(title="Members found", xlabel="others taken for members", ylabel="members found")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(lambda share, place: f"{100 * share:g} %")
    axis.legend(loc="lower right", fontsize=7.5)
    axis.grid(color="#E6E6E6")
    return figure
