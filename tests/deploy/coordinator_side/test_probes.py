"""A new SuperLink is a new connection of each node, so that requests whose responses it has lost are sent again."""

import threading
import time
from datetime import datetime
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn.deploy.coordinator_side import probes
from fedlearn.deploy.coordinator_side.connections import connections_of, write_connections
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient, NodeState
from fedlearn.deploy.coordinator_side.probes import LinkProbe
from fedlearn.flower.compat.control import ControlClient
from fedlearn.protocol.repetition import Repetition

SINCE = "2026-01-01T00:00:00+00:00"
SINCE_UNIX = 1767225600.0


def nodes(state="online"):
    return [NodeState(name="north", id=7, state=state, since=SINCE)]


@pytest.mark.parametrize("interval_s", [15.0, 0.0, -1e300, 1e300, float("inf"), float("nan")])
def test_no_interval_that_a_node_names_moves_its_last_heartbeat_into_the_future(interval_s):
    now = time.time()
    client = SimpleNamespace(last_heartbeat_of=ControlClient.last_heartbeat_of)
    node = SimpleNamespace(status="online", online_until=now + 2 * interval_s, heartbeat_interval=interval_s)
    shown = CoordinatorClient._last_heartbeat(SimpleNamespace(_client=client), node)
    assert datetime.fromisoformat(shown).timestamp() <= now + 1.0
    if interval_s == 15.0:
        assert abs(datetime.fromisoformat(shown).timestamp() - now) <= 1.0


@pytest.mark.parametrize(("link_started_at", "expected"), [(0.0, SINCE_UNIX), (SINCE_UNIX + 9.0, SINCE_UNIX + 9.0)])
def test_no_connection_is_older_than_the_superlink(tmp_path, link_started_at, expected):
    write_connections(tmp_path, nodes(), link_started_at=link_started_at)
    assert connections_of(tmp_path)() == {7: expected}
    write_connections(tmp_path, nodes("offline"), link_started_at=link_started_at)
    assert connections_of(tmp_path)() == {}


def test_a_request_in_flight_at_a_restart_of_the_superlink_is_sent_again(tmp_path, monkeypatch):
    started_at, looked = [SINCE_UNIX], threading.Semaphore(0)
    monkeypatch.setattr(probes.time, "sleep", lambda seconds: looked.acquire())
    LinkProbe(lambda: SimpleNamespace(node_states=nodes), tmp_path, lambda: started_at[0]).start()
    in_flight = {"message": SimpleNamespace(node_id=7, sent_at_unix=SINCE_UNIX + 5.0)}
    repeated = Repetition(connected_since=connections_of(tmp_path))

    def looks_again():
        (tmp_path / "connections.json").unlink(missing_ok=True)
        looked.release()
        while not (tmp_path / "connections.json").exists():
            threading.Event().wait(0.01)
        return repeated.interrupted(in_flight)

    assert looks_again() == []
    started_at[0] = SINCE_UNIX + 6.0  # its child process was killed and restarted
    assert looks_again() == ["message"]
