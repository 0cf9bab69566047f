"""Adapters that a server merges into a model: equal in torch and JAX, in each engine, and after an export."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, federate, serial, start, vector
from fedlearn.core.adapters import LORA_MERGED, find_adapters, is_mergeable
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import Examples
from fedlearn.data.subword_tokenizer import load_tokenizer
from fedlearn.errors import SettingError
from fedlearn.trainers.pretrained import PretrainedModel, build_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
tiny_models = pytest.importorskip("tiny_models")
LENGTH = 12
LOCAL = LocalSettings(batch_size=2, steps=3, learning_rate=0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"bert": tiny_models.bert(root / "bert"), "gpt2": tiny_models.decoder(root / "gpt2")}


def problem(folder, framework="torch", *, num_clients=4, task="binary", **settings):
    """Return data of some clients with two texts each, and a trainer of a mergeable model."""
    words = ["good", "bad", "film", "great"]
    if task == "binary":
        encode = load_tokenizer(folder, length=LENGTH).encode
    else:
        from fedlearn.data.prompt_inputs import prompt_inputs

        inputs = prompt_inputs(folder, length=LENGTH, text="text")
        encode = lambda texts: inputs.encode([[(text, True)] for text in texts])  # noqa: E731
    texts_K = [[f"w{k} {words[k % 4]}", f"the {words[k % 3]} film"] for k in range(4)]
    examples = [Examples(encode(texts), np.array([1, 0])) for texts in texts_K]
    held = {client: examples[client % 4] for client in range(num_clients)}
    data = FederatedData(
        task=task, clients=range(num_clients), train=held.__getitem__, test=held.__getitem__, num_classes=2
    )
    model = PretrainedModel(path=str(folder), mergeable=True, **{"rank": 4, **settings})
    return data, build_pretrained(model, data, length=LENGTH, framework=framework)[0]


def random_parameters(trainer, seed=0):
    return trainer.init(1) + np.random.default_rng(seed).normal(0, 0.05, trainer.layout.num_parameters).astype("f4")


def run(strategy, data, trainer, *, rounds=2, engine=serial, **options):
    with closing(engine(data, trainer, **options)) as used:
        state = start(strategy, trainer.init(1), used, seed=1)
        *_, last = federate(strategy, used, state, schedule=Schedule(rounds=rounds), local=LOCAL)
        return np.asarray(last.state.params_D)


def test_a_mergeable_model_starts_at_the_pretrained_model(folders):
    data, trainer = problem(folders["bert"])
    _, plain = problem(folders["bert"])
    assert is_mergeable(trainer.layout)
    assert len(find_adapters(trainer.layout)) == 4  # query and value of two layers
    leaves = trainer.layout.unpack(trainer.init(1))
    assert all(not v.any() for name, v in leaves.items() if name.endswith(LORA_MERGED))
    texts = data.train(0).x
    assert np.array_equal(trainer.predict(trainer.init(1), texts), plain.predict(plain.init(1), texts))


@pytest.mark.parametrize(("kind", "task"), [("bert", "binary"), ("gpt2", "causal_lm")])
def test_torch_and_jax_read_the_merged_matrices_alike(folders, kind, task):
    pytest.importorskip("jax")
    data, ours = problem(folders[kind], task=task)
    _, theirs = problem(folders[kind], "jax", task=task)
    params_D = random_parameters(ours)
    assert ours.layout == theirs.layout
    outputs = [trainer.predict(params_D, data.train(0).x) for trainer in (ours, theirs)]
    assert np.allclose(*outputs, atol=1e-4)
    without = params_D.copy()
    without[ours.layout.positions((f"*{LORA_MERGED}",))] = 0
    assert np.abs(ours.predict(without, data.train(0).x) - outputs[0]).max() > 1e-3


@pytest.mark.parametrize(("kind", "task"), [("bert", "binary"), ("gpt2", "causal_lm")])
def test_a_merged_export_has_the_outputs_of_the_run(folders, tmp_path, kind, task):
    from fedlearn.trainers.torch.hugging_face_files import save_adapter, save_merged

    data, trainer = problem(folders[kind], task=task)
    params_D = random_parameters(trainer)
    save_merged(trainer, params_D, tmp_path / "merged")
    model = PretrainedModel(path=str(tmp_path / "merged"))
    exported, _ = build_pretrained(model, data, length=LENGTH)
    x = data.train(0).x
    assert np.allclose(exported.predict(exported.init(1), x), trainer.predict(params_D, x), atol=1e-4)
    with pytest.raises(SettingError, match=r"try +format='merged'"):
        save_adapter(trainer, params_D, tmp_path)


@pytest.mark.slow
def test_flora_trains_equal_models_in_torch_and_jax(folders):
    pytest.importorskip("jax")
    strategy = strategies.flora(ranks=[1, 2, 4])
    ends = [run(strategy, *problem(folders["bert"], framework)) for framework in ("torch", "jax")]
    assert np.abs(ends[0] - ends[1]).max() < 1e-4


@pytest.mark.slow
def test_flora_trains_equal_models_in_each_engine(folders):
    strategy = strategies.flora(ranks=[1, 2, 4])
    data, trainer = problem(folders["bert"], num_clients=8)
    expected = run(strategy, data, trainer)
    assert np.abs(expected - trainer.init(1)).max() > 1e-3
    for batching in ("process_pool", "map"):
        assert np.array_equal(run(strategy, data, trainer, engine=vector, batching=batching), expected)


def test_only_adapters_can_be_mergeable(folders):
    with pytest.raises(SettingError, match=r"model.mergeable=false"):
        problem(folders["bert"], adapter="head")
