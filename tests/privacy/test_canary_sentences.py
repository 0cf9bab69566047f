"""Canary sentences: their form and exposure, and the parts of an adapted model that could escape the clip."""

import numpy as np
import pytest

from fedlearn import Examples, SettingError
from fedlearn.core.inputs import join_inputs
from fedlearn.core.tasks import as_task
from fedlearn.privacy.canary_sentences import BASELINE, NUM_SECRETS, draw_sentences, example_losses, exposures


def texts(*, labels=False, num=30, length=16):
    rng = np.random.default_rng(0)
    mask = (np.arange(length) < rng.integers(4, length + 1, num)[:, None]).astype(np.int32)
    fields = {"input_ids": rng.integers(2, 40, (num, length)).astype(np.int32) * mask, "attention_mask": mask}
    if labels:
        fields["labels"] = np.where((mask > 0) & (np.arange(length) >= 8), fields["input_ids"], -100).astype(np.int32)
    return Examples(join_inputs(fields), rng.integers(0, 2, num).astype(np.float32))


def draw(examples, canaries=5, candidates=7):
    rng = np.random.default_rng(1)
    return draw_sentences(examples, num_canaries=canaries, num_candidates=candidates, rng=rng)


@pytest.mark.parametrize("labels", [False, True])
def test_canaries_differ_from_their_candidates_in_the_secret_only(labels):
    examples = texts(labels=labels)
    before = examples.x.copy()
    drawn = draw(examples)
    assert np.array_equal(before, examples.x)
    for m in range(5):
        canary, others = drawn.canaries.x[m], drawn.candidates.x[m * 7 : (m + 1) * 7]
        differs = others["input_ids"] != canary["input_ids"]
        end = canary["attention_mask"].sum() - 1
        assert differs.any(axis=1).all()
        assert not differs[:, : end - NUM_SECRETS].any()
        assert not differs[:, end:].any()
        assert (others["attention_mask"] == canary["attention_mask"]).all()
        assert (drawn.candidates.y[m * 7 : (m + 1) * 7] == drawn.canaries.y[m]).all()
        if labels:
            counted = canary["labels"] != -100
            assert np.array_equal(canary["labels"][counted], canary["input_ids"][counted])
    joined = drawn.insert(examples, 2, copies=3)
    assert len(joined) == len(examples) + 3
    assert (joined.x[-3:] == drawn.canaries.x[2]).all()


def test_exposure_is_the_logarithm_of_the_rank_and_has_a_known_mean_without_memorization():
    rng = np.random.default_rng(0)
    losses = rng.random((20000, 128))
    assert exposures(losses[:, 0], losses[:, 1:]).mean() == pytest.approx(BASELINE, abs=0.05)
    assert exposures(np.zeros(1), np.ones((1, 127)))[0] == 7
    assert exposures(np.ones(1), np.ones((1, 127)))[0] == 0  # a constant model exposes nothing


@pytest.mark.framework
def test_losses_are_those_of_torch():
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    rng = np.random.default_rng(0)
    binary, many, y = rng.normal(size=(6, 1)), rng.normal(size=(6, 3)), rng.integers(0, 2, 6)
    found = example_losses(binary, y.astype(np.float32), as_task("binary"))
    expected = functional.binary_cross_entropy_with_logits(
        torch.tensor(binary[:, 0]), torch.tensor(y, dtype=torch.float64), reduction="none"
    )
    assert np.allclose(found, expected)
    expected = functional.cross_entropy(torch.tensor(many), torch.tensor(y), reduction="none")
    assert np.allclose(example_losses(many, y, as_task("multiclass")), expected)
    sums = np.array([[6.0, 1, 3]])
    assert example_losses(sums, np.array([3]), as_task("causal_lm")) == pytest.approx([2.0])


def test_inputs_without_tokens_and_short_texts_are_refused():
    with pytest.raises(SettingError, match="no token ids"):
        draw(Examples(np.zeros((4, 2), np.float32), np.zeros(4)))
    with pytest.raises(SettingError, match="at most"):
        draw(texts(), canaries=31)


KINDS = ("adapters", "adapters and head", "dropout", "head tied to the embedding")


def adapted(kind):
    """Return a trainer of a small decoder with adapters, and texts."""
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    from fedlearn.trainers.torch import TorchTrainer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        tie_word_embeddings=kind.startswith("head tied"),
    )
    tied = kind.startswith("head tied")
    module = (transformers.LlamaForCausalLM if tied else transformers.LlamaForSequenceClassification)(config)
    saved = {"adapters and head": ["score"]}.get(kind)
    rate = 0.3 if kind == "dropout" else 0.0
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": rate, "modules_to_save": saved}
    module = peft.get_peft_model(module, peft.LoraConfig(**settings))
    if tied:
        module.get_input_embeddings().weight.requires_grad_(True)

    def forward(model, x):
        logits = model(input_ids=x["input_ids"].long(), attention_mask=x["attention_mask"].long()).logits
        return logits.mean(1)[:, :2] if tied else logits

    return TorchTrainer(module, task="multiclass", forward=forward)


@pytest.mark.slow
@pytest.mark.framework
@pytest.mark.parametrize("kind", KINDS)
def test_one_text_moves_the_clipped_sum_of_an_adapted_model_by_one_clip_norm(kind):
    """Attack the clip by the frozen base, tied embeddings, dropout and saved modules."""
    trainer = adapted(kind)
    from fedlearn.privacy.example_sensitivity import measure_sensitivity

    examples = texts(num=8, length=8)
    examples = Examples(examples.x, examples.y.astype(np.int64))
    frozen = {name: p.detach().clone() for name, p in trainer.module.named_parameters() if not p.requires_grad}
    assert measure_sensitivity(trainer, examples, is_quick=True).is_bounded
    assert frozen
    assert all(bool((frozen[name] == p).all()) for name, p in trainer.module.named_parameters() if name in frozen)
    names = [leaf.name for leaf in trainer.layout.leaves]
    allowed = ("lora_", "modules_to_save") + (("embed_tokens",) if kind.startswith("head tied") else ())
    assert all(any(part in name for part in allowed) for name in names)
