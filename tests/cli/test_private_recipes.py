"""Recipes with differential privacy reach the accuracy that their comments state."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs

from fedlearn import federate, judge, start
from fedlearn.core.records import Round
from fedlearn.errors import DataError
from fedlearn.runner.compose import compose
from fedlearn.runner.experiment import build_experiment
from fedlearn.runner.start import parse_args

needs("torch")
needs("dp_accounting")


def last_round(*words: str) -> Round:
    (job,) = compose(parse_args([*words, "evaluate_every=1000"]))
    try:
        built = build_experiment(job.cfg)
    except DataError as error:
        pytest.skip(f"the data are not available: {error}")
    plan, evaluate = built.plan, judge(built.scenario)
    state = start(plan.strategy, built.scenario.trainer.init(plan.seed), built.engine, seed=plan.seed)
    *_, last = federate(plan.strategy, built.engine, state, schedule=plan.schedule, local=plan.local, evaluate=evaluate)
    built.engine.close()
    return last


# epsilon -> (accuracy here, accuracy published with Opacus), means over hospitals and five seeds
FLAMBY = {5: (0.733, 0.7036), 1: (0.736, 0.6853), 0.1: (0.662, 0.6056)}


@pytest.mark.parametrize(
    "epsilon", [1, *(pytest.param(epsilon, marks=pytest.mark.slow) for epsilon in FLAMBY if epsilon != 1)]
)
def test_flamby_heart_with_dp_sgd_is_as_accurate_as_its_header_says_and_no_less_than_published(epsilon):
    words = ["experiment=flamby_heart_dp", f"privacy.epsilon={epsilon}"]
    done = [last_round(*words, f"seed={seed}") for seed in range(42, 47)]
    accuracy = np.mean([last.evaluation.mean("accuracy") for last in done])
    expected, published = FLAMBY[epsilon]
    assert accuracy == pytest.approx(expected, abs=0.03)
    assert accuracy > published
    assert max(last.privacy.value for last in done) <= epsilon


@pytest.mark.parametrize(("epsilon", "accuracy"), [(2.9, 0.935), pytest.param(6.9, 0.934, marks=pytest.mark.slow)])
def test_dp_sgd_on_digits_is_as_accurate_as_its_header_says(epsilon, accuracy):
    last = last_round("experiment=digits_dp_sgd", f"privacy.epsilon={epsilon}")
    assert last.evaluation.pooled["accuracy"] == pytest.approx(accuracy, abs=0.03)
    assert last.privacy.value <= epsilon


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "accuracy"), [(8, 0.896), (2, 0.891)])
def test_central_dp_on_digits_is_as_accurate_as_its_header_says(epsilon, accuracy):
    last = last_round("experiment=digits_central_dp", f"privacy.epsilon={epsilon}")
    assert last.evaluation.pooled["accuracy"] == pytest.approx(accuracy, abs=0.03)
    assert last.privacy.value <= epsilon
