"""The coordinator admits and removes nodes when key files change, and reports each problem once."""

import json
import os

import pytest

from fedlearn.deploy import keys
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.coordinator_side import key_sync
from fedlearn.deploy.coordinator_side.admission import NODES_FILE
from fedlearn.deploy.coordinator_side.control_api import NodeState
from fedlearn.deploy.coordinator_side.key_sync import KeySync


class FakeControl:
    """A SuperLink that registers nodes by key. It refuses the names in ``refused``."""

    def __init__(self):
        self.registered, self.refused, self.next_id = {}, set(), 8000000000000000001

    def nodes(self):
        return {key: node_id for key, (_, node_id) in self.registered.items()}

    def node_states(self):
        return [NodeState(name, node_id, "online", "") for name, node_id in self.registered.values()]

    def register_node(self, name, public_key):
        if name in self.refused:
            raise ConnectionProblem(f"refuses {name}")
        self.registered[public_key] = (name, self.next_id)
        self.next_id += 1

    def unregister_node(self, node_id):
        self.registered = {key: value for key, value in self.registered.items() if value[1] != node_id}


@pytest.fixture
def place(tmp_path):
    keys.create(tmp_path / "keys", ["localhost"], ["north", "south"])
    return tmp_path


@pytest.fixture
def sync(place, monkeypatch):
    monkeypatch.setattr(key_sync, "RETRY_INTERVAL_S", 0.0)
    return KeySync(FakeControl(), place / "keys/coordinator", place)


def names(place):
    return sorted(name for name, _ in json.loads((place / NODES_FILE).read_text()).values())


def test_a_key_that_comes_back_is_admitted_again_by_name(sync, place, capsys):
    path = place / "keys/coordinator/allowed/south.pub"
    content = path.read_bytes()
    sync.check()
    assert names(place) == ["north", "south"]
    path.unlink()
    sync.check()
    assert names(place) == ["north"]
    path.write_bytes(content)
    sync.check()
    assert names(place) == ["north", "south"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["node south is no longer admitted", "node south is admitted"]
    assert "80000000" not in "".join(lines)


def test_a_refused_node_is_reported_once_and_does_not_hold_up_the_others(sync, place, capsys):
    sync.control.refused = {"north"}
    for _ in range(3):
        sync.check()
    assert names(place) == ["south"]
    assert capsys.readouterr().err.count("node north is not admitted: refuses north") == 1
    sync.control.refused = set()
    sync.check()
    assert names(place) == ["north", "south"]


def test_a_damaged_key_file_does_not_end_the_coordinator(sync, place, capsys):
    sync.check()
    path = place / "keys/coordinator/allowed/west.pub"
    path.write_text("half a ke")
    for _ in range(3):
        sync.check()
    assert capsys.readouterr().err.count("west.pub is not a public key") == 1
    path.unlink()
    sync.check()
    assert names(place) == ["north", "south"]


def test_another_key_under_the_same_name_replaces_the_first(sync, place):
    sync.check()
    before = sync.control.nodes().keys()
    path = place / "keys/coordinator/allowed/south.pub"
    keys.create(place / "other", ["localhost"], ["south"])
    path.write_bytes((place / "other/coordinator/allowed/south.pub").read_bytes())
    os.utime(path, ns=(1, 1))
    sync.check()
    assert names(place) == ["north", "south"]
    assert len(sync.control.nodes().keys() - before) == 1
