"""Gradient inversion: recover the input and the label of a client's only example from its update.

The attack reads the gradients of the model, the loss and the mechanism of the settings. It needs inputs of real numbers
and an affine first layer; it refuses other models.

Shapes: B victims, K clients of a cohort, D parameters, F inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fedlearn import clip, everyone, mean
from fedlearn.algorithm.strategy import Strategy
from fedlearn.callbacks import figure_style
from fedlearn.callbacks.tables import print_table
from fedlearn.core.arrays import holds_whole_numbers
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Examples, LocalSettings
from fedlearn.errors import FedlearnError, MissingExtra, is_count, is_number, require
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.gradient_inversion_attack import pearson_correlation
from fedlearn.privacy.mechanisms import local as local_dp
from fedlearn.privacy.mechanisms.base import Mechanism, none
from fedlearn.privacy.secagg import masked_sum
from fedlearn.runner.experiment import Experiment, build_experiment
from simulations.analysis.analysis_run import AnalysisRun, draw_with_style, save_results, write_report_page
from simulations.attacks.attacked_layers import AttackedLayers, find_layers
from simulations.attacks.observed_updates import apply_mechanism, observe_updates

Attack = Callable[[str, np.ndarray, Examples], "InversionResult"]  # (defense, updates, victims) -> result
ResponseFunction = Callable[[bytes, Any], bytes]
DEFAULTS = {"victims": 200, "clip": 1.0, "noise": [0.01, 0.1, 0.5, 1.0]}
DEFAULT_OVERRIDES = ("scenario=digits", "local.learning_rate=1.0", "strategy.weighting=equal")
NUM_IMAGES_SHOWN = 8  # victims in the figure
COHORT_SIZE = 20  # clients of one masked sum


@dataclass(frozen=True, kw_only=True)
class InversionResult:
    """Result of the attack under one defense.

    Attributes:
        defense: description of the defense.
        epsilon: claimed epsilon for one update; None without a claim.
        delta: claimed delta; None without a claim.
        label_accuracy: share of labels that the attack recovers; None if no parameter reveals the label.
        image_correlation: mean correlation of recovered and true inputs.
        images_BF: recovered inputs.
    """

    defense: str
    epsilon: float | None
    delta: float | None
    label_accuracy: float | None
    image_correlation: float
    images_BF: np.ndarray


def run_gradient_inversion(analysis: AnalysisRun) -> int:
    """Attack the update of each victim under each defense, and write results and report. Return the exit code."""
    experiment, victims = _build_experiment(analysis)
    try:
        results = list(_run_attacks(analysis, experiment, victims))
    finally:
        experiment.engine.close()
    text = verdict(results, analysis.settings["clip"])
    numbers = [_to_json(result) for result in results]
    named_figures = {"images": draw_with_style(lambda: plot_images(results, victims))}
    save_results(
        analysis,
        "privacy_attack",
        {"kind": "gradient_inversion", "victims": len(victims), "verdict": text, "results": numbers},
        named_figures,
    )
    return _write_report(analysis, results, text)


def _write_report(analysis: AnalysisRun, results: Sequence[InversionResult], text: str) -> int:
    table = [("protection", "epsilon", "labels recovered", "input correlation")]
    table += [(r.defense, format_epsilon(r), format_share(r, 1), f"{r.image_correlation:.3f}") for r in results]
    page = write_report_page(
        analysis,
        title="Gradient inversion",
        verdict=text,
        is_alarm=False,
        rows=[
            ("Update", "one example, one step of SGD"),
            ("Input", "from the gradients of the first layer's weight and bias (Phong et al. 2018)"),
            ("Label", "from the gradient of the last bias (iDLG)"),
            ("Claim", f"for one update, at delta {next((r.delta for r in results if r.delta), 1e-5):g}"),
        ],
        table=table,
        captions={"images": "Inputs that a server recovers from single updates, under each protection."},
    )
    print_table(table)
    sys.stdout.write(f"{text}\n saved     {analysis.folder}\n report    {page}\n")
    return 0


def format_epsilon(result: InversionResult) -> str:
    """Return the claimed epsilon with three digits, or a dash without a claim."""
    return "–" if result.epsilon is None else f"{result.epsilon:.3g}"


def format_share(result: InversionResult, digits: int = 0) -> str:
    """Return the share of recovered labels in percent, or a dash if no parameter reveals them."""
    return "–" if result.label_accuracy is None else f"{result.label_accuracy:.{digits}%}"


def verdict(results: Sequence[InversionResult], clip_norm: float) -> str:
    """Return the conclusion, in one or two sentences."""
    bare, clipped = results[0], results[1]
    unprotected = (
        f"From an unprotected update, the attack recovers {format_share(bare)} of the labels, and inputs with a "
        f"correlation of {bare.image_correlation:.2f}"
    )
    with_clipping = f"with clipping to {clip_norm:g}, {format_share(clipped)} and {clipped.image_correlation:.2f}"
    useless = clipped.image_correlation > 0.9 * bare.image_correlation
    return f"{unprotected}; {with_clipping}{': clipping alone protects nothing' if useless else ''}."


def _to_json(result: InversionResult) -> dict[str, Any]:
    names = ("defense", "epsilon", "delta", "label_accuracy", "image_correlation")
    return {name: getattr(result, name) for name in names}


def _build_experiment(analysis: AnalysisRun) -> tuple[Experiment, Examples]:
    """Build an experiment in which each client has one example and takes one step of SGD."""
    settings, plan = analysis.settings, analysis.plan
    count, noise = settings["victims"], settings["noise"]
    require(is_count(count), "privacy_attack.victims", count, "a whole number >= 1", "privacy_attack.victims=200")
    levels = isinstance(noise, list) and all(is_number(z, at_least=0) and 0 < z < float("inf") for z in noise)
    require(levels, "privacy_attack.noise", noise, "a list of numbers > 0", "'privacy_attack.noise=[0.1,1]'")
    victims: list[Examples] = []

    def with_victims(scenario: Scenario) -> Scenario:
        _require_numbers(scenario)
        victims.append(_draw_victims(scenario.data, count, plan.seed))
        return replace(scenario, data=_one_example_each(scenario.data, victims[0]))

    local = LocalSettings(steps=1, batch_size=1, learning_rate=plan.local.learning_rate)
    strategy = Strategy(
        select=everyone(), aggregate=mean(weighting="equal"), server=plan.strategy.server, local=plan.strategy.local
    )
    bare = replace(plan, strategy=strategy, local=local, privacy=none())
    return build_experiment(analysis.cfg, bare, transform_scenario=with_victims), victims[0]


def _require_numbers(scenario: Scenario) -> None:
    data = scenario.data
    numbers = not holds_whole_numbers(data.train(data.clients[0]).x)
    expected = "a scenario with inputs of real numbers: the attack does not recover tokens"
    require(numbers, "scenario", scenario.name, expected, "scenario=digits")


def _draw_victims(data: FederatedData, count: int, seed: int) -> Examples:
    parts = [data.train(client) for client in data.clients]
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    rows = generator(seed, Purpose.SHADOWS).choice(len(y), min(count, len(y)), replace=False)
    return Examples(x[rows], y[rows])


def _one_example_each(data: FederatedData, victims: Examples) -> FederatedData:
    def train(client: int) -> Examples:
        return Examples(victims.x[client : client + 1], victims.y[client : client + 1])

    def test(client: int) -> Examples:
        return Examples(victims.x[:0], victims.y[:0])

    return replace(data, clients=range(len(victims)), names={}, train=train, test=test)


def _run_attacks(analysis: AnalysisRun, experiment: Experiment, victims: Examples) -> Iterator[InversionResult]:
    plan, bound = experiment.plan, analysis.settings["clip"]
    bare_BD = observe_updates(experiment, plan.strategy, plan.local)
    layers = find_layers(experiment.engine.layout, -bare_BD, victims, experiment.scenario.model)
    attack = partial(_attack_updates, experiment.engine.layout, layers)
    yield attack("nothing", bare_BD, victims)
    clipped = replace(plan.strategy, stages=(*plan.strategy.stages, clip(bound)))
    yield attack(f"clipped to {bound:g}", observe_updates(experiment, clipped, plan.local), victims)
    for noise in analysis.settings["noise"]:
        mechanism = local_dp(clip_norm=bound, noise_multiplier=float(noise))
        yield _attack_mechanism(attack, f"clipped, noise {noise:g}", mechanism, experiment, victims)
    with suppress(MissingExtra):  # the protocol needs cryptography
        yield attack("masked", *_masked_updates(experiment, bound, victims))
    kind = analysis.plan.privacy.kind
    if kind not in ("none", "secagg", "distributed"):
        yield _attack_mechanism(attack, f"privacy={kind}", analysis.plan.privacy, experiment, victims)


def _attack_mechanism(
    attack: Attack, defense: str, mechanism: Mechanism, experiment: Experiment, victims: Examples
) -> InversionResult:
    strategy, local, epsilon, delta = apply_mechanism(mechanism, experiment, num_examples=1)
    result = attack(defense, observe_updates(experiment, strategy, local), victims)
    return replace(result, epsilon=epsilon, delta=delta)


def _attack_updates(
    layout: Layout, layers: AttackedLayers, defense: str, delta_BD: np.ndarray, victims: Examples
) -> InversionResult:
    """Recover inputs and labels from updates.

    The update of one SGD step is the negative gradient times the learning rate. The attacks ignore this factor.
    """
    gradient_BD = -delta_BD[:, : layout.num_parameters]
    inputs_BF, labels_B = layers.inputs(layout, gradient_BD), layers.labels(layout, gradient_BD)
    true_BF = victims.x.reshape(len(victims), -1)
    return InversionResult(
        defense=defense,
        epsilon=None,
        delta=None,
        label_accuracy=None if labels_B is None else float(np.mean(labels_B == victims.y)),
        image_correlation=float(np.mean(pearson_correlation(inputs_BF, true_BF))),
        images_BF=inputs_BF,
    )


def _masked_updates(experiment: Experiment, bound: float, victims: Examples) -> tuple[np.ndarray, Examples]:
    """Run secure aggregation. Return the masked vectors that the server receives, and their victims."""
    settings = masked_sum.Masking(clip_norm=bound, cohort=COHORT_SIZE, protocol="full")
    strategy = settings.protect(experiment.plan.strategy)
    integers_BD = observe_updates(experiment, strategy, experiment.plan.local)
    masked_BD = np.concatenate(
        [
            _mask_vectors(integers_BD[start : start + COHORT_SIZE])
            for start in range(0, len(integers_BD) - 1, COHORT_SIZE)
        ]
    )
    code = settings.fixed_point(COHORT_SIZE)
    part = Examples(victims.x[: len(masked_BD)], victims.y[: len(masked_BD)])
    return np.stack([code.decode(row_D) for row_D in masked_BD]), part


def _mask_vectors(integers_KD: np.ndarray) -> np.ndarray:
    """Run one round of secure aggregation, and return the masked vectors that the server receives."""
    from fedlearn.privacy.secagg import in_memory
    from fedlearn.privacy.secagg.messages import MaskedVector, decode

    rows = dict(enumerate(integers_KD))
    clients, registered = in_memory.create_clients(rows)
    session = in_memory.create_session(integers_KD, rows, threshold=len(rows) // 2 + 1, round=1, run=b"attacked")
    masked: dict[int, np.ndarray] = {}

    def observe(number: int, respond: ResponseFunction) -> ResponseFunction:
        def observed(request: bytes, vector: Any) -> bytes:
            response = respond(request, vector)
            with suppress(FedlearnError):  # the response of another stage
                masked[number] = np.frombuffer(decode(response, MaskedVector).vector, integers_KD.dtype)
            return response

        return observed

    for number, client in clients.items():
        client.respond = observe(number, client.respond)  # type: ignore[method-assign, assignment]
    in_memory.run_protocol(session, clients, registered, rows)
    return np.stack([masked[number] for number in sorted(masked)])


def plot_images(results: Sequence[InversionResult], victims: Examples) -> figure_style.Figure:
    """Draw the first images, and the recovered images under each protection."""
    num_images = min(NUM_IMAGES_SHOWN, len(victims))
    shape = victims.x.shape[1:3]
    rows: list[tuple[str, str, np.ndarray]] = [("original", "", victims.x.reshape(len(victims), -1))]
    rows += [
        (r.defense, f"labels {format_share(r)}\ninputs {round(r.image_correlation, 2) + 0:.2f}", r.images_BF)
        for r in results
    ]
    figure = figure_style.new_figure(figure_style.WIDTH_INCHES, 0.62 * len(rows) + 0.2)
    axes = figure.subplots(len(rows), num_images + 2, width_ratios=[2.6, *[1] * num_images, 1.7], squeeze=False)
    for axis_row, (name, numbers, images_BF) in zip(axes, rows, strict=True):
        for axis in axis_row:
            axis.set_axis_off()
        axis_row[0].text(1, 0.5, name, ha="right", va="center", transform=axis_row[0].transAxes)
        axis_row[-1].text(0, 0.5, numbers, ha="left", va="center", transform=axis_row[-1].transAxes)
        for axis, image_F in zip(axis_row[1:-1], images_BF, strict=False):
            image = image_F.reshape(*shape, -1)[..., 0] if victims.x.ndim == 4 else image_F.reshape(1, -1)
            axis.imshow(image, cmap="gray", aspect="auto")  # scaled to the range of the input
    return figure
