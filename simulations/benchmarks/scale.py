"""``python -m simulations.benchmarks.scale``: measure robust rules, EDEN and secure aggregation at large sizes.

Shapes: K updates, D parameters, N numbers in a vector.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import numpy as np

import strategies
from fedlearn import Layout, Updates
from fedlearn.algorithm import aggregate_updates
from fedlearn.callbacks.tables import print_table
from fedlearn.compression.codecs import eden
from fedlearn.core.command_line import DONE, command_parser, run_command
from fedlearn.errors import require
from fedlearn.privacy.secagg import in_memory
from fedlearn.privacy.secagg.server import ServerStage

ROWS = ("busy", "rules", "eden", "secagg")
RULES = ("fedmedian", "fedtrimmedavg", "rfa", "krum")
BUSY_UPDATES = 100  # updates for the row ``busy``
MIN_CLIENTS = 5  # two of them drop out, and more than half must stay


class Seconds(NamedTuple):
    """The time of a computation: on the clock, and of all processors."""

    wall: float
    processor: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    about = "Measure robust rules, EDEN and secure aggregation at large sizes, as medians of several runs."
    parser = command_parser("simulations.benchmarks.scale", about)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, help="rows of the table (default: all)")
    parser.add_argument("--updates", type=int, default=1000, help="updates of the rules (default 1000)")
    parser.add_argument("--parameters", type=int, default=1_000_000, help="parameters of the rules (default 1,000,000)")
    parser.add_argument("--numbers", type=int, default=25_000_000, help="numbers for EDEN (default 25,000,000)")
    parser.add_argument("--clients", type=int, default=300, help="clients of secure aggregation (default 300)")
    parser.add_argument("--length", type=int, default=100_000, help="numbers of each of them (default 100,000)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each computation (default 3)")
    return run_command(parser, measure, argv)


def measure(
    *, rows: Sequence[str], updates: int, parameters: int, numbers: int, clients: int, length: int, repeat: int
) -> int:
    """Print a row for each computation, and return the exit code."""
    require(clients >= MIN_CLIENTS, "--clients", clients, f"a number >= {MIN_CLIENTS}", "--clients 300")
    table: list[list[str]] = []
    if "busy" in rows:
        table += _busy_rows(_updates(BUSY_UPDATES, parameters), repeat)
    if "rules" in rows:
        block = _updates(updates, parameters)
        table += [_row(f"{rule}, {updates} x {parameters:,}", _rule(rule, block), repeat) for rule in RULES]
    if "eden" in rows:
        table += [_row(f"eden, {name}, {numbers:,}", run, repeat) for name, run in _eden(numbers).items()]
    if "secagg" in rows:
        table += [_row(f"secagg, {clients} x {length:,}", _secure_sum(clients, length), repeat)]
    print_table([["computation", "wall", "processor"], *table])
    return DONE


def seconds(run: Callable[[], object]) -> Seconds:
    """Return the time of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def _row(name: str, run: Callable[[], object], repeat: int) -> list[str]:
    times = [seconds(run) for _ in range(repeat)]
    walls, processors = zip(*times, strict=True)
    return [name, f"{median(walls):.2f} s", f"{median(processors):.2f} s"]


def _busy_rows(updates: Updates, repeat: int) -> list[list[str]]:
    """Measure krum on one thread, and on all cores while another process keeps a core busy, in turns."""
    krum, alone, busy = _rule("krum", updates), [], []
    for _ in range(repeat):
        with _single_thread():
            alone.append(seconds(krum))
        with _neighbor():
            busy.append(seconds(krum))
    name = f"krum, {len(updates)} x {updates.delta_KD.shape[1]:,}"
    walls = [median(each.wall for each in times) for times in (alone, busy)]
    processors = [median(each.processor for each in times) for times in (alone, busy)]
    rows = zip(("one thread", "all cores, busy neighbor"), walls, processors, strict=True)
    return [
        *([f"{name}, {how}", f"{wall:.2f} s", f"{processor:.2f} s"] for how, wall, processor in rows),
        [f"{name}, ratio", f"{walls[1] / walls[0]:.2f}", f"{processors[1] / processors[0]:.2f}"],
    ]


@contextmanager
def _single_thread() -> Iterator[None]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ |= {} if before is None else {"OMP_NUM_THREADS": before}


@contextmanager
def _neighbor() -> Iterator[None]:
    """Keep a core busy with another process."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)  # it starts to compute
        yield
    finally:
        process.kill()
        process.wait()


def _updates(num_updates: int, num_parameters: int) -> Updates:
    """Return random updates. Rows share random numbers, because drawing them takes longer than a rule."""
    numbers = np.random.default_rng(0).standard_normal(num_updates + num_parameters, dtype=np.float32)
    rows_KD = np.lib.stride_tricks.sliding_window_view(numbers, num_parameters)[:num_updates].copy()
    ones_K = np.ones(num_updates, np.int64)
    return Updates(clients_K=np.arange(num_updates), delta_KD=rows_KD, num_examples_K=ones_K, num_steps_K=ones_K)


def _rule(name: str, updates: Updates) -> Callable[[], object]:
    aggregator = getattr(strategies, name)().aggregate
    return lambda: aggregate_updates(aggregator, updates)


def _eden(num_numbers: int) -> dict[str, Callable[[], object]]:
    layout, codec = Layout.from_shapes([("w", (num_numbers,))]), eden().codec
    assert codec is not None
    vector_N = np.random.default_rng(0).standard_normal(num_numbers, dtype=np.float32)
    encode, decode = codec.encode, codec.decode
    payload = encode(vector_N, layout, np.random.default_rng(1))
    return {
        "encode": lambda: encode(vector_N, layout, np.random.default_rng(1)),
        "decode": lambda: decode(payload, layout, np.random.default_rng(1)),
    }


def _secure_sum(num_clients: int, length: int) -> Callable[[], object]:
    vectors_KN = np.random.default_rng(0).integers(0, 2**32, (num_clients, length), dtype=np.uint32)

    def run() -> None:
        clients, registered = in_memory.create_clients(range(num_clients))
        threshold = num_clients // 2 + 1
        session = in_memory.create_session(vectors_KN, range(num_clients), threshold=threshold, round=1, run=b"scale")
        dropouts = {ServerStage.MASK: {0}, ServerStage.CONFIRM: {1}}
        vectors = dict(enumerate(vectors_KN))
        total = in_memory.run_protocol(session, clients, registered, vectors, dropouts=dropouts)
        assert np.array_equal(total.sum, vectors_KN[list(total.clients)].sum(axis=0, dtype=np.uint32))

    return run


if __name__ == "__main__":
    sys.exit(main())
