"""``python -m simulations.benchmarks.large_messages``: send a large model between coordinator and nodes.

All processes are on this machine and are started by their commands. The trainers do not train: an update is the model
times a small number. So the memory is the memory of the messages. A relay stands between the nodes and the coordinator.
It counts bytes, and cuts all connections at regular counts.

Shapes: D parameters.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedlearn import Examples, FederatedData, Layout, LocalSettings, Scenario
from fedlearn.callbacks.tables import print_table
from fedlearn.core.records import ClientWork, MetricSum, Request, Updates
from fedlearn.errors import FedlearnError
from fedlearn.testing import LinearTrainer
from simulations.benchmarks.federation import family, fedlearn_command, run_benchmark, serve_coordinator, started
from simulations.benchmarks.speed import DONE

DEFAULTS = {"mib": 64, "rounds": 2, "cut_mib": 0, "min_free_gib": 3}
PARTS = {  # kind of a process -> part of its command line
    "run": b"coordinator_side.superexec\0run",
    "SuperLink": b"coordinator_side.superlink",
    "messenger": b"node_side.messenger",
    "trainer": b"fedlearn.deploy.trainer",
}
SAMPLE_S = 0.1
MODULE = "large_model"  # module of a user, which the operators allow
BUILDER = f"{MODULE}.large"
USER_CODE = f"""\
from {__spec__.name} import large_scenario

def large(*, num_parameters: int = 1000):
    return large_scenario(num_parameters)
"""
POLICY = f"""\
scenarios: {{large: {{num_parameters: [1, 1000000000]}}}}
strategies: {{fedavg: {{}}}}
builders: {{scenario: {{large: {BUILDER}}}}}
reveal: {{metrics: false}} # so no evaluation sends the model again
"""
OPTION = f"_target_: {BUILDER}\nnum_parameters: 1000\n"
HELP = """\
python -m simulations.benchmarks.large_messages [setting=value ...]

Send a model to two nodes and back, without training.

  mib=64           size of the model in MiB
  rounds=2         rounds of the run
  cut_mib=0        MiB after which all connections of the nodes are cut, again and again; 0: no cut
  min_free_gib=3   the run is stopped if the machine has less available memory

Exit codes: 0 done, 1 stopped for lack of memory, 2 bad setting.
"""


class StubTrainer(LinearTrainer):
    """Return the model times a small number as the update of each client, without training.

    Args:
        num_parameters: number of parameters, >= 1.
    """

    def __init__(self, num_parameters: int) -> None:
        super().__init__(1)
        self.layout = Layout.from_shapes([("weight", (num_parameters,))])

    def init(self, seed: int) -> np.ndarray:
        """Return random parameters; equal parts of a message would be sent once."""
        return np.random.default_rng(seed).random(self.layout.num_parameters, np.float32)

    def fit(self, request: Request, rule: Any, work: Sequence[ClientWork]) -> Updates:
        """Return the updates without training."""
        factors_K = np.array([-1e-3 * (1 + each.client) for each in work], np.float32)
        count_K = np.ones(len(work), np.int64)
        return Updates(
            clients_K=np.array([each.client for each in work]),
            delta_KD=np.multiply(np.asarray(request.params_D), factors_K[:, None]),
            num_examples_K=count_K,
            num_steps_K=count_K,
            metrics={"loss": MetricSum(count_K.astype(np.float64), count_K)},
        )

    def predict(self, params_D: Any, x: np.ndarray) -> np.ndarray:
        """Return the output zero for each example."""
        return np.zeros((len(x), 1), np.float32)

    def check_local(self, local: LocalSettings) -> None:
        """Check nothing, because nothing is trained."""


def large_scenario(num_parameters: int) -> Scenario:
    """Return a scenario of two clients with one example, and a model of a chosen size."""
    example = Examples(np.zeros((1, 1), np.float32), np.zeros(1, np.int64))
    data = FederatedData(
        task="binary", num_classes=2, clients=range(2), train=lambda client: example, test=lambda client: example
    )
    return Scenario(name="large", data=data, trainer=StubTrainer(num_parameters), model=f"vector {num_parameters}")


def memory_mib(process: int) -> tuple[float, float]:
    """Return the proportional memory (PSS) of a process, and its part that is in no file, in MiB."""
    text = ""
    with suppress(OSError):
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    found = {name: int(kib) / 1024 for name, kib in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    return found.get("Pss", 0.0), found.get("Pss_Anon", 0.0) + found.get("Pss_Shmem", 0.0)


def available_gib() -> float:
    """Return the available memory of this machine in GiB."""
    (kib,) = re.findall(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    return int(kib) / 2**20


@dataclass
class Meter(threading.Thread):
    """Measure the memory of all child processes of this process until `ended` is set.

    Attributes:
        peaks: kind of a process -> largest PSS of such a process, and largest part that is in no file, in MiB.
        largest_sum: largest sum of these parts over all processes at a time, in MiB.
        is_short: True if the machine had less available memory than allowed. All processes are then ended.
    """

    min_free_gib: float
    peaks: dict[str, tuple[float, float]] = field(default_factory=dict)
    largest_sum: float = 0.0
    is_short: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def run(self) -> None:
        """Measure until `ended` is set, or the memory is short."""
        while not self.ended.wait(SAMPLE_S):
            processes, total = family(os.getpid())[1:], 0.0
            for process in processes:
                pss, anonymous = memory_mib(process)
                total += anonymous
                if kind := _kind_of(process):
                    before = self.peaks.get(kind, (0.0, 0.0))
                    self.peaks[kind] = (max(before[0], pss), max(before[1], anonymous))
            self.largest_sum = max(self.largest_sum, total)
            if available_gib() < self.min_free_gib and not self.is_short:
                self.is_short = True
                for process in processes:
                    with suppress(ProcessLookupError):
                        os.kill(process, 9)

    def __hash__(self) -> int:
        return id(self)


def _kind_of(process: int) -> str:
    with suppress(OSError):
        words = Path(f"/proc/{process}/cmdline").read_bytes()
        return next((kind for kind, part in PARTS.items() if part in words), "")
    return ""


@dataclass
class Relay:
    """Pass connections on to a server, count their bytes, and cut all of them at regular counts.

    Args:
        address: address of the server, ``host:port``.
        cut_bytes: number of bytes between two cuts; 0: no cut.

    Attributes:
        num_bytes: number of bytes so far, in both directions.
        num_cuts: number of cuts so far.
    """

    address: str
    cut_bytes: int
    num_bytes: int = 0
    num_cuts: int = 0
    _pairs: dict[socket.socket, socket.socket] = field(default_factory=dict)

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Yield the address of the relay."""
        with socket.create_server(("127.0.0.1", 0)) as server, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            ended = threading.Event()
            thread = threading.Thread(target=self._serve, args=(server, selector, ended), daemon=True)
            thread.start()
            yield f"localhost:{server.getsockname()[1]}"
            ended.set()
            thread.join()
            self._close(selector, *self._pairs)

    def _serve(self, server: socket.socket, selector: Any, ended: threading.Event) -> None:
        while not ended.is_set():
            for key, _ in selector.select(0.2):
                if key.fileobj is server:
                    self._connect(server, selector)
                elif key.fileobj in self._pairs:
                    self._pass_on(key.fileobj, selector)

    def _connect(self, server: socket.socket, selector: Any) -> None:
        client, _ = server.accept()
        host, _, port = self.address.rpartition(":")
        with suppress(OSError):
            other = socket.create_connection((host, int(port)))
            self._pairs |= {client: other, other: client}
            for end in (client, other):
                selector.register(end, selectors.EVENT_READ)
            return
        client.close()

    def _pass_on(self, end: socket.socket, selector: Any) -> None:
        data = b""
        with suppress(OSError):
            data = end.recv(2**20)
            self._pairs[end].sendall(data)
        if not data:
            return self._close(selector, end, self._pairs[end])
        before, self.num_bytes = self.num_bytes, self.num_bytes + len(data)
        if self.cut_bytes and before // self.cut_bytes != self.num_bytes // self.cut_bytes:
            self.num_cuts += 1
            self._close(selector, *self._pairs)

    def _close(self, selector: Any, *ends: socket.socket) -> None:
        for end in ends:
            if self._pairs.pop(end, None) is not None:
                selector.unregister(end)
                end.close()


def measure(settings: Mapping[str, int]) -> tuple[Meter, Relay, list[float], str]:
    """Run a federation of two nodes; return memory, transfers, seconds of each round, and the output if it fails."""
    with TemporaryDirectory(prefix="fl-") as name, ExitStack() as stack:
        folder, meter = Path(name), Meter(settings["min_free_gib"])
        (folder / "policy.yaml").write_text(POLICY, encoding="utf-8")
        (folder / f"{MODULE}.py").write_text(USER_CODE, encoding="utf-8")
        (folder / "builders.yaml").write_text(f"scenario: {{large: {BUILDER}}}\n", encoding="utf-8")
        option = folder / "conf/scenario/large.yaml"
        option.parent.mkdir(parents=True)
        option.write_text(OPTION, encoding="utf-8")
        _, address = serve_coordinator(folder, stack, ["a", "b"], "--builders", "builders.yaml")
        relay = Relay(address, settings["cut_mib"] * 2**20)
        relayed = stack.enter_context(relay.listening())
        for client, node in enumerate(("a", "b")):
            place = ("--coordinator", relayed, "--keys", f"keys/nodes/{node}", "--state", node)
            command = ("fedlearn.deploy.node", *place, "--policy", "policy.yaml", "--client", str(client))
            stack.enter_context(started(folder, f"node {node}", *command))
        run = ("scenario=large", f"scenario.num_parameters={settings['mib'] * 2**18}", f"rounds={settings['rounds']}")
        waits = ("evaluate_every=1000", "report=false", f"allow_targets=[{MODULE}]", "engine.deadline=3000")
        submit = ("--coordinator", address, "--keys", "keys/operator", "--config-dir", "conf")
        meter.start()
        try:
            fedlearn_command(folder, "fedlearn.deploy.submit", *submit, *run, *waits, "hydra.run.dir=run")
        except FedlearnError as error:
            logs = (path.read_text(errors="replace")[-2000:] for path in folder.glob("node*.log"))
            return meter, relay, [], "\n".join([str(error), *logs])
        finally:
            meter.ended.set()
            meter.join()
        lines = (folder / "outputs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return meter, relay, [float(json.loads(line)["seconds"]) for line in lines], ""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and return the exit code."""
    return run_benchmark(argv, DEFAULTS, HELP, measure_and_print, may_be_zero=("cut_mib",))


def measure_and_print(settings: Mapping[str, int]) -> int:
    """Measure, print a table, and return the exit code: 1 if the run failed."""
    meter, relay, seconds, problem = measure(settings)
    _print(settings, meter, relay, seconds)
    sys.stdout.write(f"{problem}\n" if problem else "")
    return 1 if problem else DONE


def _print(settings: Mapping[str, int], meter: Meter, relay: Relay, seconds: Sequence[float]) -> None:
    size, rows = settings["mib"], []
    for kind, (pss, anonymous) in sorted(meter.peaks.items()):
        rows.append([f"{kind}, largest", f"{pss:.0f}", f"{anonymous:.0f}", f"{anonymous / size:.2f}"])
    rows.append(["all processes at a time", "", f"{meter.largest_sum:.0f}", f"{meter.largest_sum / size:.2f}"])
    print_table([[f"memory, MiB, model of {size} MiB", "PSS", "in no file", "per model"], *rows])
    passed, times = relay.num_bytes / 2**20, ", ".join(f"{value:.1f}" for value in seconds)
    sys.stdout.write(f"{passed:.0f} MiB through the links of the nodes, {passed / size:.2f} per model; ")
    sys.stdout.write(f"{relay.num_cuts} cuts; rounds of {times} s\n")


if __name__ == "__main__":
    sys.exit(main())
