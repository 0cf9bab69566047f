"""Serve the page and the metrics of a coordinator, in a thread of its process."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import socket

from cryptography import x509

from fedlearn.deploy.audit_log import AuditLog
from fedlearn.deploy.certificates import hosts_of
from fedlearn.deploy.connectivity import join_address
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient
from fedlearn.deploy.coordinator_side.metrics import coordinator_samples
from fedlearn.deploy.coordinator_side.web_source import CoordinatorSource, PersonAccounts
from fedlearn.deploy.key_files import CERTIFICATE, SERVER_KEY
from fedlearn.deploy.metrics import Sample, format_metrics
from fedlearn.deploy.persons import PERSONS_FILE
from fedlearn.flower.compat.superlink import HEAD_TIMEOUT_S, http_protocol
from fedlearn.web.app import build_app, build_metrics_app
from fedlearn.web.security import accepted_hosts
from fedlearn.web.server import LOOPBACK, Listener, listen, serve

LOCAL_NAMES = ("localhost", LOOPBACK)


@dataclass(frozen=True)
class Ports:
    """The sockets of the page and of the metrics; None for a part that is switched off."""

    web: socket | None
    metrics: socket | None


def open_ports(host: str, web: int | None, metrics: int | None) -> Ports:
    """Return listening sockets: the page at ``host``, the metrics at loopback.

    Raises:
        PortError: a port cannot be used.
    """
    page = None if web is None else listen(host, web, "--web")
    return Ports(page, None if metrics is None else listen(LOOPBACK, metrics, "--metrics"))


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The page and the metrics of a coordinator.

    Args:
        ports: their sockets.
        keys: folder with the coordinator's keys.
        state: state folder of the coordinator.
        runs: folder of the run folders.
        address: address of the coordinator on this machine.
        token: token of the coordinator's process.
    """

    ports: Ports
    keys: Path
    state: Path
    runs: Path
    address: str
    token: str

    def start(self, host: str) -> list[str]:
        """Serve in a thread that ends with this process, and return the lines that name the addresses.

        Args:
            host: host of the page, for its address.

        Raises:
            MissingExtra: the client library of Prometheus is not installed.
        """
        listeners = self._listeners()
        if not listeners:
            return []
        ready = threading.Event()
        threading.Thread(target=_serve, args=(listeners, ready), name="pages", daemon=True).start()
        ready.wait(30)
        lines = []
        if self.ports.web:
            lines.append(f"page          https://{join_address(host, self.ports.web.getsockname()[1])}")
        if self.ports.metrics:
            lines.append(f"metrics       http://{LOOPBACK}:{self.ports.metrics.getsockname()[1]}/metrics")
        return lines

    def _listeners(self) -> list[Listener]:
        if self.ports.web is None and self.ports.metrics is None:
            return []
        places = {"keys": self.keys, "state": self.state, "runs": self.runs}
        source = self._source()  # only the metrics use it
        lock = threading.Lock()

        def collect() -> list[Sample]:
            with lock:
                return list(coordinator_samples(source.snapshot, **places))

        metrics = format_metrics(collect)
        listeners = []
        if self.ports.metrics is not None:
            hosts = accepted_hosts(LOCAL_NAMES, self.ports.metrics.getsockname()[1])
            listeners.append(Listener(app=build_metrics_app(metrics, hosts=hosts), socket=self.ports.metrics))
        if self.ports.web is not None:
            names = hosts_of(x509.load_pem_x509_certificate((self.keys / CERTIFICATE).read_bytes()))
            hosts = accepted_hosts({*names, *LOCAL_NAMES}, self.ports.web.getsockname()[1])
            accounts = PersonAccounts(self.keys / PERSONS_FILE, AuditLog(self.state), self.runs)
            app = build_app(self._source(), hosts=hosts, accounts=accounts, interval_s=2.0, metrics=metrics)
            tls = {"certificate": self.keys / CERTIFICATE, "key": self.keys / SERVER_KEY}
            limits = {"http": http_protocol(), "timeout_keep_alive": int(HEAD_TIMEOUT_S)}
            listeners.append(Listener(app=app, socket=self.ports.web, options=limits, **tls))
        return listeners

    def _source(self) -> CoordinatorSource:
        client = CoordinatorClient(self.address, self.keys, token=self.token)
        return CoordinatorSource(client, self.runs, self.address, self.state)


def _serve(listeners: Sequence[Listener], ready: threading.Event) -> None:
    try:
        serve(listeners, ready.set)
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass
    except Exception:
        sys.stderr.write("the page and the metrics have ended; the coordinator goes on\n")
        traceback.print_exc()
    finally:
        ready.set()
