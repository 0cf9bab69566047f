"""The losses of the tasks, in both frameworks, against independent implementations in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from needs import needs

import fedlearn
from fedlearn.core.metrics import evaluate
from fedlearn.core.records import ExampleDP, LocalSettings, Predictions, Request
from fedlearn.core.tasks import TASKS
from fedlearn.errors import SettingError

needs("torch", "jax")

import jax.numpy as jnp  # noqa: E402
import torch  # noqa: E402
from flax import linen  # noqa: E402
from torch import nn  # noqa: E402

from fedlearn.trainers.jax.losses import loss_of as jax_loss_of  # noqa: E402
from fedlearn.trainers.torch.losses import loss_of as torch_loss_of  # noqa: E402

NUM_FEATURES = 3


def patients(size, seed, num_times=15):
    """Return inputs, and times with ties that depend on them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, NUM_FEATURES)).astype(np.float32)
    time = rng.exponential(1 / np.exp(x @ np.array([0.8, -0.5, 0.3])))
    censored = rng.exponential(1.5, size)
    steps = np.ceil(num_times * np.minimum(time, censored))
    return x, np.stack([steps, time <= censored], axis=1).astype(np.float32)


def cox_fit(parts):
    """Return the coefficients of Cox's model with Efron's ties, stratified by part, by Newton's method."""
    beta = np.zeros(NUM_FEATURES)
    for _ in range(30):
        gradient, hessian = np.zeros(NUM_FEATURES), np.zeros((NUM_FEATURES, NUM_FEATURES))
        for x, y in parts:
            x, (time, event) = x.astype(np.float64), y.T
            weight = np.exp(x @ beta)
            for moment in np.unique(time[event == 1]):
                died, at_risk = (time == moment) & (event == 1), time >= moment
                gradient += x[died].sum(axis=0)
                for place in range(int(died.sum())):
                    w = weight * (at_risk - place / died.sum() * died)
                    mean = w @ x / w.sum()
                    gradient -= mean
                    hessian += (w[:, None] * x).T @ x / w.sum() - np.outer(mean, mean)
        beta = beta + np.linalg.solve(hessian, gradient)
    return beta


def trainer_of(framework, task, num_outputs=1):
    if framework == "torch":
        return fedlearn.TorchTrainer(nn.Linear(NUM_FEATURES, num_outputs), task=task)
    return fedlearn.JaxTrainer(linen.Dense(num_outputs), input_shape=(NUM_FEATURES,), task=task)


def fitted(framework, parts, rounds=250):
    """Return the coefficients after one full-batch step per client and round."""
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    owner = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    data = fedlearn.from_arrays(x, y, assignment=owner, task="survival", test_share=0.0)
    trainer = trainer_of(framework, "survival")
    local = fedlearn.LocalSettings(steps=1, batch_size=len(x), learning_rate=1.0)
    strategy = fedlearn.Strategy(select=fedlearn.everyone(), aggregate=fedlearn.mean(), server=fedlearn.sgd(1.0))
    engine = fedlearn.serial(data, trainer)
    state = fedlearn.start(strategy, trainer.init(0) * 0, engine, seed=0)
    schedule = fedlearn.Schedule(rounds=rounds)
    for done in fedlearn.federate(strategy, engine, state, local=local, schedule=schedule):
        state = done.state
    return trainer.layout.unpack(np.asarray(state.params_D))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_full_batch_steps_give_the_coefficients_of_the_pooled_fit(framework):
    parts = [patients(150, seed=1)]
    weight = next(value for name, value in fitted(framework, parts).items() if "weight" in name)
    np.testing.assert_allclose(weight.ravel(), cox_fit(parts), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_clients_together_give_the_coefficients_of_the_stratified_fit(framework):
    parts = [patients(size, seed=size) for size in (60, 100, 80)]
    weight = next(value for name, value in fitted(framework, parts).items() if "weight" in name)
    np.testing.assert_allclose(weight.ravel(), cox_fit(parts), atol=1e-3)


def test_padding_of_clients_that_step_together_has_no_event():
    """Compare with clients in turn, for a loss whose risk sets are the batch. The clients have unequal sizes."""
    pytest.importorskip("torch")
    parts = [patients(size, seed=size) for size in (20, 35, 50)]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    owner = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    data = fedlearn.from_arrays(x, y, assignment=owner, task="survival", test_share=0.0)
    local = fedlearn.LocalSettings(epochs=1, batch_size=64, learning_rate=1.0)
    trainer, models = trainer_of("torch", "survival"), []
    strategy, schedule = fedlearn.Strategy(select=fedlearn.everyone()), fedlearn.Schedule(rounds=3)
    for batching in ("map", "vmap"):
        engine = fedlearn.vector(data, trainer, batching=batching)
        state = fedlearn.start(strategy, trainer.init(0), engine, seed=0)
        *_, last = fedlearn.federate(strategy, engine, state, local=local, schedule=schedule)
        models.append(np.asarray(last.state.params_D))
    np.testing.assert_allclose(models[0], models[1], atol=1e-5)
    assert np.abs(models[0] - trainer.init(0)).max() > 0.01


def batch_of(name, seed=0, size=20):
    """Return outputs, valid targets, and the targets of a batch with rows of padding at its end."""
    rng = np.random.default_rng(seed)
    task = TASKS[name]
    outputs, _ = task.example_arrays(4)
    outputs = rng.normal(size=(size, *outputs.shape[1:])).astype(np.float32)
    if name == "survival":
        y = patients(size, seed, num_times=6)[1]
    elif name in ("segmentation", "token_classification"):
        outputs = rng.normal(size=(size, 4, 5, 6) if name == "segmentation" else (size, 7, 4)).astype(np.float32)
        y = rng.integers(-1, 4, (size, 5, 6) if name == "segmentation" else (size, 7))
        y[0] = -1
    elif name == "causal_lm":
        y = np.full(size, 5)
        outputs = np.stack([rng.gamma(2.0, 5.0, size), rng.integers(0, 6, size), y], axis=1).astype(np.float32)
    elif name == "multilabel":
        y = rng.integers(0, 2, (size, 4))
    elif task.has_classes:
        y = rng.integers(0, task.num_outputs(4) if name == "multiclass" else 2, size)
    else:
        y = rng.normal(size=size)
    return outputs, task.targets(np.asarray(y))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_losses_of_both_frameworks_have_the_mean_of_the_metric(name):
    outputs, y = batch_of(name)
    expected = evaluate([Predictions(client=0, outputs=outputs, targets=y)], task=name).pooled["loss"]
    torch_B = torch_loss_of(TASKS[name])(torch.from_numpy(outputs), torch.from_numpy(y)).numpy()
    jax_B = np.asarray(jax_loss_of(TASKS[name])(jnp.asarray(outputs), jnp.asarray(y)))
    assert torch_B.shape == jax_B.shape == (len(y),)
    np.testing.assert_allclose(torch_B, jax_B, atol=1e-5)
    assert torch_B.mean() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_padding_is_in_no_risk_set(framework):
    outputs, y = batch_of("survival")
    padded = np.concatenate([outputs, np.full((5, 1), 9.0, np.float32)]), np.concatenate([y, np.zeros((5, 2), "f")])
    loss_of, array = (torch_loss_of, torch.from_numpy) if framework == "torch" else (jax_loss_of, jnp.asarray)
    loss = loss_of(TASKS["survival"])
    alone, together = (np.asarray(loss(*map(array, arrays))) for arrays in ((outputs, y), padded))
    np.testing.assert_allclose(together[: len(y)], alone, atol=1e-6)
    assert (together[len(y) :] == 0).all()


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_loss_that_couples_examples_is_refused_with_privacy_for_examples(framework):
    x, y = patients(30, seed=2)
    data = fedlearn.from_arrays(x, y, assignment=[0] * 30, task="survival")
    trainer = trainer_of(framework, "survival")
    local = replace(LocalSettings(steps=1, batch_size=8), example_dp=ExampleDP(clip=1.0, noise_multiplier=1.0))
    request = Request(round=1, seed=1, params_D=trainer.init(1), local=local)
    with pytest.raises(SettingError, match=r"privacy is example\n.*task=survival"):
        trainer.check_example_dp(request, data.train(0))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_loss_that_couples_examples_is_refused_with_micro_batches(framework):
    local = LocalSettings(batch_size=8, micro_batch_size=4)
    with pytest.raises(SettingError, match=r"local\.micro_batch_size is 4\n.*task=survival"):
        trainer_of(framework, "survival").check_local(local)
