"""A block that fails, e.g. because memory runs out, is trained one client at a time, and the log says so."""

import logging

import numpy as np
import pytest

from fedlearn import Examples, FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.records import Failure, Request
from fedlearn.engines import block_training
from strategies import fedavg


class Trainer:
    layout, device, framework = Layout.from_shapes([("w", (3,))]), "cpu", "numpy"


@pytest.fixture
def trainer(monkeypatch):
    examples = Examples(np.zeros((2, 1), np.float32), np.zeros(2, np.int64))
    data = FederatedData(task="binary", clients=[0, 1, 2], train=lambda c: examples, test=lambda c: examples)

    def out_of_memory(trainer, strategy, request, work):
        if len(work) > 1:
            raise MemoryError("2 GiB are not available\nmore lines")
        return [], [Failure(client=work[0].client, reason="alone")]

    monkeypatch.setattr(block_training, "client_step", out_of_memory)
    monkeypatch.setattr(block_training, "initial_client_state", lambda *arguments: {})
    return block_training.BlockTrainer(data, Trainer())


def test_the_log_states_that_a_block_is_trained_one_client_at_a_time(trainer, caplog):
    block = block_training.Block(clients=[0, 1, 2], requests=[Request(round=1, seed=1, params_D=np.zeros(3))])
    with caplog.at_level(logging.WARNING):
        results = [*trainer.train(fedavg(), block)]
    assert [result.client for result in results] == [0, 1, 2]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "a block of 3 clients" in message
    assert "MemoryError: 2 GiB are not available" in message
    assert "engine.block_size" in message
