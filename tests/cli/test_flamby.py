"""Published results: FLamby's heart disease benchmark."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs

from fedlearn import federate, judge, start
from fedlearn.errors import DataError
from fedlearn.runner.compose import compose
from fedlearn.runner.experiment import build_experiment
from fedlearn.runner.start import parse_args

needs("torch")


# pooled-test accuracy, mean of five seeds: Ogier du Terrail et al., NeurIPS 2022, arXiv:2210.04620
PUBLISHED = {"fedavg": 0.748, "fedprox": 0.748, "fedadam": 0.779}
SEEDS = (42, 43, 44, 45, 46)


def final_accuracy(strategy: str, seed: int) -> float:
    words = [f"experiment=flamby_heart_{strategy}", f"seed={seed}", "evaluate_every=15"]
    (job,) = compose(parse_args(words))
    try:
        built = build_experiment(job.cfg)
    except DataError as error:
        pytest.skip(f"the heart disease data are not available: {error}")
    plan, evaluate = built.plan, judge(built.scenario)
    state = start(plan.strategy, built.scenario.trainer.init(seed), built.engine, seed=seed)
    rounds = federate(plan.strategy, built.engine, state, schedule=plan.schedule, local=plan.local, evaluate=evaluate)
    *_, last = rounds
    built.engine.close()
    assert last.number == 15
    return last.evaluation.pooled["accuracy"]


@pytest.mark.parametrize(
    "strategy", ["fedavg", *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name != "fedavg")]
)
def test_the_mean_over_five_seeds_is_within_3_points_of_the_published_accuracy(strategy):
    accuracies = [final_accuracy(strategy, seed) for seed in SEEDS]
    assert np.mean(accuracies) == pytest.approx(PUBLISHED[strategy], abs=0.03), accuracies
