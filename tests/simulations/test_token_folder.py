"""Sentences with a tag per token from CoNLL files of the user."""

from __future__ import annotations

import csv
import json
import random

import numpy as np
import pytest
from needs import needs

import fedlearn
from fedlearn.data.preprocessing import Preprocessing
from fedlearn.data.token_files import read_sentences
from fedlearn.data.token_inputs import TokenInputs
from fedlearn.errors import DataError, FedlearnError, SettingError
from fedlearn.runner.start import main as simulate
from fedlearn.testing import check_scenario
from simulations.predict import main as predict
from simulations.scenarios.folder import declared_model, folder

needs("torch")

SITES = ("north", "south")
TAGS = ("B-LOC", "B-PER", "O")
SETTINGS = {"task": "token_classification", "model": "gru", "text_length": 6}
KINDS = {"B-PER": ("Ann", "Bob", "Eve"), "O": ("sees", "likes"), "B-LOC": ("Rome", "Oslo")}
CONLL = "-DOCSTART- -X- O\n\nAnn N B-PER\nsees V O\n\nRome N B-LOC\n"


def write(file, *, count=20, seed=0, separator="\t"):
    rng = random.Random(seed)
    sentences = []
    for _ in range(count):
        order = ["B-PER", "O", "B-LOC"] * rng.randint(1, 2)
        sentences.append("".join(f"{rng.choice(KINDS[tag])}{separator}{tag}\n" for tag in order))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(sentences), encoding="utf-8")


@pytest.fixture
def sites(tmp_path):
    for number, site in enumerate(SITES):
        write(tmp_path / "data" / f"{site}.conll", seed=number)
    return tmp_path / "data"


@pytest.mark.parametrize(
    "text",
    [CONLL, CONLL.replace(" ", "\t"), "\ufeff" + CONLL.replace("\n", "\r\n") + "\r\n\r\n"],
    ids=["spaces", "tabs", "windows"],
)
def test_the_first_and_the_last_column_are_token_and_tag(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    first, second = read_sentences(tmp_path / "a.txt")
    assert (first.tokens, first.tags, first.first_line) == (("Ann", "sees"), ("B-PER", "O"), 3)
    assert (second.tokens, second.tags, second.first_line) == (("Rome",), ("B-LOC",), 6)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"secret", "no token or no tag"),
        (b"secret\t", "no token or no tag"),
        (b"\tO", "no token or no tag"),
        (b"secret N O", "3 columns, but the first line has 2"),
        (b"secret\xff O", "is not UTF-8"),
        (b"Ann secret", r"a tag that is not in scenario\.classes"),
    ],
)
def test_a_wrong_line_is_named_without_its_content(sites, line, reason):
    (sites / "south.conll").write_bytes(b"Ann B-PER\n\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"south\.conll, line 3,.* {reason}") as caught:
        folder(path=sites, clients=SITES, classes=TAGS, deployed=True, **SETTINGS)
    assert "secret" not in str(caught.value)


def test_a_file_per_client_is_a_token_classification(sites):
    scenario = folder(path=sites, **SETTINGS)
    check_scenario(lambda: scenario)
    assert scenario.data.names == dict(enumerate(SITES))
    assert scenario.preprocessing.target.classes == TAGS
    assert "entity_f1" in scenario.data.task.metric_names
    assert Preprocessing.from_json(scenario.preprocessing.to_json()) == scenario.preprocessing
    train = scenario.data.train(0)
    assert np.array_equal(train.x == 0, train.y == -1)


@pytest.mark.parametrize(("tokens", "tags"), [("tokens", "tags"), ("words", "ner_tags"), ("tokens", "labels")])
def test_json_lines_and_conll_give_the_same_scenario(sites, tokens, tags):
    conll = folder(path=str(sites), **SETTINGS)
    for site in SITES:
        lines = [{tokens: s.tokens, tags: s.tags, "id": 1} for s in read_sentences(sites / f"{site}.conll")]
        (sites / f"{site}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        (sites / f"{site}.conll").unlink()
    scenario = folder(path=str(sites), **SETTINGS)
    assert scenario.data.names == conll.data.names
    for client in conll.data.clients:
        assert np.array_equal(scenario.data.train(client).x, conll.data.train(client).x)
        assert np.array_equal(scenario.data.train(client).y, conll.data.train(client).y)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"tokens": ["SECRET"]}', "has no tags or ner_tags"),
        ('{"tags": ["O"]}', "has no tokens or words"),
        ('{"tokens": ["SECRET"], "tags": ["O", "O"]}', "has 1 tokens and 2 tags"),
        ('{"tokens": ["SECRET"], "words": ["SECRET"], "tags": ["O"]}', "has tokens and words"),
        ('{"tokens": "SECRET", "tags": ["O"]}', "something else than a list of text in tokens"),
        ('{"tokens": ["SECRET", 3], "tags": ["O", "O"]}', "something else than a list of text in tokens"),
        ('{"tokens": ["SECRET"], "tags": [" "]}', "something else than a list of text in tags"),
        ('{"tokens": ["SECRET"], "tags": [null]}', "something else than a list of text in tags"),
        ('["SECRET"]', "is no JSON object"),
        ("{SECRET", "is no JSON"),
    ],
)
def test_a_wrong_line_of_json_is_named_without_its_content(tmp_path, line, reason):
    right = '{"tokens": ["Ann"], "tags": ["O"]}'
    (tmp_path / "a.jsonl").write_text(f"{right}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 3") as caught:
        list(read_sentences(tmp_path / "a.jsonl"))
    assert reason in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_tags_of_json_lines_may_be_numbers_and_empty_sentences_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tokens": ["Ann", "left"], "ner_tags": [1, 0]}\n{"tokens": [], "tags": []}\n')
    (sentence,) = read_sentences(tmp_path / "a.jsonl")
    assert (sentence.tags, sentence.line_of(1)) == (("1", "0"), 1)


def test_names_of_files_are_clients_or_splits(tmp_path):
    for name in ("north/train", "north/test", "south/train"):
        write(tmp_path / "data" / f"{name}.txt", count=5, seed=len(name))
    data = folder(path=tmp_path / "data", **SETTINGS).data
    assert [(len(data.train(k)), len(data.test(k))) for k in data.clients] == [(5, 5), (5, 0)]
    write(tmp_path / "all.conll")
    with pytest.raises(SettingError, match="no file names a client"):
        folder(path=tmp_path / "all.conll", **SETTINGS)
    assert len(folder(path=tmp_path / "all.conll", partition="iid", **SETTINGS).data.clients) == 10
    write(tmp_path / "all.csv")
    with pytest.raises(DataError, match="is a table"):
        folder(path=tmp_path / "all.csv", **SETTINGS)


def test_long_sentences_are_cut_in_training_and_refused_in_prediction(sites):
    scenario = folder(path=sites, **{**SETTINGS, "text_length": 4})
    assert "sentences are cut to 4 tokens" in scenario.data.source
    with pytest.raises(DataError, match="sentence 2 has 5 tokens"):
        TokenInputs(length=4).transform([["a"], ["a"] * 5])


def test_a_node_needs_the_tags_and_a_coordinator_knows_the_model(sites):
    with pytest.raises(SettingError, match="classes"):
        folder(path=sites, clients=SITES, deployed=True, **SETTINGS)
    node = folder(path=sites, clients=[*SITES, "west"], classes=TAGS, deployed=True, **SETTINGS)
    assert declared_model({**SETTINGS, "classes": TAGS}) == (node.preprocessing, node.network)
    assert declared_model(SETTINGS) is None


@pytest.mark.parametrize(
    "change", [{"model": "mlp"}, {"text_length": 0}, {"classes": ["O"]}, {"group": "x"}, {"target": "tag"}]
)
def test_settings_that_do_not_fit_are_refused(sites, change):
    with pytest.raises(SettingError, match=f"{next(iter(change))} "):
        folder(path=sites, **{**SETTINGS, **change})


def run(path, out, *settings):
    common = [f"scenario.path={path}", "scenario.task=token_classification", "model=gru", "scenario.text_length=6"]
    return simulate(["scenario=folder", *common, "report=false", "rounds=4", f"hydra.run.dir={out}", *settings])


def test_a_federated_tagger_learns_and_tags_new_sentences(sites, tmp_path, capsys):
    assert run(sites, tmp_path / "run") == 0
    model = fedlearn.load(tmp_path / "run")
    assert model.value > 0.9  # the most frequent tag alone has an F1 of 1/6
    assert model.predict([["Ann", "sees", "Rome"], ["Bob"], []]).tolist() == [["B-PER", "O", "B-LOC"], ["B-PER"], []]
    for wrong in (["Ann", "sees"], [["a"] * 7]):
        with pytest.raises(FedlearnError, match="expected"):
            model.predict(wrong)
    (tmp_path / "new.conll").write_text("Eve\nlikes\n\nOslo\n")
    capsys.readouterr()
    assert predict([str(tmp_path / "run"), "--data", str(tmp_path / "new.conll")]) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows == [
        ["line", "token", "prediction"],
        ["1", "Eve", "B-PER"],
        ["2", "likes", "O"],
        ["4", "Oslo", "B-LOC"],
    ]
    (tmp_path / "new.jsonl").write_text('\n{"tokens": ["Eve", "likes"]}\n{"tokens": ["Oslo"]}\n')
    assert predict([str(tmp_path / "run"), "--data", str(tmp_path / "new.jsonl")]) == 0
    of_json = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert [row[0] for row in of_json] == ["line", "2", "2", "3"]
    assert [row[1:] for row in of_json] == [row[1:] for row in rows]


@pytest.mark.slow
def test_engines_and_frameworks_give_one_model(sites, tmp_path):
    pytest.importorskip("flax")
    variants = {"serial": ["engine=serial"], "vector": ["engine=vector"], "jax": ["framework=jax"]}
    for name, settings in variants.items():
        assert run(sites, tmp_path / name, *settings) == 0
    params = [fedlearn.load(tmp_path / name).params_D for name in variants]
    np.testing.assert_allclose(params[1], params[0], atol=1e-4)
    np.testing.assert_allclose(params[2], params[0], atol=1e-3)
