"""Pretrained models of transformers: trained parameters, tokenizers, files, export and generation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import fedlearn
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import Examples
from fedlearn.data.pretrained_files import find_pretrained
from fedlearn.data.prompt_inputs import PromptInputs, prompt_inputs
from fedlearn.data.subword_tokenizer import IDS, IGNORED, LABELS, MASK, load_tokenizer
from fedlearn.data.tables import table_from_columns
from fedlearn.errors import DataError, SettingError
from fedlearn.trainers.pretrained import LORA_B, PretrainedModel, build_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
tiny_models = pytest.importorskip("tiny_models")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_models.bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return tiny_models.decoder(tmp_path_factory.mktemp("models") / "gpt2")


def data_of(task, x, y, num_classes=2):
    examples = Examples(x, np.asarray(y))
    return FederatedData(
        task=task, clients=[0], train=lambda k: examples, test=lambda k: examples, num_classes=num_classes
    )


def reviews(folder, length=12):
    texts = ["w1 good film", "the boring bad w2 film of the w3", "great", "w4 bad boring"]
    x = load_tokenizer(folder, length=length).encode(texts)
    return texts, x, np.array([1, 0, 1, 0])


def trained(model, data, *, steps=3, length=12, **settings):
    trainer, _ = build_pretrained(model, data, length=length)
    return trainer, fit(trainer, data, trainer.init(1), steps=steps, **settings)


def fit(trainer, data, params_D, *, steps=3, **settings):
    from fedlearn.algorithm.local_rule import plain_training
    from fedlearn.core.records import ClientWork, LocalSettings, Request

    settings = {"learning_rate": 0.5, "batch_size": 2, **settings}
    request = Request(seed=1, round=1, params_D=params_D, local=LocalSettings(steps=steps, **settings))
    work = [ClientWork(client=0, examples=data.train(0))]
    return params_D + trainer.fit(request, plain_training, work).delta_KD[0]


@pytest.mark.parametrize("adapter", ["lora", "head", "full"])
def test_only_adapters_and_head_are_in_the_vector(bert, adapter):
    _, x, y = reviews(bert)
    trainer, _ = build_pretrained(PretrainedModel(path=str(bert), adapter=adapter), data_of("binary", x, y), length=12)
    names = {leaf.name for leaf in trainer.layout.leaves}
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # no pooler
    kinds = {"lora": all(".lora_" in name for name in names - head), "head": names == head}
    assert head <= names
    assert kinds.get(adapter, "bert.embeddings.word_embeddings.weight" in names)


def test_training_changes_trained_parameters_only_and_starts_at_the_checkpoint(bert):
    _, x, y = reviews(bert)
    data = data_of("binary", x, y)
    trainer, params_D = trained(PretrainedModel(path=str(bert)), data)
    before, after = trainer.layout.unpack(trainer.init(1)), trainer.layout.unpack(params_D)
    assert all(not v.any() for name, v in before.items() if name.endswith(LORA_B))
    assert all(np.any(after[name] != v) for name, v in before.items() if name.endswith(LORA_B))
    original = transformers.AutoModelForMaskedLM.from_pretrained(bert).state_dict()
    now = trainer.network(params_D).state_dict()
    base = {
        name: name.replace(".base_layer", "") for name in now if ".lora_" not in name and name.startswith("bert.enc")
    }
    assert base
    assert all(torch.equal(now[name], original[theirs]) for name, theirs in base.items())


def test_padding_and_other_texts_do_not_change_the_outputs_of_a_text(bert):
    _, x, y = reviews(bert)
    trainer, _ = build_pretrained(PretrainedModel(path=str(bert)), data_of("binary", x, y), length=12)
    params_D = trainer.init(1)
    together = trainer.predict(params_D, x)
    alone = np.concatenate([trainer.predict(params_D, x[row : row + 1]) for row in range(len(x))])
    wide = trainer.predict(params_D, load_tokenizer(bert, length=40).encode(reviews(bert)[0]))
    assert np.allclose(together, alone, atol=1e-6)
    assert np.allclose(together, wide, atol=1e-6)


def test_one_forward_pass_of_an_evaluation_has_few_logits(gpt2, monkeypatch):
    from fedlearn.trainers.torch import hugging_face

    inputs = prompt_inputs(gpt2, length=32, text="text")
    x = inputs.transform(table_from_columns({"text": ["w1 good film " * (n % 5 + 1) for n in range(40)]}))
    trainer, _ = build_pretrained(PretrainedModel(path=str(gpt2)), data_of("causal_lm", x, np.ones(40, int)), length=32)
    sizes = []
    score = trainer._model.module._run
    monkeypatch.setattr(trainer._model.module, "_run", lambda m, x: sizes.append(x[IDS].numel()) or score(m, x))
    whole = trainer.predict(trainer.init(1), x)
    monkeypatch.setattr(hugging_face, "PREDICTED_LOGITS", 40 * 300)
    assert np.allclose(trainer.predict(trainer.init(1), x), whole, rtol=1e-4)
    assert max(sizes[1:]) <= 40


def test_scores_of_texts_are_the_losses_of_transformers(gpt2):
    inputs = prompt_inputs(gpt2, length=96, prompt="question", response="answer")
    table = table_from_columns({"question": ["say w1", "say w2 good"], "answer": ["the film w1 great", "bad"]})
    x = inputs.transform(table)
    trainer, _ = build_pretrained(PretrainedModel(path=str(gpt2)), data_of("causal_lm", x, [1, 1]), length=96)
    nll, _, count = trainer.predict(trainer.init(1), x).T
    module = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    for row in range(2):
        length = int(x[MASK][row].sum())
        ids, labels = (torch.from_numpy(x[name][row : row + 1, :length]).long() for name in (IDS, LABELS))
        with torch.no_grad():
            loss = module(ids, labels=labels).loss
        assert nll[row] / count[row] == pytest.approx(float(loss), rel=1e-5)
    text = inputs.tokenizer.decode([t for t in x[LABELS][0] if t != IGNORED])
    assert text == "the film w1 great"  # the loss counts the response alone


@pytest.mark.slow
def test_each_response_of_a_chat_counts_and_the_template_is_that_of_the_model(tmp_path):
    folder = tiny_models.decoder(tmp_path / "llama", "llama", chat_template=tiny_models.CHAT_TEMPLATE)
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "good"}]
    chat += [{"from": "human", "value": "w2"}, {"from": "gpt", "value": "bad film"}]
    inputs = prompt_inputs(folder, length=64, messages="messages")
    x = inputs.transform(table_from_columns({"messages": [json.dumps(chat)]}))
    read = inputs.tokenizer.decode
    assert read(x[IDS][0][x[MASK][0] > 0]) == "<|user|>w1<|assistant|>good<|user|>w2<|assistant|>bad film"
    assert read([t for t in x[LABELS][0] if t != IGNORED]) == "goodbad film"
    with pytest.raises(DataError, match=r"row 2, column messages: no list of messages"):
        inputs.transform(table_from_columns({"messages": [json.dumps(chat), '{"role": 1}']}))


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 1},
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=["accumulated", "bfloat16", "checkpointed"],
)
def test_savings_of_memory_do_not_change_the_update(gpt2, settings):
    inputs = prompt_inputs(gpt2, length=16, text="text")
    x = inputs.transform(table_from_columns({"text": ["w1 good film the", "w2 bad", "boring of w3", "great w4"]}))
    data = data_of("causal_lm", x, [1, 1, 1, 1])
    model = PretrainedModel(path=str(gpt2))
    _, plain_D = trained(model, data, length=16)
    trainer, params_D = trained(replace(model, gradient_checkpointing=not settings), data, length=16, **settings)
    moved = np.abs(plain_D - trainer.init(1)).max()
    assert np.abs(params_D - plain_D).max() <= (0.05 if "precision" in settings else 1e-4) * moved


def test_an_exported_adapter_and_a_merged_model_have_equal_logits(bert, tmp_path):
    from peft import PeftModel

    from fedlearn.trainers.torch.hugging_face_files import save_adapter, save_merged

    texts, x, y = reviews(bert)
    trainer, params_D = trained(PretrainedModel(path=str(bert), targets="all-linear"), data_of("binary", x, y))
    logit_N1 = trainer.predict(params_D, x)
    save_merged(trainer, params_D, tmp_path / "merged", ("no", "yes"))
    save_adapter(trainer, params_D, tmp_path / "adapter")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")(texts, padding=True, return_tensors="pt")
    for module in (merged, PeftModel.from_pretrained(base, tmp_path / "adapter").eval()):
        with torch.no_grad():
            logits_N2 = module(**tokens).logits.numpy()
        assert np.allclose(logits_N2[:, 1] - logits_N2[:, 0], logit_N1[:, 0], atol=1e-5)
    assert merged.config.id2label == {0: "no", 1: "yes"}
    assert not any("lora" in name for name in merged.state_dict())


@pytest.mark.slow
def test_generation_repeats_and_continues_a_prompt(gpt2):
    trainer, _ = build_pretrained(
        PretrainedModel(path=str(gpt2)),
        data_of("causal_lm", prompt_inputs(gpt2, length=16, text="t").encode([[("w1", True)]]), [1]),
        length=16,
    )
    ids = prompt_inputs(gpt2, length=16, text="t").tokenizer.ids("the film")
    write = [trainer.generate(trainer.init(1), ids, num_tokens=6, temperature=t, seed=3) for t in (0.0, 0.9, 0.9)]
    assert write[1] == write[2]
    assert len(write[0]) <= 6


FAULTS = {
    "no folder": (lambda f: str(f / "absent"), r"no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"weights as pickle"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), r"adapter of another model"),
    "part outside": (
        lambda f: (
            (f / "model.safetensors").rename(f.parent / "other.safetensors"),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}'),
        ),
        r"names \.\./other\.safetensors",
    ),
    "damaged config": (lambda f: (f / "config.json").write_text("[]"), r"cannot load it|is no mapping"),
    "code of its own": (
        lambda f: (f / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "evil.C"}}'),
        r"cannot load it",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_safe_or_not_complete_is_refused(tmp_path, bert, fault):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    (folder / "evil.py").write_text("raise SystemExit('this code must not run')")
    spoil, message = FAULTS[fault]
    path = spoil(folder)
    path = path if isinstance(path, str) else str(folder)
    _, x, y = reviews(bert)
    with pytest.raises(DataError, match=message):
        build_pretrained(PretrainedModel(path=path), data_of("binary", x, y), length=12)


def test_another_base_is_refused_by_its_digest(bert, gpt2):
    digest = find_pretrained(str(bert)).digest
    assert find_pretrained(str(bert), digest=digest).digest == digest
    with pytest.raises(SettingError, match=r"model\.digest"):
        find_pretrained(str(gpt2), digest=digest)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["nothing"]}, r"model\.targets(.|\n)*names of affine maps(.|\n)*query"),
        ({"layers": 3}, r"model\.layers(.|\n)*at most 2"),
        ({"adapter": "lorra"}, r"model\.adapter=lora"),
        ({"rank": 0}, r"model\.rank"),
        ({"dropout": 1.0}, r"model\.dropout"),
        ({"path": None}, r"model\.path"),
    ],
)
def test_wrong_settings_are_refused(bert, settings, message):
    _, x, y = reviews(bert)
    with pytest.raises(SettingError, match=message):
        build_pretrained(PretrainedModel(**{"path": str(bert), **settings}), data_of("binary", x, y), length=12)


def test_a_text_that_is_too_long_for_the_model_is_refused_and_cut_texts_are_counted(bert):
    _, x, y = reviews(bert)
    with pytest.raises(SettingError, match=r"length is 65(.|\n)*at most 64"):
        build_pretrained(PretrainedModel(path=str(bert)), data_of("binary", x, y), length=65)
    tokenizer = load_tokenizer(bert, length=5)
    assert tokenizer.count_cut(["w1 good film", "w1 good film bad", ""]) == 1


def test_a_padding_token_that_is_also_the_end_token_stays_a_token_of_the_text(gpt2):
    inputs = prompt_inputs(gpt2, length=8, text="text")
    assert isinstance(inputs, PromptInputs)
    x = inputs.transform(table_from_columns({"text": ["good"]}))
    assert inputs.tokenizer.pad_id == 0
    length = int(x[MASK][0].sum())
    assert x[LABELS][0][length - 1] == 0  # the end token is counted
    assert (x[LABELS][0][length:] == IGNORED).all()


@pytest.mark.slow
def test_the_public_way_from_python_needs_ten_lines(bert, tmp_path):
    (tmp_path / "north.csv").write_text("review,label\n" + "w1 good film,pos\nw2 bad film,neg\n" * 8)
    (tmp_path / "south.csv").write_text("review,label\n" + "w3 great,pos\nboring w4,neg\n" * 8)
    settings = {"scenario.path": str(tmp_path), "scenario.length": 12, "model.path": str(bert)}
    result = fedlearn.run("text", rounds=1, report=False, folder=tmp_path / "run", show=False, settings=settings)
    assert set(result.predict({"review": ["w1 good", "bad w2"]})) <= {"pos", "neg"}
