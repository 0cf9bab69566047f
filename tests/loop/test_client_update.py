from dataclasses import replace

import numpy as np
import pytest

from fedlearn import LocalRule, Stage, Strategy, Transform, clip, everyone
from fedlearn.core import Request
from fedlearn.core.records import ClientWork, Examples
from fedlearn.loop.client_update import client_step, initial_client_state
from fedlearn.testing import LinearTrainer, linear_problem

TRAINER = LinearTrainer(3)
ORDER = Request(round=1, seed=1, params_D=TRAINER.init(1))


def work_of(strategy, *clients):
    data, memory = linear_problem(), initial_client_state(strategy, TRAINER.layout, ORDER.params_D)
    return [ClientWork(client=k, examples=data.train(k), client_state=memory) for k in clients]


def spoil(item, value):
    x = item.examples.x.copy()
    x[2, 1] = value
    return item._replace(examples=Examples(x, item.examples.y))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_client_with_broken_data_fails_by_name_and_the_others_go_on(value):
    strategy = Strategy(select=everyone(), stages=(clip(0.1),))
    first, second, third = work_of(strategy, 0, 1, 4)
    healthy, _ = client_step(TRAINER, strategy, ORDER, [first, third])
    updates, failures = client_step(TRAINER, strategy, ORDER, [first, spoil(second, value), third])
    assert updates.clients_K.tolist() == [0, 4]
    assert np.array_equal(updates.delta_KD, healthy.delta_KD)
    assert [(f.client, f.stage) for f in failures] == [(1, "update")]
    assert "1 of 9 examples have NaN or infinity in x, first 2" in failures[0].reason


def test_a_client_that_diverges_on_sound_data_is_told_so():
    strategy = Strategy(select=everyone())
    wild = replace(ORDER, local=replace(ORDER.local, learning_rate=1e30, epochs=5))
    with np.errstate(all="ignore"):
        updates, failures = client_step(TRAINER, strategy, wild, work_of(strategy, 3))
    assert len(updates) == 0
    assert "learning_rate" in failures[0].reason


def test_stages_apply_in_order_on_the_client_before_the_update_leaves():
    def times(factor):
        return Stage(client=Transform(update=lambda u, memory, context: (u * factor, memory)))

    strategy = Strategy(select=everyone(), stages=(times(100.0), clip(0.5)))
    updates, _ = client_step(TRAINER, strategy, ORDER, work_of(strategy, 0, 1))
    assert np.allclose(np.linalg.norm(updates.delta_KD, axis=1), 0.5, rtol=1e-5)


def test_a_stage_remembers_per_client_what_it_held_back():
    def keep_largest(update_KD, memory, context):
        total_KD = update_KD + memory["error"]
        kept_KD = np.where(np.abs(total_KD) == np.abs(total_KD).max(axis=1, keepdims=True), total_KD, 0)
        return kept_KD, {"error": total_KD - kept_KD}

    feedback = Transform(
        init=lambda layout: {"error": np.zeros(layout.num_parameters, np.float32)}, update=keep_largest
    )
    strategy = Strategy(select=everyone(), stages=(Stage(client=feedback),))
    work = work_of(strategy, 0, 1)
    plain, _ = client_step(TRAINER, Strategy(select=everyone()), ORDER, work)
    updates, _ = client_step(TRAINER, strategy, ORDER, work)
    assert ((updates.delta_KD != 0).sum(axis=1) == 1).all()
    assert np.allclose(updates.delta_KD + updates.client_state["0.error"], plain.delta_KD)


def test_what_a_client_sends_is_counted_in_bytes():
    def finish(delta_KD, num_steps_K, learning_rate):
        return {}, {"more": delta_KD, "bit": delta_KD[:, :1]}

    plain, _ = client_step(TRAINER, Strategy(select=everyone()), ORDER, work_of(Strategy(select=everyone()), 0, 1))
    assert plain.num_bytes_K.tolist() == [16, 16]
    more = Strategy(select=everyone(), local=LocalRule(after_training=finish))
    updates, _ = client_step(TRAINER, more, ORDER, work_of(more, 0, 1))
    assert updates.num_bytes_K.tolist() == [36, 36]
