"""`BaseTrainer`: the optimizers of torch, all inputs of a request, and a refusal of everything else."""

from dataclasses import replace

import numpy as np
import pytest

from fedlearn.algorithm.local_rule import LocalRule, plain_training, proximal
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientWork, ExampleDP, LocalSettings, Request
from fedlearn.engines.base import vector
from fedlearn.errors import SettingError
from fedlearn.testing import LinearTrainer, check_trainer, linear_problem
from fedlearn.trainers.base import BaseTrainer, require_plain_training

DATA = linear_problem()
WORK = [ClientWork(client=k, examples=DATA.train(k)) for k in range(3)]
REQUEST = Request(round=3, seed=1, params_D=np.linspace(-1, 1, 4, dtype=np.float32))


class Plain(BaseTrainer):
    """Linear regression with a gradient of the mean loss only."""

    layout = LinearTrainer(3).layout

    def outputs(self, params_D, x):
        return x @ params_D[1:, None] + params_D[0]

    def gradient(self, params_D, x, y):
        error_N = self.outputs(params_D, x)[:, 0] - y
        return error_N**2, 2 * np.concatenate([[error_N.mean()], error_N @ x / len(x)])


def request_with(**local):
    return replace(REQUEST, local=LocalSettings(batch_size=4, **local))


def torch_linear():
    torch = pytest.importorskip("torch")
    from fedlearn.trainers.torch import TorchTrainer

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = torch.nn.Linear(3, 1)

        def forward(self, x):
            return self.out(x)

    return TorchTrainer(Net(), task="regression")


@pytest.mark.parametrize(
    "local",
    [
        {"learning_rate": 0.05, "epochs": 2},
        {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01, "steps": 9},
        {"learning_rate": 0.01, "optimizer": "adamw", "weight_decay": 0.1, "epochs": 3},
    ],
)
@pytest.mark.parametrize("rule", [plain_training, proximal(0.3)], ids=["plain", "proximal"])
def test_it_trains_as_the_torch_trainer_does(local, rule):
    start_D = np.ones(4, np.float32)
    work = [WORK[0], WORK[1]._replace(start_D=start_D), WORK[2]._replace(round=7)]
    ours, theirs = (trainer.fit(request_with(**local), rule, work) for trainer in (Plain(), torch_linear()))
    assert np.allclose(ours.delta_KD, theirs.delta_KD, atol=1e-5)
    assert np.allclose(ours.metrics["loss"].total_K, theirs.metrics["loss"].total_K, rtol=1e-4)
    assert np.array_equal(ours.num_steps_K, theirs.num_steps_K)
    assert np.array_equal(ours.metrics["loss"].count_K, theirs.metrics["loss"].count_K)


def test_its_dp_sgd_clips_as_the_torch_trainer_does():
    request = request_with(example_dp=ExampleDP(clip=0.5, noise_multiplier=0.0), learning_rate=0.1, epochs=2)
    ours, theirs = (trainer.fit(request, plain_training, WORK) for trainer in (LinearTrainer(3), torch_linear()))
    assert np.allclose(ours.delta_KD, theirs.delta_KD, atol=1e-5)


def test_the_noise_of_a_deployment_does_not_follow_from_the_seed():
    request = request_with(example_dp=ExampleDP(), learning_rate=0.1)
    deltas = [LinearTrainer(3).fit(request, plain_training, WORK).delta_KD for _ in range(2)]
    assert np.array_equal(*deltas)
    real = [LinearTrainer(3).fit(replace(request, deployed=True), plain_training, WORK).delta_KD for _ in range(2)]
    assert not np.array_equal(*real)


@pytest.mark.parametrize("deployed", [False, True])
def test_releases_of_dp_sgd_lie_on_a_grid_with_and_without_an_example(deployed):
    dp, examples = ExampleDP(clip=1.0, noise_multiplier=1.0), DATA.train(0)
    blank = replace(examples, x=np.concatenate([0 * examples.x[:1], examples.x[1:]]))
    local = LocalSettings(steps=1, batch_size=1024, learning_rate=float(len(examples)), example_dp=dp)
    request = replace(REQUEST, local=local, deployed=deployed, params_D=np.zeros(4))
    for part in (examples, blank):
        result = LinearTrainer(3).fit_client(request, plain_training, ClientWork(client=0, examples=part))
        steps_D = result.delta_D * 2**20
        assert np.abs(steps_D - np.round(steps_D)).max() < 1e-6
        assert (np.round(steps_D) % 16).any()


class Centred(LinearTrainer):
    """Compute gradients at inputs minus their mean over the batch."""

    def example_gradients(self, params_D, x, y):
        return super().example_gradients(params_D, x - x.mean(axis=0), y)


class MeanLoss(LinearTrainer):
    """Divide by the number of examples."""

    def example_gradients(self, params_D, x, y):
        loss_N, grad_ND = super().example_gradients(params_D, x, y)
        return loss_N, grad_ND / max(1, len(y))


@pytest.mark.parametrize("trainer", [Centred(3), MeanLoss(3)], ids=["centred", "mean loss"])
def test_dp_sgd_is_refused_if_gradients_mix_the_examples_of_a_batch(trainer):
    request = request_with(example_dp=ExampleDP(clip=0.5), learning_rate=0.1)
    with pytest.raises(SettingError, match=r"example_gradients mixes the examples of a batch"):
        trainer.fit(request, plain_training, WORK)


class WithBuffers(Plain):
    layout = Layout.from_shapes([("out.weight", (1, 3))], [("out.mean", (1,))])


REFUSED = {
    "DP-SGD": (Plain(), request_with(example_dp=ExampleDP()), plain_training, r"local\.example_dp"),
    "a penalty": (Plain(), REQUEST, LocalRule(penalty=lambda batch, g: 0), "strategy is one with a penalty"),
    "adjusted logits": (Plain(), REQUEST, LocalRule(adjust_logits=lambda o, c: o), "one that adjusts logits"),
    "buffers": (WithBuffers(), REQUEST, plain_training, "model is one with buffers"),
}


@pytest.mark.parametrize(("trainer", "request_", "rule", "message"), REFUSED.values(), ids=REFUSED)
def test_it_refuses_everything_that_it_does_not_support(trainer, request_, rule, message):
    with pytest.raises(SettingError, match=message):
        trainer.fit(request_, rule, WORK)


@pytest.mark.parametrize("batching", ["vmap", "process_pool"])
def test_it_refuses_a_batching_that_it_does_not_support(batching):
    with pytest.raises(SettingError, match="batching"):
        vector(DATA, Plain(), batching=batching)


@pytest.mark.parametrize(
    ("rule", "local"),
    [
        (proximal(0.1), {}),
        (LocalRule(adjust_logits=lambda o, c: o), {}),
        (LocalRule(penalty=lambda batch, g: 0), {}),
        (LocalRule(gradient=lambda gradient_at, w, g: gradient_at(w)), {}),
        (plain_training, {"example_dp": ExampleDP()}),
    ],
)
def test_a_solver_without_gradients_refuses_rules_and_dp_sgd(rule, local):
    require_plain_training(plain_training, REQUEST)
    with pytest.raises(SettingError):
        require_plain_training(rule, request_with(**local))


def test_predictions_do_not_depend_on_the_batches_of_predict():
    trainer = Plain()
    x = np.random.default_rng(1).normal(size=(23, 3)).astype(np.float32)
    whole = trainer.predict(REQUEST.params_D, x)
    trainer.max_predict_rows = 5
    assert np.allclose(trainer.predict(REQUEST.params_D, x), whole, atol=1e-6)
    assert trainer.predict(REQUEST.params_D, x[:0]).shape == (0, 1)


def test_a_missing_method_is_named():
    class Empty(BaseTrainer):
        layout = Plain.layout

    with pytest.raises(NotImplementedError, match="Empty needs the method gradient or example_gradients"):
        Empty().fit(REQUEST, plain_training, WORK)
    with pytest.raises(NotImplementedError, match="Empty needs the method outputs"):
        Empty().predict(REQUEST.params_D, DATA.train(0).x)


def test_a_trainer_of_twenty_lines_keeps_the_contract():
    check_trainer(Plain(), [DATA.train(k) for k in range(4)])
