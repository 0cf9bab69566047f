"""Rounds on a virtual clock: who is late is left out, in the words of the engine for real clients."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedlearn import (
    ClockedEngine,
    LocalRule,
    Schedule,
    Strategy,
    checkpoint,
    constant,
    everyone,
    federate,
    lognormal,
    mean,
    serial,
    start,
    vector,
)
from fedlearn.compress import half
from fedlearn.errors import SettingError, TooManyFailures
from fedlearn.strategy import compressed
from fedlearn.testing import LOCAL, LinearTrainer, linear_problem
from strategies import fedasync, fedavg, fedbuff

SLOW = lognormal(sigma=1.0)


def clocked(system, make=serial, num_clients=6, spoilt=()):
    data = linear_problem(num_clients=num_clients)
    if spoilt:
        whole = data.train
        nan = {client: np.float32("nan") for client in spoilt}
        data = replace(data, train=lambda one: replace(whole(one), x=whole(one).x * nan.get(one, np.float32(1))))
    engine = make(data, LinearTrainer(3))
    return engine if system is None else ClockedEngine(engine, system, lambda client: len(data.train(client)))


def rounds(strategy, engine, number=4, state=None, **schedule):
    state = state or start(strategy, LinearTrainer(3).init(1), engine, seed=1)
    schedule = Schedule(rounds=number, **{"max_failures": 0.9, **schedule})
    return list(federate(strategy, engine, state, schedule=schedule, local=LOCAL))


def remembers():
    """Each client counts the rounds in which its update was taken."""
    rule = LocalRule(
        correct=lambda grad, w, w_global, seen: grad,
        memory=("seen",),
        finish=lambda delta_KD, steps_K, rate, seen: ({"seen": seen + 1}, {}),
    )
    return Strategy(select=everyone(), local=rule, aggregate=mean())


def test_a_clock_without_deadlines_changes_no_result_and_tells_the_time_of_the_slowest():
    with_clock, without = rounds(fedavg(), clocked(SLOW)), rounds(fedavg(), clocked(None))
    assert np.array_equal(with_clock[-1].state.params_D, without[-1].state.params_D)
    assert [done.clock for done in without] == [None] * 4
    # 25 examples in batches of 4 are 7 steps; 4 parameters are 16 bytes
    steady = rounds(fedavg(), clocked(constant(seconds_per_step=2.0, download=8.0, upload=4.0)))
    assert [done.clock for done in steady] == pytest.approx([20.0, 40.0, 60.0, 80.0])


def test_enough_takes_the_fastest_and_calls_the_others_spare():
    everyone_in, closed = rounds(fedavg(), clocked(SLOW)), rounds(fedavg(), clocked(replace(SLOW, enough=4)))
    for waited, early in zip(everyone_in, closed, strict=True):
        assert early.num_updates == 4
        assert {(one.stage, one.reason) for one in early.failures} == {
            ("spare", "the round had its 4 updates without it")
        }
        assert early.clock < waited.clock


def test_spares_count_against_no_round_and_latecomers_do():
    assert rounds(fedavg(), clocked(replace(SLOW, enough=1)), max_failures=0)
    with pytest.raises(TooManyFailures, match=r"no answer within 0\.3 s"):
        rounds(fedavg(), clocked(replace(SLOW, deadline=0.3)), max_failures=0)


def test_a_deadline_ends_the_round_and_leaves_the_late_out():
    for number, done in enumerate(rounds(fedavg(), clocked(replace(SLOW, deadline=0.5))), start=1):
        assert 0 < len(done.failures) < 6
        assert {(one.stage, one.reason) for one in done.failures} == {("node", "no answer within 0.5 s")}
        assert done.clock == pytest.approx(0.5 * number)


def test_a_client_that_fails_is_replaced_by_the_next_that_arrives():
    done, *_ = rounds(fedavg(), clocked(replace(SLOW, enough=4), spoilt=range(4)), number=1)
    assert done.num_updates == 2
    done, *_ = rounds(fedavg(), clocked(replace(SLOW, enough=4), spoilt=(0,)), number=1)
    assert done.num_updates == 4


def test_whoever_is_late_remembers_nothing_of_the_round():
    engine = clocked(replace(SLOW, enough=3))
    taken = [done.num_updates for done in rounds(remembers(), engine)]
    assert taken == [3] * 4
    assert sum(float(memory["seen"][0]) for memory in engine.memories.values()) == sum(taken)


def test_the_clock_does_not_depend_on_the_engine_below():
    one = rounds(fedavg(clients_per_round=4), clocked(replace(SLOW, dropout=0.2, enough=3)))
    two = rounds(fedavg(clients_per_round=4), clocked(replace(SLOW, dropout=0.2, enough=3), vector))
    assert [done.clock for done in one] == [done.clock for done in two]
    assert [done.failures for done in one] == [done.failures for done in two]
    assert np.array_equal(one[-1].state.params_D, two[-1].state.params_D)


@pytest.mark.parametrize("strategy", [fedavg(clients_per_round=5), fedasync(concurrency=4), fedbuff(concurrency=5)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_virtual_second(strategy, tmp_path):
    system = replace(SLOW, dropout=0.1, available=0.9)
    whole = rounds(strategy, clocked(system), 8)
    first = clocked(system)
    half = rounds(strategy, first, 5)[-1].state
    path = checkpoint.save(tmp_path, half, first.memories, layout=first.layout)
    second = clocked(system)
    state, second.memories = checkpoint.load(path, second.layout)
    rest = rounds(strategy, second, 8, state=state)
    assert np.array_equal(rest[-1].state.params_D, whole[-1].state.params_D)
    assert [done.clock for done in rest] == [done.clock for done in whole[5:]]
    assert [(done.cohort, done.failures) for done in rest] == [(done.cohort, done.failures) for done in whole[5:]]
    assert [(done.bytes_up, done.bytes_down) for done in rest] == [(d.bytes_up, d.bytes_down) for d in whole[5:]]


def test_a_codec_shortens_the_upload_and_with_it_the_round():
    system = constant(seconds_per_step=0.0, download=None, upload=1.0)
    whole, *_ = rounds(fedavg(), clocked(system), number=1)
    written, *_ = rounds(compressed(fedavg(), half()), clocked(system), number=1)
    assert whole.clock == 16
    assert 0 < written.clock < whole.clock


def test_a_privacy_claim_does_not_rest_on_who_was_first():
    private = SimpleNamespace(protection="a claim")
    with pytest.raises(SettingError, match=r"system.enough is 2"):
        next(clocked(replace(SLOW, enough=2)).fit(None, private, range(4)))
