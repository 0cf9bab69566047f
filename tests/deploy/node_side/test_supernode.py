"""Messengers are forked from a process that has imported Flower."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")
if not hasattr(os, "fork"):
    pytest.skip("this system cannot fork", allow_module_level=True)

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec

from fedlearn.deploy.node_side.supernode import ForkExecutor
from fedlearn.protocol.polling import PollingClock

# the process of all tests may load JAX, but the process from which messengers are forked never does
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
SPEC = ExecutionSpec(
    task_type=TaskType.CLIENT_APP,
    runtime_api_address="127.0.0.1:1",
    token="t0ken",
    insecure=True,
    root_certificates_path=None,
    runtime_dependency_install=False,
    parent_pid=os.getpid(),
    suppress_output=False,
    task_id=1,
)


def wait_for(path):
    until = time.monotonic() + 120
    while time.monotonic() < until and not path.exists():
        time.sleep(0.01)
    return path.read_text()


@pytest.fixture
def forks():
    return ForkExecutor(PollingClock())


def test_each_message_has_a_process_of_its_own_that_starts_at_once_and_ends(forks, tmp_path):
    def run_clientapp(address, token, insecure, *, parent_pid):
        (tmp_path / f"{token}.draft").write_text(f"{os.getpid()} {address} {insecure} {parent_pid}")
        (tmp_path / f"{token}.draft").rename(tmp_path / token)
        sys.exit(0)

    forks.run_clientapp = run_clientapp
    forks.launch(SPEC)  # a fork has the function above; a program that imports Flower again would not
    process, *rest = wait_for(tmp_path / "t0ken").split()
    assert int(process) != os.getpid()
    assert rest == ["127.0.0.1:1", "True", str(os.getpid())]
    until = time.monotonic() + 120
    while time.monotonic() < until:
        forks.reconcile()
        if not os.path.exists(f"/proc/{process}"):
            break
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)


def test_a_messenger_that_breaks_does_not_break_its_parent(forks, tmp_path):
    def run_clientapp(*args, **settings):
        (tmp_path / "began").write_text("x")
        raise RuntimeError("broken")

    forks.run_clientapp = run_clientapp
    forks.launch(SPEC)
    wait_for(tmp_path / "began")
    forks.reconcile()


def test_messengers_have_flower_and_ours_loaded_before_the_first_message(forks):
    assert {
        "flwr.supernode.runtime.run_clientapp",
        "flwr.clientapp",
        "fedlearn.protocol.client_app",
    } <= sys.modules.keys()
    assert "torch" not in forks.run_clientapp.__globals__


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals child processes that their parent has ended")
def test_a_messenger_ends_with_a_parent_that_is_killed(forks, tmp_path):
    def run_clientapp(*args, **settings):
        (tmp_path / "draft").write_text(str(os.getpid()))
        (tmp_path / "draft").rename(tmp_path / "messenger")
        time.sleep(600)

    forks.run_clientapp = run_clientapp
    parent = os.fork()
    if parent == 0:
        forks.launch(SPEC)
        time.sleep(600)
        os._exit(0)
    messenger = int(wait_for(tmp_path / "messenger"))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until = time.monotonic() + 60
    while time.monotonic() < until and is_running(messenger):
        time.sleep(0.01)
    ended = not is_running(messenger)
    with suppress(ProcessLookupError):
        os.kill(messenger, signal.SIGKILL)
    assert ended


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
