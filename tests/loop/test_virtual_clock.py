"""Rounds on a virtual clock: stragglers and dropouts are recorded as failures, as in deployment."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedlearn import LocalRule, Schedule, Strategy, everyone, federate, mean, serial, start, vector
from fedlearn.algorithm import Asynchrony
from fedlearn.algorithm.strategy import with_compression
from fedlearn.compression.codecs import half, topk
from fedlearn.core import checkpoint
from fedlearn.errors import SettingError, TooManyFailures
from fedlearn.loop import VirtualClockEngine, constant, lognormal, trace
from fedlearn.loop.base_engine import BaseEngine
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, linear_problem
from strategies import fedasync, fedavg, fedbuff

SLOW = lognormal(sigma=1.0)
INITIAL_D = LinearTrainer(3).init(1)


def clocked(system, make=serial, num_clients=6, spoilt=()):
    data = linear_problem(num_clients=num_clients)
    if spoilt:
        whole = data.train
        nan = {client: np.float32("nan") for client in spoilt}
        data = replace(data, train=lambda item: replace(whole(item), x=whole(item).x * nan.get(item, np.float32(1))))
    engine = make(data, LinearTrainer(3))
    return engine if system is None else VirtualClockEngine(engine, system, lambda client: len(data.train(client)))


def rounds(strategy, engine, number=4, state=None, seed=1, **schedule):
    state = state or start(strategy, INITIAL_D, engine, seed=seed)
    schedule = Schedule(rounds=number, **{"max_failures": 0.9, **schedule})
    return list(federate(strategy, engine, state, schedule=schedule, local=LOCAL_SETTINGS))


def counts_accepted_updates():
    """Return a strategy whose clients count the rounds in which their update was accepted."""
    rule = LocalRule(
        correct=lambda grad, w, w_global, seen: grad,
        client_state=("seen",),
        after_training=lambda delta_KD, steps_K, rate, seen: ({"seen": seen + 1}, {}),
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
    everyone_in, closed = rounds(fedavg(), clocked(SLOW)), rounds(fedavg(), clocked(replace(SLOW, min_completed=4)))
    for waited, early in zip(everyone_in, closed, strict=True):
        assert early.num_updates == 4
        assert {(item.stage, item.reason) for item in early.failures} == {
            ("not_needed", "the round closed with 4 other updates")
        }
        assert early.clock < waited.clock


def test_spares_count_against_no_round_and_latecomers_do():
    assert rounds(fedavg(), clocked(replace(SLOW, min_completed=1)), max_failures=0)
    with pytest.raises(TooManyFailures, match=r"no response within 0\.3 s"):
        rounds(fedavg(), clocked(replace(SLOW, deadline=0.3)), max_failures=0)


def test_a_deadline_ends_the_round_and_leaves_the_late_out():
    for number, done in enumerate(rounds(fedavg(), clocked(replace(SLOW, deadline=0.5))), start=1):
        assert 0 < len(done.failures) < 6
        assert {(item.stage, item.reason) for item in done.failures} == {("node", "no response within 0.5 s")}
        assert done.clock == pytest.approx(0.5 * number)


def test_a_client_that_fails_is_replaced_by_the_next_that_arrives():
    done, *_ = rounds(fedavg(), clocked(replace(SLOW, min_completed=4), spoilt=range(4)), number=1)
    assert done.num_updates == 2
    done, *_ = rounds(fedavg(), clocked(replace(SLOW, min_completed=4), spoilt=(0,)), number=1)
    assert done.num_updates == 4


def test_whoever_is_late_remembers_nothing_of_the_round():
    engine = clocked(replace(SLOW, min_completed=3))
    taken = [done.num_updates for done in rounds(counts_accepted_updates(), engine)]
    assert taken == [3] * 4
    assert sum(float(memory["seen"][0]) for memory in engine.client_states.values()) == sum(taken)


def test_the_clock_does_not_depend_on_the_engine_below():
    item = rounds(fedavg(clients_per_round=4), clocked(replace(SLOW, dropout=0.2, min_completed=3)))
    two = rounds(fedavg(clients_per_round=4), clocked(replace(SLOW, dropout=0.2, min_completed=3), vector))
    assert [done.clock for done in item] == [done.clock for done in two]
    assert [done.failures for done in item] == [done.failures for done in two]
    assert np.array_equal(item[-1].state.params_D, two[-1].state.params_D)


def drifting():
    """Return a strategy whose client states change training: an engine that reads a future state ends elsewhere."""
    rule = LocalRule(
        correct=lambda grad, w, w_global, past: grad + 0.1 * past + 0.01 * (w - w_global),
        client_state=("past",),
        after_training=lambda delta_KD, steps_K, rate, past: ({"past": past + delta_KD}, {}),
    )
    asynchrony = Asynchrony(buffer_size=2, concurrency=5)
    return Strategy(select=everyone(), local=rule, aggregate=mean(), asynchrony=asynchrony)


@pytest.mark.parametrize("make", [serial, vector])
@pytest.mark.parametrize(
    "strategy", [fedavg(clients_per_round=5), fedasync(concurrency=4), fedbuff(concurrency=5), drifting()]
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_virtual_second(strategy, make, tmp_path):
    system = replace(SLOW, dropout=0.1, available=0.9)
    whole = rounds(strategy, clocked(system, make), 8)
    first = clocked(system, make)
    half = rounds(strategy, first, 5)[-1].state
    path = checkpoint.save(tmp_path, half, first.client_states, layout=first.layout)
    second = clocked(system, make)
    state, second.client_states = checkpoint.load(path, second.layout)
    rest = rounds(strategy, second, 8, state=state)
    assert np.array_equal(rest[-1].state.params_D, whole[-1].state.params_D)
    assert [done.clock for done in rest] == [done.clock for done in whole[5:]]
    assert [(done.cohort, done.failures) for done in rest] == [(done.cohort, done.failures) for done in whole[5:]]
    assert [(done.bytes_up, done.bytes_down) for done in rest] == [(d.bytes_up, d.bytes_down) for d in whole[5:]]


def test_a_codec_shortens_the_upload_and_with_it_the_round():
    system = constant(seconds_per_step=0.0, download=None, upload=1.0)
    whole, *_ = rounds(fedavg(), clocked(system), number=1)
    written, *_ = rounds(with_compression(fedavg(), half()), clocked(system), number=1)
    assert whole.clock == 16
    assert 0 < written.clock < whole.clock


def test_a_privacy_claim_does_not_rest_on_who_was_first():
    private = SimpleNamespace(privacy_guarantee="a claim")
    with pytest.raises(SettingError, match=r"system.min_completed is 2"):
        next(clocked(replace(SLOW, min_completed=2)).fit(None, private, range(4)))


ASYNCHRONOUS = {
    "fedasync": fedasync(concurrency=5),
    "fedbuff": fedbuff(buffer_size=3, concurrency=6),
    "a memory": drifting(),
    "what was left out": with_compression(fedbuff(buffer_size=2, concurrency=5), topk(share=0.5)),
    "a head of its own": replace(fedbuff(concurrency=5), local=LocalRule(personal_parameters=("out.bias",))),
}
SYSTEMS = {
    "none": constant(),
    "dropouts": replace(SLOW, dropout=0.3, available=0.8),
    "a deadline": replace(SLOW, deadline=2.0),
}


class Counting(LinearTrainer):
    """Records the number of clients of each call; training raises an error if the client ``spoilt`` is among them."""

    def __init__(self, num_features, spoilt=None):
        super().__init__(num_features)
        self.blocks, self.spoilt = [], spoilt

    def fit(self, order, rule, work):
        self.blocks.append(len(work))
        if self.spoilt in [item.client for item in work]:
            raise RuntimeError("the scanner is offline")
        return super().fit(order, rule, work)


class Unmixed(BaseEngine):
    """An engine that only trains clients with equal requests together, as engines with remote clients do."""

    def __init__(self, engine):
        super().__init__(engine.clients, engine.layout)
        self.client_states = engine.client_states
        self.fit, self.evaluate = engine.fit, engine.evaluate


def in_turn_and_in_blocks(strategy, system, spoilt=None, number=12):
    """Return rounds, trainer and client states of engines that train one by one, mixed, and by model version."""
    found = []
    for make in (serial, vector, lambda *given: Unmixed(vector(*given))):
        data, trainer = linear_problem(num_clients=9), Counting(3, spoilt)
        engine = VirtualClockEngine(make(data, trainer), system, lambda client, data=data: len(data.train(client)))
        found.append((rounds(strategy, engine, number), trainer, engine.client_states))
    return found


def assert_same(item, other):
    (ours, _, ours_kept), (theirs, _, theirs_kept) = item, other
    assert [np.array(done.state.params_D).tobytes() for done in ours] == [
        np.array(done.state.params_D).tobytes() for done in theirs
    ]
    seen = [
        [(d.clock, d.cohort, d.failures, d.bytes_up, d.bytes_down, d.metrics) for d in them] for them in (ours, theirs)
    ]
    assert seen[0] == seen[1]
    assert ours_kept.keys() == theirs_kept.keys()
    assert all(
        np.array_equal(v, theirs_kept[client][name]) for client in ours_kept for name, v in ours_kept[client].items()
    )


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
@pytest.mark.parametrize("strategy", ASYNCHRONOUS.values(), ids=ASYNCHRONOUS)
def test_clients_that_train_in_blocks_before_they_land_bring_the_same_bits(strategy, system):
    in_turn, mixed, by_version = in_turn_and_in_blocks(strategy, system)
    assert_same(mixed, in_turn)
    assert_same(by_version, in_turn)
    assert any(done.failures for done in in_turn[0]) == (system is not SYSTEMS["none"])
    assert set(in_turn[1].blocks) == {1}
    assert len(mixed[1].blocks) < len(in_turn[1].blocks)


def test_devices_of_a_trace_bring_the_same_in_blocks(tmp_path):
    rows = [f"{client},{0.1 * (client + 1)},,,{20 * client},{20 * client + 45}" for client in range(5)]
    path = tmp_path / "devices.csv"
    path.write_text("\n".join(["client,seconds_per_step,download,upload,from,until", *rows]))
    in_turn, mixed, by_version = in_turn_and_in_blocks(drifting(), trace(path=str(path), period=120.0))
    assert_same(mixed, in_turn)
    assert_same(by_version, in_turn)
    assert in_turn[0][-1].clock > 20, "no client waited for its window"


def test_a_client_that_breaks_its_block_fails_alone():
    in_turn, mixed, by_version = in_turn_and_in_blocks(fedasync(concurrency=6), SLOW, spoilt=2)
    assert {failure.client for done in mixed[0] for failure in done.failures} == {2}
    for blocks in (mixed, by_version):
        assert [done.cohort for done in blocks[0]] == [done.cohort for done in in_turn[0]]
        assert np.array_equal(blocks[0][-1].state.params_D, in_turn[0][-1].state.params_D)


def test_what_waits_is_of_clients_under_way():
    engine, strategy = clocked(SLOW, vector, 9), fedasync(concurrency=5)
    state, most = start(strategy, LinearTrainer(3).init(1), engine, seed=1), 0
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=30), local=LOCAL_SETTINGS):
        waiting = [item.client for item, *_ in engine._deferred._waiting.values()]
        assert set(waiting) <= {item.client for item in done.state.in_flight}
        most = max(most, len(waiting))
    assert 1 < most <= 4


def test_another_run_on_the_same_engine_gets_nothing_of_the_one_before():
    engine, item, other = clocked(constant(), vector), fedbuff(buffer_size=1, concurrency=6), fedasync(concurrency=6)
    for strategy, seed in ((item, 1), (other, 1), (other, 2)):
        again = rounds(strategy, engine, 6, seed=seed)
        fresh = rounds(strategy, clocked(constant()), 6, seed=seed)
        assert np.array_equal(again[-1].state.params_D, fresh[-1].state.params_D)
        rounds(strategy, engine, 2, seed=seed)  # some clients have trained, but their updates are still in flight
