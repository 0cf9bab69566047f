"""Test the prediction of the next film: sequences, candidates, and equal models in both frameworks."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.metrics import evaluate
from fedlearn.core.records import ClientWork, ExampleDP, LocalSettings, Predictions, Request
from fedlearn.data.subword_tokenizer import IDS, IGNORED, LABELS, MASK
from fedlearn.errors import SettingError
from simulations.models.recommendation.next_film import NEXT_FILM, test_sequence, training_sequences
from simulations.scenarios import movielens as ratings
from simulations.scenarios import next_film as scenarios

test_sequence.__test__ = False  # a function of the library
needs("torch")
USERS, ITEMS = 6, 130


@pytest.fixture
def build(monkeypatch):
    """Return the builder of the scenario, on a few users."""
    pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    user_R = np.repeat(np.arange(USERS), 20)
    item_R = np.concatenate([rng.permutation(ITEMS)[:20] for _ in range(USERS)])
    item_R[0] = ITEMS - 1
    rows = user_R, item_R, np.ones(len(user_R)), rng.permutation(len(user_R)), "a test"
    for module in (scenarios, ratings):
        monkeypatch.setattr(module, "read_ratings", lambda size, path=None: rows)
    return scenarios.next_film


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 9, 10, 11])
def test_each_film_but_the_first_counts_once(count):
    history = np.random.default_rng(0).permutation(50)[:count]
    examples = training_sequences(history, length=5, num_candidates=4)
    ids, labels = examples.x[IDS], examples.x[LABELS]
    assert labels[labels != IGNORED].tolist() == (history[1:] + 1).tolist()
    assert np.array_equal(labels[labels != IGNORED], ids[labels != IGNORED])
    assert np.array_equal(examples.x[MASK], ids > 0)
    assert np.array_equal(examples.y, (labels != IGNORED).sum(axis=1))
    assert not examples.x["candidates"].any()


def test_the_held_out_film_follows_the_newest_films_and_is_no_part_of_the_training(build):
    data, other = build(length=8).data, ratings.movielens(task="ranking").data
    for user in data.clients:
        x = data.test(user).x
        wanted = x["candidates"][0, 0]
        assert x[IDS][0].all()
        assert x[IDS][0, -1] == wanted
        assert (x[LABELS][0] != IGNORED).tolist() == [False] * 7 + [True]
        assert wanted not in data.train(user).x[IDS]
        # candidates are the ones of the recipe with factors
        ranked = other.test(user)
        assert (x["candidates"][0] - 1).tolist() == ranked.x.tolist()
        assert ranked.y.tolist() == [1] + [0] * 99


def test_the_last_film_is_ranked_with_ties_against_it():
    outputs = np.zeros((4, 4))
    outputs[:, 2:] = [[1, 1], [1, 10], [1, 11], [5, 0]]
    metrics = evaluate([Predictions(client=0, outputs=outputs, targets=outputs[:, 2])], task=NEXT_FILM).pooled
    assert metrics["hr@10"] == pytest.approx(2 / 3)
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / np.log2(11)) / 3)


def test_an_equal_score_of_another_film_counts_against_the_held_out_one(build):
    scenario = build()
    zeros_D = np.zeros(scenario.trainer.layout.num_parameters, np.float32)
    outputs = scenario.trainer.predict(zeros_D, scenario.data.test(0).x)
    assert outputs[0, 3] == 100
    assert outputs[0, 0] == pytest.approx(np.log(ITEMS + 1), rel=1e-5)
    assert not scenario.trainer.predict(zeros_D, scenario.data.train(0).x)[:, 3].any()


def test_a_later_film_changes_no_earlier_prediction(build):
    scenario = build(length=8)
    trainer, x = scenario.trainer, scenario.data.train(0).x[:1]
    params_D = trainer.init(1)
    before, changed = x.copy(), x.copy()
    before[LABELS][0, 4:] = IGNORED
    changed[LABELS][0, 4:] = IGNORED
    changed[IDS][0, 4:] = 7
    np.testing.assert_allclose(*(trainer.predict(params_D, rows) for rows in (before, changed)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("private", [None, ExampleDP(clip=0.1, noise_multiplier=0.0)])
def test_both_frameworks_train_one_model(build, private):
    pytest.importorskip("jax")
    pair = [build(framework=framework, length=8) for framework in ("torch", "jax")]
    params_D = pair[0].trainer.init(1)
    assert np.array_equal(params_D, pair[1].trainer.init(1))
    work = [ClientWork(client=client, examples=pair[0].data.train(client)) for client in range(3)]
    local = LocalSettings(batch_size=2, learning_rate=0.3, steps=2, example_dp=private)
    request = Request(round=1, seed=1, params_D=params_D, local=local)
    x = np.concatenate([pair[0].data.test(client).x for client in range(3)])
    np.testing.assert_allclose(*(part.trainer.predict(params_D, x) for part in pair), atol=1e-4)
    deltas = [np.asarray(part.trainer.fit(request, plain_training, work).delta_KD) for part in pair]
    assert np.abs(deltas[0]).max() > 1e-3
    np.testing.assert_allclose(*deltas, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "value"), [("length", 2), ("width", 0), ("width", 30), ("layers", 0), ("heads", 1.5), ("model", "gru")]
)
def test_a_setting_out_of_range_is_named(build, setting, value):
    with pytest.raises(SettingError) as caught:
        build(**{setting: value})
    assert caught.value.setting == setting
