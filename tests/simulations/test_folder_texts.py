from __future__ import annotations

import json

import numpy as np
import pytest
from needs import needs

import fedlearn
from fedlearn.data.scripts import text_tokens
from fedlearn.data.text_tokenizers import HashingTokenizer
from fedlearn.errors import SettingError
from fedlearn.runner.start import main as simulate
from simulations.scenarios.folder import declared_model, folder

needs("torch")
needs("tokenizers")

GOOD, BAD = "a good and warm film", "a dull and cold film"
CHINESE_GOOD, CHINESE_BAD = "这部电影很好看我喜欢", "这部电影很难看我讨厌"


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    path = tmp_path_factory.mktemp("reviews")
    for site in ("north", "south"):
        rows = [f"{site} {k},{GOOD if k % 2 else BAD},{'yes' if k % 2 else 'no'}" for k in range(40)]
        (path / f"{site}.csv").write_text("\n".join(["title,body,liked", *rows]) + "\n")
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Good, GOOD film! a", ["good", "good", "film"]),
        ("很好看", ["很好", "好看"]),
        ("とても良い", ["とて", "ても", "も良", "良い"]),
        ("ดีมาก", ["ดี", "ีม", "มา", "าก"]),
        ("film 好 2024", ["film", "2024", "好"]),
        ("", []),
    ],
)
def test_words_of_a_bag(text, words):
    assert text_tokens(text) == words


@pytest.mark.parametrize("text", ["这部电影很好看", "とても良い映画", "ภาพยนตร์ดีมาก", "កុនល្អ"])
def test_a_text_without_spaces_is_more_than_one_token(text):
    tokens = HashingTokenizer(length=40).encode([text])[0]
    assert (tokens > 0).sum() >= 4
    assert len({*tokens[tokens > 0].tolist()}) >= 4


def test_several_columns_of_text_are_read_by_each_kind_of_model(reviews):
    bag = folder(path=reviews, target="liked", text=["title", "body"])
    assert bag.preprocessing.inputs.names == ("title", "body")
    assert bag.data.train(0).x.shape[1] == 2 * 4096
    tokens = folder(path=reviews, target="liked", text=["title", "body"], model="gru", text_length=12)
    assert tokens.preprocessing.inputs.columns == ("title", "body")
    other = folder(path=reviews, target="liked", text=["body", "title"], model="gru", text_length=12)
    x, y = tokens.data.train(0).x, other.data.train(0).x
    assert x.shape[1] == 12
    assert not np.array_equal(x, y)
    assert np.array_equal(np.sort(x), np.sort(y))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("transformer", "bilstm", "lstm", "cnn")]


@pytest.mark.parametrize("model", ["gru", *SLOW])
def test_a_text_model_trains_and_predicts_from_its_run_folder(reviews, tmp_path, model):
    run = tmp_path / "run"
    words = [f"model={model}", f"scenario.path={reviews}", "scenario.target=liked", "'scenario.text=[title,body]'"]
    words = [word.strip("'") for word in words]
    local = ["local.optimizer=adam", "local.learning_rate=0.01", "rounds=12", "report=false"]
    assert simulate(["scenario=folder", *words, *local, "scenario.text_length=12", f"hydra.run.dir={run}"]) == 0
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test"]["accuracy"] > 0.9
    trained = fedlearn.load(run)
    assert trained.predict({"title": ["x", "x"], "body": [GOOD, BAD]}).tolist() == ["yes", "no"]
    (tmp_path / "new.csv").write_text(f"body,title\n{GOOD},\n{BAD},x\n")
    assert trained.predict(tmp_path / "new.csv").tolist() == ["yes", "no"]


def test_chinese_texts_are_told_apart(tmp_path):
    rows = [f"{k % 2},{CHINESE_GOOD if k % 2 else CHINESE_BAD}{k}" for k in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["liked,text", *rows]) + "\n", encoding="utf-8")
    data = folder(path=tmp_path / "a.csv", target="liked", text="text", partition="iid").data
    x, y = (np.concatenate([getattr(data.train(c), part) for c in data.clients]) for part in ("x", "y"))
    means = [x[y == label].mean(axis=0) for label in (0, 1)]
    assert np.abs(means[0] - means[1]).max() > 0.2  # a bigram of one class only


def test_a_coordinator_knows_a_text_model_without_data():
    settings = {"target": "liked", "classes": ["no", "yes"], "text": ["title", "body"], "model": "gru"}
    preprocessing, network = declared_model(settings)
    assert preprocessing.inputs.columns == ("title", "body")
    assert network.builder == "simulations.models.text.build_text_classifier"


def test_a_text_model_without_text_is_refused(reviews):
    with pytest.raises(SettingError, match="model is gru"):
        folder(path=reviews, target="liked", model="gru", ignore=["title"])
    with pytest.raises(SettingError, match="length"):
        folder(path=reviews, target="liked", text="body", model="gru", text_length=0)
