"""The update of a large torch model takes the memory of the model, and stays valid as long as a caller uses it."""

from copy import deepcopy

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, from_arrays
from fedlearn.core.records import ClientWork, Request

torch = pytest.importorskip("torch")
from fedlearn.trainers.torch import TorchTrainer, flat_model  # noqa: E402

INPUTS = 1100  # so that the model has more than 4 MiB
RULE = strategies.fedavg().local


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, INPUTS), dtype=np.float32)
    return from_arrays(x, rng.integers(0, 5, 12), assignment=np.repeat(np.arange(3), 4), task="multiclass")


def build():
    torch.manual_seed(0)
    return TorchTrainer(
        torch.nn.Sequential(
            torch.nn.Linear(INPUTS, 1000), torch.nn.BatchNorm1d(1000), torch.nn.ReLU(), torch.nn.Linear(1000, 5)
        ),
        task="multiclass",
    )


@pytest.fixture
def trainer():
    return build()


def fit(trainer, data, client, *, rule=RULE, seed=1):
    local = LocalSettings(batch_size=3, epochs=2, learning_rate=0.1)
    request = Request(round=1, seed=seed, params_D=trainer.init(1), local=local)
    work = ClientWork(client=client, examples=data.train(client), client_state={})
    return trainer.fit(request, rule, [work]).delta_KD


def test_updates_in_use_keep_their_values_and_equal_the_ones_in_memory_of_their_own(trainer, data, monkeypatch):
    lent = [fit(trainer, data, client) for client in range(3)]
    outputs = trainer.predict(trainer.init(1), data.train(0).x)
    monkeypatch.setattr(flat_model, "MIN_LENT_BYTES", 2**40)
    plain = build()
    for client, update_1D in enumerate(lent):
        assert update_1D.any()
        np.testing.assert_array_equal(update_1D, fit(plain, data, client))
    np.testing.assert_array_equal(outputs, plain.predict(plain.init(1), data.train(0).x))


def test_a_part_of_an_update_keeps_its_values(trainer, data):
    part = fit(trainer, data, 0)[0, 10:20]
    before = part.copy()
    fit(trainer, data, 1)
    np.testing.assert_array_equal(part, before)


def test_clients_share_the_memory_of_the_model_if_no_caller_uses_their_updates(trainer, data):
    places = {fit(trainer, data, client).ctypes.data for client in range(3)}
    assert places == {trainer._model.flat_D.data_ptr()}


def test_a_model_without_some_parameters_follows_the_new_memory(trainer, data):
    ffa = strategies.fedavg().local._replace(frozen_parameters=("inner.0.weight", "0.weight"))
    held = [fit(trainer, data, 0), fit(trainer, data, 0, rule=ffa), fit(trainer, data, 1, rule=ffa)]
    alone = fit(build(), data, 1, rule=ffa)
    np.testing.assert_array_equal(held[2], alone)


def test_a_trainer_that_has_lent_its_memory_can_be_copied(trainer, data):
    held = fit(trainer, data, 0)
    before, other = held.copy(), deepcopy(trainer)
    trainer.predict(trainer.init(1), data.train(0).x)  # the module of the copy stays in training
    update_1D = fit(other, data, 1)
    np.testing.assert_array_equal(held, before)
    np.testing.assert_array_equal(update_1D, fit(build(), data, 1))
    np.testing.assert_array_equal(other.init(1), trainer.init(1))
    assert not {id(p) for p in other.module.parameters()} & {id(p) for p in trainer.module.parameters()}
