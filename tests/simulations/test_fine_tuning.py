"""The scenario `text`: columns, errors at the door, and the bytes that leave a client."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fedlearn
from fedlearn.data.tables import table_from_columns
from fedlearn.errors import DataError, SettingError
from simulations.scenarios.text_columns import causal_columns, classification_columns

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
tiny_models = pytest.importorskip("tiny_models")
FORMS = {"text": None, "prompt": None, "context": None, "response": None, "messages": None}
LONG = ["a film of twenty characters or more"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {"bert": tiny_models.bert(folder / "bert"), "llama": tiny_models.decoder(folder / "llama", "llama")}


@pytest.fixture
def reviews(tmp_path):
    for name in ("north", "south"):
        lines = ["w1 good film,pos", "w2 bad film the of w3 boring,neg"] * 8
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join(["review,sentiment", *lines]))
    return tmp_path / "data"


def build(path, folder, **settings):
    from fedlearn.trainers.pretrained import PretrainedModel
    from simulations.scenarios.text import text

    return text(path=path, model=PretrainedModel(path=str(folder)), **settings)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"label": ["x"], "sentence": ["y"]}, ("sentence", "label")),
        ({"Text": ["y"], "Target": ["x"], "id": [1]}, ("Text", "Target")),
        ({"note": LONG, "class": ["x"], "code": ["k"]}, ("note", "class")),
    ],
)
def test_columns_of_a_classification_are_guessed_from_usual_names(columns, expected):
    from fedlearn.data.contents import Contents

    contents = Contents(table=table_from_columns(columns), clients=None, test_N=None)
    text, target, note = classification_columns(None, None, lambda: contents)
    assert (text, target) == expected
    assert note == f"columns: text {expected[0]}, target {expected[1]}"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["messages", "text"], {"messages": "messages"}),
        (["instruction", "input", "output"], {"prompt": "instruction", "response": "output", "context": "input"}),
        (["question", "answer"], {"prompt": "question", "response": "answer"}),
        (["id", "text"], {"text": "text"}),
    ],
)
def test_columns_of_a_language_model_are_guessed_from_usual_names(names, expected):
    assert causal_columns(FORMS, table_from_columns({name: ["x"] for name in names}), deployed=False)[0] == expected


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"prompt": "a"}, "response"),
        ({"response": "b"}, "prompt"),
        ({"text": "a", "messages": "b"}, "one of text"),
    ],
)
def test_incomplete_or_contradicting_columns_are_refused(stated, message):
    with pytest.raises(SettingError, match=message):
        causal_columns({**FORMS, **stated}, table_from_columns({"a": ["x"], "b": ["y"]}), deployed=False)


def test_a_real_node_guesses_no_column():
    with pytest.raises(SettingError, match=r"a real node guesses nothing"):
        causal_columns(FORMS, table_from_columns({"text": ["x"]}), deployed=True)
    with pytest.raises(SettingError, match=r"a real node guesses nothing"):
        classification_columns("text", None, lambda: None, deployed=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "revew"}, r"scenario\.text=review"),
        ({"target": "label"}, r"label(.|\n)*sentiment"),
        ({"classes": ["yes", "no"]}, r"pos|neg|classes"),
        ({"task": "causal_llm"}, r"task='causal_lm'"),
        ({"task": "causal_lm", "text": "review", "classes": ["a"]}, r"null for task=causal_lm"),
        ({"messages": "review"}, r"null for task=classification"),
        ({"length": 2}, r"length"),
        ({"length": 65}, r"at most 64"),
    ],
)
def test_wrong_settings_are_refused_before_training(reviews, models, settings, message):
    with pytest.raises((SettingError, DataError), match=message):
        build(reviews, models["bert"], **settings)


def test_the_header_shows_guesses_and_the_number_of_cut_texts(reviews, models):
    scenario = build(reviews, models["bert"], length=6)
    assert "16 of 32 texts are cut to 6 subwords" in scenario.data.source
    assert "columns: text review, target sentiment" in scenario.data.source


def test_tags_of_tokens_after_the_cut_do_not_count(tmp_path, models):
    (tmp_path / "a.conll").write_text("w1 B\ngood O\nfilm O\n\nthe O\nw2 B\n\n" * 6)
    scenario = build(tmp_path, models["bert"], task="token_classification", length=4, partition="iid")
    y = np.concatenate([scenario.data.train(client).y for client in scenario.data.clients])
    assert set(np.sum(y >= 0, axis=1).tolist()) == {2}
    assert "6 tokens after the cut have no tag" in scenario.data.source
    outputs = scenario.trainer.predict(scenario.trainer.init(1), scenario.data.train(0).x)
    assert outputs.shape[1:] == (4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("privacy", [None, "example", "central", "secagg"])
def test_only_adapters_and_head_leave_a_client_and_are_stored(reviews, models, tmp_path, privacy):
    settings = {"scenario.path": str(reviews), "scenario.length": 12, "model.path": str(models["bert"])}
    settings |= {"privacy.noise_multiplier": 1.0} if privacy in ("example", "central") else {}
    settings |= {"strategy.weighting": "equal"} if privacy in ("central", "secagg") else {}
    settings |= {"strategy.clients_per_round": 2} if privacy == "central" else {}
    run = tmp_path / "run"
    fedlearn.run("text", privacy=privacy, rounds=2, report=False, folder=run, show=False, settings=settings)
    layout = json.loads((run / "model" / "model.json").read_text())["layout"]
    names = {name for name, *_ in layout}
    size = sum(int(np.prod(shape)) for _, shape, *_ in layout)
    assert all(".lora_" in name or name.startswith(("classifier", "bert.pooler")) for name in names)
    base = (models["bert"] / "model.safetensors").stat().st_size
    checkpoints = [path.stat().st_size for path in (run / "checkpoints").glob("round_*")]
    assert checkpoints
    assert all(4 * size <= number < 4 * size + 4096 < base for number in checkpoints)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert 2 * 4 * size <= row["bytes_up"] < 2 * (6 * size + 4096)  # masked sums have more than four bytes per number


@pytest.fixture
def sayings(tmp_path):
    lines = ["w1 good film of the w2 w3", "bad film", "the w4 of w5 boring film w6 good w7 w8"] * 4
    (tmp_path / "sayings.csv").write_text(
        "\n".join(["who,text", *(f"{who},{line}" for line in lines for who in ("north", "south"))])
    )
    return tmp_path / "sayings.csv"


@pytest.mark.slow
@pytest.mark.parametrize("privacy", ["none", "example"])
def test_an_audit_shows_exposure_and_utility_of_texts_of_different_lengths(sayings, models, tmp_path, privacy, capsys):
    from simulations.audit import main

    settings = ["scenario.task=causal_lm", f"scenario.path={sayings}", "scenario.client=who", "scenario.length=16"]
    settings += [f"model.path={models['llama']}", "strategy.weighting=equal", "rounds=2"]
    settings += [f"privacy={privacy}", *(["privacy.epsilon=8"] if privacy == "example" else []), "local.batch_size=8"]
    settings += ["audit.canaries=100", "audit.sentences=2", "audit.copies=2", f"hydra.run.dir={tmp_path / 'run'}"]
    assert main(["scenario=text", *settings]) == 0
    sentences = json.loads((tmp_path / "run" / "audit.json").read_text())["sentences"]
    assert len(sentences["exposure"]) == 2
    assert sentences["utility"].startswith("perplexity ")
    assert sentences["utility"] in capsys.readouterr().out
    assert (sentences["epsilon"] is None) == (privacy == "none")
