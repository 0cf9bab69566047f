"""The process of a node's trainer: socket, health, responses and shutdown."""

import os
import pathlib
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedlearn import FedlearnError
from fedlearn.core import Request
from fedlearn.core.serialization import WireError, unpack
from fedlearn.deploy.node_side import trainer_client
from fedlearn.deploy.node_side.trainer_client import CHUNK_BYTES, TrainerClient, TrainerUnavailable
from fedlearn.deploy.trainer import SERVICE, main, serve
from fedlearn.protocol import messages
from fedlearn.protocol.membership import Member
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.training_order import pack_order

ACCEPTED = "{diabetes: {partition: {one_of: [iid]}}}"
POLICY = f"""
scenarios: {ACCEPTED}
strategies: {{fedavg: {{}}}}
reveal: {{min_test_examples: 1}}
"""
DIABETES = {"name": "diabetes", "partition": {"name": "iid", "num_clients": 4}}
SLOW = """
import os, pathlib, time


def endless():
    pathlib.Path(os.environ["BEGUN"]).touch()
    time.sleep(600)
"""
WORDS = {"scenario": DIABETES, "strategy": {"name": "fedavg"}}
HELLO = NodeRequest(kind=RequestKind.HELLO, run="run", round=0, id="1", settings=WORDS)


def call_trainer(socket, payload, timeout_s):
    return bytes(TrainerClient(socket).call([payload], timeout_s=timeout_s))


def call(trainer, request):
    data = call_trainer(str(trainer.socket), request.pack(), timeout_s=60)
    return NodeResponse.unpack(data, request, max_bytes=2**20)


def health(place):
    with grpc.insecure_channel(f"unix:{place}") as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=60).status


@pytest.fixture
def echo(tmp_path):
    """Start a trainer that responds with the reversed bytes of the request."""
    place = tmp_path / "s"
    server = serve(SimpleNamespace(respond_in_parts=lambda payload: [bytes(payload)[::-1]]), place)
    yield place
    server.stop(0).wait(60)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """Start a trainer of clients 1 and 3 in a separate process."""
    yield from started_trainer(tmp_path_factory.mktemp("trainer"), "--framework", "torch")


def started_trainer(folder, *more):
    (folder / "policy.yaml").write_text(POLICY)
    words = ["--socket", folder / "s", "--client", "1", "--client", "3", "--policy", folder / "policy.yaml"]
    words += ["--client-states", folder / "client_states", *more]
    command = [sys.executable, "-m", "fedlearn.deploy.trainer", *map(str, words)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and "serves requests" not in (folder / "log").read_text():
        time.sleep(0.1)
    yield SimpleNamespace(process=process, socket=folder / "s", folder=folder, log=lambda: (folder / "log").read_text())
    if process.poll() is None:
        process.kill()
    process.wait(60)


def test_only_its_own_user_may_open_the_socket(echo):
    assert stat.S_IMODE(echo.stat().st_mode) == 0o600


def test_the_standard_health_service_answers(echo):
    assert health(echo) == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 5 * CHUNK_BYTES + 3])
def test_parcels_of_any_size_pass_in_parts(echo, size):
    payload = os.urandom(size)
    assert call_trainer(str(echo), payload, timeout_s=120) == payload[::-1]


def test_a_trainer_stops_reading_a_request_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(messages, "MAX_REQUEST_BYTES", 3 * CHUNK_BYTES)
    sizes = []

    def respond_in_parts(data):
        sizes.append(len(data))
        with pytest.raises(WireError, match="more than"):
            NodeRequest.unpack(data)
        return [b"refused"]

    server = serve(SimpleNamespace(respond_in_parts=respond_in_parts), tmp_path / "s")
    assert call_trainer(str(tmp_path / "s"), bytes(50 * CHUNK_BYTES), timeout_s=60) == b"refused"
    assert sizes == [4 * CHUNK_BYTES]
    server.stop(0).wait(60)


def test_a_second_trainer_at_the_same_socket_is_refused_and_a_socket_left_over_is_not(echo, tmp_path):
    site = SimpleNamespace(respond_in_parts=lambda payload: [payload])
    with pytest.raises(FedlearnError, match="no other trainer uses"):
        serve(site, echo)
    left_over = tmp_path / "left"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(left_over))
    server = serve(site, left_over)
    assert call_trainer(str(left_over), b"x", timeout_s=60) == b"x"
    server.stop(0).wait(60)


def test_a_path_that_is_too_long_or_taken_is_refused_by_name(tmp_path):
    with pytest.raises(FedlearnError, match="--socket"):
        serve(None, tmp_path / ("x" * 120))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FedlearnError, match="without another file"):
        serve(None, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_the_absence_of_a_trainer_is_reported_within_the_timeout(tmp_path):
    began = time.monotonic()
    with pytest.raises(TrainerUnavailable, match=r"the trainer at .* does not respond: UNAVAILABLE"):
        call_trainer(str(tmp_path / "none"), b"x", timeout_s=2)
    assert time.monotonic() - began < 60


def test_a_trainer_that_starts_late_gets_the_request_and_one_that_dies_gets_it_again(tmp_path):
    started = threading.Event()

    def start():
        time.sleep(1.0)
        servers.append(serve(SimpleNamespace(respond_in_parts=lambda payload: [bytes(payload)[::-1]]), tmp_path / "s"))
        started.set()

    servers = []
    threading.Thread(target=start).start()
    try:
        assert call_trainer(tmp_path / "s", b"abc", timeout_s=60) == b"cba"
    finally:
        assert started.wait(60)
        servers[0].stop(0).wait(60)


def test_a_request_waits_for_a_dead_trainer_for_a_limited_time(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_client, "START_TIMEOUT_S", 1.0)
    start = time.monotonic()
    with pytest.raises(TrainerUnavailable):
        call_trainer(tmp_path / "none", b"x", timeout_s=600)
    assert time.monotonic() - start < 60


def test_a_trainer_that_does_not_answer_is_told_at_the_deadline(tmp_path):
    over = threading.Event()
    server = serve(SimpleNamespace(respond_in_parts=lambda payload: [b""] if over.wait(600) else None), tmp_path / "s")
    try:
        with pytest.raises(TrainerUnavailable, match="DEADLINE_EXCEEDED"):
            call_trainer(str(tmp_path / "s"), b"x", timeout_s=0.5)
    finally:
        over.set()
        server.stop(0).wait(60)


def test_the_messenger_loads_no_framework():
    names = ("torch", "jax", "sklearn")
    code = f"import sys, fedlearn.deploy.node_side.messenger; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_a_trainer_answers_hello_and_trains_the_clients_that_live_there(trainer):
    hello = call(trainer, HELLO)
    member = Member.read(hello.content, hello.clients, 7)
    assert (member.clients, member.framework, member.task) == ((1, 3), "torch", "regression")
    order = Request(round=1, seed=1, params_D=np.zeros(member.layout.num_parameters, np.float32))
    fields = {"kind": RequestKind.FIT, "round": 1, "clients": (3,), "state_rounds": (0,), "shared": pack_order(order)}
    response = call(trainer, replace(HELLO, **fields, layout=member.layout.digest))
    assert response.clients == (3,)
    assert response.content.arrays["num_examples"].tolist() == [member.num_examples[3]]
    assert np.isfinite(response.content.arrays["delta"]).all()


@pytest.mark.parametrize(
    ("changes", "stage", "reason"),
    [
        ({"settings": {**WORDS, "strategy": {"name": "fedadam"}}}, "policy", "fedadam is not accepted"),
        ({"kind": RequestKind.FIT, "clients": (0,)}, "request", "clients [0] are not at this node"),
        ({"run": "../../etc"}, "request", "the name of the run is"),
        ({"kind": "exec"}, "request", "expected one of hello"),
    ],
    ids=["policy", "elsewhere", "path", "kind"],
)
def test_what_a_trainer_refuses_it_refuses_with_a_reason_that_both_sides_have(trainer, changes, stage, reason):
    refusal = call(trainer, replace(HELLO, **changes)).refusal
    assert refusal.stage == stage
    assert reason in refusal.reason
    assert reason in trainer.log()


def test_bytes_that_are_no_parcel_are_refused_and_the_trainer_lives_on(trainer):
    error = unpack(call_trainer(str(trainer.socket), b"\x80\x04nonsense", timeout_s=60)).metadata["refusal"]
    assert "cannot be read" in error["detail"]
    assert health(trainer.socket) == health_pb2.HealthCheckResponse.SERVING


def test_a_trainer_that_is_told_to_stop_takes_its_socket_along(trainer):
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.process.wait(60) == 0
    assert not trainer.socket.exists()


def test_a_trainer_in_the_middle_of_a_training_stops_too(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "policy.yaml").write_text(
        POLICY.replace(ACCEPTED, "{endless: {}}") + "builders: {scenario: {endless: slow.endless}}\n"
    )
    words = [
        "--socket",
        tmp_path / "s",
        "--client",
        0,
        "--policy",
        tmp_path / "policy.yaml",
        "--client-states",
        tmp_path / "m",
    ]
    command = [sys.executable, "-m", "fedlearn.deploy.trainer", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    env["BEGUN"] = str(tmp_path / "begun")
    slow = replace(HELLO, settings={**WORDS, "scenario": "endless"})
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < until
            with pytest.raises(TrainerUnavailable, match=r"DEADLINE_EXCEEDED|UNAVAILABLE"):
                call_trainer(str(tmp_path / "s"), slow.pack(), timeout_s=0.5)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)


def test_a_bad_setting_ends_the_trainer_with_2_and_the_reason(tmp_path, capsys):
    words = [
        "--socket",
        str(tmp_path / "s"),
        "--client",
        "0",
        "--policy",
        str(tmp_path / "none"),
        "--client-states",
        str(tmp_path),
    ]
    assert main([str(word) for word in words]) == 2
    assert "cannot be read" in capsys.readouterr().err


def wait_until(condition):
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.fixture
def idle_trainer(tmp_path):
    yield from started_trainer(tmp_path, "--framework", "torch", "--idle-timeout", "0.5")


@pytest.mark.slow
def test_an_idle_trainer_frees_its_memory_and_loses_no_request(idle_trainer):
    maps, policy = pathlib.Path(f"/proc/{idle_trainer.process.pid}/maps"), idle_trainer.folder / "policy.yaml"
    first = call(idle_trainer, HELLO)
    assert "torch" in maps.read_text()
    policy.write_text("no policy")
    time.sleep(2.0)
    assert "torch" in maps.read_text()  # a new start would fail, so the trainer stays
    policy.write_text(POLICY)
    wait_until(lambda: "torch" not in maps.read_text())
    until = time.monotonic() + 3.0
    while time.monotonic() < until:  # requests of all moments of a restart
        assert call(idle_trainer, HELLO).content.metadata == first.content.metadata
        time.sleep(random.uniform(0.0, 0.7))
    assert "starts anew" in idle_trainer.log()
    assert idle_trainer.process.poll() is None
