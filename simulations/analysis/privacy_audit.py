"""Audit of a privacy mechanism: canaries give a lower bound on epsilon, which is compared with the claimed epsilon.

Shapes: M canaries, D parameters.

If the privacy unit is a client, canaries are clients. They train, and each then sends one large parameter through the
stages, engine, aggregator and noise of the run. If the unit is an example, canaries are examples of one client. The
model is then linear, each canary has the gradient of one parameter, and the DP-SGD of the run clips and adds noise.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedlearn import everyone, mean, sgd
from fedlearn.callbacks import figures
from fedlearn.core.command_line import DONE, FAILED
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.privacy_guarantee import Neighbors
from fedlearn.core.records import Examples, Round
from fedlearn.errors import SettingError, is_count, require
from fedlearn.loop.scenario import Scenario
from fedlearn.loop.training_loop import Schedule, federate, start
from fedlearn.privacy.audit import (
    CANARY_NORM,
    SIGNIFICANCE,
    AuditResult,
    Canaries,
    CanaryTrainer,
    Observer,
    ObservingEngine,
    Scores,
    audit_scores,
    draw_canaries,
    is_gaussian,
)
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.runner.config import Experiment, build_experiment
from simulations import models
from simulations.analysis.analysis_run import AnalysisRun, draw_with_style, save_results, write_report_page

DEFAULTS = {"canaries": 1000, "rounds": 1}
MIN_CANARIES = 100
DEFAULT_DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class AuditedRun:
    """An audited run and its claim.

    Attributes:
        scores: scores of the canaries, from the released parameters.
        last_round: the last audited round.
        privacy_unit: ``client`` or ``example``.
        delta: delta of the claim.
        is_gaussian: whether all releases together are one release with Gaussian noise.
    """

    scores: Scores
    last_round: Round
    privacy_unit: str
    delta: float
    is_gaussian: bool = True

    @property
    def claimed_epsilon(self) -> float | None:
        """Epsilon of the ledger; None for a run without a privacy guarantee."""
        return None if self.last_round.privacy is None else self.last_round.privacy.value


def audit(analysis: AnalysisRun) -> tuple[AuditedRun, AuditResult]:
    """Run the audited rounds and measure the lower bound.

    Raises:
        SettingError: a setting is out of range, or the settings cannot be audited.
        MissingExtra: jax-privacy is not installed.
    """
    canaries, rounds = analysis.settings["canaries"], analysis.settings["rounds"]
    enough, planned = is_count(canaries, at_least=MIN_CANARIES), analysis.plan.schedule.rounds
    require(enough, "audit.canaries", canaries, f"a whole number >= {MIN_CANARIES}", "audit.canaries=1000")
    fits = is_count(rounds) and rounds <= planned
    require(fits, "audit.rounds", rounds, f"a whole number of rounds in 1..{planned}, which are planned", "rounds=20")
    seen = _examples(analysis) if analysis.plan.privacy.kind == "example" else _clients(analysis)
    return seen, audit_scores(seen.scores, delta=seen.delta, gaussian=seen.is_gaussian)


def _audited(made: Experiment, scores: Scores, last: Round, unit: str) -> AuditedRun:
    protection = made.plan.strategy.privacy_guarantee
    claimed = None if protection is None else protection.delta
    delta = DEFAULT_DELTA if claimed is None else float(claimed)
    gaussian = protection is None or is_gaussian(last.state.ledger, protection)
    return AuditedRun(scores=scores, last_round=last, privacy_unit=unit, delta=delta, is_gaussian=gaussian)


def _clients(asked: AnalysisRun) -> AuditedRun:
    """Canaries in the place of clients. The server's optimiser is left out: it only sees what is released."""
    plan, count = asked.plan, int(asked.settings["canaries"])
    plan = replace(plan, strategy=replace(plan.strategy, server=sgd()), local=replace(plan.local, epochs=1, steps=1))
    population = Population(clients=range(count), rounds=plan.schedule.rounds)
    protection = plan.privacy.protect(plan.strategy, plan.local, population)[0].privacy_guarantee
    replaced = protection is not None and protection.neighbors is Neighbors.REPLACE
    chosen: list[Canaries] = []

    def staged(scenario: Scenario) -> Scenario:
        size = scenario.trainer.layout.num_parameters
        expected = f"at most {size}, the number of parameters of the model: each canary needs one"
        require(count <= size, "audit.canaries", count, expected, f"model=mlp, or audit.canaries={size}")
        chosen.append(draw_canaries(count, size, seed=plan.seed, is_replacement=replaced))
        trainer = CanaryTrainer(scenario.trainer, chosen[0])
        return replace(scenario, data=_one_each(scenario.data, chosen[0].participants), trainer=trainer)

    made = build_experiment(asked.cfg, plan, transform_scenario=staged)
    canaries, ear = chosen[0], Observer(chosen[0])
    last, released_D = _run(made, int(asked.settings["rounds"]), ear)
    alone = plan.privacy.kind == "local"  # what a client sends is itself the release
    seen_M = ear.observed_M if alone else released_D[canaries.index_M]
    return _audited(made, canaries.split_scores(seen_M), last, "client")


def _one_each(data: FederatedData, present: np.ndarray) -> FederatedData:
    """The clients of an audit: each has one example of a real one, and nothing is evaluated."""
    holders = [client for client in data.clients if len(data.train(client))]
    first = data.train(holders[0])
    one, none = Examples(first.x[:1], first.y[:1]), Examples(first.x[:0], first.y[:0])
    clients = tuple(present.tolist())
    return replace(data, clients=clients, names={}, train=lambda client: one, test=lambda client: none)


def _examples(asked: AnalysisRun) -> AuditedRun:
    """Canaries as the examples of one client, the release being what that client sends."""
    plan, count = asked.plan, int(asked.settings["canaries"])
    strategy = replace(plan.strategy, select=everyone(), aggregate=mean(weighting="equal"), server=sgd())
    plan, canaries = replace(plan, strategy=strategy), draw_canaries(count, count, seed=plan.seed)

    def staged(scenario: Scenario) -> Scenario:
        data = _pushed(canaries)
        framework, device = scenario.trainer.framework, scenario.trainer.device
        trainer, line = models.build_trainer("linear", data, input_shape=(count,), framework=framework, device=device)
        return Scenario(name=scenario.name, data=data, trainer=trainer, model=line)

    made = build_experiment(asked.cfg, plan, transform_scenario=staged)
    last, released_D = _run(made, int(asked.settings["rounds"]), None)
    weight = made.scenario.trainer.layout.slices["out.weight"]
    seen_M = released_D[weight][canaries.index_M]
    return _audited(made, canaries.split_scores(seen_M), last, "example")


def _pushed(canaries: Canaries) -> FederatedData:
    """Examples for a linear model with squared error: each one's gradient is, in effect, one weight's."""
    place, none = canaries.index_M[canaries.included_M], np.zeros(0, np.float32)
    x = np.zeros((len(place), len(canaries.index_M)), np.float32)
    x[np.arange(len(place)), place] = CANARY_NORM  # the bias has a thousandth of the gradient
    train = Examples(x, np.full(len(place), 1e6, np.float32))
    return FederatedData(
        task="regression",
        clients=(0,),
        num_classes=1,
        train=lambda client: train,
        test=lambda client: Examples(x[:0], none),
        source="canaries",
    )


def _run(made: Experiment, rounds: int, ear: Observer | None) -> tuple[Round, np.ndarray]:
    """The last of the audited rounds, and what all of them added to a model that began at zero."""
    plan, engine = made.plan, made.engine
    listened = ObservingEngine(engine, ear) if ear else engine
    state = start(plan.strategy, np.zeros(engine.layout.num_parameters, np.float32), engine, seed=plan.seed)
    schedule = Schedule(rounds=rounds, max_failures=plan.schedule.max_failures)
    try:
        done = list(federate(plan.strategy, listened, state, schedule=schedule, local=plan.local))
    finally:
        engine.close()
    if not done:
        raise SettingError("privacy.epsilon", plan.privacy.kind, "a budget that allows one round", "privacy.epsilon=2")
    return done[-1], np.asarray(done[-1].state.params_D, np.float64)


def verdict(claimed_epsilon: float | None, result: AuditResult) -> str:
    """Return the conclusion, in one sentence."""
    confidence = f"{1 - SIGNIFICANCE:.0%} confidence"
    seen = f"epsilon is at least {result.epsilon_lower_bound:.3g}, with {confidence}"
    if claimed_epsilon is None:
        return f"Nothing is claimed, and {seen}."
    if result.epsilon_lower_bound > claimed_epsilon:
        return (
            f"ALARM: {seen}, but {claimed_epsilon:.4g} is claimed: noise or clipping is not what the ledger believes."
        )
    if claimed_epsilon >= result.max_lower_bound:
        return (
            f"No contradiction: {seen}; but so few canaries could not refute the {claimed_epsilon:.4g} that is claimed."
        )
    limit = f"what could be seen ends at {result.max_lower_bound:.3g}"
    return f"The claim stands: {seen}, and {claimed_epsilon:.4g} is claimed ({limit})."


def run_audit(analysis: AnalysisRun) -> int:
    """Audit, write the results and the report page; return the exit code: 3 if the claim is refuted."""
    seen, found = audit(analysis)
    alarm = seen.claimed_epsilon is not None and found.epsilon_lower_bound > seen.claimed_epsilon
    text, kind = verdict(seen.claimed_epsilon, found), analysis.plan.privacy.kind
    numbers = {
        "privacy": kind,
        "unit": seen.privacy_unit,
        "canaries": analysis.settings["canaries"],
        "rounds": seen.last_round.number,
        "delta": seen.delta,
        "claimed_epsilon": seen.claimed_epsilon,
        **asdict(found),
        "significance": SIGNIFICANCE,
        "alarm": alarm,
        "verdict": text,
    }
    save_results(analysis, "audit", numbers, {"scores": draw_with_style(lambda: plot_audit(seen, found))})
    claim = "–" if seen.claimed_epsilon is None else f"{seen.claimed_epsilon:.4g}"
    written = write_report_page(
        analysis,
        title=f"Audit of privacy={kind}",
        verdict=text,
        is_alarm=alarm,
        rows=_rows(analysis, seen, found),
        table=[
            ("", "epsilon ≥", "claimed ≤", "could see", "AUC", "found at 1 % false"),
            (
                f"one {seen.privacy_unit}",
                f"{found.epsilon_lower_bound:.3g}",
                claim,
                f"{found.max_lower_bound:.3g}",
                f"{found.auc:.3f}",
                f"{found.tpr:.1%}",
            ),
        ],
        captions={"scores": caption(seen)},
    )
    sys.stdout.write(f"{text}\n saved     {analysis.folder}\n report    {written}\n")
    return FAILED if alarm else DONE


def _rows(asked: AnalysisRun, seen: AuditedRun, found: AuditResult) -> list[tuple[str, str]]:
    included, excluded = len(seen.scores.included), len(seen.scores.excluded)
    return [
        ("Mechanism", asked.plan.privacy.kind),
        ("Canaries", f"{included + excluded:,} {seen.privacy_unit}s, of which {included:,} were in"),
        ("Rounds", f"{seen.last_round.number:,}"),
        ("Delta", f"{seen.delta:g}"),
        ("Bound", f"one run, {1 - SIGNIFICANCE:.0%} confidence, the mechanism taken for {found.assumption}"),
    ]


def caption(audited: AuditedRun) -> str:
    """Return the caption of the figure."""
    return (
        f"Left: the released value at the parameter of each canary {audited.privacy_unit}, in multiples of the "
        "contribution of an included canary, for included and excluded canaries. Right: the measured lower bound on "
        "epsilon, the claimed epsilon, and the largest epsilon that this number of canaries can prove."
    )


def plot_audit(audited: AuditedRun, result: AuditResult) -> figures.Figure:
    """Draw the scores of included and excluded canaries, and the measured bound beside the claim."""
    figure = figures.new_figure(figures.WIDTH_INCHES, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _histograms(left, audited.scores)
    _bars(right, audited.claimed_epsilon, result)
    return figure


def _histograms(axis: Any, scores: Scores) -> None:
    gap = float(np.median(scores.included) - np.median(scores.excluded)) or 1.0
    middle = float(np.median(scores.excluded))
    both = {"were out": (scores.excluded, figures.CLIENTS_COLOR), "were in": (scores.included, figures.WORST_COLOR)}
    scaled = {name: ((values - middle) / abs(gap), color) for name, (values, color) in both.items()}
    every = np.concatenate([values for values, _ in scaled.values()])
    low, high = np.quantile(every, [0.001, 0.999])
    edges = np.linspace(low - 0.1, high + 0.1, 45)
    for name, (values, color) in scaled.items():
        axis.hist(np.clip(values, edges[0], edges[-1]), edges, color=color, alpha=0.6, label=name)
    axis.set(title="Canaries", xlabel="score", ylabel="canaries")
    axis.legend()


def _bars(axis: Any, claimed: float | None, found: AuditResult) -> None:
    alarm = claimed is not None and found.epsilon_lower_bound > claimed
    bars = [
        ("proved", found.epsilon_lower_bound, figures.WORST_COLOR if alarm else figures.POOLED_COLOR),
        ("provable", found.max_lower_bound, "#BBBBBB"),
    ]
    if claimed is not None:
        bars.insert(1, ("claimed", claimed, figures.TEXT_COLOR))
    names, values, colors = zip(*bars, strict=True)
    places = np.arange(len(bars))
    axis.bar(places, values, color=colors, width=0.62)
    for place, value in zip(places, values, strict=True):
        axis.annotate(f"{value:.2f}", (place, value), xytext=(0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(places, names)
    axis.tick_params(axis="x", length=0)
    axis.margins(y=0.12)
    axis.set_title("Epsilon")
