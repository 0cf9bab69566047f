"""The messenger of a node: lost connections, lost replies, a dead trainer, and a revoked key."""

import json
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

import httpx
from flwr.app import Message

from fedlearn.deploy.node_side import messenger
from fedlearn.deploy.node_side.messenger import Messenger, NotAdmitted
from fedlearn.deploy.node_side.messenger_state import MAX_AGE_S, STATE_FILE, MessengerState, read_problem
from fedlearn.deploy.node_side.trainer_client import TrainerUnavailable
from fedlearn.flower.compat.fleet import MissingParts
from fedlearn.flower.compat.messages import identify_as_server, set_message_id
from fedlearn.protocol.grid_client import from_record_dict, to_record_dict

CUT = httpx.ReadError("the connection is cut")


class Done(BaseException):
    """Ends a messenger, which otherwise runs for ever."""


def refused(status):
    request = httpx.Request("POST", "https://coordinator/")
    return httpx.HTTPStatusError("refused", request=request, response=httpx.Response(status, request=request))


class FakeFleet:
    """A coordinator whose next answers are given; an exception is raised."""

    def __init__(self, pulls=(), pushes=(), activations=(7,)):
        self.pulls, self.pushes, self.activations = list(pulls), list(pushes), list(activations)
        self.log, self.heartbeats = [], []

    def activate(self, interval_s):
        self.log.append("activate")
        return self._next(self.activations, 7)

    def deactivate(self, node_id):
        self.log.append(f"deactivate {node_id}")

    def pull(self, node_id):
        self.log.append("pull")
        if not self.pulls:
            raise Done
        return self._next(self.pulls)

    def push(self, node_id, reply):
        self._next(self.pushes, None)
        self.log.append(f"error {reply.error.reason}" if reply.has_error() else from_record_dict(reply.content))

    def heartbeat(self, node_id, interval_s):
        return self._next(self.heartbeats, True)

    @staticmethod
    def _next(answers, default=None):
        answer = answers.pop(0) if answers else default
        if isinstance(answer, BaseException):
            raise answer
        return answer


def request(payload=b"question"):
    identify_as_server()
    message = Message(to_record_dict(payload), 7, "query", ttl=60)
    set_message_id(message, "id")
    return message


def carry(tmp_path, fleet, call=lambda payload, timeout_s: b"".join(payload)[::-1], problems=()):
    pauses, problems = [], list(problems)
    state = MessengerState.load(tmp_path)
    trainer = SimpleNamespace(call=call, problem=lambda: problems.pop(0) if problems else "")
    carrier = Messenger(fleet, trainer, state, "coordinator:8000", sleep=pauses.append)
    with pytest.raises(Done):
        carrier.run()
    return pauses


@pytest.mark.parametrize("size", [0, 8, 3 * 2**20])
def test_bytes_of_any_size_pass_in_both_directions(tmp_path, size):
    payload = bytes(range(256)) * (size // 256) + b"x"
    fleet = FakeFleet([None, request(payload)])
    carry(tmp_path, fleet)
    assert fleet.log == ["activate", "pull", "pull", payload[::-1], "pull"]


@pytest.mark.parametrize("error", [CUT, MissingParts("part"), refused(503), refused(500), OSError("broken")])
def test_after_an_error_the_messenger_connects_anew_so_that_the_coordinator_repeats_its_requests(tmp_path, error):
    fleet = FakeFleet([error, request()])
    carry(tmp_path, fleet)
    assert fleet.log == ["activate", "pull", "deactivate 7", "activate", "pull", b"noitseuq", "pull"]


HOSTILE = (
    ValueError("no protobuf"),
    TypeError("a record"),
    KeyError("x"),
    RecursionError(),
    MemoryError(),
    struct.error(),
)


@pytest.mark.parametrize("place", ["pulls", "pushes", "activations", "heartbeats"])
def test_no_malformed_answer_of_a_coordinator_ends_the_messenger(tmp_path, place):
    for number, error in enumerate(HOSTILE):
        fleet = FakeFleet([request()])
        getattr(fleet, place).insert(0, error)
        if place == "heartbeats":
            fleet.activations.insert(0, refused(412))  # after this, the messenger sends a heartbeat
        carry(tmp_path / str(number), fleet)
        assert fleet.log[-1] == "pull", error
        assert b"noitseuq" in fleet.log or place == "pushes", error


@pytest.mark.parametrize("ttl", [float("nan"), -1.0, 0.0, float("inf"), 1e300])
def test_a_hostile_time_to_live_reaches_no_trainer(tmp_path, ttl):
    seen = []
    message = request()
    vars(message.metadata)["_ttl"] = ttl
    fleet = FakeFleet([message, request()])
    carry(tmp_path, fleet, lambda payload, timeout_s: seen.append(timeout_s) or payload)
    assert all(0 < seconds <= messenger.MAX_TIMEOUT_S for seconds in seen)
    assert fleet.log[-2:] == [b"question", "pull"]


def test_a_heartbeat_outlives_malformed_answers(tmp_path, monkeypatch):
    fleet, state = FakeFleet(), MessengerState.load(tmp_path)
    fleet.heartbeats, state.node_id, pauses = [*HOSTILE, Done()], 7, []
    trainer = SimpleNamespace(problem=lambda: "")
    monkeypatch.setattr(messenger, "HEARTBEAT_INTERVAL_S", 0.0)
    monkeypatch.setattr(messenger.time, "sleep", pauses.append)
    carrier = Messenger(fleet, trainer, state, "coordinator:8000")
    carrier.is_connected = True
    with pytest.raises(Done):
        messenger.Heartbeat(carrier).run()
    assert len(pauses) == len(HOSTILE)


def test_no_heartbeat_renews_the_last_connection_of_a_killed_messenger(tmp_path, monkeypatch):
    carry(tmp_path, FakeFleet())
    beats, num_beats = [], []

    def stop(seconds):
        raise Done

    def beat():
        with pytest.raises(Done):
            heartbeat.run()
        num_beats.append(len(beats))

    fleet = FakeFleet()
    for name in ("deactivate", "activate", "pull"):
        answer = getattr(fleet, name)
        monkeypatch.setattr(fleet, name, lambda *arguments, answer=answer: beat() or answer(*arguments))
    monkeypatch.setattr(fleet, "heartbeat", lambda *arguments: beats.append(arguments))
    monkeypatch.setattr(messenger, "HEARTBEAT_INTERVAL_S", 0.0)
    monkeypatch.setattr(messenger.time, "sleep", stop)
    trainer = SimpleNamespace(call=None, problem=lambda: "")
    carrier = Messenger(fleet, trainer, MessengerState.load(tmp_path), "coordinator:8000", sleep=lambda seconds: None)
    heartbeat = messenger.Heartbeat(carrier)
    with pytest.raises(Done):
        carrier.run()
    assert fleet.log == ["deactivate 7", "activate", "pull"]
    assert num_beats == [0, 0, 1]  # none before the new connection


def test_a_messenger_that_was_killed_ends_its_last_connection_at_its_next_start(tmp_path):
    carry(tmp_path, FakeFleet())
    fleet = FakeFleet()
    carry(tmp_path, fleet)
    assert fleet.log == ["deactivate 7", "activate", "pull"]


def test_the_last_connection_ends_at_once_and_the_next_starts_with_a_trainer_that_works(tmp_path):
    carry(tmp_path, FakeFleet())
    fleet = FakeFleet()
    assert carry(tmp_path, fleet, problems=["it does not listen", "it does not answer"]) == [0.5, 0.5]
    assert fleet.log == ["deactivate 7", "activate", "pull"]


def test_a_response_is_sent_again_until_the_coordinator_has_it(tmp_path):
    fleet = FakeFleet([request()], pushes=[CUT, MissingParts("part"), CUT, None])
    carry(tmp_path, fleet)
    assert fleet.log == ["activate", "pull", b"noitseuq", "pull"]


def test_the_end_of_a_run_is_no_error_of_the_connection(tmp_path):
    fleet = FakeFleet([request(), request(b"ab")], pushes=[refused(403), None])
    carry(tmp_path, fleet)
    assert fleet.log == ["activate", "pull", "pull", b"ba", "pull"]


def test_a_dead_trainer_is_an_error_without_paths_of_the_node(tmp_path, caplog):
    def call(payload, timeout_s):
        raise TrainerUnavailable("the trainer at /secret/trainer.sock does not respond")

    fleet = FakeFleet([request()])
    carry(tmp_path, fleet, call)
    assert fleet.log[2] == f"error {messenger.NO_TRAINER}"
    assert "/secret/trainer.sock" in caplog.text


def test_the_last_connection_is_waited_for_and_a_revoked_key_is_final(tmp_path):
    fleet = FakeFleet(activations=[refused(412), refused(412), 7])
    assert carry(tmp_path, fleet) == [0.5, 1.0]
    state, trainer = MessengerState.load(tmp_path / "other"), SimpleNamespace(problem=lambda: "")
    for revoked in (
        FakeFleet(activations=[refused(401)]),
        FakeFleet([refused(401)]),
        SimpleNamespace(activate=FakeFleet(activations=[refused(412)]).activate, heartbeat=lambda *_: raise_(401)),
    ):
        with pytest.raises(NotAdmitted):
            Messenger(revoked, trainer, state, "coordinator:8000", sleep=lambda s: None).run()
        state.node_id = 0


def raise_(status):
    raise refused(status)


def test_the_pauses_between_attempts_grow_up_to_a_limit(tmp_path):
    pauses = carry(tmp_path, FakeFleet(activations=[CUT] * 20))
    assert pauses == sorted(pauses)
    assert pauses[-1] == messenger.MAX_RETRY_INTERVAL_S


def test_the_parent_reads_which_part_of_the_path_does_not_work(tmp_path):
    assert "not started" in read_problem(tmp_path, "messenger")
    state = MessengerState.load(tmp_path)
    state.report(coordinator="", trainer="it does not answer")
    assert [read_problem(tmp_path, part) for part in ("messenger", "coordinator")] == ["", ""]
    assert read_problem(tmp_path, "trainer") == "it does not answer"
    content = json.loads((tmp_path / STATE_FILE).read_text())
    (tmp_path / STATE_FILE).write_text(json.dumps({**content, "time": content["time"] - MAX_AGE_S - 1}))
    assert "has not answered" in read_problem(tmp_path, "messenger")  # it hangs, or is stopped
    assert read_problem(tmp_path, "trainer") == ""  # an old file says nothing about the trainer


def test_the_parent_of_a_node_loads_neither_flower_nor_a_framework():
    code = (
        "import sys, fedlearn.deploy.node; print([m for m in ('flwr', 'torch', 'jax', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
