"""``python -m simulations.benchmarks.secagg``: measure processor time and traffic of a round of secure aggregation.

Shapes: D numbers in a vector.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from fedlearn.callbacks.tables import print_table
from fedlearn.errors import FedlearnError, require
from fedlearn.privacy.secagg import in_memory
from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.messages import Session
from fedlearn.privacy.secagg.server import Server, ServerStage
from simulations.benchmarks.speed import BAD_SETTING, DONE, machine

DEFAULTS = {"clients": 100, "length": 1_000_000, "dropouts": 5}
HELP = """\
python -m simulations.benchmarks.secagg [setting=value ...]

Measure a round of secure aggregation: the whole protocol, in one process, one client after another.

  clients=100          size of the cohort; the threshold is just over half of it
  length=1000000       length of a vector of 32-bit numbers
  dropouts=5           clients that drop out after sharing their keys, before they send masked vectors;
                       the same number drops out after sending them, before the sum is unmasked

Exit codes: 0 done, 2 bad setting.
"""
Column = defaultdict[ServerStage, list[float]]


@dataclass
class Costs:
    """Costs of a round.

    Attributes:
        client: processor seconds of each client, by stage.
        server: processor seconds of the server, by stage.
        up: bytes that each client sends, by stage.
        down: bytes that each client receives, by stage.
    """

    client: Column = field(default_factory=lambda: defaultdict(list))
    server: Column = field(default_factory=lambda: defaultdict(list))
    up: Column = field(default_factory=lambda: defaultdict(list))
    down: Column = field(default_factory=lambda: defaultdict(list))


@dataclass
class Rehearsal:
    """Run one round with clients in this process, and measure its costs.

    Args:
        session: session of the round.
        clients: clients by number.
        server: server of the protocol.
        silent: clients that do not respond, by stage.
        costs: costs so far.
    """

    session: Session
    clients: Mapping[int, Client]
    server: Server
    silent: Mapping[ServerStage, set[int]]
    costs: Costs = field(default_factory=Costs)

    def run(self) -> Costs:
        """Run all stages, check the sum, and return the costs.

        Raises:
            AssertionError: The sum is wrong.
        """
        requests = self.server.start()
        while requests:
            requests = self._run_stage(requests)
        assert self.server.total is not None
        expected_D = np.zeros(self.session.length, self.session.dtype)
        for client in self.server.survivors:
            expected_D += self._vector(client)
        if not np.array_equal(self.server.total, expected_D):
            raise AssertionError("the unmasked sum differs from the sum of the vectors")
        return self.costs

    def _run_stage(self, requests: Mapping[int, bytes]) -> dict[int, bytes]:
        stage, costs = self.server.stage, self.costs
        for client in sorted(set(requests) - self.silent.get(stage, set())):
            vector = self._vector(client) if stage == ServerStage.MASK else None
            with _timed(costs.client[stage]):
                response = self.clients[client].respond(requests[client], lambda session, vector=vector: vector)  # type: ignore[misc]
            costs.down[stage].append(len(requests[client]))
            costs.up[stage].append(len(response))
            with _timed(costs.server[stage]):
                self.server.add(client, response)
        with _timed(costs.server[stage]):
            return self.server.advance()

    def _vector(self, client: int) -> np.ndarray:
        first, factor = np.uint32(7919 * client), np.uint32(2 * client + 1)
        return (np.arange(self.session.length, dtype=np.uint32) + first) * factor


def rehearse(*, clients: int, length: int, dropouts: int) -> Costs:
    """Run one round and return its costs.

    Args:
        clients: size of the cohort, >= 2.
        length: length of a vector, >= 1.
        dropouts: number of clients that drop out before they send a masked vector, and again before unmasking, >= 0.

    Raises:
        SecAggAborted: Fewer clients remain than the threshold (`fedlearn.privacy.secagg.errors`).
    """
    participants, registered = in_memory.create_clients(range(clients))
    empty = np.zeros((1, length), np.uint32)
    session = in_memory.create_session(empty, range(clients), threshold=clients // 2 + 1, round=1, run=b"benchmark")
    silent = {ServerStage.MASK: set(range(dropouts)), ServerStage.OPEN: set(range(dropouts, 2 * dropouts))}
    return Rehearsal(session, participants, Server(session, registered), silent).run()


def table_rows(costs: Costs) -> Iterator[tuple[str, ...]]:
    """Yield a row per stage: time of the median client and of the slowest one, time of the server, bytes."""
    yield "stage", "client, median", "client, worst", "server", "up", "down"
    for stage, seconds in costs.client.items():
        times = f"{1e3 * median(seconds):.1f} ms", f"{1e3 * max(seconds):.1f} ms", f"{sum(costs.server[stage]):.2f} s"
        yield stage.name.lower(), *times, f"{max(costs.up[stage]):,} B", f"{max(costs.down[stage]):,} B"
    total = [sum(median(costs.client[stage]) for stage in costs.client), sum(map(sum, costs.server.values()))]
    ups, downs = (sum(max(sizes) for sizes in each.values()) for each in (costs.up, costs.down))
    yield "all", f"{1e3 * total[0]:.1f} ms", "", f"{total[1]:.2f} s", f"{ups:,.0f} B", f"{downs:,.0f} B"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure a round, print the table, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if {"--help", "-h", "help"} & set(argv):
        sys.stdout.write(HELP)
        return DONE
    try:
        settings = _read(argv)
        costs = rehearse(**settings)
    except FedlearnError as error:
        sys.stderr.write(f"{error.on_command_line()}\n")
        return BAD_SETTING
    sys.stdout.write(f"{machine()}\n{', '.join(f'{name}={value}' for name, value in settings.items())}\n")
    print_table([*table_rows(costs)])
    return DONE


def _read(overrides: Sequence[str]) -> dict[str, int]:
    settings = dict(DEFAULTS)
    for override in overrides:
        name, _, value = override.partition("=")
        require(name in DEFAULTS, name, value or "given", f"one of {', '.join(DEFAULTS)}", "clients=100")
        least = {"clients": 2, "length": 1, "dropouts": 0}[name]
        valid = value.isdigit() and int(value) >= least
        require(valid, name, value, f"a whole number >= {least}", f"{name}={DEFAULTS[name]}")
        settings[name] = int(value)
    num_clients, num_dropouts = settings["clients"], settings["dropouts"]
    most = (num_clients - 1) // 4  # twice this number drops out, and the threshold must remain
    expected = f"at most {most} with clients={num_clients}"
    require(num_dropouts <= most, "dropouts", num_dropouts, expected, f"dropouts={most}")
    return settings


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    began = time.process_time()
    yield
    seconds.append(time.process_time() - began)


if __name__ == "__main__":
    sys.exit(main())
