"""Compare the models of transformers in JAX with the library itself: outputs, gradients, adapters and training."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.inputs import join_inputs
from fedlearn.core.records import ClientWork, ExampleDP, Examples, LocalSettings, Request
from fedlearn.data.pretrained_files import find_pretrained
from fedlearn.trainers.pretrained import PretrainedModel, build_pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from fedlearn.trainers.jax.pretrained import generate, load_model, read_adapter, save_adapter  # noqa: E402

LABELS, LENGTH, NUM_TEXTS, VOCAB = 3, 9, 5, 30
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
DISTIL = {"vocab_size": VOCAB, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 40}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40}
TEXTS, WORDS, CAUSAL = "multiclass", "token_classification", "causal_lm"
AUTO = {
    TEXTS: "AutoModelForSequenceClassification",
    WORDS: "AutoModelForTokenClassification",
    CAUSAL: "AutoModelForCausalLM",
}
PEFT_TASKS = {TEXTS: "SEQ_CLS", WORDS: "TOKEN_CLS", CAUSAL: "CAUSAL_LM"}
MODELS = {
    "small bert": ("BertConfig", {**SIZES, "num_hidden_layers": 1}, TEXTS),
    "bert": ("BertConfig", SIZES, TEXTS),
    "bert of words": ("BertConfig", SIZES, WORDS),
    "roberta": ("RobertaConfig", SIZES, TEXTS),
    "roberta of words": ("RobertaConfig", SIZES, WORDS),
    "distilbert": ("DistilBertConfig", DISTIL, TEXTS),
    "distilbert of words": ("DistilBertConfig", DISTIL, WORDS),
    "gpt2": ("GPT2Config", GPT2, CAUSAL),
    "gpt2, not tied": ("GPT2Config", {**GPT2, "tie_word_embeddings": False, "activation_function": "relu"}, CAUSAL),
    "llama": ("LlamaConfig", {**SIZES, "num_key_value_heads": 2}, CAUSAL),
    "llama 3": (
        "LlamaConfig",
        {
            **SIZES,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": ROPE,
        },
        CAUSAL,
    ),
    "llama, linear": ("LlamaConfig", {**SIZES, "rope_parameters": {**ROPE, "rope_type": "linear"}}, CAUSAL),
    "mistral": ("MistralConfig", {**SIZES, "num_key_value_heads": 2, "sliding_window": 4}, CAUSAL),
    "qwen2": ("Qwen2Config", {**SIZES, "num_key_value_heads": 2}, CAUSAL),
}


@cache
def config_of(name):
    kind, values, _ = MODELS[name]
    config = getattr(transformers, kind)(**values, bos_token_id=1, eos_token_id=2)
    config.num_labels = LABELS
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    return config


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function that writes a model with random weights, and returns its folder."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()

    @cache
    def write(name, dtype="float32"):
        folder = tmp_path_factory.mktemp("model")
        module(name).to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return write


def module(name, folder=None):
    """Return a module of transformers: from a folder, or with weights that change each output."""
    auto = getattr(transformers, AUTO[MODELS[name][2]])
    if folder is not None:
        return auto.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    built = auto.from_config(config_of(name)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def inputs(name):
    """Return token ids and a mask of texts of uneven length."""
    rng = np.random.default_rng(0)
    mask = (np.arange(LENGTH) < np.array([LENGTH, 4, 7, 1, LENGTH])[:, None]).astype(np.int32)
    ids = np.where(mask == 1, rng.integers(3, VOCAB, mask.shape), 1 if "roberta" in name else 0).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask}


def real_outputs(logits, name):
    """Return the outputs that count: of texts, or of tokens that are no padding."""
    logits = np.asarray(logits.detach() if isinstance(logits, torch.Tensor) else logits)
    return logits[inputs(name)["attention_mask"] == 1] if logits.ndim == 3 else logits


def torch_outputs(built, name):
    return built(**{key: torch.from_numpy(part).long() for key, part in inputs(name).items()}).logits


def loaded(name, folder, **options):
    return load_model(find_pretrained(str(folder)), task=MODELS[name][2], num_labels=LABELS, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_ones_of_transformers(name, folder_of):
    folder = folder_of(name)
    model, original = loaded(name, folder), module(name, folder)
    assert set(model.trained) == {leaf for leaf, _ in original.named_parameters()}
    logits, x = torch_outputs(original, name), jax.tree.map(jnp.asarray, inputs(name))
    np.testing.assert_allclose(real_outputs(model(x), name), real_outputs(logits, name), atol=1e-5)
    mask = inputs(name)["attention_mask"][:, :, None] if logits.ndim == 3 else 1
    factors = (np.random.default_rng(1).normal(size=logits.shape) * mask).astype(np.float32)
    (logits * torch.from_numpy(factors)).sum().backward()
    gradient = model.jit(jax.grad(lambda params: (model.apply(params, x) * factors).sum()))(model.weights["params"])
    for leaf, parameter in original.named_parameters():
        expected = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        np.testing.assert_allclose(gradient[leaf], expected, atol=1e-4 * (1 + np.abs(expected).max()), err_msg=leaf)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_file_in_bfloat16_gives_the_same_outputs(name, folder_of):
    folder = folder_of(name, "bfloat16")
    tuning = PretrainedModel(path=str(folder), targets="all-linear")
    model = loaded(name, folder, tuning=tuning)
    assert {str(v.dtype) for v in model._frozen.arrays.values()} == {"bfloat16"}
    logits = torch_outputs(module(name, folder), name)
    if MODELS[name][2] == CAUSAL:  # a head has no adapters, and is trained as float32
        assert set(model.trained) == {leaf for leaf in model.trained if ".lora_" in leaf}
    np.testing.assert_allclose(real_outputs(model(inputs_of(name)), name), real_outputs(logits, name), atol=1e-4)


def inputs_of(name):
    return jax.tree.map(jnp.asarray, inputs(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_peft_are_read_and_written(name, folder_of, tmp_path):
    folder = folder_of(name)
    targets = ["q_lin", "ffn.lin1"] if "distil" in name else None
    config = peft.LoraConfig(task_type=PEFT_TASKS[MODELS[name][2]], r=2, lora_alpha=5, target_modules=targets)
    tuned = peft.get_peft_model(module(name, folder), config).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "peft")
    model = read_adapter(str(folder), tmp_path / "peft")
    outputs = real_outputs(model(inputs_of(name)), name)
    np.testing.assert_allclose(outputs, real_outputs(torch_outputs(tuned, name), name), atol=1e-5)
    save_adapter(model, tmp_path / "ours", tuning=PretrainedModel(path=str(folder), rank=2, alpha=5.0))
    again = peft.PeftModel.from_pretrained(module(name, folder), tmp_path / "ours").eval()
    np.testing.assert_allclose(outputs, real_outputs(torch_outputs(again, name), name), atol=1e-5)
    model.save_pretrained(tmp_path / "merged")
    merged = torch_outputs(module(name, tmp_path / "merged"), name)
    np.testing.assert_allclose(outputs, real_outputs(merged, name), atol=1e-5)


DECODERS = [name for name in MODELS if MODELS[name][2] == CAUSAL]


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_texts_are_the_ones_of_transformers(name, folder_of):
    prompt = inputs(name)["input_ids"][[0, 4], :5]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = torch.from_numpy(prompt).long()
    expected = module(name, folder_of(name)).generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    model = loaded(name, folder_of(name))
    assert np.array_equal(generate(model, prompt, num_tokens=12), expected.numpy())
    stop = int(expected[0, 7])
    stopped = generate(model, prompt[:1], num_tokens=12, stop_tokens=(stop,))[0, 5:]
    first = list(stopped).index(stop)
    assert np.array_equal(stopped[: first + 1], expected[0, 5 : 6 + first].numpy())
    assert set(stopped[first:]) == {stop}


@pytest.mark.slow
def test_samples_have_the_probabilities_of_the_logits(folder_of):
    model, prompt = loaded("llama", folder_of("llama")), np.full((4000, 1), 7, np.int32)
    expected = np.asarray(jax.nn.softmax(model(jnp.asarray(prompt[:1]))[0, -1] / 0.7))
    drawn = generate(model, prompt, num_tokens=1, temperature=0.7, seed=3)[:, 1]
    shares = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / len(drawn))
    assert np.array_equal(drawn, generate(model, prompt, num_tokens=1, temperature=0.7, seed=3)[:, 1])


def clients(name):
    """Return data of two clients of different size, with the inputs of a task."""
    rng, task = np.random.default_rng(2), MODELS[name][2]
    x = {key: np.tile(part, (2, 1)) for key, part in inputs(name).items()}
    count = len(x["input_ids"])
    if task == CAUSAL:
        x["labels"] = np.where(x["attention_mask"] == 1, x["input_ids"], -100).astype(np.int32)
        y = (x["labels"][:, 1:] != -100).sum(axis=1)
    elif task == WORDS:
        x["token_positions"] = np.tile(np.array([1, 3, -1], np.int32), (count, 1))
        y = np.where(x["token_positions"] >= 0, rng.integers(0, LABELS, (count, 3)), -1)
    else:
        y = rng.integers(0, LABELS, count)
    x = join_inputs(x)
    parts = [Examples(x[:6], y[:6]), Examples(x[6:], y[6:])]
    classes = 1 if task == CAUSAL else LABELS
    return FederatedData(
        task=task, clients=range(2), train=parts.__getitem__, test=parts.__getitem__, num_classes=classes
    )


def trainers(name, folder, **settings):
    model, data = PretrainedModel(path=str(folder), **settings), clients(name)
    return [
        build_pretrained(model, data, length=LENGTH, framework=framework)[0] for framework in ("torch", "jax")
    ], data


def updates(trainer, data, params_D, **local):
    work = [ClientWork(client=client, examples=data.train(client)) for client in data.clients]
    settings = LocalSettings(**{"batch_size": 3, "learning_rate": 0.1, "steps": 2, **local})
    request = Request(round=1, seed=1, params_D=params_D, local=settings)
    return np.asarray(trainer.fit(request, plain_training, work).delta_KD)


TUNINGS = {
    "lora": {"rank": 2},
    "all maps": {"rank": 2, "targets": "all-linear", "layers": 1},
    "full": {"adapter": "full"},
    "the last layer": {"adapter": "full", "layers": 1},
    "the head": {"adapter": "head"},
}
PAIRS = [(name, tuning) for name in MODELS for tuning in TUNINGS]
PAIRS = [
    (name, tuning)
    for name, tuning in PAIRS
    if not ("distil" in name and tuning == "lora") and not (name in DECODERS and tuning == "the head")
]


QUICK = ("small bert", "lora")


@pytest.mark.parametrize(
    ("name", "tuning"), [QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS if pair != QUICK)]
)
def test_clients_of_both_frameworks_train_one_model(name, tuning, folder_of):
    pair, data = trainers(name, folder_of(name), **TUNINGS[tuning])
    assert pair[0].layout == pair[1].layout
    assert np.array_equal(pair[0].init(3), pair[1].init(3))
    params_D = pair[0].init(3)
    params_D = params_D + 0.1 * np.random.default_rng(0).standard_normal(params_D.shape).astype(np.float32)
    x = data.train(0).x
    np.testing.assert_allclose(*(trainer.predict(params_D, x) for trainer in pair), atol=1e-4)
    deltas = [updates(trainer, data, params_D) for trainer in pair]
    assert np.abs(deltas[0]).max() > 1e-4
    np.testing.assert_allclose(*deltas, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tuning"), PAIRS)
def test_private_clients_of_both_frameworks_clip_each_text_alike(name, tuning, folder_of):
    pair, data = trainers(name, folder_of(name), **TUNINGS[tuning])
    params_D = pair[0].init(3)
    params_D = params_D + 0.1 * np.random.default_rng(0).standard_normal(params_D.shape).astype(np.float32)
    private = ExampleDP(clip=0.05, noise_multiplier=0.0)
    deltas = [updates(trainer, data, params_D, example_dp=private) for trainer in pair]
    assert np.abs(deltas[0]).max() > 1e-4
    np.testing.assert_allclose(*deltas, atol=1e-4)
