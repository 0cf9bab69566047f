from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from needs import needs

import strategies
from fedlearn import start
from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.records import ClientWork, ExampleDP, Examples, LocalSettings, Request
from fedlearn.data.download import DataSet, OfficialSource
from fedlearn.engines.base import vector
from fedlearn.errors import SettingError
from fedlearn.loop.scenario import judge
from fedlearn.loop.schedule import Schedule
from fedlearn.loop.training_loop import federate
from fedlearn.loop.wrappers import TrainerWrapper
from fedlearn.testing import check_scenario
from simulations.datasets import movielens as sources
from simulations.models.recommendation import build_recommender
from simulations.models.recommendation.negative_sampling import NegativeSamplingTrainer
from simulations.scenarios.movielens import leave_one_out, movielens

needs("torch")

USERS, ITEMS = 12, 130


def fixture_ratings():
    """Return ``user, item, stars, time``.

    All users rate some films, and agree on the good ones.
    """
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(1, USERS + 1), 20)
    item = np.concatenate([rng.permutation(ITEMS)[:20] for _ in range(USERS)]) + 1
    item[:ITEMS] = np.arange(1, ITEMS + 1)
    return user, item, np.where(item % 2, 5, 2), rng.permutation(len(user)) + 874_724_710


@pytest.fixture
def layouts(tmp_path, monkeypatch):
    """Create small official files of each size, and `sources.SIZES` with their checksums."""
    columns = np.stack(fixture_ratings()).T.tolist()
    files = {
        "100k": ("u.data", "\n".join("\t".join(map(str, row)) for row in columns) + "\n"),
        "1m": ("ratings.dat", "\n".join("::".join(map(str, row)) for row in columns) + "\n"),
    }
    sizes = {}
    for size, (name, text) in files.items():
        (tmp_path / name).write_text(text)
        checksum = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        sizes[size] = DataSet(name=f"ml-{size}", origins=(OfficialSource(base_url="", files={name: checksum}),))
    monkeypatch.setattr(sources, "VARIANTS", sizes)
    return tmp_path


@pytest.mark.parametrize("size", ["100k", "1m"])
def test_a_rating_is_read_from_each_official_layout(layouts, size):
    user_R, item_R, stars_R, time_R, _ = sources.read_ratings(size, path=layouts)
    user, item, stars, time = fixture_ratings()
    assert np.array_equal(user_R, user - 1)
    assert np.array_equal(item_R, item - 1)
    assert np.array_equal(stars_R, stars)
    assert np.array_equal(time_R, time)


@pytest.mark.parametrize("task", ["rating", "ranking"])
def test_users_keep_the_contract_of_scenarios(layouts, task):
    pytest.importorskip("torch")
    from simulations.scenarios.movielens import movielens

    check_scenario(lambda: movielens(path=layouts, task=task))


def test_the_default_is_943_users_of_the_pinned_wheel(tmp_path_factory, monkeypatch):
    from fedlearn.errors import DataError

    monkeypatch.delenv("FEDLEARN_DATA", raising=False)
    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
    try:
        scenario = movielens()
    except DataError as error:
        pytest.skip(f"the data are not available: {error}")
    data = scenario.data
    assert len(data.clients) == 943
    assert sum(len(data.train(user)) + len(data.test(user)) for user in data.clients) == 100_000
    assert scenario.trainer.layout.num_parameters == 1682 * 17 + 17


def test_the_last_film_seen_is_held_out_among_99_that_were_not():
    user, item, _, time = fixture_ratings()
    data = leave_one_out(user - 1, item - 1, time, num_negatives=3, seed=1)
    for client in data.clients:
        current = user - 1 == client
        train, test = data.train(client), data.test(client)
        assert test.x[test.y == 1].tolist() == [(item - 1)[current][time[current].argmax()]]
        assert (test.y == 0).sum() == 99
        assert len(set(test.x.tolist())) == 100
        assert not set(test.x.tolist()) & set(train.x.tolist())
        assert (train.y == 1).sum() * 3 == (train.y == 0).sum()


def test_of_films_seen_in_one_second_the_last_is_drawn_and_is_not_the_one_with_the_highest_number():
    user, item, _, time = fixture_ratings()
    at_once = leave_one_out(user - 1, item - 1, np.zeros_like(time), num_negatives=1, seed=1)
    last = [at_once.test(client).x[0] for client in at_once.clients]
    highest = [(item - 1)[user - 1 == client].max() for client in at_once.clients]
    assert np.sum(np.array(last) == highest) <= USERS // 4
    shuffled = np.random.default_rng(1).permutation(len(user))  # the order of the lines in a file must not matter
    again = leave_one_out(user[shuffled] - 1, item[shuffled] - 1, np.zeros_like(time), num_negatives=1, seed=1)
    assert last == [again.test(client).x[0] for client in again.clients]


class RecordingTrainer(TrainerWrapper):
    """Records the examples that it trains on."""

    def fit(self, order, rule, work):
        self.seen = {single.client: single.examples for single in work}


def test_negatives_are_others_in_each_round_and_never_of_the_held_out_list():
    user, item, _, time = fixture_ratings()
    data = leave_one_out(user - 1, item - 1, time, num_negatives=2, seed=1)
    within = RecordingTrainer(None)
    built = NegativeSamplingTrainer(within, data, num_items=ITEMS)
    work = [ClientWork(client=k, examples=data.train(k)) for k in (0, 3)]
    seen = []
    for round in (1, 2, 1):
        built.fit(Request(round=round, seed=1, params_D=None), plain_training, work[: round + 1])
        seen.append(within.seen[0])
    current = data.train(0)
    for examples in seen:
        liked, others = examples.x[examples.y == 1], examples.x[examples.y == 0]
        assert np.array_equal(liked, current.x[current.y == 1])
        assert len(others) == 2 * len(liked)
        assert not set(others.tolist()) & {*data.test(0).x.tolist(), *liked.tolist()}
    assert not np.array_equal(seen[0].x, seen[1].x)
    assert np.array_equal(seen[0].x, seen[2].x)  # the other clients of the block do not matter
    stranger = ClientWork(client=len(data.clients), examples=current)
    built.fit(Request(round=1, seed=1, params_D=None), plain_training, [stranger])
    assert within.seen[stranger.client] is current


def test_a_model_within_a_trainer_around_a_trainer_is_exported(layouts, tmp_path):
    import torch

    from fedlearn.runner.start import main
    from simulations.analysis.export import export

    settings = ["scenario=movielens", f"scenario.path={layouts}", "scenario.task=ranking", "scenario.factors=2"]
    assert main([*settings, "rounds=1", "report=false", f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    names = torch.load(export(tmp_path / "run", "torch", client="0"), weights_only=True)
    assert "items.weight" in names


@pytest.mark.parametrize("task", ["regression", "ranking"])
@pytest.mark.parametrize("model", ["mf", "ncf"])
def test_twins_of_recommenders_learn_alike(model, task):
    pytest.importorskip("flax")
    user, item, _, time = fixture_ratings()
    data = replace(leave_one_out(user - 1, item - 1, time, num_negatives=1, seed=1), task=task)
    work = [
        ClientWork(client=k, examples=Examples(data.train(k).x, data.train(k).y.astype(np.float32))) for k in range(2)
    ]
    sizes = {"num_items": ITEMS, "num_factors": 3, "global_mean": 0.5}
    pair = [build_recommender(model, data, framework=framework, **sizes)[0] for framework in ("torch", "jax")]
    assert pair[0].layout == pair[1].layout
    params_D = pair[0].init(1)
    assert not params_D[pair[0].layout.slices["user.vectors"]].any()
    for dp in (None, ExampleDP(clip=0.1, noise_multiplier=0.0)):
        local = LocalSettings(batch_size=8, epochs=2, learning_rate=0.1, example_dp=dp)
        order = Request(round=1, seed=1, params_D=params_D, local=local)
        deltas = [np.asarray(trainer.fit(order, plain_training, work).delta_KD) for trainer in pair]
        assert np.abs(deltas[0]).max() > 1e-3
        np.testing.assert_allclose(*deltas, atol=1e-5)


@pytest.mark.parametrize("model", ["mf", "ncf"])
def test_what_describes_a_user_never_leaves_the_client(layouts, model):
    scenario = movielens(path=layouts, model=model, factors=2)
    engine = vector(scenario.data, scenario.trainer, batching="map")
    strategy, layout = strategies.fcf(learning_rate=0.1), scenario.trainer.layout
    state = start(strategy, scenario.trainer.init(1), engine, seed=1)
    local = LocalSettings(batch_size=4, learning_rate=0.1)
    schedule = Schedule(rounds=20, evaluate_every=20)
    rounds = list(federate(strategy, engine, state, schedule=schedule, local=local, evaluate=judge(scenario)))
    kept = [leaf.name for leaf in layout.leaves if leaf.name.startswith("user.")]
    tensors = layout.unpack(np.asarray(rounds[-1].state.params_D))
    assert kept == ["user.bias", "user.vectors"]
    assert not any(tensors[name].any() for name in kept)  # the server's values are unchanged
    assert all(memory["local.kept"].any() for memory in engine.client_states.values())
    assert rounds[-1].evaluation.pooled["rmse"] < 1.5  # the stars are 2 or 5


def test_a_ranking_is_evaluated_list_by_list(layouts):
    scenario = movielens(path=layouts, task="ranking", factors=2)
    engine = vector(scenario.data, scenario.trainer, batching="map")
    strategy = strategies.fcf()
    state = start(strategy, scenario.trainer.init(1), engine, seed=1)
    (done,) = federate(
        strategy, engine, state, schedule=Schedule(rounds=1), local=LocalSettings(), evaluate=judge(scenario)
    )
    per_client = done.evaluation.per_client
    assert set(per_client["hr@10"]) <= {0.0, 1.0}
    assert done.evaluation.pooled["hr@10"] == pytest.approx(per_client["hr@10"].mean())
    assert done.evaluation.pooled["ndcg@10"] == pytest.approx(per_client["ndcg@10"].mean())


@pytest.mark.parametrize(
    ("setting", "value"), [("task", "rate"), ("size", "10m"), ("factors", 0), ("num_negatives", 0), ("model", "mlp")]
)
def test_a_setting_of_movielens_out_of_range_is_named(layouts, setting, value):
    with pytest.raises(SettingError) as caught:
        movielens(path=layouts, **{setting: value})
    assert caught.value.setting == setting
