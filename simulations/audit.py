"""``python -m simulations.audit``: does a mechanism keep what its ledger says? Canaries give a lower bound on epsilon.

Shapes: M canaries, D parameters laid flat.

Where the unit of protection is a client, canaries are clients: they train, and then send one parameter, pushed hard,
through the run's own stages, engine, aggregator and noise. Where it is an example, canaries are examples of one client,
of a linear model whose gradient at each is one parameter, and it is the run's own DP-SGD that clips and noises them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedlearn import everyone, mean, sgd
from fedlearn.config import Experiment, experiment
from fedlearn.data.federated import FederatedData
from fedlearn.errors import SettingError, is_count, require
from fedlearn.loop import Schedule, federate, start
from fedlearn.privacy.audit import (
    LENGTH,
    SIGNIFICANCE,
    Canaries,
    CanaryTrainer,
    Ear,
    Finding,
    Overheard,
    Scores,
    examine,
    flip,
    is_gaussian,
)
from fedlearn.privacy.mechanism import Population
from fedlearn.records import Examples, Round
from fedlearn.scenario import Scenario
from simulations import figures, models
from simulations.exits import DONE, FAILED
from simulations.inquiry import Inquiry, command, page, save, styled

DEFAULTS = {"canaries": 1000, "rounds": 1}
FEWEST = 100
DELTA = 1e-5  # where nothing is claimed
USAGE = """Measures a lower bound on epsilon with canaries and holds it against what the ledger claims.

  python -m simulations.audit [group=option ...] [setting=value ...] [audit.canaries=1000] [audit.rounds=1]

Words are those of python -m simulations.run, and
  audit.canaries   how many, 100 or more; the more, the larger an epsilon can be refuted
  audit.rounds     how many of the planned rounds are run and audited

Examples
  python -m simulations.audit scenario=digits
  python -m simulations.audit scenario=digits strategy.weighting=equal privacy=central privacy.noise_multiplier=1
  python -m simulations.audit scenario=digits privacy=example privacy.noise_multiplier=1 local.batch_size=1000

Sampling (of clients, or of batches) hides canaries from the audit as well as from anyone else: to put the mechanism
itself to the test let everyone take part, and let batches be as large as audit.canaries.

Leaves audit.json, scores.png and report.html in outputs/audit/...
Exit codes: 0 the claim stands, 2 bad configuration, 3 the claim is refuted, 130 stopped.
"""


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What was released, and what was claimed of it.

    Attributes:
        scores: of the canaries.
        last: the last audited round.
        unit: ``client`` or ``example``.
        delta: of the claim.
    """

    scores: Scores
    last: Round
    unit: str
    delta: float

    @property
    def claimed(self) -> float | None:
        """Epsilon by the ledger; None where nothing is promised."""
        return None if self.last.privacy is None else self.last.privacy.value


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; exit codes as in ``USAGE``."""
    return command(words, name="audit", usage=USAGE, defaults=DEFAULTS, body=_report)


def audit(asked: Inquiry) -> tuple[Audited, Finding]:
    """Release, look, and conclude.

    Raises:
        SettingError: a setting is out of range, or there is nothing to audit in this combination.
        MissingExtra: jax-privacy is not installed.
    """
    canaries, rounds = asked.own["canaries"], asked.own["rounds"]
    enough, planned = is_count(canaries, at_least=FEWEST), asked.plan.schedule.rounds
    require(enough, "audit.canaries", canaries, f"a whole number >= {FEWEST}", "audit.canaries=1000")
    fits = is_count(rounds) and rounds <= planned
    require(fits, "audit.rounds", rounds, f"a whole number of rounds in 1..{planned}, which are planned", "rounds=20")
    seen = _examples(asked) if asked.plan.privacy.kind == "example" else _clients(asked)
    return seen, examine(seen.scores, delta=seen.delta, gaussian=is_gaussian(seen.last.state.ledger))


def _audited(made: Experiment, scores: Scores, last: Round, unit: str) -> Audited:
    protection = made.plan.strategy.protection
    claimed = None if protection is None else protection.facts["delta"]
    delta = DELTA if claimed is None else float(claimed)
    return Audited(scores=scores, last=last, unit=unit, delta=delta)


def _clients(asked: Inquiry) -> Audited:
    """Canaries in the place of clients. The server's optimiser is left out: it only sees what is released."""
    plan, count = asked.plan, int(asked.own["canaries"])
    plan = replace(plan, strategy=replace(plan.strategy, server=sgd()), local=replace(plan.local, epochs=1, steps=1))
    population = Population(clients=range(count), rounds=plan.schedule.rounds)
    protection = plan.privacy.protect(plan.strategy, plan.local, population)[0].protection
    replaced = protection is not None and "replaced" in str(protection.facts["adjacency"])
    chosen: list[Canaries] = []

    def staged(scenario: Scenario) -> Scenario:
        size = scenario.trainer.layout.num_parameters
        expected = f"at most {size}, the number of parameters of the model: each canary needs one"
        require(count <= size, "audit.canaries", count, expected, f"model=mlp, or audit.canaries={size}")
        chosen.append(flip(count, size, seed=plan.seed, opposed=replaced))
        trainer = CanaryTrainer(scenario.trainer, chosen[0])
        return replace(scenario, data=_one_each(scenario.data, chosen[0].present), trainer=trainer)

    made = experiment(asked.cfg, plan, staged=staged)
    canaries, ear = chosen[0], Ear(chosen[0])
    last, released_D = _run(made, int(asked.own["rounds"]), ear)
    alone = plan.privacy.kind == "local"  # what a client sends is itself the release
    seen_M = ear.heard_M if alone else released_D[canaries.place_M]
    return _audited(made, canaries.told_apart(seen_M), last, "client")


def _one_each(data: FederatedData, present: np.ndarray) -> FederatedData:
    """The clients of an audit: each has one example of a real one, and nothing is evaluated."""
    holders = [client for client in data.clients if len(data.train(client))]
    first = data.train(holders[0])
    one, none = Examples(first.x[:1], first.y[:1]), Examples(first.x[:0], first.y[:0])
    clients = tuple(present.tolist())
    return replace(data, clients=clients, names={}, train=lambda client: one, test=lambda client: none)


def _examples(asked: Inquiry) -> Audited:
    """Canaries as the examples of one client, the release being what that client sends."""
    plan, count = asked.plan, int(asked.own["canaries"])
    strategy = replace(plan.strategy, select=everyone(), aggregate=mean(weighting="equal"), server=sgd())
    plan, canaries = replace(plan, strategy=strategy), flip(count, count, seed=plan.seed)

    def staged(scenario: Scenario) -> Scenario:
        data = _pushed(canaries)
        framework, device = scenario.trainer.framework, scenario.trainer.device
        trainer, line = models.trainer("linear", data, input_shape=(count,), framework=framework, device=device)
        return Scenario(name=scenario.name, data=data, trainer=trainer, model=line)

    made = experiment(asked.cfg, plan, staged=staged)
    last, released_D = _run(made, int(asked.own["rounds"]), None)
    weight = made.scenario.trainer.layout.slices["out.weight"]
    seen_M = released_D[weight][canaries.place_M]
    return _audited(made, canaries.told_apart(seen_M), last, "example")


def _pushed(canaries: Canaries) -> FederatedData:
    """Examples for a linear model with squared error: each one's gradient is, in effect, one weight's."""
    place, none = canaries.place_M[canaries.included_M], np.zeros(0, np.float32)
    x = np.zeros((len(place), len(canaries.place_M)), np.float32)
    x[np.arange(len(place)), place] = LENGTH  # the bias has a thousandth of the gradient
    train = Examples(x, np.full(len(place), 1e6, np.float32))
    return FederatedData(
        task="regression",
        clients=(0,),
        num_classes=1,
        train=lambda client: train,
        test=lambda client: Examples(x[:0], none),
        source="canaries",
    )


def _run(made: Experiment, rounds: int, ear: Ear | None) -> tuple[Round, np.ndarray]:
    """The last of the audited rounds, and what all of them added to a model that began at zero."""
    plan, engine = made.plan, made.engine
    listened = Overheard(engine, ear) if ear else engine
    state = start(plan.strategy, np.zeros(engine.layout.num_parameters, np.float32), engine, seed=plan.seed)
    schedule = Schedule(rounds=rounds, max_failures=plan.schedule.max_failures)
    try:
        done = list(federate(plan.strategy, listened, state, schedule=schedule, local=plan.local))
    finally:
        engine.close()
    if not done:
        raise SettingError("privacy.epsilon", plan.privacy.kind, "a budget that allows one round", "privacy.epsilon=2")
    return done[-1], np.asarray(done[-1].state.params_D, np.float64)


def verdict(claimed: float | None, found: Finding) -> str:
    """What follows, in a sentence."""
    confidence = f"{1 - SIGNIFICANCE:.0%} confidence"
    seen = f"epsilon is at least {found.bound:.3g}, with {confidence}"
    if claimed is None:
        return f"Nothing is claimed, and {seen}."
    if found.bound > claimed:
        return f"ALARM: {seen}, but {claimed:.4g} is claimed: noise or clipping is not what the ledger believes."
    if claimed >= found.most:
        return f"No contradiction: {seen}; but so few canaries could not refute the {claimed:.4g} that is claimed."
    return f"The claim stands: {seen}, and {claimed:.4g} is claimed (what could be seen ends at {found.most:.3g})."


def _report(asked: Inquiry) -> int:
    seen, found = audit(asked)
    alarm = seen.claimed is not None and found.bound > seen.claimed
    text, kind = verdict(seen.claimed, found), asked.plan.privacy.kind
    numbers = {
        "privacy": kind,
        "unit": seen.unit,
        "canaries": asked.own["canaries"],
        "rounds": seen.last.number,
        "delta": seen.delta,
        "claimed_epsilon": seen.claimed,
        **asdict(found),
        "significance": SIGNIFICANCE,
        "alarm": alarm,
        "verdict": text,
    }
    save(asked, "audit", numbers, {"scores": styled(lambda: picture(seen, found))})
    claim = "–" if seen.claimed is None else f"{seen.claimed:.4g}"
    written = page(
        asked,
        title=f"Audit of privacy={kind}",
        verdict=text,
        alarm=alarm,
        rows=_rows(asked, seen, found),
        table=[
            ("", "epsilon ≥", "claimed ≤", "could see", "AUC", "found at 1 % false"),
            (
                f"one {seen.unit}",
                f"{found.bound:.3g}",
                claim,
                f"{found.most:.3g}",
                f"{found.auc:.3f}",
                f"{found.tpr:.1%}",
            ),
        ],
        captions={"scores": caption(seen)},
    )
    sys.stdout.write(f"{text}\n saved     {asked.folder}\n report    {written}\n")
    return FAILED if alarm else DONE


def _rows(asked: Inquiry, seen: Audited, found: Finding) -> list[tuple[str, str]]:
    included, excluded = len(seen.scores.included), len(seen.scores.excluded)
    return [
        ("Mechanism", asked.plan.privacy.kind),
        ("Canaries", f"{included + excluded:,} {seen.unit}s, of which {included:,} were in"),
        ("Rounds", f"{seen.last.number:,}"),
        ("Delta", f"{seen.delta:g}"),
        ("Bound", f"one run, {1 - SIGNIFICANCE:.0%} confidence, the mechanism taken for {found.law}"),
    ]


def caption(seen: Audited) -> str:
    """What the figure shows."""
    return (
        f"Left: what was released where each canary {seen.unit} pushes, in units of what one that is in adds, for "
        "those that were in and those that were out. Right: the epsilon that telling them apart proves, beside the one "
        "claimed and the largest that so many canaries could prove."
    )


def picture(seen: Audited, found: Finding) -> figures.Figure:
    """Scores of both kinds of canaries, and the bound beside the claim."""
    figure = figures.blank(figures.WIDTH, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _histograms(left, seen.scores)
    _bars(right, seen.claimed, found)
    return figure


def _histograms(axis: Any, scores: Scores) -> None:
    gap = float(np.median(scores.included) - np.median(scores.excluded)) or 1.0
    middle = float(np.median(scores.excluded))
    both = {"were out": (scores.excluded, figures.CLIENTS), "were in": (scores.included, figures.WORST)}
    scaled = {name: ((values - middle) / abs(gap), color) for name, (values, color) in both.items()}
    every = np.concatenate([values for values, _ in scaled.values()])
    low, high = np.quantile(every, [0.001, 0.999])
    edges = np.linspace(low - 0.1, high + 0.1, 45)
    for name, (values, color) in scaled.items():
        axis.hist(np.clip(values, edges[0], edges[-1]), edges, color=color, alpha=0.6, label=name)
    axis.set(title="Canaries", xlabel="score", ylabel="canaries")
    axis.legend()


def _bars(axis: Any, claimed: float | None, found: Finding) -> None:
    alarm = claimed is not None and found.bound > claimed
    bars = [
        ("proved", found.bound, figures.WORST if alarm else figures.POOLED),
        ("provable", found.most, "#BBBBBB"),
    ]
    if claimed is not None:
        bars.insert(1, ("claimed", claimed, figures.INK))
    names, values, colors = zip(*bars, strict=True)
    places = np.arange(len(bars))
    axis.bar(places, values, color=colors, width=0.62)
    for place, value in zip(places, values, strict=True):
        axis.annotate(f"{value:.2f}", (place, value), xytext=(0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(places, names)
    axis.tick_params(axis="x", length=0)
    axis.margins(y=0.12)
    axis.set_title("Epsilon")


if __name__ == "__main__":
    sys.exit(main())
