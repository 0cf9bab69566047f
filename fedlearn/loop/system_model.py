"""Model the speed and availability of clients, and the deadlines of the server, on a virtual clock.

All draws depend only on the seed of the run, the client and the round of the request (see `fedlearn.core.random`). So a
repeated or resumed run has the same virtual times. Times are virtual seconds, and sizes are bytes.
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

NOT_CONNECTED = (
    "no node with this client is connected"  # the reason that `fedlearn.protocol.exchange` gives for real clients
)
COLUMNS = ("client", "seconds_per_step", "download", "upload")
WINDOW = ("from", "until")


class Device(NamedTuple):
    """Hold the speed of a client.

    Attributes:
        seconds_per_step: duration of one local step, in seconds, >= 0.
        download: bytes per second to the client, > 0; ``inf`` (default) takes no time.
        upload: bytes per second from the client, > 0; ``inf`` (default) takes no time.
    """

    seconds_per_step: float
    download: float = inf
    upload: float = inf


class Workload(NamedTuple):
    """Hold the work of a client for one request.

    Attributes:
        num_steps: number of local steps.
        bytes_down: size of the request, in bytes.
        bytes_up: size of the response, in bytes.
    """

    num_steps: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


class Arrival(NamedTuple):
    """Hold the outcome of a request to one client.

    Attributes:
        seconds: time from the request to the response, or to the moment when the server records a failure.
        failure_reason: reason of the failure; empty for a response.
    """

    seconds: float
    failure_reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SystemModel:
    """Describe speed, network and availability of clients, as the server sees them.

    Args:
        name: name of the model, for the header; default ``none``.
        device: ``(seed, client, round) -> Device``. With None (default), every request takes one second.
        window: ``(client, clock) -> (begins, ends)``, the current or next time window in which the client is
            connected; ``inf`` for never. By default, clients are always connected.
        available: probability that a client is connected when the server sends a request, in (0, 1]; default 1.
        dropout: probability that a client drops out during its work, in [0, 1); default 0.
        deadline: seconds after which a request counts as failed, > 0; default None, no deadline.
        min_completed: number of updates that close a round of a synchronous strategy, >= 1. The round does not need
            the other clients of the cohort. None (default) waits for all.

    Raises:
        SettingError: A setting is out of range.
    """

    name: str = "none"
    device: Callable[[int, ClientId, int], Device] | None = None
    window: Callable[[ClientId, float], tuple[float, float]] = lambda client, clock: (clock, inf)
    available: float = 1.0
    dropout: float = 0.0
    deadline: float | None = None
    min_completed: int | None = None

    def __post_init__(self) -> None:
        ok = is_number(self.available, at_least=0) and 0 < self.available <= 1
        require(ok, "available", self.available, "a probability in (0, 1]", "available=0.9")
        ok = is_number(self.dropout, at_least=0, below=1)
        require(ok, "dropout", self.dropout, "a probability in [0, 1)", "dropout=0.1")
        ok = self.deadline is None or _is_positive(self.deadline)
        require(ok, "deadline", self.deadline, "null, or a number of seconds > 0", "deadline=600")
        ok = self.min_completed is None or is_count(self.min_completed)
        require(ok, "min_completed", self.min_completed, "null, or a whole number >= 1", "min_completed=10")

    def arrival(self, seed: int, client: ClientId, round: int, workload: Workload, *, clock: float = 0.0) -> Arrival:
        """Return the outcome of a request that the server sends at time ``clock``.

        ``seconds = wait for its window + bytes_down / download + steps x seconds_per_step + bytes_up / upload``

        The server notices a dropout at the time of the missing response. It notices a client that leaves at the end of
        its window. It notices everything else at the deadline, at the latest.

        Args:
            seed: seed of the run.
            client: id of the client.
            round: round of the request.
            workload: local steps and bytes.
            clock: time of the request, in virtual seconds; default 0.
        """
        if self.device is None:
            return Arrival(1.0)
        availability, dropout = generator(seed, Purpose.SYSTEM, round=round, client=client).random(2)
        device, (begins, ends) = self.device(seed, client, round), self.window(client, clock)
        if availability >= self.available or begins == inf:
            return Arrival(0.0, NOT_CONNECTED)
        duration = (
            workload.bytes_down / device.download
            + workload.num_steps * device.seconds_per_step
            + workload.bytes_up / device.upload
        )
        reason = "the client dropped out during its work" if dropout < self.dropout else ""
        arrival = Arrival(begins - clock + duration, reason)
        if begins + duration > ends:
            arrival = Arrival(ends - clock, f"the client left after {ends - clock:g} s, before the end of its work")
        if self.deadline is not None and arrival.seconds > self.deadline:
            return Arrival(self.deadline, f"no response within {self.deadline:g} s")
        return arrival


def none() -> SystemModel:
    """Return an empty model: simulated rounds have no clock, and real clients have their own speed.

    An asynchronous strategy needs a clock. Each request to a simulated client then takes one virtual second.
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
    """Return a model of clients with equal speed, which differ in local steps and bytes only.

    Args:
        seconds_per_step: duration of one local step, in seconds, >= 0; default 0.1.
        download: bytes per second to a client, > 0; default 1e6. None takes no time.
        upload: bytes per second from a client, > 0; default 2.5e5. None takes no time.
        available: see `SystemModel`.
        dropout: see `SystemModel`.
        deadline: see `SystemModel`.
        min_completed: see `SystemModel`.
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

    ``seconds_per_step_k,t = seconds_per_step exp(sigma a_k + jitter e_k,t)``

    ``a_k`` is standard normal for each client, ``e_k,t`` for each request. One more factor with the same distribution
    divides both bandwidths of a client.

    Args:
        seconds_per_step: duration of one local step at the median client, in seconds, >= 0; default 0.1.
        download: bytes per second to the median client, > 0; default 1e6. None takes no time.
        upload: bytes per second from the median client, > 0; default 2.5e5. None takes no time.
        sigma: variation between clients, >= 0; default 1. With 1, one client in six is more than 2.7 times slower
            than the median.
        jitter: variation between requests to one client, >= 0; default 0.1.
        available: see `SystemModel`.
        dropout: see `SystemModel`.
        deadline: see `SystemModel`.
        min_completed: see `SystemModel`.
    """
    median = _device(seconds_per_step, download, upload)
    for name, spread in (("sigma", sigma), ("jitter", jitter)):
        require(is_number(spread, at_least=0, below=100), name, spread, "a number >= 0", f"{name}=0.5")

    def device(seed: int, client: ClientId, round: int) -> Device:
        a_2 = generator(seed, Purpose.DEVICE, client=client).normal(size=2)
        e_2 = generator(seed, Purpose.DEVICE, client=client, round=round).normal(size=2)
        compute, network = (exp(sigma * a + jitter * e) for a, e in zip(a_2.tolist(), e_2.tolist(), strict=True))
        return Device(median.seconds_per_step * compute, median.download / network, median.upload / network)

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

    The columns are ``client`` (a number), ``seconds_per_step``, ``download`` and ``upload`` (bytes per second; empty
    for no time). The optional columns ``from`` and ``until`` are the window in which the device is connected. A device
    with several windows has several rows, and the first row determines its speed.

    Client k is device k modulo the number of devices, so a short trace is enough for a large population.

    Args:
        path: path of the file.
        period: seconds after which windows repeat, > 0; default one day. None does not repeat them.
        dropout: see `SystemModel`.
        deadline: see `SystemModel`.
        min_completed: see `SystemModel`.

    Raises:
        SettingError: The path is missing, or a number is out of range.
        DataError: The file cannot be read, or has missing or wrong values.
    """
    require(bool(path), "path", path, "the path of a CSV file", "system.path=devices.csv")
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
        require(rate is None or _is_positive(rate), name, rate, "null, or bytes per second > 0", f"{name}=1e6")
    return Device(seconds_per_step, *(inf if rate is None else float(rate) for rate in (download, upload)))


def _is_positive(number: object) -> bool:
    return is_number(number, at_least=0, below=inf) and number != 0


def _read(path: Path) -> Sequence[tuple[Device, list[tuple[float, float]]]]:
    """Return device and windows of each client of a trace, in order of the client numbers."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        devices: dict[int, tuple[Device, list[tuple[float, float]]]] = {}
        for row in rows:
            client = int(row["client"])
            _, windows = devices.setdefault(client, (_read_device(row), []))
            if row.get("until"):
                windows.append(_read_window(row))
    except (OSError, KeyError, TypeError, ValueError) as error:
        fix = f"a CSV file with the columns {', '.join(COLUMNS)}, and optionally {', '.join(WINDOW)}"
        raise DataError(
            f"the trace {path} cannot be read: {type(error).__name__}: {error}\n  advice    {fix}"
        ) from error
    if not devices:
        raise DataError(f"the trace {path} has no rows\n  advice    one row per device")
    return [(device, sorted(windows)) for _, (device, windows) in sorted(devices.items())]


def _read_device(row: Mapping[str, Any]) -> Device:
    rates = [float(row[name]) if row[name] else None for name in ("download", "upload")]
    return _device(float(row["seconds_per_step"]), *rates)


def _read_window(row: Mapping[str, Any]) -> tuple[float, float]:
    begins, ends = float(row["from"]), float(row["until"])
    if not 0 <= begins < ends < inf:
        raise ValueError(f"from {begins:g} until {ends:g}, expected 0 <= from < until")
    return begins, ends


def refuse_early_end(strategy: Strategy, min_completed: int | None, setting: str) -> None:
    """Refuse to close rounds early if the strategy has a privacy guarantee.

    The guarantee assumes that the sampling law of the strategy determines the participants. A round that closes early
    selects the fastest clients instead.

    Args:
        strategy: the strategy.
        min_completed: number of updates that close a round; None waits for all clients.
        setting: name of this setting, for the error.

    Raises:
        SettingError: ``min_completed`` is set, and the strategy has a privacy guarantee.
    """
    expected = "null, because the privacy guarantee assumes that random sampling alone selects the participants"
    ok = min_completed is None or strategy.privacy_guarantee is None
    require(ok, setting, min_completed, expected, f"{setting}=null")
