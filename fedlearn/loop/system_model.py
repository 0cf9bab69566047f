"""The system model: speed and availability of clients, and deadlines of the server, on a virtual clock.

All draws follow from the seed of the run, the client and the number of the request (see `fedlearn.core.random`). So a
run repeats, and resumes, to the same virtual second. Times are virtual seconds, sizes are bytes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, inf
from pathlib import Path
from typing import Any, NamedTuple

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId
from fedlearn.errors import DataError, is_count, is_number, require

NOT_CONNECTED = "no node with this client is connected"  # the words of the engine for real clients
COLUMNS = ("client", "seconds_per_step", "download", "upload")
WINDOW = ("from", "until")


class Device(NamedTuple):
    """What a client computes and sends with: seconds a local step, and bytes a second (``inf``: no time at all)."""

    seconds_per_step: float
    download: float = inf
    upload: float = inf


class Workload(NamedTuple):
    """What an order costs a client: local steps, and bytes down and up."""

    num_steps: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


class Arrival(NamedTuple):
    """What comes of an order.

    Attributes:
        seconds: from the order to the answer, or to when the server knows that there will be none.
        failure_reason: why there is none; empty for an answer.
    """

    seconds: float
    failure_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SystemModel:
    """Describe speed, network and availability of clients, as the server sees them.

    Args:
        name: of the model, for the header.
        device: ``(seed, client, round) -> Device``; None: there is no model, and every order takes one second.
        window: ``(client, clock) -> (begins, ends)``, when a client that is asked at ``clock`` is there, now or next;
            ``inf`` for never.
        available: chance that a client is there when it is asked, in (0, 1].
        dropout: chance that one that began never answers, in [0, 1).
        deadline: seconds that an order is waited for, > 0; None: for ever.
        min_completed: number of updates that close a round of a synchronous strategy, >= 1; the other clients of the
            cohort are spare. None waits for all.

    Raises:
        SettingError: a setting is out of range.
    """

    name: str = "none"
    device: Callable[[int, ClientId, int], Device] | None = None
    window: Callable[[ClientId, float], tuple[float, float]] = lambda client, clock: (clock, inf)
    available: float = 1.0
    dropout: float = 0.0
    deadline: float | None = None
    min_completed: int | None = None

    def __post_init__(self) -> None:
        there = is_number(self.available, at_least=0) and 0 < self.available <= 1
        require(there, "available", self.available, "a chance in (0, 1]", "available=0.9")
        out = is_number(self.dropout, at_least=0, below=1)
        require(out, "dropout", self.dropout, "a chance in [0, 1)", "dropout=0.1")
        timely = self.deadline is None or _is_positive(self.deadline)
        require(timely, "deadline", self.deadline, "null, or a number of seconds > 0", "deadline=600")
        counted = self.min_completed is None or is_count(self.min_completed)
        require(counted, "min_completed", self.min_completed, "null, or a whole number >= 1", "min_completed=10")

    def arrival(self, seed: int, client: ClientId, round: int, workload: Workload, *, clock: float = 0.0) -> Arrival:
        """What comes of an order that a client gets at some time.

        ``seconds = wait for its window + bytes_down / download + steps x seconds_per_step + bytes_up / upload``

        A dropout is noticed when the answer would have been there, a client that leaves when it leaves, and all that
        takes longer than the deadline at the deadline.
        """
        if self.device is None:
            return Arrival(1.0)
        present, stays = generator(seed, Purpose.SYSTEM, round=round, client=client).random(2)
        device, (begins, ends) = self.device(seed, client, round), self.window(client, clock)
        if present >= self.available or begins == inf:
            return Arrival(0.0, NOT_CONNECTED)
        lasts = (
            workload.bytes_down / device.download
            + workload.num_steps * device.seconds_per_step
            + workload.bytes_up / device.upload
        )
        fate = Arrival(begins - clock + lasts, "it dropped out before it was done" if stays < self.dropout else "")
        if begins + lasts > ends:
            fate = Arrival(ends - clock, f"it left after {ends - clock:g} s, before it was done")
        if self.deadline is not None and fate.seconds > self.deadline:
            return Arrival(self.deadline, f"no response within {self.deadline:g} s")
        return fate


def none() -> SystemModel:
    """No model: simulated rounds have no clock, and real clients are as fast as they are.

    Under an asynchronous strategy, which needs a clock, each order to a simulated client takes one virtual second.
    """
    return SystemModel()


def constant(
    *,
    seconds_per_step: float = 0.1,
    download: float | None = 1e6,
    upload: float | None = 2.5e5,
    available: float = 1.0,
    dropout: float = 0.0,
    deadline: float | None = None,
    min_completed: int | None = None,
) -> SystemModel:
    """Return a model of equally fast clients, which differ in local steps and bytes only.

    Args:
        seconds_per_step: of local training, >= 0.
        download: bytes a second, > 0; None takes no time.
        upload: likewise.
        available: see `SystemModel`.
        dropout: likewise.
        deadline: likewise.
        min_completed: likewise.
    """
    device = _device(seconds_per_step, download, upload)
    return SystemModel(
        name="constant",
        device=lambda seed, client, round: device,
        available=available,
        dropout=dropout,
        deadline=deadline,
        min_completed=min_completed,
    )


def lognormal(
    *,
    seconds_per_step: float = 0.1,
    download: float | None = 1e6,
    upload: float | None = 2.5e5,
    sigma: float = 1.0,
    jitter: float = 0.1,
    available: float = 1.0,
    dropout: float = 0.0,
    deadline: float | None = None,
    min_completed: int | None = None,
) -> SystemModel:
    """Return a model of clients whose speed and network vary by lognormal factors, so that some are stragglers.

    ``seconds_per_step_k,t = seconds_per_step exp(sigma a_k + jitter e_k,t)``, and bandwidths likewise (both of a
    client by one factor), with standard normal ``a_k`` for the run and ``e_k,t`` for each order.

    Args:
        seconds_per_step: the median client's, >= 0.
        download: the median client's bytes a second, > 0; None takes no time.
        upload: likewise.
        sigma: how far clients differ, >= 0; with 1 one in six is more than 2.7 times slower than the median.
        jitter: how far a client's orders differ, >= 0.
        available: see `SystemModel`.
        dropout: likewise.
        deadline: likewise.
        min_completed: likewise.
    """
    median = _device(seconds_per_step, download, upload)
    for name, spread in (("sigma", sigma), ("jitter", jitter)):
        require(is_number(spread, at_least=0, below=100), name, spread, "a number >= 0", f"{name}=0.5")

    def device(seed: int, client: ClientId, round: int) -> Device:
        own = generator(seed, Purpose.DEVICE, client=client).normal(size=2)
        now = generator(seed, Purpose.DEVICE, client=client, round=round).normal(size=2)
        slower, narrower = (exp(sigma * a + jitter * e) for a, e in zip(own.tolist(), now.tolist(), strict=True))
        return Device(median.seconds_per_step * slower, median.download / narrower, median.upload / narrower)

    return SystemModel(
        name="lognormal",
        device=device,
        available=available,
        dropout=dropout,
        deadline=deadline,
        min_completed=min_completed,
    )


def trace(
    *,
    path: str | None = None,
    period: float | None = 86400.0,
    dropout: float = 0.0,
    deadline: float | None = None,
    min_completed: int | None = None,
) -> SystemModel:
    """Return a model of measured devices, from a CSV file with a header line.

    Columns: ``client`` (a number), ``seconds_per_step``, ``download`` and ``upload`` (bytes a second; empty for no
    time), and if wanted ``from`` and ``until``: when the device is there. A device with several such windows has
    several rows, of which the first tells its speed. Client k is device number k of the file, counted round and round,
    so that a short trace serves a large population.

    Args:
        path: of the file.
        period: seconds after which windows repeat, > 0; None: they do not.
        dropout: see `SystemModel`.
        deadline: likewise.
        min_completed: likewise.

    Raises:
        SettingError: no path is given, or a number is out of range.
        DataError: the file cannot be read, or does not say what it must.
    """
    require(bool(path), "path", path, "a CSV file", "system.path=devices.csv")
    require(period is None or _is_positive(period), "period", period, "null, or seconds > 0", "period=86400")
    devices = _read(Path(str(path)))

    def window(client: ClientId, clock: float) -> tuple[float, float]:
        windows = devices[client % len(devices)][1]
        if not windows:
            return clock, inf
        first = 0.0 if period is None else clock - clock % period
        for start, (begins, ends) in product((first,) if period is None else (first, first + period), windows):
            if start + ends > clock:
                return max(clock, start + begins), start + ends
        return inf, inf

    return SystemModel(
        name="trace",
        device=lambda seed, client, round: devices[client % len(devices)][0],
        window=window,
        dropout=dropout,
        deadline=deadline,
        min_completed=min_completed,
    )


def _device(seconds_per_step: float, download: float | None, upload: float | None) -> Device:
    ok = is_number(seconds_per_step, at_least=0, below=inf)
    require(ok, "seconds_per_step", seconds_per_step, "a number of seconds >= 0", "seconds_per_step=0.1")
    for name, rate in (("download", download), ("upload", upload)):
        require(rate is None or _is_positive(rate), name, rate, "null, or bytes a second > 0", f"{name}=1e6")
    return Device(seconds_per_step, *(inf if rate is None else float(rate) for rate in (download, upload)))


def _is_positive(number: object) -> bool:
    return is_number(number, at_least=0, below=inf) and number != 0


def _read(path: Path) -> Sequence[tuple[Device, list[tuple[float, float]]]]:
    """Device and windows of each client of a trace, by its number there."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found: dict[int, tuple[Device, list[tuple[float, float]]]] = {}
        for row in rows:
            client = int(row["client"])
            _, windows = found.setdefault(client, (_measured(row), []))
            if row.get("until"):
                windows.append(_windowed(row))
    except (OSError, KeyError, TypeError, ValueError) as error:
        fix = f"a CSV file with the columns {', '.join(COLUMNS)} and, if wanted, {', '.join(WINDOW)}"
        raise DataError(
            f"the trace {path} cannot be read: {type(error).__name__}: {error}\n  try       {fix}"
        ) from error
    if not found:
        raise DataError(f"the trace {path} names no device\n  try       a row for each of them")
    return [(device, sorted(windows)) for _, (device, windows) in sorted(found.items())]


def _measured(row: Mapping[str, Any]) -> Device:
    rates = [float(row[name]) if row[name] else None for name in ("download", "upload")]
    return _device(float(row["seconds_per_step"]), *rates)


def _windowed(row: Mapping[str, Any]) -> tuple[float, float]:
    begins, ends = float(row["from"]), float(row["until"])
    if not 0 <= begins < ends < inf:
        raise ValueError(f"from {begins:g} until {ends:g}, expected 0 <= from < until")
    return begins, ends


def refuse_early_end(strategy: Strategy, min_completed: int | None, setting: str) -> None:
    """Refuse to close rounds before all have answered where a privacy claim rests on the draw.

    Raises:
        SettingError: names the setting by which they would close.
    """
    expected = "null: a privacy claim rests on who was drawn, not on who was first"
    require(
        min_completed is None or strategy.privacy_guarantee is None, setting, min_completed, expected, f"{setting}=null"
    )
