"""Sites of runs in a federation over loopback: a fourth hospital that refuses, and runs from before it was admitted."""

from __future__ import annotations

import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from fedlearn.deploy.key_folders import add
from fedlearn.deploy.processes import GRACE_S, Child, Children, module_command
from fedlearn.deploy.rehearse import Rehearsal
from tests.deploy.conftest import FAULTS, LIMIT_S, POLICY, ROOT, Federation, interrupt

pytestmark = pytest.mark.slow
SITES = "sites=[node0,node1,node2]"


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Start a coordinator and three nodes, with a client each."""
    folder = tmp_path_factory.mktemp("s")
    with pytest.MonkeyPatch.context() as patch, Children(grace_s=2 * GRACE_S) as children:
        patch.setenv("PYTHONPATH", f"{FAULTS}:{ROOT}")
        patch.syspath_prepend(str(FAULTS))
        rehearsal = Rehearsal(folder, folder / "runs", [[0], [1], [2]], POLICY)
        rehearsal.start(children)
        yield Federation(rehearsal), children


def add_refusing_node(federation: Federation, children: Children) -> Child:
    """Admit a fourth node, whose policy accepts no strategy of the runs."""
    add(federation.keys, ["node3=3"])
    policy = federation.folder / "other.yaml"
    policy.write_text(json.dumps({**POLICY, "strategies": {"fedprox": {}}}))
    command = [
        *module_command("fedlearn.deploy.node"),
        *("--coordinator", federation.address, "--keys", str(federation.keys / "nodes/node3")),
        *("--state", str(federation.folder / "node3"), "--policy", str(policy), "--client", "3"),
    ]
    child = Child("node3", command, federation.folder / "node3.log", parent_death_signal=signal.SIGTERM)
    children.start(child)
    children.wait_for(partial(_is_ready, child), "node3 is ready", timeout_s=120)
    return child


def _is_ready(child: Child) -> bool:
    return "\nready\n" in child.read_output()


def _wait(condition) -> None:
    until = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def refusals(federation: Federation) -> int:
    """Return the number of requests that the fourth node has refused."""
    log: Path = federation.folder / "node3/trainer.log"
    return log.read_text().count("refused a request")


def test_a_fourth_hospital_neither_stops_nor_changes_the_runs_of_the_others(three):
    federation, children = three
    whole = federation.run(SITES, "rounds=4", name="whole")
    assert whole.code == 0, whole.text
    old = federation.run(
        "strategy=slow", SITES, "rounds=40", name="old", events=[(lambda run: len(run.lines) >= 1, interrupt)]
    )
    assert old.code == 130, old.text
    assert len(old.lines) <= 3  # the stop takes effect at the end of a round
    add_refusing_node(federation, children)

    named = federation.run(SITES, "rounds=4", name="named")
    assert named.code == 0, named.text
    assert named.summary["parameters_sha256"] == whole.summary["parameters_sha256"]
    assert "node3" not in named.text
    assert refusals(federation) == 0

    everyone = federation.run("rounds=4", name="everyone")
    assert everyone.code == 0, everyone.text
    assert "3 of 4 sites joined; refused: node3" in everyone.text
    assert everyone.summary["parameters_sha256"] == whole.summary["parameters_sha256"]
    assert refusals(federation) > 0

    before = refusals(federation)
    num_done = len(old.lines)
    assert federation.rehearsal.follower().resume_run("old", [f"rounds={num_done + 1}"]) == 0
    assert [line["num_updates"] for line in old.lines] == [3] * (num_done + 1)
    assert refusals(federation) == before  # the run was for three sites when it started


def test_all_four_are_required_if_all_four_are_named(three):
    federation, _ = three
    run = federation.run("sites=[node0,node3]", "rounds=1", name="required")
    assert run.code == 2
    assert "refused: node3" in run.text
    assert "fedavg is not accepted" in run.text
    assert not any(word.isdigit() and len(word) > 15 for word in run.text.split("\n", 1)[1].split())
    unknown = federation.run("sites=[node0,node9]", "rounds=1", name="unknown")
    assert unknown.code == 2
    assert "sites is node9\n  expected  one of node0, node1, node2, node3" in unknown.text


def test_a_key_that_comes_back_joins_again_and_is_asked(three):
    federation, _ = three
    path = federation.keys / "coordinator/allowed/node2.pub"
    content = path.read_bytes()
    coordinator, node = federation.children["coordinator"], federation.children["node2"]
    path.unlink()
    _wait(lambda: "node node2 is no longer admitted" in coordinator.read_output())
    _wait(lambda: node.exit_code is not None)
    assert "does not admit the key of this node" in node.read_output()
    path.write_bytes(content)
    _wait(lambda: coordinator.read_output().count("node node2 is admitted") == 2)
    node.start()
    _wait(lambda: _is_ready(node))
    run = federation.run(SITES, "rounds=1", name="back")
    assert run.code == 0, run.text
