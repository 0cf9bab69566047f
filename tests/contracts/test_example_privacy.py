"""`check_trainer` rejects models and losses that mix the examples of a batch, and DP-SGD that does not clip."""

from dataclasses import replace

import numpy as np
import pytest

from fedlearn.core.records import Examples
from fedlearn.testing import LinearTrainer, check_trainer, linear_problem
from fedlearn.testing.example_privacy import CLIENT, _batch, _row, _summed, check_example_privacy
from fedlearn.trainers.base import BaseTrainer

CLIENTS = [linear_problem(num_features=6).train(k) for k in range(3)]


def torch_trainer(kind, loss=None):
    torch = pytest.importorskip("torch")
    from torch import nn

    from fedlearn.trainers.torch import TorchTrainer

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.out = nn.Linear(2 if kind == "reshaped" else 6, 5), nn.Linear(5, 1)
            self.norm = nn.BatchNorm1d(5, track_running_stats=kind == "buffers")
            self.dropout = nn.Dropout(0.3)

        def forward(self, x):
            if kind == "reshaped":  # three tokens of two features, arranged along the batch
                h = torch.tanh(self.hidden(x.reshape(-1, 2)))
                return self.out(h.reshape(len(x), 3, 5).mean(dim=1))
            h = torch.tanh(self.hidden(x))
            if kind in ("centered", "centered dropout"):
                h = h - h.mean(dim=0)
            if kind in ("batch norm", "buffers"):
                h = self.norm(h)
            return self.out(self.dropout(h) if "dropout" in kind else h)

    torch.manual_seed(1)
    return TorchTrainer(Net(), task="regression", loss=loss)


def jax_trainer(kind, loss=None):
    pytest.importorskip("jax")
    import flax.linen as nn
    import jax.numpy as jnp

    from fedlearn.trainers.jax import JaxTrainer

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            if kind == "reshaped":
                h = jnp.tanh(nn.Dense(5, name="hidden")(x.reshape(-1, 2)))
                return nn.Dense(1, name="out")(h.reshape(len(x), 3, 5).mean(axis=1))
            h = jnp.tanh(nn.Dense(5, name="hidden")(x))
            return nn.Dense(1, name="out")(h - h.mean(axis=0) if kind == "centered" else h)

    return JaxTrainer(Net(), task="regression", input_shape=(6,), loss=loss)


def squared(outputs, y):
    return (outputs[:, 0] - y) ** 2


def ranked(outputs, y):
    """Compare an example with the mean of its batch, as Cox's partial likelihood does."""
    return (outputs[:, 0] - outputs[:, 0].mean() - y) ** 2


MAKERS = {"torch": torch_trainer, "jax": jax_trainer}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_model_that_keeps_examples_apart_passes(make):
    # tests/trainers runs all of check_trainer on the models of this repository
    check_example_privacy(make("plain"), CLIENTS)


@pytest.mark.parametrize("kind", ["dropout", "buffers"])
def test_random_layers_pass_and_batch_statistics_are_refused_by_the_trainer(kind):
    check_example_privacy(torch_trainer(kind), CLIENTS)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("kind", "loss"), [("centered", None), ("plain", ranked)])
def test_a_model_or_loss_that_mixes_examples_is_rejected(make, kind, loss):
    with pytest.raises(AssertionError, match=r"mixes the examples|must not depend on the other"):
        (check_trainer if make is torch_trainer else check_example_privacy)(make(kind, loss), CLIENTS)


def test_random_layers_do_not_hide_a_mixture():
    with pytest.raises(AssertionError, match="mixes the examples"):
        check_example_privacy(torch_trainer("centered dropout"), CLIENTS)


def test_batch_norm_without_buffers_is_rejected():
    with pytest.raises(AssertionError, match="a batch of one example must train"):
        check_example_privacy(torch_trainer("batch norm"), CLIENTS)


def contribution_of_reshaped(make):
    """Return the longest contribution of one example, in multiples of the clip norm."""
    trainer, batch = make("reshaped"), _batch(CLIENTS)
    alone = _summed(trainer, trainer.init(1), [_row(batch, n) for n in range(6)], 1e-3, 1e3, CLIENT)
    return np.linalg.norm(alone, axis=1).max() / 1e-3


@pytest.mark.parametrize(
    "make", [torch_trainer, pytest.param(jax_trainer, marks=pytest.mark.slow)], ids=["torch", "jax"]
)
def test_tokens_along_the_batch_are_rejected_unless_they_are_clipped_as_one_example(make):
    if contribution_of_reshaped(make) <= 1.001:
        check_trainer(make("reshaped"), CLIENTS, tolerance=1e-4)
    else:
        with pytest.raises(AssertionError, match="must clip the gradient of an example"):
            check_trainer(make("reshaped"), CLIENTS, tolerance=1e-4)


class TooLong(LinearTrainer):
    """Clips to twice the norm."""

    def fit(self, request, rule, work):
        dp = request.local.example_dp
        local = replace(request.local, example_dp=dp and replace(dp, clip=2 * dp.clip))
        return super().fit(replace(request, local=local), rule, work)


class Unclipped(LinearTrainer):
    """Ignores the settings of DP-SGD."""

    def fit(self, request, rule, work):
        return super().fit(replace(request, local=replace(request.local, example_dp=None)), rule, work)


class OfTheSum(LinearTrainer):
    """Clips the gradient of the whole batch, so that one example depends on the others."""

    def example_gradients(self, params_D, x, y):
        loss_N, grad_ND = super().example_gradients(params_D, x, y)
        return loss_N, np.broadcast_to(grad_ND.mean(axis=0), grad_ND.shape)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (TooLong, "must clip the gradient"),
        (Unclipped, "must clip the gradient"),
        (OfTheSum, "mixes the examples of a batch"),
    ],
)
def test_dp_sgd_that_does_not_bound_an_example_is_rejected(kind, message):
    with pytest.raises(AssertionError, match=message):
        check_trainer(kind(6), CLIENTS)


def test_support_of_dp_sgd_needs_gradients_of_examples():
    with pytest.raises(TypeError, match="needs the method example_gradients"):
        type("Claims", (BaseTrainer,), {"supports_dp_sgd": True})


def test_examples_of_whole_numbers_are_accepted():
    integers = [Examples(np.rint(4 * c.x).astype(np.int32), c.y) for c in CLIENTS]
    check_trainer(LinearTrainer(6), integers, tolerance=1e-4)
