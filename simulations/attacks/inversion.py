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

from fedlearn import clip, everyone, masking, mean
from fedlearn.config import Experiment, experiment
from fedlearn.data.federated import FederatedData
from fedlearn.errors import FedlearnError, MissingExtra, is_count, is_number, require
from fedlearn.layout import Layout
from fedlearn.privacy.attacks import correlation, inputs_from, labels_from
from fedlearn.privacy.mechanism import Mechanism, none
from fedlearn.privacy.mechanisms import local as local_dp
from fedlearn.records import Examples, LocalSettings
from fedlearn.scenario import Scenario
from fedlearn.seeds import Purpose, generator
from fedlearn.strategy import Strategy
from simulations import figures
from simulations.attacks.uploads import protected, uploads
from simulations.inquiry import Inquiry, page, save, styled

Answer = Callable[[bytes, Any], bytes]
DEFAULTS = {"victims": 200, "clip": 1.0, "noise": [0.01, 0.1, 0.5, 1.0]}
PRESET = ("scenario=digits", "local.learning_rate=1.0", "strategy.weighting=equal")
SHOWN = 8  # victims in the picture
GROUP = 20  # clients of one sum


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What one protection let through.

    Attributes:
        protection: in words.
        epsilon: that it claims for one such update, at ``delta``; None: it claims nothing.
        delta: of the claim.
        labels: share of labels found.
        correlation: of recovered with true images, mean.
        images_BF: recovered.
    """

    protection: str
    epsilon: float | None
    delta: float | None
    labels: float
    correlation: float
    images_BF: np.ndarray


def invert(asked: Inquiry) -> int:
    """Attack the update of each victim under each protection, and write it up."""
    made, victims = _experiment(asked)
    try:
        results = list(_attacked(asked, made, victims))
    finally:
        made.engine.close()
    text = verdict(results, asked.own["clip"])
    numbers = [_plain(result) for result in results]
    drawn = {"images": styled(lambda: picture(results, victims))}
    save(asked, "attack", {"kind": "inversion", "victims": len(victims), "verdict": text, "results": numbers}, drawn)
    return _written(asked, results, text)


def _written(asked: Inquiry, results: Sequence[Attacked], text: str) -> int:
    table = [("protection", "epsilon", "labels found", "correlation of images")]
    table += [(r.protection, claim(r), f"{r.labels:.1%}", f"{r.correlation:.3f}") for r in results]
    written = page(
        asked,
        title="Gradient inversion",
        verdict=text,
        alarm=False,
        rows=[
            ("Update", "of one example, one step of SGD"),
            ("Image", "from the gradients of the first layer's weight and bias (Phong et al. 2018)"),
            ("Label", "from the gradient of the last bias (iDLG)"),
            ("Claim", f"for one update, at delta {next((r.delta for r in results if r.delta), 1e-5):g}"),
        ],
        table=table,
        captions={"images": "Images that a server recovers from single updates, under each protection."},
    )
    width = max(len(result.protection) for result in results)
    for result in results:
        sys.stdout.write(
            f" {result.protection:<{width}}  labels {result.labels:6.1%}   images {result.correlation:6.3f}"
            f"   epsilon {claim(result)}\n"
        )
    sys.stdout.write(f"{text}\n saved     {asked.folder}\n report    {written}\n")
    return 0


def claim(result: Attacked) -> str:
    """Epsilon as a reader wants it."""
    return "–" if result.epsilon is None else f"{result.epsilon:.3g}"


def verdict(results: Sequence[Attacked], bound: float) -> str:
    """What follows, in a sentence."""
    bare, clipped = results[0], results[1]
    seen = f"{bare.labels:.0%} of labels and images with a correlation of {bare.correlation:.2f} come back"
    same = f"clipped to {bound:g} it is {clipped.labels:.0%} and {clipped.correlation:.2f}"
    moral = ": clipping alone protects nothing" if clipped.correlation > 0.9 * bare.correlation else ""
    return f"From a bare update {seen}; {same}{moral}."


def _plain(result: Attacked) -> dict[str, Any]:
    names = ("protection", "epsilon", "delta", "labels", "correlation")
    return {name: getattr(result, name) for name in names}


def _experiment(asked: Inquiry) -> tuple[Experiment, Examples]:
    """Clients that hold one example each, which they take one plain step on."""
    own, plan = asked.own, asked.plan
    count, noise = own["victims"], own["noise"]
    require(is_count(count), "attack.victims", count, "a whole number >= 1", "attack.victims=200")
    levels = isinstance(noise, list) and all(is_number(z, at_least=0) and 0 < z < float("inf") for z in noise)
    require(levels, "attack.noise", noise, "a list of numbers > 0", "'attack.noise=[0.1,1]'")
    victims: list[Examples] = []

    def staged(scenario: Scenario) -> Scenario:
        _require_images(scenario)
        victims.append(_drawn(scenario.data, count, plan.seed))
        return replace(scenario, data=_one_each(scenario.data, victims[0]))

    local = LocalSettings(steps=1, batch_size=1, learning_rate=plan.local.learning_rate)
    strategy = Strategy(select=everyone(), aggregate=mean(weighting="equal"), local=plan.strategy.local)
    bare = replace(plan, strategy=strategy, local=local, privacy=none())
    return experiment(asked.cfg, bare, staged=staged), victims[0]


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


def _attacked(asked: Inquiry, made: Experiment, victims: Examples) -> Iterator[Attacked]:
    plan, bound = made.plan, asked.own["clip"]
    yield _result("nothing", made, plan.strategy, plan.local, victims)
    clipped = replace(plan.strategy, stages=(*plan.strategy.stages, clip(bound)))
    yield _result(f"clipped to {bound:g}", made, clipped, plan.local, victims)
    for noise in asked.own["noise"]:
        mechanism = local_dp(clip_norm=bound, noise_multiplier=float(noise))
        yield _protected(f"clipped, noise {noise:g}", mechanism, made, victims)
    with suppress(MissingExtra):  # the protocol needs cryptography
        yield _masked(made, bound, victims)
    kind = asked.plan.privacy.kind
    if kind not in ("none", "secagg", "distributed"):
        yield _protected(f"privacy={kind}", asked.plan.privacy, made, victims)


def _protected(words: str, mechanism: Mechanism, made: Experiment, victims: Examples) -> Attacked:
    strategy, local, epsilon, delta = protected(mechanism, made, examples=1)
    return replace(_result(words, made, strategy, local, victims), epsilon=epsilon, delta=delta)


def _result(words: str, made: Experiment, strategy: Strategy, local: LocalSettings, victims: Examples) -> Attacked:
    return _judged(words, made, uploads(made, strategy, local), victims)


def _judged(words: str, made: Experiment, delta_BD: np.ndarray, victims: Examples) -> Attacked:
    """Plain SGD moves by the gradient times the learning rate, whose size no attack here depends on."""
    layout = made.engine.layout
    gradient_BD = -delta_BD[:, : layout.num_parameters]
    first = _first(layout)
    weights_BOF = gradient_BD[:, layout.slices[f"{first}.weight"]]
    biases_BO = gradient_BD[:, layout.slices[f"{first}.bias"]]
    images_BF = inputs_from(weights_BOF.reshape(*biases_BO.shape, -1), biases_BO)
    found_B = labels_from(gradient_BD[:, layout.slices["out.bias"]])
    true_BF = victims.x.reshape(len(victims), -1)
    return Attacked(
        protection=words,
        epsilon=None,
        delta=None,
        labels=float(np.mean(found_B == victims.y)),
        correlation=float(np.mean(correlation(images_BF, true_BF))),
        images_BF=images_BF,
    )


def _masked(made: Experiment, bound: float, victims: Examples) -> Attacked:
    """The real protocol, and what its server holds of each client before it adds them up."""
    settings = masking.Masking(clip_norm=bound, cohort=GROUP, protocol="full")
    strategy = settings.protect(made.plan.strategy)
    integers_BD = uploads(made, strategy, made.plan.local)
    seen_BD = np.concatenate(
        [_on_the_wire(integers_BD[start : start + GROUP]) for start in range(0, len(integers_BD) - 1, GROUP)]
    )
    code = settings.code(GROUP)
    part = Examples(victims.x[: len(seen_BD)], victims.y[: len(seen_BD)])
    return _judged("masked", made, np.stack([code.decode(row_D) for row_D in seen_BD]), part)


def _on_the_wire(integers_KD: np.ndarray) -> np.ndarray:
    """The masked vectors of one round of secure aggregation."""
    from fedlearn.privacy.secagg import drill
    from fedlearn.privacy.secagg.records import Masked, decode

    rows = dict(enumerate(integers_KD))
    clients, registered = drill.strangers(rows)
    session = drill.session_of(integers_KD, rows, threshold=len(rows) // 2 + 1, round=1, run=b"attacked")
    seen: dict[int, np.ndarray] = {}

    def overhear(client: int, answer: Answer) -> Answer:
        def heard(request: bytes, vector: Any) -> bytes:
            reply = answer(request, vector)
            with suppress(FedlearnError):  # another stage's reply
                seen[client] = np.frombuffer(decode(reply, Masked).vector, integers_KD.dtype)
            return reply

        return heard

    for client, one in clients.items():
        one.answer = overhear(client, one.answer)  # type: ignore[method-assign, assignment]
    drill.run(session, clients, registered, rows)
    return np.stack([seen[client] for client in sorted(seen)])


def picture(results: Sequence[Attacked], victims: Examples) -> figures.Figure:
    """The first images, and what came back of them under each protection."""
    shown = min(SHOWN, len(victims))
    shape = victims.x.shape[1:3]
    rows: list[tuple[str, str, np.ndarray]] = [("original", "", victims.x.reshape(len(victims), -1))]
    rows += [
        (r.protection, f"labels {r.labels:.0%}\nimages {round(r.correlation, 2) + 0:.2f}", r.images_BF) for r in results
    ]
    figure = figures.blank(figures.WIDTH, 0.62 * len(rows) + 0.2)
    axes = figure.subplots(len(rows), shown + 2, width_ratios=[2.6, *[1] * shown, 1.7], squeeze=False)
    for axis_row, (name, numbers, images_BF) in zip(axes, rows, strict=True):
        for axis in axis_row:
            axis.set_axis_off()
        axis_row[0].text(1, 0.5, name, ha="right", va="center", transform=axis_row[0].transAxes)
        axis_row[-1].text(0, 0.5, numbers, ha="left", va="center", transform=axis_row[-1].transAxes, fontsize=7.5)
        for axis, image_F in zip(axis_row[1:-1], images_BF, strict=False):
            axis.imshow(image_F.reshape(*shape, -1)[..., 0], cmap="gray")  # stretched to its own range
    return figure
