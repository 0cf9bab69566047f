"""A block that fails, e.g. because memory runs out, is trained in halves, and the log says so."""

import gc
import logging
import weakref

import numpy as np
import pytest

from fedlearn import Examples, FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.records import Failure, FailureStage, Request, Updates
from fedlearn.engines import block_training
from fedlearn.engines.base import automatic_block_size
from strategies import fedavg

NUM_CLIENTS = 37


class Trainer:
    layout, device, framework = Layout.from_shapes([("w", (3,))]), "cpu", "numpy"


class Memory:
    """Memory of a failed block: an object that the traceback of its error keeps."""


class Steps:
    """Replace the training of a block. It fails for blocks larger than the memory and for broken clients."""

    def __init__(self, room=NUM_CLIENTS, broken=()):
        self.room, self.broken, self.sizes, self.kept = room, set(broken), [], []

    def __call__(self, trainer, strategy, request, work):
        gc.collect()
        assert not any(memory() for memory in self.kept), "a failed block keeps its memory"
        memory = Memory()
        self.kept.append(weakref.ref(memory))
        self.sizes.append(len(work))
        if len(work) > self.room:
            raise MemoryError("2 GiB are not available\nmore lines")
        if self.broken.intersection(client_work.client for client_work in work):
            raise ValueError("broken")
        clients_K = np.array([client_work.client for client_work in work])
        ones_K = np.ones(len(work), np.int64)
        updates = Updates(
            clients_K=clients_K, delta_KD=np.ones((len(work), 3)), num_examples_K=ones_K, num_steps_K=ones_K
        )
        return updates, []

    def mixed(self, trainer, strategy, requests, work):
        return [self(trainer, strategy, None, work)[0]]


def results_of(monkeypatch, steps, *, is_mixed=False):
    examples = Examples(np.zeros((2, 1), np.float32), np.zeros(2, np.int64))
    clients = range(NUM_CLIENTS)
    data = FederatedData(task="binary", clients=clients, train=lambda c: examples, test=lambda c: examples)
    monkeypatch.setattr(block_training, "client_step", steps)
    monkeypatch.setattr(block_training, "client_step_mixed_rounds", steps.mixed)
    monkeypatch.setattr(block_training, "initial_client_state", lambda *arguments: {})
    requests = [Request(round=1, seed=1, params_D=np.zeros(3))] * (NUM_CLIENTS if is_mixed else 1)
    block = block_training.Block(clients=clients, requests=requests, is_mixed=is_mixed)
    return [*block_training.BlockTrainer(data, Trainer()).train(fedavg(), block)]


def clients_of(results):
    return [client for result in results if isinstance(result, Updates) for client in result.clients_K.tolist()]


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("room", [1, 2, 5, 18, 19, 36])
def test_halves_fit_the_memory(monkeypatch, room, is_mixed):
    steps = Steps(room=room)
    assert clients_of(results_of(monkeypatch, steps, is_mixed=is_mixed)) == [*range(NUM_CLIENTS)]
    trained = [size for size in steps.sizes if size <= room]
    assert min(trained) > room // 4, "blocks are larger than a quarter of the memory"


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("broken", [(0,), (20,), (36,), (3, 4), (0, 17, 36), range(NUM_CLIENTS)])
def test_only_broken_clients_fail(monkeypatch, broken, is_mixed):
    steps = Steps(broken=broken)
    results = results_of(monkeypatch, steps, is_mixed=is_mixed)
    failed = [result.client for result in results if isinstance(result, Failure)]
    assert failed == [*broken]
    assert {result.stage for result in results if isinstance(result, Failure)} == {FailureStage.FIT}
    assert clients_of(results) == [client for client in range(NUM_CLIENTS) if client not in broken]
    assert len(steps.sizes) <= 1 + 14 * len(broken), "a broken client costs a logarithmic number of attempts"


def test_the_log_states_each_failed_block(monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        results_of(monkeypatch, Steps(room=18))
    messages = [record.getMessage() for record in caplog.records]
    assert "a block of 37 clients" in messages[0]
    assert "MemoryError: 2 GiB are not available" in messages[0]
    assert "engine.block_size" in messages[0]
    assert len(messages) == 2


@pytest.mark.parametrize(("memory", "size"), [(None, 512), (2**40, 512), (2**32, 256), (2**20, 1)])
def test_a_block_fits_the_memory_of_the_device(memory, size):
    trainer = Trainer()
    trainer.device, trainer.layout = "cuda:0", Layout.from_shapes([("w", (2**18,))])
    trainer.device_memory = memory
    assert automatic_block_size(trainer) == size
