"""The scenario `sst2`: a pretrained encoder of the user or MiniLM, and models that are trained from scratch."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.partition import Iid
from fedlearn.data.subword_tokenizer import SubwordTokenizer
from fedlearn.data.text_tokenizers import HashingTokenizer
from fedlearn.errors import DataError, SettingError
from fedlearn.runner.start import main as run
from fedlearn.testing import check_scenario
from fedlearn.trainers.pretrained import PretrainedModel

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
tiny_models = pytest.importorskip("tiny_models")
RUN = ["scenario=sst2", "model=hf", "scenario.length=8", "partition=iid", "partition.num_clients=2", "report=false"]
RUN += ["local.optimizer=adamw", "local.learning_rate=0.02", "local.batch_size=4", "local.steps=null"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Return a folder with a small encoder and a few sentences."""
    folder = tiny_models.bert(tmp_path_factory.mktemp("shelf"))
    lines = [f"{'the ' * (n % 3)}{'good' if n % 2 else 'bad'} film\t{n % 2}" for n in range(60)]
    (folder / "train.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "test.tsv.gz").write_bytes(gzip.compress("\n".join(lines[:20]).encode()))
    return folder


@contextmanager
def offline(folder: Path) -> Iterator[None]:
    """Set the data folder of the scenario, with the checksums of its files."""
    from simulations.datasets import sst2

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLEARN_DATA", str(folder))
        patch.setenv("FEDLEARN_CACHE", str(folder / "cache"))
        origin = sst2.SST2.origins[-1]
        sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in origin.files}
        files = {file: f"sha256:{digest}" for file, digest in sums.items()}
        patch.setattr(sst2, "SST2", replace(sst2.SST2, origins=(replace(origin, files=files),)))
        yield


@pytest.fixture(autouse=True)
def here(shelf) -> Iterator[None]:
    with offline(shelf):
        yield


def run_experiment(shelf: Path, folder: Path, *words: str) -> Path:
    assert run([*RUN, f"model.path={shelf}", *words, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.mark.slow
def test_a_mixed_run_learns_and_its_model_reads_new_sentences(shelf, tmp_path):
    from fedlearn.runner.trained_model import load

    pytest.importorskip("jax")
    words = ["framework=mixed", "rounds=6", "evaluate_every=6", "local.epochs=5"]
    folder = run_experiment(shelf, tmp_path / "run", *words)
    (tmp_path / "new.txt").write_text("the good film\nbad film\n")
    model = load(folder)
    assert model.predict(tmp_path / "new.txt").tolist() == ["positive", "negative"]
    assert model.predict(["the good film"]).tolist() == ["positive"]
    assert model.inputs.tokenizer.length == 8


@pytest.mark.slow
@pytest.mark.parametrize("privacy", ["example", "central"])
def test_adapters_are_tuned_with_privacy(shelf, tmp_path, privacy):
    pytest.importorskip("dp_accounting")
    words = [f"privacy={privacy}", "privacy.noise_multiplier=1.0", "privacy.delta=0.01", "rounds=1"]
    equal = ["strategy.weighting=equal"] if privacy == "central" else []
    run_experiment(shelf, tmp_path / "run", *words, *equal)


@pytest.mark.parametrize("model", ["cnn", pytest.param("transformer", marks=pytest.mark.slow)])
def test_models_that_are_trained_from_scratch_read_hashed_words(model):
    from simulations.scenarios.sst2 import sst2

    check_scenario(lambda: sst2(model=model, length=6, partition=Iid(num_clients=2)))


def test_a_pipeline_has_the_tokenizer_of_its_model(shelf):
    from simulations.models.text.readers import build_text_pipeline, digest_of_base, text_network

    model, options = PretrainedModel(path=str(shelf)), {"length": 6, "vocab_size": 50}
    subwords, tuned = build_text_pipeline(model, **options)
    assert isinstance(subwords, SubwordTokenizer)
    x, y = subwords.encode(["good film", "bad"] * 4), np.arange(8) % 2
    data = from_arrays(x, y, assignment=np.arange(8) % 2, task="binary", test_share=0.25)
    assert "lora 8" in tuned(data)[1]
    assert text_network(model, **options).arguments["digest"] == digest_of_base(model)
    words, _ = build_text_pipeline("cnn", **options)
    assert words == HashingTokenizer(vocab_size=50, length=6)
    assert digest_of_base("cnn") == ""


def test_an_unknown_model_is_named_with_the_known_ones():
    from simulations.scenarios.sst2 import sst2

    with pytest.raises(SettingError, match=r"cnn, bilstm, lstm, gru, transformer, minilm, hf(.|\n)*model='bilstm'"):
        sst2(model="bilstmm", length=6, partition=Iid(num_clients=2))


@pytest.mark.parametrize(("content", "problem"), [(b"", "contains no text"), (b"\xff\xfe", "is not UTF-8")])
def test_a_file_without_sentences_is_refused(tmp_path, content, problem):
    from fedlearn.data.example_files import read_batches
    from simulations.scenarios.sst2 import sst2

    scenario = sst2(model="cnn", length=6, partition=Iid(num_clients=2))
    (tmp_path / "new.txt").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        list(read_batches(tmp_path / "new.txt", scenario.preprocessing.inputs, 10))


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
        sst2(model=PretrainedModel(path="all-minilm-l6-v2"))
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
