"""The root dataset: the server's own examples, at a client that its operator runs."""

import numpy as np
import pytest

from fedlearn import SettingError, federate, judge, start
from fedlearn.algorithm import RootDataset
from fedlearn.robust import with_root_dataset
from fedlearn.runner.experiment import build_experiment
from fedlearn.runner.plan import build_plan
from fedlearn.testing import linear_problem


def planned(*words):
    from fedlearn.runner.compose import compose
    from fedlearn.runner.start import parse_args

    (job,) = compose(parse_args([*words]))
    return job.cfg, build_plan(job.cfg)


def accuracy(*words):
    cfg, created = planned(*words)
    built = build_experiment(cfg, created)
    rule = built.plan.strategy
    state = start(rule, built.scenario.trainer.init(1), built.engine, seed=1)
    evaluate = judge(built.scenario)
    *_, last = federate(rule, built.engine, state, schedule=created.schedule, local=created.local, evaluate=evaluate)
    return last.evaluation.pooled["accuracy"]


def test_root_data_are_drawn_uniformly_from_all_clients_and_lie_at_one_of_them():
    data = linear_problem(num_clients=6, seed=3)
    rooted = with_root_dataset(data, RootDataset(client=2, num_examples=60), seed=1)
    all_x = np.concatenate([data.train(k).x for k in data.clients])
    found = rooted.train(2)
    places = [np.flatnonzero((all_x == x).all(axis=1)).tolist() for x in found.x]
    assert len({place for (place,) in places}) == len(found) == 60, "each example is of a client, and none occurs twice"
    assert all(np.array_equal(rooted.train(k).x, data.train(k).x) for k in (0, 1, 3, 4, 5))
    assert np.array_equal(rooted.test(2).x, data.test(2).x)
    assert np.array_equal(with_root_dataset(data, RootDataset(client=2, num_examples=60), seed=1).train(2).x, found.x)
    counts = np.zeros(len(all_x))
    for seed in range(200):
        x = with_root_dataset(data, RootDataset(client=0, num_examples=9), seed=seed).train(0).x
        counts[[np.flatnonzero((all_x == item).all(axis=1))[0] for item in x]] += 1
    assert counts.max() < 35, "the average count is 18"
    with pytest.raises(SettingError, match="at most 90"):
        with_root_dataset(data, RootDataset(client=2, num_examples=91), seed=1)


def test_a_run_lays_root_data_at_the_servers_own_client_and_attacks_spare_it():
    pytest.importorskip("torch")
    words = ["strategy=fltrust", "strategy.num_root_examples=100", "strategy.root_client=3", "scenario=digits"]
    cfg, created = planned(*words, "poisoning=label_flip", "poisoning.fraction=0.45")
    built = build_experiment(cfg, created)
    x, y = built.scenario.data.train(3).x, built.scenario.data.train(3).y
    assert len(x) == 100
    assert len(set(y.tolist())) == 10
    assert len(built.malicious_clients) == 9
    assert 3 not in built.malicious_clients


def test_root_data_are_not_drawn_where_nobody_has_all_examples():
    with pytest.raises(SettingError, match=r"strategy\.num_root_examples=null"):
        planned("strategy=fltrust", "strategy.num_root_examples=50", "engine=grid")


def test_trust_by_a_sample_of_all_is_worth_more_than_trust_by_a_skewed_share():
    """Compare ten clients of two digits each: the root's own share has no example of the other eight digits."""
    pytest.importorskip("torch")
    words = ["strategy=fltrust", "scenario=digits", "partition.num_clients=10", "partition=pathological"]
    words += ["rounds=10", "local.learning_rate=0.3"]
    skewed, uniform = (accuracy(*words, f"strategy.num_root_examples={size}") for size in ("null", "100"))
    assert uniform > skewed + 0.2
