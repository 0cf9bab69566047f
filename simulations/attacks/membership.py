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
from fedlearn.config import Experiment, experiment
from fedlearn.data.federated import FederatedData
from fedlearn.errors import is_count, is_number, require
from fedlearn.privacy.attacks import Roc, confidence, lira, roc
from fedlearn.privacy.mechanism import Mechanism, none
from fedlearn.records import Examples
from fedlearn.scenario import Scenario
from fedlearn.seeds import Purpose, generator
from fedlearn.strategy import Strategy
from simulations import figures
from simulations.attacks.uploads import protected, uploads
from simulations.inquiry import Inquiry, page, save, styled

DEFAULTS = {"members": 300, "shadows": 24, "label_noise": 0.15}
PRESET = ("scenario=digits", "local.optimizer=adamw", "local.learning_rate=0.01", "local.epochs=30")
UNITS = ("none", "example", "local")
FPR = 0.01


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Examples, each of which some models were trained on."""

    examples: Examples
    member_MN: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """How far members can be told from others.

    Attributes:
        protection: in words.
        curves: of each attack, by name.
        epsilon, delta: claimed; None without a claim.
        accuracy: of the models, on examples that they were not trained on.
    """

    protection: str
    curves: Mapping[str, Roc]
    epsilon: float | None
    delta: float | None
    accuracy: float

    def most(self, fpr: Any) -> Any:
        """What the claim allows: ``tpr <= e^epsilon fpr + delta``."""
        assert self.epsilon is not None
        assert self.delta is not None
        return np.minimum(1.0, np.exp(min(self.epsilon, 50.0)) * np.asarray(fpr) + self.delta)


def infer(asked: Inquiry) -> int:
    """Train models on random halves, attack each, unprotected and as asked for, and write it up."""
    kind = asked.plan.privacy.kind
    expected = "none, example or local: what a client sends is attacked, which the others do not protect"
    require(kind in UNITS, "privacy", kind, expected, "privacy=example privacy.noise_multiplier=1")
    made, pool = _experiment(asked)
    try:
        results = [_inferred("no protection", none(), made, pool)]
        if kind != "none":
            results.append(_inferred(f"privacy={kind}", asked.plan.privacy, made, pool))
    finally:
        made.engine.close()
    text = verdict(results)
    numbers = {"kind": "membership", "verdict": text, **asked.own, "results": [_plain(result) for result in results]}
    save(asked, "attack", numbers, {"members": styled(lambda: picture(results))})
    return _written(asked, results, text)


def verdict(results: list[Inferred]) -> str:
    """What follows, in a sentence."""
    said = [f"{r.protection}: AUC {r.curves['LiRA'].auc:.2f}" + _claim(r) for r in results]
    return f"Who was a member, told by the likelihood ratio attack. {'; '.join(said)}."


def _claim(result: Inferred) -> str:
    if result.epsilon is None:
        return ""
    found, allowed = result.curves["LiRA"].tpr_at(FPR), float(result.most(FPR))
    word = "within" if found <= allowed else "ABOVE"
    return f", {found:.1%} of members at {FPR:.0%} false, {word} the {allowed:.1%} of epsilon {result.epsilon:.3g}"


def _plain(result: Inferred) -> dict[str, Any]:
    attacks = {name: {"auc": curve.auc, "tpr_at_1_percent": curve.tpr_at(FPR)} for name, curve in result.curves.items()}
    allowed = None if result.epsilon is None else float(result.most(FPR))
    return {
        "protection": result.protection,
        "epsilon": result.epsilon,
        "delta": result.delta,
        "allowed_tpr_at_1_percent": allowed,
        "accuracy": result.accuracy,
        "attacks": attacks,
    }


def _written(asked: Inquiry, results: list[Inferred], text: str) -> int:
    table = [("protection", "attack", "AUC", "found at 1 % false", "allowed", "epsilon", "accuracy")]
    for result in results:
        allowed = "–" if result.epsilon is None else f"{float(result.most(FPR)):.1%}"
        epsilon = "–" if result.epsilon is None else f"{result.epsilon:.3g}"
        table += [
            (result.protection, name, f"{curve.auc:.3f}", f"{curve.tpr_at(FPR):.1%}", allowed, epsilon,
             f"{result.accuracy:.1%}")
            for name, curve in result.curves.items()
        ]  # fmt: skip
    own = asked.own
    written = page(
        asked,
        title="Membership inference",
        verdict=text,
        alarm=False,
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


def _experiment(asked: Inquiry) -> tuple[Experiment, Pool]:
    """A client for each model, with a random half of the pool."""
    own, plan, pools = asked.own, asked.plan, list[Pool]()
    share = own["label_noise"]
    require(is_count(own["members"], at_least=10), "attack.members", own["members"], ">= 10", "attack.members=300")
    require(is_count(own["shadows"], at_least=8), "attack.shadows", own["shadows"], ">= 8", "attack.shadows=24")
    fits = is_number(share, at_least=0, below=1)
    require(fits, "attack.label_noise", share, "a share in [0, 1)", "attack.label_noise=0.15")

    def staged(scenario: Scenario) -> Scenario:
        pools.append(_pool(scenario.data, own, plan.seed))
        return replace(scenario, data=_halves(scenario.data, pools[0]))

    strategy = Strategy(select=everyone(), aggregate=mean(weighting="equal"), local=plan.strategy.local)
    return experiment(asked.cfg, replace(plan, strategy=strategy, privacy=none()), staged=staged), pools[0]


def _pool(data: FederatedData, own: Mapping[str, Any], seed: int) -> Pool:
    """Examples of all clients together, some of them mislabelled, and who was trained on which."""
    classifies = data.task in ("binary", "multiclass")
    require(classifies, "scenario", data.task, "one that classifies", "scenario=digits")
    parts, rng = [data.train(client) for client in data.clients], generator(seed, Purpose.SHADOWS)
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    count, half = 2 * own["members"], own["members"]
    expected = f"at most {len(y) // 2}: twice as many are drawn from {len(y)} training examples"
    require(count <= len(y), "attack.members", half, expected, f"attack.members={len(y) // 2}")
    rows = rng.choice(len(y), count, replace=False)
    wrong_N = (y[rows] + rng.integers(1, data.num_classes, size=count)) % data.num_classes
    y_N = np.where(rng.random(count) < own["label_noise"], wrong_N, y[rows])
    chosen = [rng.permutation(count) < half for _ in range(own["shadows"] + 1)]
    return Pool(examples=Examples(x[rows], y_N), member_MN=np.stack(chosen))


def _halves(data: FederatedData, pool: Pool) -> FederatedData:
    whole = pool.examples

    def half(client: int) -> Examples:
        return Examples(whole.x[pool.member_MN[client]], whole.y[pool.member_MN[client]])

    def nothing(client: int) -> Examples:
        return Examples(whole.x[:0], whole.y[:0])

    return replace(data, clients=range(len(pool.member_MN)), names={}, train=half, test=nothing)


def _inferred(words: str, mechanism: Mechanism, made: Experiment, pool: Pool) -> Inferred:
    size = int(pool.member_MN[0].sum())
    strategy, local, epsilon, delta = protected(mechanism, made, examples=size)
    models_MD = made.scenario.trainer.init(made.plan.seed) + uploads(made, strategy, local)
    seen_MN = np.stack([_confidence(made, model_D, pool) for model_D in models_MD.astype(np.float32)])
    scores = {"LiRA": lira(seen_MN, pool.member_MN), "loss": seen_MN}
    curves = {name: roc(of_attack, pool.member_MN) for name, of_attack in scores.items()}
    right_MN = seen_MN[~pool.member_MN] > 0
    return Inferred(protection=words, curves=curves, epsilon=epsilon, delta=delta, accuracy=float(np.mean(right_MN)))


def _confidence(made: Experiment, model_D: np.ndarray, pool: Pool) -> np.ndarray:
    return confidence(made.scenario.trainer.predict(model_D, pool.examples.x), pool.examples.y)


def picture(results: list[Inferred]) -> figures.Figure:
    """ROC curves of the likelihood ratio attack, and what the claim allows."""
    figure = figures.blank(0.62 * figures.WIDTH, 0.56 * figures.WIDTH)
    axis = figure.subplots()
    smallest = 1e-3
    grid = np.geomspace(smallest, 1, 200)
    axis.plot(grid, grid, color="#999999", linewidth=1, linestyle=(0, (4, 2)), label="guessing")
    for result, color in zip(results, (figures.WORST, figures.POOLED), strict=False):
        for (name, curve), width in zip(result.curves.items(), (1.9, 0.9), strict=True):
            label = f"{result.protection}, {name} (AUC {curve.auc:.2f})"
            axis.plot(np.maximum(curve.fpr, smallest / 10), curve.tpr, color=color, linewidth=width, label=label)
        if result.epsilon is not None:
            allowed = f"most at epsilon {result.epsilon:.3g}"
            axis.plot(grid, result.most(grid), color=color, linewidth=1, linestyle=":", label=allowed)
    axis.set(xscale="log", yscale="log", xlim=(smallest, 1), ylim=(smallest, 1.05))
    axis.set(title="Members found", xlabel="others taken for members", ylabel="members found")
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(lambda share, place: f"{100 * share:g} %")
    axis.legend(loc="lower right", fontsize=7.5)
    axis.grid(color="#E6E6E6")
    return figure
