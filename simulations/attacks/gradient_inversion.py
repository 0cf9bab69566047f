"""Gradient inversion: the image and the label of a client's one example, from its update.

Shapes: B victims, D parameters laid flat, F pixels, O outputs of the first layer, C classes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedlearn import clip, everyone, mean
from fedlearn.algorithm.strategy import Strategy
from fedlearn.callbacks import figures
from fedlearn.callbacks.tables import print_table
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Examples, LocalSettings
from fedlearn.errors import FedlearnError, MissingExtra, is_count, is_number, require
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.gradient_inversion_attack import pearson_correlation, reconstruct_inputs, reconstruct_labels
from fedlearn.privacy.mechanisms import local as local_dp
from fedlearn.privacy.mechanisms.base import Mechanism, none
from fedlearn.privacy.secagg import masked_sum
from fedlearn.runner.config import Experiment, build_experiment
from simulations.analysis.analysis_run import AnalysisRun, draw_with_style, save_results, write_report_page
from simulations.attacks.observed_updates import apply_mechanism, observe_updates

ResponseFunction = Callable[[bytes, Any], bytes]
DEFAULTS = {"victims": 200, "clip": 1.0, "noise": [0.01, 0.1, 0.5, 1.0]}
DEFAULT_OVERRIDES = ("scenario=digits", "local.learning_rate=1.0", "strategy.weighting=equal")
NUM_IMAGES_SHOWN = 8  # victims in the picture
COHORT_SIZE = 20  # clients of one sum


@dataclass(frozen=True, kw_only=True)
class InversionResult:
    """What one protection let through.

    Attributes:
        defense: in words.
        epsilon: that it claims for one such update, at ``delta``; None: it claims nothing.
        delta: of the claim.
        label_accuracy: share of labels found.
        image_correlation: of recovered with true images, mean.
        images_BF: recovered.
    """

    defense: str
    epsilon: float | None
    delta: float | None
    label_accuracy: float
    image_correlation: float
    images_BF: np.ndarray


def run_gradient_inversion(analysis: AnalysisRun) -> int:
    """Attack the update of each victim under each protection, and write it up."""
    made, victims = _experiment(analysis)
    try:
        results = list(_attacked(analysis, made, victims))
    finally:
        made.engine.close()
    text = verdict(results, analysis.settings["clip"])
    numbers = [_plain(result) for result in results]
    drawn = {"images": draw_with_style(lambda: plot_images(results, victims))}
    save_results(
        analysis,
        "privacy_attack",
        {"kind": "gradient_inversion", "victims": len(victims), "verdict": text, "results": numbers},
        drawn,
    )
    return _written(analysis, results, text)


def _written(asked: AnalysisRun, results: Sequence[InversionResult], text: str) -> int:
    table = [("protection", "epsilon", "labels found", "correlation of images")]
    table += [(r.defense, format_epsilon(r), f"{r.label_accuracy:.1%}", f"{r.image_correlation:.3f}") for r in results]
    written = write_report_page(
        asked,
        title="Gradient inversion",
        verdict=text,
        is_alarm=False,
        rows=[
            ("Update", "of one example, one step of SGD"),
            ("Image", "from the gradients of the first layer's weight and bias (Phong et al. 2018)"),
            ("Label", "from the gradient of the last bias (iDLG)"),
            ("Claim", f"for one update, at delta {next((r.delta for r in results if r.delta), 1e-5):g}"),
        ],
        table=table,
        captions={"images": "Images that a server recovers from single updates, under each protection."},
    )
    print_table(table)
    sys.stdout.write(f"{text}\n saved     {asked.folder}\n report    {written}\n")
    return 0


def format_epsilon(result: InversionResult) -> str:
    """Epsilon as a reader wants it."""
    return "–" if result.epsilon is None else f"{result.epsilon:.3g}"


def verdict(results: Sequence[InversionResult], clip_norm: float) -> str:
    """What follows, in a sentence."""
    bare, clipped = results[0], results[1]
    seen = (
        f"{bare.label_accuracy:.0%} of labels and images with a correlation of {bare.image_correlation:.2f} come back"
    )
    same = f"clipped to {clip_norm:g} it is {clipped.label_accuracy:.0%} and {clipped.image_correlation:.2f}"
    moral = ": clipping alone protects nothing" if clipped.image_correlation > 0.9 * bare.image_correlation else ""
    return f"From a bare update {seen}; {same}{moral}."


def _plain(result: InversionResult) -> dict[str, Any]:
    names = ("defense", "epsilon", "delta", "label_accuracy", "image_correlation")
    return {name: getattr(result, name) for name in names}


def _experiment(asked: AnalysisRun) -> tuple[Experiment, Examples]:
    """Clients that hold one example each, which they take one plain step on."""
    own, plan = asked.settings, asked.plan
    count, noise = own["victims"], own["noise"]
    require(is_count(count), "privacy_attack.victims", count, "a whole number >= 1", "privacy_attack.victims=200")
    levels = isinstance(noise, list) and all(is_number(z, at_least=0) and 0 < z < float("inf") for z in noise)
    require(levels, "privacy_attack.noise", noise, "a list of numbers > 0", "'privacy_attack.noise=[0.1,1]'")
    victims: list[Examples] = []

    def staged(scenario: Scenario) -> Scenario:
        _require_images(scenario)
        victims.append(_drawn(scenario.data, count, plan.seed))
        return replace(scenario, data=_one_each(scenario.data, victims[0]))

    local = LocalSettings(steps=1, batch_size=1, learning_rate=plan.local.learning_rate)
    strategy = Strategy(select=everyone(), aggregate=mean(weighting="equal"), local=plan.strategy.local)
    bare = replace(plan, strategy=strategy, local=local, privacy=none())
    return build_experiment(asked.cfg, bare, transform_scenario=staged), victims[0]


def _require_images(scenario: Scenario) -> None:
    data, layout = scenario.data, scenario.trainer.layout
    images = data.train(data.clients[0]).x.ndim == 4 and data.task == "multiclass"
    require(images, "scenario", scenario.name, "one that classifies images", "scenario=digits")
    expected = "linear or mlp: the attack needs an affine first layer"
    require(_first(layout) is not None, "model", scenario.model, expected, "model=mlp")


def _first(layout: Layout) -> str | None:
    """The name of the layer that sees the input, if that is affine."""
    shapes = {leaf.name: leaf.shape for leaf in layout.leaves}
    if any(len(shape) == 4 for shape in shapes.values()):  # a convolution sees it
        return None
    return next((name for name in ("hidden_0", "out") if f"{name}.weight" in shapes), None)


def _drawn(data: FederatedData, count: int, seed: int) -> Examples:
    parts = [data.train(client) for client in data.clients]
    x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
    rows = generator(seed, Purpose.SHADOWS).choice(len(y), min(count, len(y)), replace=False)
    return Examples(x[rows], y[rows])


def _one_each(data: FederatedData, victims: Examples) -> FederatedData:
    def one(client: int) -> Examples:
        return Examples(victims.x[client : client + 1], victims.y[client : client + 1])

    def nothing(client: int) -> Examples:
        return Examples(victims.x[:0], victims.y[:0])

    return replace(data, clients=range(len(victims)), names={}, train=one, test=nothing)


def _attacked(asked: AnalysisRun, made: Experiment, victims: Examples) -> Iterator[InversionResult]:
    plan, bound = made.plan, asked.settings["clip"]
    yield _result("nothing", made, plan.strategy, plan.local, victims)
    clipped = replace(plan.strategy, stages=(*plan.strategy.stages, clip(bound)))
    yield _result(f"clipped to {bound:g}", made, clipped, plan.local, victims)
    for noise in asked.settings["noise"]:
        mechanism = local_dp(clip_norm=bound, noise_multiplier=float(noise))
        yield _protected(f"clipped, noise {noise:g}", mechanism, made, victims)
    with suppress(MissingExtra):  # the protocol needs cryptography
        yield _masked(made, bound, victims)
    kind = asked.plan.privacy.kind
    if kind not in ("none", "secagg", "distributed"):
        yield _protected(f"privacy={kind}", asked.plan.privacy, made, victims)


def _protected(words: str, mechanism: Mechanism, made: Experiment, victims: Examples) -> InversionResult:
    strategy, local, epsilon, delta = apply_mechanism(mechanism, made, num_examples=1)
    return replace(_result(words, made, strategy, local, victims), epsilon=epsilon, delta=delta)


def _result(
    words: str, made: Experiment, strategy: Strategy, local: LocalSettings, victims: Examples
) -> InversionResult:
    return _judged(words, made, observe_updates(made, strategy, local), victims)


def _judged(words: str, made: Experiment, delta_BD: np.ndarray, victims: Examples) -> InversionResult:
    """Plain SGD moves by the gradient times the learning rate, whose size no attack here depends on."""
    layout = made.engine.layout
    gradient_BD = -delta_BD[:, : layout.num_parameters]
    first = _first(layout)
    weights_BOF = gradient_BD[:, layout.slices[f"{first}.weight"]]
    biases_BO = gradient_BD[:, layout.slices[f"{first}.bias"]]
    images_BF = reconstruct_inputs(weights_BOF.reshape(*biases_BO.shape, -1), biases_BO)
    found_B = reconstruct_labels(gradient_BD[:, layout.slices["out.bias"]])
    true_BF = victims.x.reshape(len(victims), -1)
    return InversionResult(
        defense=words,
        epsilon=None,
        delta=None,
        label_accuracy=float(np.mean(found_B == victims.y)),
        image_correlation=float(np.mean(pearson_correlation(images_BF, true_BF))),
        images_BF=images_BF,
    )


def _masked(made: Experiment, bound: float, victims: Examples) -> InversionResult:
    """The real protocol, and what its server holds of each client before it adds them up."""
    settings = masked_sum.Masking(clip_norm=bound, cohort=COHORT_SIZE, protocol="full")
    strategy = settings.protect(made.plan.strategy)
    integers_BD = observe_updates(made, strategy, made.plan.local)
    seen_BD = np.concatenate(
        [
            _on_the_wire(integers_BD[start : start + COHORT_SIZE])
            for start in range(0, len(integers_BD) - 1, COHORT_SIZE)
        ]
    )
    code = settings.fixed_point(COHORT_SIZE)
    part = Examples(victims.x[: len(seen_BD)], victims.y[: len(seen_BD)])
    return _judged("masked", made, np.stack([code.decode(row_D) for row_D in seen_BD]), part)


def _on_the_wire(integers_KD: np.ndarray) -> np.ndarray:
    """The masked vectors of one round of secure aggregation."""
    from fedlearn.privacy.secagg import in_memory
    from fedlearn.privacy.secagg.messages import MaskedVector, decode

    rows = dict(enumerate(integers_KD))
    clients, registered = in_memory.create_clients(rows)
    session = in_memory.create_session(integers_KD, rows, threshold=len(rows) // 2 + 1, round=1, run=b"attacked")
    seen: dict[int, np.ndarray] = {}

    def overhear(client: int, answer: ResponseFunction) -> ResponseFunction:
        def heard(request: bytes, vector: Any) -> bytes:
            reply = answer(request, vector)
            with suppress(FedlearnError):  # another stage's reply
                seen[client] = np.frombuffer(decode(reply, MaskedVector).vector, integers_KD.dtype)
            return reply

        return heard

    for client, one in clients.items():
        one.respond = overhear(client, one.respond)  # type: ignore[method-assign, assignment]
    in_memory.run_protocol(session, clients, registered, rows)
    return np.stack([seen[client] for client in sorted(seen)])


def plot_images(results: Sequence[InversionResult], victims: Examples) -> figures.Figure:
    """The first images, and what came back of them under each protection."""
    shown = min(NUM_IMAGES_SHOWN, len(victims))
    shape = victims.x.shape[1:3]
    rows: list[tuple[str, str, np.ndarray]] = [("original", "", victims.x.reshape(len(victims), -1))]
    rows += [
        (r.defense, f"labels {r.label_accuracy:.0%}\nimages {round(r.image_correlation, 2) + 0:.2f}", r.images_BF)
        for r in results
    ]
    figure = figures.new_figure(figures.WIDTH_INCHES, 0.62 * len(rows) + 0.2)
    axes = figure.subplots(len(rows), shown + 2, width_ratios=[2.6, *[1] * shown, 1.7], squeeze=False)
    for axis_row, (name, numbers, images_BF) in zip(axes, rows, strict=True):
        for axis in axis_row:
            axis.set_axis_off()
        axis_row[0].text(1, 0.5, name, ha="right", va="center", transform=axis_row[0].transAxes)
        axis_row[-1].text(0, 0.5, numbers, ha="left", va="center", transform=axis_row[-1].transAxes, fontsize=7.5)
        for axis, image_F in zip(axis_row[1:-1], images_BF, strict=False):
            axis.imshow(image_F.reshape(*shape, -1)[..., 0], cmap="gray")  # stretched to its own range
    return figure
