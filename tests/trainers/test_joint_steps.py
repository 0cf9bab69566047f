"""Clients with adapters over one frozen base train in joint passes, and each gets the update of a pass of its own."""

import sys
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from fedlearn import Examples, FederatedData, LocalSettings, Schedule, SettingError, federate, serial, start, vector
from fedlearn.algorithm import LocalRule, Strategy, everyone
from fedlearn.core import ExampleDP
from fedlearn.core.records import ClientWork, Request

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from fedlearn.trainers.torch import TorchTrainer  # noqa: E402
from fedlearn.trainers.torch.joint_layers import JointLayers  # noqa: E402

LOCAL = LocalSettings(
    batch_size=4, epochs=2, optimizer="adamw", learning_rate=0.01, weight_decay=0.1, max_grad_norm=0.5
)
SIZES = (9, 4, 1, 6)


class Adapted(nn.Module):
    """Add an adapter to a frozen layer over positions, and classify by the mean."""

    def __init__(self, *, dropout=0.0, mixes=False, scales=False):
        super().__init__()
        torch.manual_seed(0)
        self.base, self.lora_A, self.lora_B = (
            nn.Linear(6, 16),
            nn.Linear(6, 2, bias=False),
            nn.Linear(2, 16, bias=False),
        )
        self.below, self.head = nn.Linear(6, 6).requires_grad_(False), nn.Linear(16, 3)
        self.dropout, self.mixes = nn.Dropout(dropout), mixes
        self.scale = nn.Parameter(torch.ones(16)) if scales else None
        self.base.requires_grad_(False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        x = torch.tanh(self.below(x))
        hidden = torch.relu(self.base(x) + self.lora_B(self.lora_A(self.dropout(x))))
        hidden = hidden if self.scale is None else hidden * self.scale
        return self.head(hidden.mean(1) + (hidden.mean((0, 1)) if self.mixes else 0))


def work():
    rng = np.random.default_rng(0)
    return [
        ClientWork(k, Examples(rng.normal(size=(n, 5, 6)).astype(np.float32), rng.integers(0, 3, n)))
        for k, n in enumerate(SIZES)
    ]


def fits(module, *, local=LOCAL, rule=None, trainer=None):
    """Return the updates of clients one after another, and in joint passes."""
    trainer = trainer or TorchTrainer(module, task="multiclass")
    request = Request(round=1, seed=1, params_D=trainer.init(1), local=local)
    return [trainer.with_batching(each).fit(request, rule or LocalRule(), work()) for each in ("map", "joint")]


RULES = {
    "plain": LocalRule(),
    "proximal": LocalRule(correct=lambda grad, w, w_global: grad + 0.5 * (w - w_global)),
    "frozen": LocalRule(frozen_parameters=("lora_A.*",)),
    "adjusted": LocalRule(adjust_logits=lambda outputs, counts: outputs + counts / 10),
    "two gradients": LocalRule(gradient=lambda gradient_at, w, w_global: gradient_at(w) + gradient_at(2 * w)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    "local",
    [LOCAL, LocalSettings(batch_size=3, learning_rate=0.1), replace(LOCAL, class_weights="balanced")],
    ids=["adamw", "sgd", "class weights"],
)
def test_joint_passes_give_each_client_the_update_of_passes_of_its_own(rule, local):
    alone, joint = fits(Adapted(), local=local, rule=rule)
    assert np.abs(alone.delta_KD).max(axis=1).min() > 1e-3
    assert np.allclose(alone.delta_KD, joint.delta_KD, atol=1e-5)
    assert np.allclose(alone.metrics["loss"].total_K, joint.metrics["loss"].total_K, rtol=1e-5)
    assert np.array_equal(alone.num_steps_K, joint.num_steps_K)


def test_dp_sgd_trains_one_client_after_another():
    local = LocalSettings(batch_size=4, example_dp=ExampleDP(clip=0.1, noise_multiplier=1.0))
    alone, joint = fits(Adapted(), local=local)
    assert np.array_equal(alone.delta_KD, joint.delta_KD)


def test_large_weights_are_used_in_place(monkeypatch):
    monkeypatch.setattr("fedlearn.trainers.torch.joint_layers.MAX_COPIED", 0)
    alone, joint = fits(Adapted())
    assert np.allclose(alone.delta_KD, joint.delta_KD, atol=1e-5)


@pytest.mark.parametrize("num_rows", [(4, 4, 4, 4), (4, 4, 4, 3), (1, 1, 1, 1), (8, 4, 4, 4)], ids=str)
def test_clients_with_equal_and_unequal_numbers_of_rows_get_their_updates(num_rows, monkeypatch):
    monkeypatch.setitem(globals(), "SIZES", num_rows)
    alone, joint = fits(Adapted(), local=LocalSettings(batch_size=4, epochs=3, learning_rate=0.1))
    assert np.allclose(alone.delta_KD, joint.delta_KD, atol=1e-6)


def test_a_small_pass_gives_the_same(monkeypatch):
    monkeypatch.setattr("fedlearn.trainers.torch.joint_steps.MAX_POSITIONS", 60)
    alone, joint = fits(Adapted())
    assert np.allclose(alone.delta_KD, joint.delta_KD, atol=1e-5)


class SharedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.table(x[..., 0].long() % 6).mean(1))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: Adapted(dropout=0.1), "draws random numbers"),
        (lambda: Adapted(scales=True), "outside of linear layers"),
        (SharedHead, "outside of linear layers"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(30, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "keeps buffers"),
    ],
    ids=["dropout", "scale", "tied", "statistics"],
)
def test_a_model_that_does_not_fit_is_refused(module, reason):
    with pytest.raises(SettingError, match=reason):
        TorchTrainer(module(), task="multiclass").with_batching("joint")


def test_a_model_that_mixes_the_examples_of_a_batch_is_refused():
    with pytest.raises(SettingError, match="mixes the examples"):
        fits(Adapted(mixes=True))


def test_layers_are_themselves_again_after_an_error():
    trainer = TorchTrainer(Adapted(), task="multiclass")
    layers = JointLayers(trainer._model)
    with (
        suppress(RuntimeError),
        layers.using(layers.weights(torch.zeros(2, trainer.layout.num_parameters)), torch.tensor([0, 1])),
    ):
        assert "forward" in vars(trainer.module.lora_A)
        raise RuntimeError
    assert "forward" not in vars(trainer.module.lora_A)


def problem():
    items = {item.client: item.examples for item in work()}
    return FederatedData(
        task="multiclass", num_classes=3, clients=range(4), train=items.__getitem__, test=items.__getitem__
    )


def test_an_engine_trains_in_joint_passes():
    ends = []
    for engine in (
        serial(problem(), TorchTrainer(Adapted(), task="multiclass")),
        vector(problem(), TorchTrainer(Adapted(), task="multiclass"), batching="joint"),
    ):
        strategy = Strategy(select=everyone())
        state = start(strategy, engine.trainer.init(1), engine, seed=1)
        *_, last = federate(strategy, engine, state, schedule=Schedule(rounds=3), local=LOCAL)
        ends.append(last.state.params_D)
        engine.close()
    assert np.allclose(*ends, atol=1e-5)


def test_the_clients_of_each_process_share_passes(monkeypatch):
    monkeypatch.setattr("fedlearn.engines.base.available_cores", lambda: 2)
    monkeypatch.delitem(sys.modules, "jax", raising=False)  # the engine does not fork beside its threads
    engine = vector(problem(), TorchTrainer(Adapted(), task="multiclass"), batching="joint")
    assert [part.stop - part.start for part in engine.pool.parts(8)] == [4, 4]
    assert "joint" in engine.describe(8)


def test_an_engine_refuses_a_model_that_mixes_the_examples_of_a_batch():
    engine = vector(problem(), TorchTrainer(Adapted(mixes=True), task="multiclass"), batching="joint")
    strategy = Strategy(select=everyone())
    state = start(strategy, engine.trainer.init(1), engine, seed=1)
    with pytest.raises(SettingError, match="mixes the examples"):
        next(federate(strategy, engine, state, schedule=Schedule(rounds=1), local=LOCAL))
    engine.close()


class Block(nn.Module):
    def __init__(self, adapted):
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.lora_A, self.lora_B = (
            (nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)) if adapted else (None, None)
        )
        self.num_rows = 0

    def forward(self, x, mask=None):
        self.num_rows += len(x)
        adapted = 0 if self.lora_A is None else self.lora_B(self.lora_A(x))
        return x + torch.tanh(self.base(x) + adapted)


class Deep(nn.Module):
    """Stack blocks, of which only the last ones have adapters."""

    def __init__(self, num_frozen=2):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(i >= num_frozen) for i in range(3)])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def test_frozen_blocks_below_the_first_adapter_run_once_for_each_example(monkeypatch):
    monkeypatch.setattr("fedlearn.trainers.torch.frozen_prefix.MAX_SHARE", 100)
    trainer = TorchTrainer(Deep(), task="multiclass")
    trainer.check_model(work()[0].examples)
    trainer.module.blocks[0].num_rows = 0
    alone, joint = fits(None, trainer=trainer)
    assert np.allclose(alone.delta_KD, joint.delta_KD, atol=1e-5)
    num_alone = 2 * sum(SIZES) + 4 + 4  # two epochs, and the check of the first batches of two clients
    assert trainer.module.blocks[0].num_rows == num_alone + sum(SIZES)
    _, again = fits(None, trainer=trainer)
    assert np.allclose(again.delta_KD, joint.delta_KD, atol=1e-6)


def test_kept_inputs_stay_within_a_share_of_the_frozen_parameters():
    trainer = TorchTrainer(Deep(), task="multiclass")
    alone, joint = fits(None, trainer=trainer)
    prefix = trainer._joint_steps(()).prefix
    frozen = sum(4 * p.numel() for p in trainer.module.parameters() if not p.requires_grad)
    assert prefix.is_active
    assert sum(4 * kept.numel() for kept in prefix._kept.values()) <= 0.2 * frozen
    assert np.allclose(alone.delta_KD, joint.delta_KD, atol=1e-5)


def test_blocks_with_frozen_factors_are_no_prefix():
    """Check a factor that does not train, and whose value follows from the request."""
    trainer = TorchTrainer(Deep(1), task="multiclass")
    alone, joint = fits(None, trainer=trainer, rule=LocalRule(frozen_parameters=("blocks.1.*",)))
    assert np.allclose(alone.delta_KD, joint.delta_KD, atol=1e-5)
    assert len(trainer._joint_steps(("blocks.1.*",)).prefix._below) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_models_of_transformers_with_peft_train_in_joint_passes(kind):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = {"vocab_size": 50, "num_labels": 2, "pad_token_id": 0}
    config = {
        "bert": lambda: transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **sizes,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=16, n_layer=3, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes
        ),
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, **sizes
        ),
    }[kind]()
    torch.manual_seed(0)
    module = transformers.AutoModelForSequenceClassification.from_config(config)
    targets = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}[kind]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets, layers_to_transform=[1, 2]), module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(("classifier", "score")))
    rng, items = np.random.default_rng(0), []
    for k, n in enumerate(SIZES):
        lengths = rng.integers(3, 12, n)
        mask = (np.arange(12) < lengths[:, None]).astype(np.int64)
        x = {"input_ids": rng.integers(1, 50, (n, 12)) * mask, "attention_mask": mask}
        items.append(ClientWork(k, Examples(x, rng.integers(0, 2, n))))

    def trim(x):
        longest = int(x["attention_mask"].sum(1).max())
        return {name: part[:, :longest] for name, part in x.items()}

    trainer = TorchTrainer(module, task="multiclass", trim=trim)
    request = Request(round=1, seed=1, params_D=trainer.init(1), local=LocalSettings(batch_size=4, epochs=3))
    alone, joint = (trainer.with_batching(each).fit(request, LocalRule(), items) for each in ("map", "joint"))
    assert trainer._joint_steps(()).prefix.is_active
    assert np.abs(alone.delta_KD).max() > 1e-2
    assert np.allclose(alone.delta_KD, joint.delta_KD, atol=1e-5)
