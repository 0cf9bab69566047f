"""Client states on the disk of a node."""

import numpy as np
import pytest

from fedlearn import FedlearnError
from fedlearn.deploy.node_side.client_states import MAX_SAVED_ROUNDS, ClientStateError, ClientStates, check_run_name

INITIAL = {"own": np.zeros(3, np.float32)}


def state_of_round(round):
    return {"own": np.full(3, round, np.float32)}


@pytest.fixture
def states(tmp_path):
    return ClientStates(tmp_path / "client_states")


def test_a_client_goes_on_from_the_round_that_is_named_not_from_the_last(states):
    for number in (1, 2, 3):
        states.save("run", 7, number, state_of_round(number))
    assert states.load("run", 7, 2, INITIAL)["own"].tolist() == [2, 2, 2]
    assert states.load("run", 7, 0, INITIAL) is INITIAL


def test_a_repeated_round_forgets_the_future_that_was_given_up(states, tmp_path):
    for number in (1, 2, 3):
        states.save("run", 7, number, state_of_round(number))
    states.save("run", 7, 2, state_of_round(20))
    assert states.load("run", 7, 2, INITIAL)["own"][0] == 20
    with pytest.raises(ClientStateError, match=r"after round 3 of run.*available rounds: 1, 2"):
        states.load("run", 7, 3, INITIAL)


def test_only_so_many_rounds_are_kept(states, tmp_path):
    for number in range(1, 30):
        states.save("run", 7, number, state_of_round(number))
    assert len(list((tmp_path / "client_states").rglob("round_*"))) == MAX_SAVED_ROUNDS


def test_memories_of_runs_and_clients_do_not_meet(states):
    states.save("one", 1, 1, state_of_round(1))
    states.save("two", 1, 1, state_of_round(2))
    states.save("one", 2, 1, state_of_round(3))
    for run, client, value in (("one", 1, 1), ("two", 1, 2), ("one", 2, 3)):
        assert states.load(run, client, 1, INITIAL)["own"][0] == value


def test_a_damaged_memory_or_one_of_another_strategy_is_told(states, tmp_path):
    states.save("run", 7, 1, state_of_round(1))
    (path,) = (tmp_path / "client_states").rglob("round_*")
    with pytest.raises(ClientStateError, match="this strategy expects"):
        states.load("run", 7, 1, {"other": np.zeros(3)})
    path.write_bytes(b"broken")
    with pytest.raises(ClientStateError, match="cannot be read at this node"):
        states.load("run", 7, 1, INITIAL)


def test_orders_are_counted_across_restarts_and_a_damaged_count_is_not_taken_for_none(states, tmp_path):
    for run in ("one", "one", "two"):
        states.count_request(run)
    again = ClientStates(tmp_path / "client_states")
    assert again.request_counts("one") == (2, 3)
    assert again.request_counts("new") == (0, 3)
    (tmp_path / "client_states" / "requests.json").write_text("{")
    with pytest.raises(ClientStateError, match="number of training requests of this node is unknown"):
        again.request_counts("one")


@pytest.mark.parametrize(
    ("old", "new"), [("orders.json", "requests.json"), ("run/client_000007/masking.notes", "secagg.state")]
)
def test_counts_and_keys_of_an_earlier_version_are_not_passed_over(tmp_path, old, new):
    path = tmp_path / old
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(ClientStateError, match=f"has the name {new} in this version"):
        ClientStates(tmp_path)
    path.rename(path.with_name(new))
    ClientStates(tmp_path)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "x" * 101, "a b"])
def test_a_run_cannot_lead_out_of_the_folder(name):
    with pytest.raises(FedlearnError, match="the name of the run is"):
        check_run_name(name)


def test_the_folder_is_for_its_owner_alone(states, tmp_path):
    assert (tmp_path / "client_states").stat().st_mode & 0o077 == 0
