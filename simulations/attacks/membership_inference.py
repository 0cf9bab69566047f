"""Membership inference: decide from the model of a client whether an example is in its training data.

Shapes: M models, N examples, D parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlearn import everyone, mean
from fedlearn.algorithm.strategy import Strategy
from fedlearn.callbacks import figure_style
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Examples
from fedlearn.errors import is_count, is_number, require
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.gradient_inversion_attack import Roc, confidence, lira, roc
from fedlearn.privacy.mechanisms.base import Mechanism, none
from fedlearn.runner.experiment import Experiment, build_experiment
from simulations.analysis.analysis_run import AnalysisRun, draw_with_style, save_results, write_report_page
from simulations.attacks.observed_updates import apply_mechanism, observe_updates

DEFAULTS = {"members": 300, "shadows": 24, "label_noise": 0.15}
DEFAULT_OVERRIDES = ("scenario=digits", "local.optimizer=adamw", "local.learning_rate=0.01", "local.epochs=30")
ATTACKED_MECHANISMS = ("none", "example", "local")
FPR = 0.01


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Pool of examples. Each model is trained on some of them.

    Attributes:
        examples: all N examples.
        is_member_MN: True if model m is trained on example n.
    """

    examples: Examples
    is_member_MN: np.ndarray


@dataclass(frozen=True, kw_only=True)
class MembershipResult:
    """Result of the attacks under one defense.

    Attributes:
        defense: description of the defense.
        roc_curves: ROC curve of each attack, by name.
        epsilon: claimed epsilon; None without a claim.
        delta: claimed delta; None without a claim.
        accuracy: accuracy of the models on examples outside their training data.
    """

    defense: str
    roc_curves: Mapping[str, Roc]
    epsilon: float | None
    delta: float | None
    accuracy: float

    def max_tpr(self, fpr: Any) -> Any:
        """Return the largest true positive rate under the claim, ``e^epsilon fpr + delta``, at most 1."""
        assert self.epsilon is not None
        assert self.delta is not None
        return np.minimum(1.0, np.exp(min(self.epsilon, 50.0)) * np.asarray(fpr) + self.delta)


def run_membership_inference(analysis: AnalysisRun) -> int:
    """Train models on random halves of a pool, attack each of them, and write results and report.

    The attack runs without protection, and with the mechanism of the settings if there is one.

    Returns:
        The exit code.
    """
    kind = analysis.plan.privacy.kind
    expected = "none, example or local: the attack reads single updates, and other mechanisms do not protect them"
    require(kind in ATTACKED_MECHANISMS, "privacy", kind, expected, "privacy=example privacy.noise_multiplier=1")
    experiment, pool = _build_experiment(analysis)
    try:
        results = [_attack_mechanism("no protection", none(), experiment, pool)]
        if kind != "none":
            results.append(_attack_mechanism(f"privacy={kind}", analysis.plan.privacy, experiment, pool))
    finally:
        experiment.engine.close()
    text = verdict(results)
    numbers = {
        "kind": "membership_inference",
        "verdict": text,
        **analysis.settings,
        "results": [_to_json(result) for result in results],
    }
    save_results(analysis, "privacy_attack", numbers, {"members": draw_with_style(lambda: plot_roc_curves(results))})
    return _write_report(analysis, results, text)


def verdict(results: list[MembershipResult]) -> str:
    """Return the conclusion, in two sentences."""
    parts = [f"{r.defense}: AUC {r.roc_curves['LiRA'].auc:.2f}" + _claim(r) for r in results]
    return f"The likelihood ratio attack separates members from other examples. {'; '.join(parts)}."


def _claim(result: MembershipResult) -> str:
    if result.epsilon is None:
        return ""
    tpr, allowed = result.roc_curves["LiRA"].tpr_at(FPR), float(result.max_tpr(FPR))
    relation = "within" if tpr <= allowed else "ABOVE"
    rates = f"true positive rate {tpr:.1%} at false positive rate {FPR:.0%}"
    return f", {rates}, {relation} the bound {allowed:.1%} of epsilon {result.epsilon:.3g}"


def _to_json(result: MembershipResult) -> dict[str, Any]:
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


def _write_report(analysis: AnalysisRun, results: list[MembershipResult], text: str) -> int:
    table = [("protection", "attack", "AUC", "TPR at 1 % FPR", "bound", "epsilon", "accuracy")]
    for result in results:
        allowed = "–" if result.epsilon is None else f"{float(result.max_tpr(FPR)):.1%}"
        epsilon = "–" if result.epsilon is None else f"{result.epsilon:.3g}"
        table += [
            (result.defense, name, f"{curve.auc:.3f}", f"{curve.tpr_at(FPR):.1%}", allowed, epsilon,
             f"{result.accuracy:.1%}")
            for name, curve in result.roc_curves.items()
        ]  # fmt: skip
    settings = analysis.settings
    page = write_report_page(
        analysis,
        title="Membership inference",
        verdict=text,
        is_alarm=False,
        rows=[
            ("Target", f"the model of a client with {settings['members']} examples, each model in turn"),
            ("Shadows", f"{settings['shadows']} models, trained in the same way on other random halves of the pool"),
            ("Labels", f"{settings['label_noise']:.0%} are wrong, so a model fits them only by memorization"),
            ("Accuracy", "on examples outside the training data of a model, including wrong labels"),
        ],
        table=table,
        captions={
            "members": "True positive rate (members) against false positive rate (other examples), on logarithmic "
            "axes. The left end matters most. Dotted: the bound of the claimed epsilon; dashed: guessing."
        },
    )
    sys.stdout.write(f"{text}\n saved     {analysis.folder}\n report    {page}\n")
    return 0


def _build_experiment(analysis: AnalysisRun) -> tuple[Experiment, Pool]:
    """Build an experiment with a client for each model. Each client has a random half of the pool."""
    settings, plan, pools = analysis.settings, analysis.plan, list[Pool]()
    members, shadows, share = settings["members"], settings["shadows"], settings["label_noise"]
    enough = is_count(members, at_least=10)
    require(enough, "privacy_attack.members", members, "a whole number >= 10", "privacy_attack.members=300")
    enough = is_count(shadows, at_least=8)
    require(enough, "privacy_attack.shadows", shadows, "a whole number >= 8", "privacy_attack.shadows=24")
    valid = is_number(share, at_least=0, below=1)
    require(valid, "privacy_attack.label_noise", share, "a share in [0, 1)", "privacy_attack.label_noise=0.15")

    def with_halves(scenario: Scenario) -> Scenario:
        pools.append(_draw_pool(scenario.data, settings, plan.seed))
        return replace(scenario, data=_halves(scenario.data, pools[0]))

    strategy = Strategy(
        select=everyone(), aggregate=mean(weighting="equal"), server=plan.strategy.server, local=plan.strategy.local
    )
    return build_experiment(
        analysis.cfg, replace(plan, strategy=strategy, privacy=none()), transform_scenario=with_halves
    ), pools[0]


def _draw_pool(data: FederatedData, settings: Mapping[str, Any], seed: int) -> Pool:
    """Draw the examples from the data of all clients, change some labels, and draw the members of each model."""
    require(data.task.is_classification, "task of the scenario", data.task, "binary or multiclass", "scenario=digits")
    parts, rng = [data.train(client) for client in data.clients], generator(seed, Purpose.SHADOWS)
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    count, half = 2 * settings["members"], settings["members"]
    expected = f"at most {len(y) // 2}: the attack draws twice this number from {len(y)} training examples"
    require(count <= len(y), "privacy_attack.members", half, expected, f"privacy_attack.members={len(y) // 2}")
    rows = rng.choice(len(y), count, replace=False)
    wrong_N = (y[rows] + rng.integers(1, data.num_classes, size=count)) % data.num_classes
    y_N = np.where(rng.random(count) < settings["label_noise"], wrong_N, y[rows])
    members = [rng.permutation(count) < half for _ in range(settings["shadows"] + 1)]
    return Pool(examples=Examples(x[rows], y_N), is_member_MN=np.stack(members))


def _halves(data: FederatedData, pool: Pool) -> FederatedData:
    examples = pool.examples

    def train(client: int) -> Examples:
        return Examples(examples.x[pool.is_member_MN[client]], examples.y[pool.is_member_MN[client]])

    def test(client: int) -> Examples:
        return Examples(examples.x[:0], examples.y[:0])

    return replace(data, clients=range(len(pool.is_member_MN)), names={}, train=train, test=test)


def _attack_mechanism(defense: str, mechanism: Mechanism, experiment: Experiment, pool: Pool) -> MembershipResult:
    size = int(pool.is_member_MN[0].sum())
    strategy, local, epsilon, delta = apply_mechanism(mechanism, experiment, num_examples=size)
    models_MD = experiment.scenario.trainer.init(experiment.plan.seed) + observe_updates(experiment, strategy, local)
    confidence_MN = np.stack([_confidence(experiment, model_D, pool) for model_D in models_MD.astype(np.float32)])
    scores = {"LiRA": lira(confidence_MN, pool.is_member_MN), "loss": confidence_MN}
    curves = {name: roc(scores_MN, pool.is_member_MN) for name, scores_MN in scores.items()}
    is_correct = confidence_MN[~pool.is_member_MN] > 0
    return MembershipResult(
        defense=defense, roc_curves=curves, epsilon=epsilon, delta=delta, accuracy=float(np.mean(is_correct))
    )


def _confidence(experiment: Experiment, model_D: np.ndarray, pool: Pool) -> np.ndarray:
    return confidence(experiment.scenario.trainer.predict(model_D, pool.examples.x), pool.examples.y)


def plot_roc_curves(results: list[MembershipResult]) -> figure_style.Figure:
    """Draw the ROC curves of the attacks, and the bound of the claimed epsilon."""
    figure = figure_style.new_figure(0.62 * figure_style.WIDTH_INCHES, 0.56 * figure_style.WIDTH_INCHES)
    axis = figure.subplots()
    smallest = 1e-3
    grid = np.geomspace(smallest, 1, 200)
    axis.plot(grid, grid, color="#999999", linewidth=1, linestyle=(0, (4, 2)), label="guessing")
    for result, color in zip(results, (figure_style.WORST_COLOR, figure_style.POOLED_COLOR), strict=False):
        for (name, curve), width in zip(result.roc_curves.items(), (1.9, 0.9), strict=True):
            label = f"{result.defense}, {name} (AUC {curve.auc:.2f})"
            axis.plot(np.maximum(curve.fpr, smallest / 10), curve.tpr, color=color, linewidth=width, label=label)
        if result.epsilon is not None:
            label = f"bound at epsilon {result.epsilon:.3g}"
            axis.plot(grid, result.max_tpr(grid), color=color, linewidth=1, linestyle=":", label=label)
    axis.set(xscale="log", yscale="log", xlim=(smallest, 1), ylim=(smallest, 1.05))
    axis.set(title="Membership inference", xlabel="false positive rate", ylabel="true positive rate")
    for direction in (axis.xaxis, axis.yaxis):
        direction.set_major_formatter(lambda share, place: f"{100 * share:g} %")
    axis.legend(loc="lower right")
    axis.grid(color="#E6E6E6")
    return figure
