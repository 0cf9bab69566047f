"""Audit a privacy mechanism: canaries give a lower bound on epsilon, which is compared with the claimed epsilon.

Shapes: M canaries, D parameters.

If the privacy unit is a client, canaries are clients. They train, and each then sends one large parameter through the
stages, engine, aggregator and noise of the run. If the unit is an example, canaries are examples of one client. The
model is then linear, and each canary has the gradient of one parameter. The DP-SGD of the run clips and adds noise.
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
        is_gaussian: True if all releases together are one release with Gaussian noise.
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
    audited = _audit_example_level(analysis) if is_example_level else _audit_client_level(analysis)
    return audited, audit_scores(audited.scores, delta=audited.delta, gaussian=audited.is_gaussian)


def _build_audited_run(experiment: Experiment, scores: Scores, last: Round, unit: str) -> AuditedRun:
    guarantee = experiment.plan.strategy.privacy_guarantee
    claimed = None if guarantee is None else guarantee.delta
    delta = DEFAULT_DELTA if claimed is None else float(claimed)
    gaussian = guarantee is None or is_gaussian(last.state.ledger, guarantee)
    return AuditedRun(scores=scores, last_round=last, privacy_unit=unit, delta=delta, is_gaussian=gaussian)


def _audit_client_level(analysis: AnalysisRun) -> AuditedRun:
    """Audit with clients as canaries.

    The server optimizer is plain SGD: it only processes released values, so it does not change the privacy.
    """
    plan, count = analysis.plan, int(analysis.settings["canaries"])
    plan = replace(plan, strategy=replace(plan.strategy, server=sgd()), local=replace(plan.local, epochs=1, steps=1))
    population = Population(clients=range(count), rounds=plan.schedule.rounds)
    guarantee = plan.privacy.protect(plan.strategy, plan.local, population)[0].privacy_guarantee
    is_replacement = guarantee is not None and guarantee.neighbors is Neighbors.REPLACE
    drawn: list[Canaries] = []

    def with_canaries(scenario: Scenario) -> Scenario:
        size = scenario.trainer.layout.num_parameters
        expected = f"at most {size}, the number of parameters of the model: each canary needs one"
        require(count <= size, "audit.canaries", count, expected, f"model=mlp, or audit.canaries={size}")
        drawn.append(draw_canaries(count, size, seed=plan.seed, is_replacement=is_replacement))
        trainer = CanaryTrainer(scenario.trainer, drawn[0])
        return replace(scenario, data=_one_example_each(scenario.data, drawn[0].participants), trainer=trainer)

    experiment = build_experiment(analysis.cfg, plan, transform_scenario=with_canaries)
    canaries, observer = drawn[0], Observer(drawn[0])
    last, released_D = _run(experiment, int(analysis.settings["rounds"]), observer)
    is_local = plan.privacy.kind == "local"  # each update is itself a release
    observed_M = observer.observed_M if is_local else released_D[canaries.index_M]
    return _build_audited_run(experiment, canaries.split_scores(observed_M), last, "client")


def _one_example_each(data: FederatedData, participants: np.ndarray) -> FederatedData:
    """Return the data of an audit: each client has one real training example and no test example."""
    real_clients = [client for client in data.clients if len(data.train(client))]
    first = data.train(real_clients[0])
    train, test = Examples(first.x[:1], first.y[:1]), Examples(first.x[:0], first.y[:0])
    clients = tuple(participants.tolist())
    return replace(data, clients=clients, names={}, train=lambda client: train, test=lambda client: test)


def _audit_example_level(analysis: AnalysisRun) -> AuditedRun:
    """Audit with examples of one client as canaries. The release is the update of this client."""
    plan, count = analysis.plan, int(analysis.settings["canaries"])
    strategy = replace(plan.strategy, select=everyone(), aggregate=mean(weighting="equal"), server=sgd())
    plan, canaries = replace(plan, strategy=strategy), draw_canaries(count, count, seed=plan.seed)

    def with_canaries(scenario: Scenario) -> Scenario:
        data = _canary_data(canaries)
        framework, device = scenario.trainer.framework, scenario.trainer.device
        trainer, line = models.build_trainer("linear", data, input_shape=(count,), framework=framework, device=device)
        return Scenario(name=scenario.name, data=data, trainer=trainer, model=line)

    experiment = build_experiment(analysis.cfg, plan, transform_scenario=with_canaries)
    last, released_D = _run(experiment, int(analysis.settings["rounds"]), None)
    weight = experiment.scenario.trainer.layout.slices["out.weight"]
    observed_M = released_D[weight][canaries.index_M]
    return _build_audited_run(experiment, canaries.split_scores(observed_M), last, "example")


def _canary_data(canaries: Canaries) -> FederatedData:
    """Return the examples of one client, for a linear model with squared error.

    The gradient of each example is almost entirely the gradient of one weight.
    """
    index, no_targets = canaries.index_M[canaries.included_M], np.zeros(0, np.float32)
    x = np.zeros((len(index), len(canaries.index_M)), np.float32)
    x[np.arange(len(index)), index] = CANARY_NORM  # the bias has a thousandth of the gradient
    train = Examples(x, np.full(len(index), 1e6, np.float32))
    return FederatedData(
        task="regression",
        clients=(0,),
        num_classes=1,
        train=lambda client: train,
        test=lambda client: Examples(x[:0], no_targets),
        source="canaries",
    )


def _run(experiment: Experiment, rounds: int, observer: Observer | None) -> tuple[Round, np.ndarray]:
    """Run the audited rounds with a model that starts at zero. Return the last round and the final parameters."""
    plan, engine = experiment.plan, experiment.engine
    observed = ObservingEngine(engine, observer) if observer else engine
    state = start(plan.strategy, np.zeros(engine.layout.num_parameters, np.float32), engine, seed=plan.seed)
    schedule = Schedule(rounds=rounds, max_failures=plan.schedule.max_failures)
    try:
        done = list(federate(plan.strategy, observed, state, schedule=schedule, local=plan.local))
    finally:
        engine.close()
    if not done:
        raise SettingError("privacy", plan.privacy.kind, "a budget for one round or more", "privacy.epsilon=2")
    return done[-1], np.asarray(done[-1].state.params_D, np.float64)


def verdict(claimed_epsilon: float | None, result: AuditResult) -> str:
    """Return the conclusion, in one or two sentences."""
    confidence = f"{1 - SIGNIFICANCE:.0%} confidence"
    bound = f"epsilon is at least {result.epsilon_lower_bound:.3g} with {confidence}"
    if claimed_epsilon is None:
        return f"The run claims no epsilon; {bound}."
    claim = f"the claimed epsilon is {claimed_epsilon:.4g}"
    if result.epsilon_lower_bound > claimed_epsilon:
        return f"ALARM: {bound}, but {claim}. Noise or clipping differs from the ledger."
    if claimed_epsilon >= result.max_lower_bound:
        return f"No contradiction: {bound}, and {claim}. This number of canaries is too small to refute it."
    return f"The claim holds: {bound}, and {claim}. The largest provable bound is {result.max_lower_bound:.3g}."


def run_audit(analysis: AnalysisRun) -> int:
    """Audit, write results and report page, and return the exit code. It is 3 if the claim is refuted."""
    audited, result = audit(analysis)
    alarm = audited.claimed_epsilon is not None and result.epsilon_lower_bound > audited.claimed_epsilon
    text, kind = verdict(audited.claimed_epsilon, result), analysis.plan.privacy.kind
    numbers = {
        "privacy": kind,
        "unit": audited.privacy_unit,
        "canaries": analysis.settings["canaries"],
        "rounds": audited.last_round.number,
        "delta": audited.delta,
        "claimed_epsilon": audited.claimed_epsilon,
        **asdict(result),
        "significance": SIGNIFICANCE,
        "alarm": alarm,
        "verdict": text,
    }
    save_results(analysis, "audit", numbers, {"scores": draw_with_style(lambda: plot_audit(audited, result))})
    claim = "–" if audited.claimed_epsilon is None else f"{audited.claimed_epsilon:.4g}"
    page = write_report_page(
        analysis,
        title=f"Audit of privacy={kind}",
        verdict=text,
        is_alarm=alarm,
        rows=_rows(analysis, audited, result),
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
    sys.stdout.write(f"{text}\n saved     {analysis.folder}\n report    {page}\n")
    return FAILED if alarm else DONE


def _rows(analysis: AnalysisRun, audited: AuditedRun, result: AuditResult) -> list[tuple[str, str]]:
    included, excluded = len(audited.scores.included), len(audited.scores.excluded)
    return [
        ("Mechanism", analysis.plan.privacy.kind),
        ("Canaries", f"{included + excluded:,} {audited.privacy_unit}s, {included:,} of them included"),
        ("Rounds", f"{audited.last_round.number:,}"),
        ("Delta", f"{audited.delta:g}"),
        ("Bound", f"one run, {1 - SIGNIFICANCE:.0%} confidence, assumed mechanism: {result.assumption}"),
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
    groups = {"excluded": (scores.excluded, figures.CLIENTS_COLOR), "included": (scores.included, figures.WORST_COLOR)}
    scaled = {name: ((values - middle) / abs(gap), color) for name, (values, color) in groups.items()}
    low, high = np.quantile(np.concatenate([values for values, _ in scaled.values()]), [0.001, 0.999])
    edges = np.linspace(low - 0.1, high + 0.1, 45)
    for name, (values, color) in scaled.items():
        axis.hist(np.clip(values, edges[0], edges[-1]), edges, color=color, alpha=0.6, label=name)
    axis.set(title="Canaries", xlabel="score", ylabel="canaries")
    axis.legend()


def _bars(axis: Any, claimed: float | None, result: AuditResult) -> None:
    alarm = claimed is not None and result.epsilon_lower_bound > claimed
    bars = [
        ("proved", result.epsilon_lower_bound, figures.WORST_COLOR if alarm else figures.POOLED_COLOR),
        ("provable", result.max_lower_bound, "#BBBBBB"),
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
