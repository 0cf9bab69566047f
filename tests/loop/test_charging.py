"""Uploads that are private against the server are paid for before requests go out, also if the round fails."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from needs import needs

from fedlearn import Schedule, federate, serial, start
from fedlearn.core import Failure
from fedlearn.errors import CheckpointError, FedlearnError, TooManyFailures
from fedlearn.loop.training_loop import _cohort
from fedlearn.privacy.mechanisms import central, distributed, example, local, secagg
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.runner.ledger_file import LedgerFile
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, linear_problem
from strategies import fedavg

needs("dp_accounting", reason="the extra privacy is not installed")

NUM_CLIENTS = 4
SETTINGS = replace(LOCAL_SETTINGS, batch_size=1000)  # all clients then pay the same for DP-SGD


class RealClients:
    """An engine whose clients count as real. It records uploads, and can fail after some of them.

    Args:
        after: number of uploads of a round before the fault; None for no fault.
        fault: function without arguments that makes the fault.
        failures: client -> keyword arguments of its failure.
    """

    deployed = True

    def __init__(self, *, after=None, fault=None, failures=None):
        self.engine = serial(linear_problem(num_clients=NUM_CLIENTS), LinearTrainer(3))
        self.after, self.fault, self.failures = after, fault, failures or {}
        self.uploads = dict.fromkeys(range(NUM_CLIENTS), 0)

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def fit(self, request, strategy, cohort):
        num_uploads = 0
        for client in cohort:
            if client in self.failures:
                yield Failure(client=client, **self.failures[client])
                continue
            if num_uploads == self.after:
                self.fault()
            num_uploads += 1
            self.uploads[client] += 1
            yield from self.engine.fit(request, strategy, [client])


class Journal:
    """Record the ledgers of a run in memory."""

    def __init__(self):
        self.ledgers = []

    def record(self, ledger):
        self.ledgers.append(ledger)


def protected(mechanism, **settings):
    strategy = fedavg(weighting="equal", **settings)
    population = Population(clients=range(NUM_CLIENTS), rounds=5, num_examples_of=lambda client: 10)
    return mechanism.protect(strategy, SETTINGS, population)


MECHANISMS = {"local": local(noise_multiplier=1.0), "example": example(noise_multiplier=1.0)}


@pytest.fixture(params=MECHANISMS)
def private(request):
    return protected(MECHANISMS[request.param])


def run(private, engine, state, *, rounds=1, journal=None):
    strategy, settings = private
    schedule = Schedule(rounds=rounds, max_failures=0.0)
    return list(federate(strategy, engine, state, schedule=schedule, local=settings, journal=journal))


def first_state(private, engine):
    return start(private[0], np.zeros(4, np.float32), engine, seed=1)


def charged(ledger, client):
    """Return the number of rounds that a client has paid for, or of its steps for DP-SGD."""
    return sum(count for _, count in ledger.client_history(client))


def stop():
    raise TooManyFailures("the deadline is over")


def test_a_round_that_stops_after_uploads_is_paid_for_when_it_is_repeated(private):
    engine = RealClients(after=3, fault=stop)
    state = first_state(private, engine)
    (done,) = run(private, RealClients(), state)
    price = charged(done.state.ledger, 0)
    for _ in range(3):
        with pytest.raises(TooManyFailures) as stopped:
            run(private, engine, state)
        state = replace(state, ledger=stopped.value.ledger)
    engine.after = None
    (done,) = run(private, engine, state)
    for client, uploads in engine.uploads.items():
        assert charged(done.state.ledger, client) >= price * uploads
    assert engine.uploads[0] == 4
    assert charged(done.state.ledger, 0) == price * 4


@pytest.mark.process
def test_a_killed_coordinator_has_paid_for_the_uploads(tmp_path):
    private = protected(MECHANISMS["local"])
    engine, file = RealClients(after=2, fault=lambda: os.kill(os.getpid(), signal.SIGKILL)), LedgerFile(tmp_path)
    state = first_state(private, engine)
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                run(private, engine, file.restore(state), journal=file)
            finally:
                os._exit(1)  # the fault must end the child before
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (done,) = run(private, RealClients(), file.restore(state), journal=file)
    assert charged(done.state.ledger, 0) == charged(file.restore(state).ledger, 0) == 3
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_the_charge_is_recorded_before_any_request_goes_out(private):
    journal, sent = Journal(), []

    class Watched(RealClients):
        def fit(self, request, strategy, cohort):
            sent.append([charged(journal.ledgers[-1], client) > 0 for client in cohort])
            yield from super().fit(request, strategy, cohort)

    (done,) = run(private, Watched(), first_state(private, RealClients()), journal=journal)
    assert sent == [[True] * NUM_CLIENTS]
    assert journal.ledgers[-1].histories == done.state.ledger.histories


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, FedlearnError])
def test_any_end_of_a_round_leaves_its_cost_in_the_journal(private, error):
    journal = Journal()

    def fault():
        raise error("stopped")

    engine = RealClients(after=1, fault=fault)
    with pytest.raises(error):
        run(private, engine, first_state(private, engine), journal=journal)
    assert all(charged(journal.ledgers[-1], client) for client in range(NUM_CLIENTS))


LOST = {"stage": "node", "reason": "no response within 1 s"}
SILENT = (
    {"stage": "node", "reason": "not connected", "is_delivered": False},
    {"stage": "policy", "reason": "refused"},
    {"stage": "fit", "reason": "out of memory"},
)


@pytest.mark.parametrize("silent", SILENT, ids=lambda values: values["stage"])
def test_lost_responses_are_paid_for_and_clients_that_sent_nothing_are_refunded(private, silent):
    engine = RealClients(failures={0: LOST, 1: silent})
    strategy, settings = private
    state, schedule = first_state(private, engine), Schedule(rounds=1, max_failures=0.9)
    (done,) = federate(strategy, engine, state, schedule=schedule, local=settings)
    assert charged(done.state.ledger, 0) == charged(done.state.ledger, 2) > 0
    assert charged(done.state.ledger, 1) == 0
    with pytest.raises(TooManyFailures) as stopped:
        run(private, engine, state)
    assert charged(stopped.value.ledger, 0) > 0
    assert charged(stopped.value.ledger, 1) == 0


def test_a_trusted_server_and_a_simulation_charge_completed_rounds_only():
    cases = ((central(noise_multiplier=1.0), True), (MECHANISMS["local"], False))
    for private, deployed in ((protected(mechanism), deployed) for mechanism, deployed in cases):
        journal, engine = Journal(), RealClients(after=3, fault=stop)
        engine.deployed = deployed
        with pytest.raises(TooManyFailures) as stopped:
            run(private, engine, first_state(private, engine), journal=journal)
        assert stopped.value.ledger is None
        assert journal.ledgers == []


def test_which_mechanisms_hold_against_the_server():
    kinds = {
        "central": central(noise_multiplier=1.0),
        "secagg": secagg(),
        "distributed": distributed(noise_multiplier=1.0),
        **MECHANISMS,
    }
    population = Population(clients=range(NUM_CLIENTS), rounds=5, num_examples_of=lambda client: 10)
    for name, mechanism in kinds.items():
        equal = fedavg(weighting="equal", clients_per_round=2)
        strategy, _ = mechanism.protect(equal, SETTINGS, population)
        assert strategy.privacy_guarantee.holds_against_server is (name in ("local", "example", "distributed")), name


def test_a_damaged_ledger_of_a_run_is_no_empty_one(tmp_path, private):
    file, state = LedgerFile(tmp_path), first_state(private, RealClients())
    assert file.restore(state) is state
    file.record(state.ledger)
    file.path.write_text('{"federation": []}')
    with pytest.raises(CheckpointError, match="privacy loss of the run is unknown"):
        file.restore(state)


def test_no_request_goes_out_if_its_charge_cannot_be_written(tmp_path, private):
    (tmp_path / "checkpoints").write_text("a file in place of the folder")
    engine = RealClients()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(private, engine, first_state(private, engine), journal=LedgerFile(tmp_path))
    assert not any(engine.uploads.values())


def test_cohorts_of_real_clients_do_not_follow_from_the_seed():
    strategy, _ = protected(central(noise_multiplier=1.0), clients_per_round=2)
    engine = RealClients()
    state = start(strategy, np.zeros(4, np.float32), engine, seed=1)
    assert len({_cohort(strategy, engine, state) for _ in range(40)}) > 1
    engine.deployed = False
    assert len({_cohort(strategy, engine, state) for _ in range(40)}) == 1
