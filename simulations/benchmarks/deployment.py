"""``python -m simulations.benchmarks.deployment``: measure the cost of coordinator and nodes at rest, and of a round.

All processes are on this machine and are started by their commands. Stub nodes are threads that connect, report and
poll as the messenger of a node does, and do no work.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx

from fedlearn.callbacks.tables import print_table
from fedlearn.flower.compat.fleet import FleetClient
from fedlearn.protocol.polling import poll_interval
from simulations.benchmarks.federation import family, fedlearn_command, run_benchmark, serve_coordinator, started
from simulations.benchmarks.large_messages import measure as measure_messages
from simulations.benchmarks.speed import DONE

DEFAULTS = {"stubs": 200, "seconds": 60, "rounds": 10, "mib": 64}
LIMITS = {
    "memory of a node at rest, MiB": 300.0,
    "memory of a node at rest after a run, MiB": 300.0,
    "processor of the coordinator, cores": 0.5,
    "a round without work, s": 1.0,
}
HEARTBEAT_S, MAX_POLL_S = 10.0, 6.0  # as in fedlearn.deploy.node_side.messenger
IDLE_TIMEOUT_S = 10  # the default is 15 minutes
POLICY = """\
scenarios: {diabetes: {partition: {one_of: [iid]}}}
strategies: {fedavg: {}}
max_rounds: 10000
"""
HELP = """\
python -m simulations.benchmarks.deployment [setting=value ...]

Measure a federation on this machine, over TLS.

  stubs=200      number of stub nodes that are connected and have no work
  seconds=60     time for which the processor time of the coordinator is measured
  rounds=10      rounds of the run with two nodes; the median of their times is shown
  mib=64         size of a model that travels to two nodes and back; see simulations.benchmarks.large_messages

Exit codes: 0 done, 2 bad setting.
"""


def memory_mib(process: int) -> float:
    """Return the proportional memory (PSS) of a process and of all its child processes, in MiB."""
    total = 0
    for member in family(process):
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{member}/smaps_rollup").read_text(encoding="ascii").splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def processor_s(process: int) -> float:
    """Return the processor time of a process and of all its child processes so far, in seconds."""
    ticks = 0
    for member in family(process):
        with suppress(OSError):
            fields = Path(f"/proc/{member}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Stubs:
    """Stub nodes in threads, which report and poll as a messenger without work, and connect anew after an error.

    Attributes:
        ended: event that ends them.
        num_polls, num_errors: number of polls that the coordinator answered, and of errors.
    """

    ended: threading.Event = field(default_factory=threading.Event)
    num_polls: int = 0
    num_errors: int = 0

    def run(self, keys: Path, address: str) -> None:
        """Run one stub node until the event."""
        certificates, key = (keys / "ca.crt").read_bytes(), (keys / "node.key").read_bytes()
        fleet, node_id = FleetClient(address, certificates=certificates, private_key=key), 0
        start = reported = time.monotonic()
        while not self.ended.wait(poll_interval(time.monotonic() - start, MAX_POLL_S, shortest_s=0.1)):
            try:
                if not node_id:
                    node_id, start = fleet.activate(1.5 * HEARTBEAT_S), time.monotonic()
                if time.monotonic() - reported >= HEARTBEAT_S:
                    fleet.heartbeat(node_id, 1.5 * HEARTBEAT_S)
                    reported = time.monotonic()
                fleet.pull(node_id)
                self.num_polls += 1
            except httpx.HTTPError:
                self.num_errors, node_id = self.num_errors + 1, 0


def measure_idle_coordinator(num_stubs: int, seconds: float) -> tuple[float, float, int]:
    """Return processor time per second, polls per second, and errors of a coordinator with nodes that have no work."""
    with TemporaryDirectory(prefix="fl-") as name, ExitStack() as stack:
        folder, names, stubs = Path(name), [f"n{number}" for number in range(num_stubs)], Stubs()
        process, address = serve_coordinator(folder, stack, names)
        threads = [threading.Thread(target=stubs.run, args=(folder / "keys/nodes" / node, address)) for node in names]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        time.sleep(2 * seconds)  # an idle node polls less and less often
        before, start, polls, errors = processor_s(process), time.monotonic(), stubs.num_polls, stubs.num_errors
        time.sleep(seconds)
        measured_s = time.monotonic() - start
        used, rate = (processor_s(process) - before) / measured_s, (stubs.num_polls - polls) / measured_s
        errors = stubs.num_errors - errors
        stubs.ended.set()
        for thread in threads:
            thread.join()
    return used, rate, errors


def measure_nodes(rounds: int) -> tuple[float, float, float, float]:
    """Return the memory of a node in MiB and the median time of a round in seconds.

    The three values of the memory are at rest before the run, directly after the run, and at rest after the run.
    """
    with TemporaryDirectory(prefix="fl-") as name, ExitStack() as stack:
        folder = Path(name)
        _, address = serve_coordinator(folder, stack, ["a", "b"])
        (folder / "policy.yaml").write_text(POLICY, encoding="utf-8")
        nodes = []
        for client, node in enumerate(("a", "b")):
            place = ("--coordinator", address, "--keys", f"keys/nodes/{node}", "--state", node)
            settings = ("--policy", "policy.yaml", "--client", str(client), "--idle-timeout", str(IDLE_TIMEOUT_S))
            command = ("fedlearn.deploy.node", *place, *settings)
            nodes.append(stack.enter_context(started(folder, f"node {node}", *command)))
        time.sleep(5.0)
        at_rest = max(memory_mib(node) for node in nodes)
        run = ("scenario=diabetes", "partition.num_clients=2", f"rounds={rounds}", "report=false")
        submit = ("fedlearn.deploy.submit", "--coordinator", address, "--keys", "keys/operator")
        fedlearn_command(folder, *submit, *run, "hydra.run.dir=run")
        lines = (folder / "outputs/run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        times = [float(json.loads(line)["seconds"]) for line in lines[1:]]
        after_run = max(memory_mib(node) for node in nodes)
        time.sleep(3 * IDLE_TIMEOUT_S)
        return at_rest, after_run, max(memory_mib(node) for node in nodes), median(times)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and return the exit code."""
    return run_benchmark(argv, DEFAULTS, HELP, measure_and_print)


def measure_and_print(settings: Mapping[str, int]) -> int:
    """Measure, print a table, and return the exit code."""
    before, after_run, after, round_s = measure_nodes(settings["rounds"])
    cores, polls, errors = measure_idle_coordinator(settings["stubs"], settings["seconds"])
    measured = dict(zip(LIMITS, (before, after, cores, round_s), strict=True))
    rows = [[name, f"{value:.2f}", f"{LIMITS[name]:g}"] for name, value in measured.items()]
    last = ["memory of a node directly after a run, MiB", f"{after_run:.2f}", ""]
    stubs = [["polls of the stub nodes per second", f"{polls:.1f}", ""], ["errors of the stub nodes", str(errors), ""]]
    meter = measure_messages({"mib": settings["mib"], "rounds": 1, "cut_mib": 0, "min_free_gib": 2})[0]
    largest = max(memory for _, memory in meter.peaks.values())
    sizes = f"while a model of {settings['mib']} MiB travels, MiB"
    large = [[f"memory of the largest process {sizes}", f"{largest:.0f}", ""]]
    large += [[f"memory of all processes {sizes}", f"{meter.largest_sum:.0f}", ""]]
    print_table([["cost", "measured", "limit"], *rows, last, *stubs, *large])
    return DONE


if __name__ == "__main__":
    sys.exit(main())
