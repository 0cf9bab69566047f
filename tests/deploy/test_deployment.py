"""A federation over loopback, with TLS and node authentication, and its faults."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.key_folders import add, create, revoke
from fedlearn.deploy.run_log import Follower
from fedlearn.runner.start import main as simulate


def sha_of_simulation(folder, *words):
    """Return the digest of the final model of a simulation."""
    words = ("scenario=diabetes", "partition.num_clients=4", "report=false", *words)
    assert simulate([*words, f"hydra.run.dir={folder}"]) == 0
    return json.loads((folder / "summary.json").read_text())["parameters_sha256"]


def kill(child):
    os.kill(child.process.pid, signal.SIGKILL)


def rounds_done(number):
    """Return a condition: the run has completed this number of rounds."""
    return lambda run: len(run.lines) >= number


def interrupt():
    """Send SIGINT to this process, as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def test_deployed_vector_and_serial_end_with_the_same_bits(federation, tmp_path):
    deployed = federation.run("rounds=3", name="same")
    assert deployed.code == 0, deployed.text
    simulated = {
        sha_of_simulation(tmp_path / engine, "rounds=3", f"engine={engine}") for engine in ("vector", "serial")
    }
    assert {deployed.summary["parameters_sha256"]} == simulated
    assert "round 3/3" in deployed.text
    left = {path.name for path in deployed.folder.iterdir()}
    assert left >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "clients.csv",
        "summary.json",
        "run.log",
        "checkpoints",
    }
    assert [line["num_updates"] for line in deployed.lines] == [4, 4, 4]
    described = [folder / "model/preprocessing.json" for folder in (deployed.folder, tmp_path / "serial")]
    assert described[0].read_bytes() == described[1].read_bytes()  # from the settings: a coordinator has no data
    assert not (deployed.folder / "data_digests.json").exists()


@pytest.mark.slow
def test_masked_updates_add_up_to_the_bits_of_a_simulation(federation, tmp_path):
    words = ("privacy=secagg", "strategy.weighting=equal", "rounds=2")
    deployed = federation.run(*words, name="masked")
    assert deployed.code == 0, deployed.text
    assert "only sums of at least 2 parties can be opened" in deployed.text
    assert deployed.summary["parameters_sha256"] == sha_of_simulation(tmp_path / "masked", *words)


@pytest.mark.slow
def test_compressed_updates_end_with_the_bits_of_a_simulation_and_are_counted_as_there(federation, tmp_path):
    words = ("compress=topk", "compress.share=0.2", "rounds=2")  # nodes store the residuals of the codec
    deployed = federation.run(*words, name="compressed")
    assert deployed.code == 0, deployed.text
    assert deployed.summary["parameters_sha256"] == sha_of_simulation(tmp_path, *words)
    simulated = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sent = [line["bytes_up"] for line in deployed.lines]
    assert sent == [line["bytes_up"] for line in simulated]
    assert max(sent) < deployed.lines[0]["bytes_down"] / 2  # the global model is sent uncompressed


@pytest.mark.slow
def test_a_node_killed_in_a_round_is_done_without_and_rejoins(federation):
    def back(run):
        updates = [line["num_updates"] for line in run.lines]
        return 2 in updates and 4 in updates[updates.index(2) :]  # first the remaining node alone, then both nodes

    events = [(rounds_done(1), lambda: kill(federation.children["node1"])), (back, interrupt)]
    words = (
        "strategy=slow",
        "rounds=1000",
        "engine.deadline=6",
        "max_failures=0.6",
    )  # the node needs longer to restart
    run = federation.run(*words, name="killed_node", events=events)
    assert run.code == 130, run.text
    assert back(run), run.text
    reasons = {failure["reason"] for line in run.lines for failure in line["failures"]}
    assert any("answer" in reason or "node" in reason for reason in reasons), reasons


def test_a_coordinator_killed_in_a_run_comes_back_and_the_run_ends_as_it_would_have(federation, tmp_path):
    go = tmp_path / "go"

    def strike():
        kill(federation.children["coordinator"])
        go.touch()

    words = ("strategy=held_coordinator", f"strategy.until={go}", "rounds=5")
    run = federation.run(*words, name="killed_coordinator", events=[(rounds_done(2), strike)])
    assert run.code == 0, run.text
    assert "resumes from its last checkpoint" in run.text
    assert [line["round"] for line in run.lines] == [1, 2, 3, 4, 5]
    assert run.summary["parameters_sha256"] == sha_of_simulation(tmp_path / "whole", "rounds=5")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_a_run_lives_through_the_death_of_flowers_link(federation, tmp_path):
    go = tmp_path / "go"

    def strike():
        federation.replace_link()
        go.touch()

    def whole(run):
        return any(line["round"] > 1 and line["num_updates"] == 4 for line in run.lines)

    events = [(lambda run: Path(f"{go}.waiting").exists(), strike), (whole, interrupt)]
    words = ("strategy=held_node", f"strategy.until={go}", "rounds=1000")
    words += ("max_failures=0.6", "engine.deadline=60")  # a message in transit may be lost
    run = federation.run(*words, name="killed_link", events=events)
    assert run.code == 130, run.text
    assert "lost the coordinator" in run.text
    assert "was interrupted" not in run.text
    assert [line["round"] for line in run.lines] == list(range(1, len(run.lines) + 1))
    assert whole(run), run.text


def test_training_that_raises_has_a_reference_in_the_run_folder_and_its_reason_in_the_log_of_the_node(federation):
    def logs():
        return [path.read_text(errors="replace") for path in federation.folder.rglob("*.log")]

    run = federation.run("strategy=raising", "rounds=2", "max_failures=0.6", name="raising")
    assert run.code == 0, run.text
    for text in (run.text, (run.folder / "run.log").read_text()):
        assert "the scanner is switched off" not in text
        reference = re.search(r"local training failed \(reference (\w+) in the log of the node\)", text)[1]
        assert any(
            f"reference {reference}: " in log and "RuntimeError: the scanner is switched off" in log for log in logs()
        )
    failed = {failure["client"] for line in run.lines for failure in line["failures"]}
    assert failed == {1, 3}


@pytest.mark.slow
def test_a_full_disk_ends_the_run_by_name_and_keeps_the_last_checkpoint(federation):
    run = federation.run("strategy=full", "rounds=4", name="full")
    assert run.code == 3, run.text
    assert "can no longer be written: No space left on device" in run.text
    assert "python -m fedlearn.deploy.submit --resume full" in run.text
    assert [path.name for path in (run.folder / "checkpoints").glob("round_*")] == ["round_000001.safetensors"]


@pytest.mark.slow
def test_a_dry_run_asks_the_nodes_and_trains_nothing(federation):
    run = federation.run("rounds=7", "dry_run=true", name="dry")
    assert run.code == 0, run.text
    assert "at 2 nodes" in run.text
    assert "in 7 rounds" in run.text
    assert "nothing was trained, and no run folder remains" in run.text
    assert not run.folder.exists()
    refused = federation.run("strategy=fedadam", "dry_run=true", name="dry_refused")
    assert refused.code == 2, refused.text
    assert "fedadam is not accepted" in refused.text


def test_an_order_outside_the_policy_is_refused_with_the_reason(federation):
    run = federation.run("strategy=fedadam", "rounds=2", name="refused")
    assert run.code == 2, run.text
    assert "fedadam is not accepted" in run.text
    assert not run.folder.exists()


@pytest.mark.slow
def test_ctrl_c_saves_the_round_and_resume_ends_as_if_nothing_had_been(federation, tmp_path):
    go = tmp_path / "go"
    words = [
        *federation.words,
        "strategy=held_coordinator",
        f"strategy.until={go}",
        "rounds=6",
        "hydra.run.dir=stopped",
    ]
    command = federation.submit(*words)
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        seen = []
        for line in started.stdout:
            seen.append(line)
            if line.startswith("round 2/6"):
                started.send_signal(signal.SIGINT)
            if "stopping after this round" in line:
                go.touch()
        assert started.wait(120) == 130, "".join(seen)
    finally:
        started.kill()
        started.communicate()
    text = "".join(seen)
    assert "stopping after this round" in text
    assert shlex.join(["python", *federation.submit("--resume", "stopped")[1:]]) in text
    stopped = federation.found("stopped")
    assert len(stopped.lines) == 2  # the present round, not a later one
    again = subprocess.run(federation.submit("--resume", "stopped"), capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert stopped.summary["parameters_sha256"] == sha_of_simulation(tmp_path / "whole", "rounds=6")


def node_of(federation, folder, keys_folder):
    """Return the command that starts one more node."""
    place = ["--coordinator", federation.address, "--keys", str(keys_folder), "--state", str(folder)]
    return [sys.executable, "-m", "fedlearn.deploy.node", *place, "--policy", str(federation.policy), "--client", "9"]


def test_a_node_with_a_key_of_its_own_making_is_not_let_in(federation, tmp_path):
    create(tmp_path / "others", ["localhost"], ["intruder"])
    current = tmp_path / "others/nodes/intruder"
    shutil.copyfile(federation.keys / "ca.crt", current / "ca.crt")
    done = subprocess.run(node_of(federation, tmp_path / "n", current), capture_output=True, text=True, timeout=90)
    assert done.returncode == 2, done.stderr
    assert "does not admit the key of this node" in done.stderr


def test_a_node_that_trusts_another_authority_does_not_join(federation, tmp_path):
    create(tmp_path / "others", ["localhost"], ["a"])
    command = node_of(federation, tmp_path / "n", tmp_path / "others/nodes/a")
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 2, done.stderr
    assert "its certificate is signed by another authority" in done.stderr


def test_a_node_that_is_added_joins_and_one_that_is_revoked_is_out_at_once(federation, tmp_path):
    add(federation.keys, ["late"])
    command = node_of(federation, tmp_path / "n", federation.keys / "nodes/late")
    node = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        shown = iter(node.stdout.readline, "")
        assert any(line == "ready\n" for line in shown), node.stderr.read()
        revoke(federation.keys, ["late"])
        _, reason = node.communicate(timeout=90)
        assert node.returncode == 2
        assert "does not admit the key of this node" in reason
    finally:
        node.kill()
        node.communicate()


def test_the_wrong_token_submits_nothing(federation, tmp_path):
    (tmp_path / "token").write_text("guessed")
    shutil.copyfile(federation.keys / "ca.crt", tmp_path / "ca.crt")
    with pytest.raises(ConnectionProblem, match="does not accept this token"):
        Follower(federation.address, tmp_path, 1.0).submit({"do": "stop", "run": 1})


def test_the_health_of_the_coordinator_is_told_to_anybody_who_trusts_it(federation):
    context = ssl.create_default_context(cafile=federation.keys / "ca.crt")
    with urllib.request.urlopen(f"https://{federation.address}/health", context=context, timeout=20) as answer:
        assert answer.status == 200


def processes_of(federation):
    """Return the command lines of the processes of the federation, by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            environment = (path.parent / "environ").read_bytes()
            if bytes(federation.folder) in environment + b" ".join(words):
                found[int(path.parent.name)] = [word.decode(errors="replace") for word in words]
    return found


def memory_of(process):
    """Return the largest memory of a process so far, in MB."""
    lines = (Path("/proc") / str(process) / "status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


@pytest.mark.parametrize(
    ("path", "chunked"),
    [
        ("/v1/fleet/push-object", True),
        ("/v1/fleet/push-messages", False),
        pytest.param("/v1/fleet/push-messages", True, marks=pytest.mark.slow),
        pytest.param("/v1/control/start-run", True, marks=pytest.mark.slow),
        pytest.param("/v1/control/start-run", False, marks=pytest.mark.slow),
    ],
)
def test_a_large_message_of_a_stranger_is_not_read(federation, path, chunked):
    link = next(id for id, words in processes_of(federation).items() if any("side.superlink" in w for w in words))
    before, host, port = memory_of(link), *federation.address.split(":")
    trust = ssl.create_default_context(cafile=str(federation.keys / "operator/ca.crt"))
    with trust.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as connection:
        connection.settimeout(60)
        size = "transfer-encoding: chunked" if chunked else f"content-length: {500 * 2**20}"
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/protobuf\r\n{size}\r\n\r\n"
        part = (b"400000\r\n" if chunked else b"") + b"\x0a" * 2**22 + (b"\r\n" if chunked else b"")
        with suppress(OSError):  # the coordinator discards the body, or closes the connection
            connection.sendall(head.encode())
            for _ in range(125):
                connection.sendall(part)
        answer = b""
        with suppress(OSError):
            answer = connection.recv(100)
    assert not answer or answer.startswith(b"HTTP/1.1 401"), answer
    assert memory_of(link) - before < 40


@pytest.mark.slow
def test_no_argument_of_a_process_is_a_token(federation):
    seen = {}

    def look(run):
        seen.update(processes_of(federation))
        return any("superexec" in word for words in seen.values() for word in words[3:4]) and bool(run.lines)

    run = federation.run("rounds=2", name="tokens", events=[(look, lambda: None)])
    assert run.code == 0, run.text
    arguments = [word for words in seen.values() for word in words]
    assert "--runtime-api-address" in arguments
    runs = [words for words in seen.values() if "run" in words and any("superexec" in word for word in words)]
    assert runs, "the process of the run was not seen"
    files = ("operator/token", "coordinator/executor.secret")
    secrets = {(federation.keys / name).read_text().strip() for name in files}
    assert not [word for word in arguments if word == "--token" or any(secret in word for secret in secrets)]
    assert not [word for word in arguments if re.fullmatch(r"[0-9a-f]{32,}|\w[\w-]{39,}", word)]


def test_no_other_user_can_read_a_file_of_coordinator_or_node(federation):
    paths = [federation.folder, *federation.folder.rglob("*")]
    assert {"flower.db", "superlink.log", "trainer.log", "masking.key", "nodes.json"} <= {path.name for path in paths}
    open_to_others = [str(path) for path in paths if not path.is_symlink() and path.stat().st_mode & 0o077]
    assert not open_to_others


@pytest.mark.slow
def test_the_coordinator_writes_the_curves_of_a_run(federation):
    pytest.importorskip("tensorboardX")
    deployed = federation.run("rounds=2", "callbacks=tensorboard", name="tracked")
    assert deployed.code == 0, deployed.text
    (events,) = (deployed.folder / "tensorboard").iterdir()
    assert b"test/loss" in events.read_bytes()
    assert "callback_failures" not in deployed.summary
