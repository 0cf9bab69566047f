"""Train the run with canary sentences in its data, and measure their exposure.

Shapes: M canaries, R candidates of each canary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from fedlearn.callbacks.formatting import format_metric
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Evaluation, Examples
from fedlearn.errors import is_count, require
from fedlearn.loop.scenario import Scenario, judge
from fedlearn.loop.training_loop import federate, start
from fedlearn.privacy.canary_sentences import BASELINE, CanarySentences, draw_sentences, example_losses, exposures
from fedlearn.runner.experiment import build_experiment
from simulations.analysis.analysis_run import AnalysisRun

NUM_CANDIDATES = 127  # candidates of each canary; the largest exposure is 7 bits


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Exposure of the canary sentences after the run.

    Attributes:
        exposure_M: exposure of each canary, bits.
        most: largest possible exposure, bits.
        copies: copies of each canary in the data of its client.
        rounds: rounds of the run.
        epsilon: epsilon of the ledger; None without a guarantee.
        utility: main metric of the trained model on held-out examples, e.g. ``perplexity 59.9``; empty without a value.
    """

    exposure_M: np.ndarray
    most: float
    copies: int
    rounds: int
    epsilon: float | None
    utility: str = ""

    @property
    def text(self) -> str:
        """The result in one line."""
        mean = float(self.exposure_M.mean())
        parts = (
            f"mean exposure {mean:.2f} bits, largest {self.exposure_M.max():.2f} of {self.most:.2f}; "
            f"{BASELINE:.2f} without memorization",
            f"{len(self.exposure_M)} canaries, {self.copies} copies each",
            self.utility,
        )
        return " · ".join(filter(None, parts))

    def to_json(self) -> dict[str, object]:
        """Return the values for ``audit.json``."""
        values = {"most": self.most, "copies": self.copies, "rounds": self.rounds, "utility": self.utility}
        return {
            "exposure": self.exposure_M.tolist(),
            "mean": float(self.exposure_M.mean()),
            "epsilon": self.epsilon,
            **values,
        }


def measure_exposure(analysis: AnalysisRun) -> Exposure | None:
    """Run all planned rounds with canary sentences in the data. Each canary belongs to one client.

    Returns:
        The exposure, or None if ``audit.sentences`` is 0.

    Raises:
        SettingError: A setting is out of range, or the inputs of the scenario are no token ids.
    """
    sentences, copies = analysis.settings["sentences"], analysis.settings["copies"]
    require(is_count(sentences, at_least=0), "audit.sentences", sentences, "a whole number >= 0", "audit.sentences=20")
    require(is_count(copies), "audit.copies", copies, "a whole number >= 1", "audit.copies=4")
    if not sentences:
        return None
    drawn: list[CanarySentences] = []
    rng = generator(analysis.plan.seed, Purpose.CANARIES)

    def with_sentences(scenario: Scenario) -> Scenario:
        data = scenario.data
        pool = [data.train(client) for client in list(data.clients)[:50]]
        texts = Examples(np.concatenate([part.x for part in pool]), np.concatenate([part.y for part in pool]))
        drawn.append(draw_sentences(texts, num_canaries=sentences, num_candidates=NUM_CANDIDATES, rng=rng))
        owners = {client: range(i, sentences, len(data.clients)) for i, client in enumerate(data.clients)}

        @cache
        def train(client: int) -> Examples:
            examples = data.train(client)
            for index in owners[client]:
                examples = drawn[0].insert(examples, index, copies)
            return examples

        return replace(scenario, data=replace(data, train=train))

    experiment = build_experiment(analysis.cfg, analysis.plan, transform_scenario=with_sentences)
    plan, trainer, engine = experiment.plan, experiment.scenario.trainer, experiment.engine
    state, epsilon, utility = start(plan.strategy, trainer.init(plan.seed), engine, seed=plan.seed), None, ""
    schedule = replace(plan.schedule, evaluate_every=plan.schedule.rounds)
    evaluate = judge(experiment.scenario)
    try:
        for done in federate(plan.strategy, engine, state, schedule=schedule, local=plan.local, evaluate=evaluate):
            state, epsilon = done.state, done.privacy and done.privacy.value
            utility = _utility(experiment.scenario, done.evaluation)
    finally:
        engine.close()
    losses = [
        example_losses(trainer.predict(state.params_D, each.x), each.y, experiment.scenario.data.task)
        for each in (drawn[0].canaries, drawn[0].candidates)
    ]
    return Exposure(
        exposure_M=exposures(losses[0], losses[1].reshape(sentences, NUM_CANDIDATES)),
        most=float(np.log2(NUM_CANDIDATES + 1)),
        copies=copies,
        rounds=state.round,
        epsilon=epsilon,
        utility=utility,
    )


def _utility(scenario: Scenario, evaluation: Evaluation | None) -> str:
    metric = scenario.metric or scenario.data.task.main_metric
    value = None if evaluation is None else evaluation.pooled.get(metric)
    return f"{metric} {format_metric(metric, value)}" if value is not None else ""
