"""Addresses and ports: whether the coordinator can be reached, and if not, why."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from fedlearn.errors import FedlearnError

CONNECT_TIMEOUT_S = 15.0  # for a connection


class ConnectionProblem(FedlearnError):
    """The coordinator cannot be reached, is not who it says, or does not know us."""


def check_connection(address: str, root_certificate: Path, *, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
    """Connect with TLS and hang up.

    Args:
        address: ``host:port``.
        root_certificate: the certificate that the server's must be signed with.
        timeout_s: for the attempt.

    Raises:
        ConnectionProblem: nobody answers, or who does is not the coordinator.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConnectionProblem(f"{address} is not an address\n  expected  host:port\n  try       localhost:8000")
    host = host.strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=read_key_file(root_certificate))
        with (
            socket.create_connection((host, int(port)), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            pass
    except OSError as error:
        raise ConnectionProblem(explain(address, error)) from error


CAUSES = (
    ("expired", "its certificate has expired", "python -m fedlearn.deploy.keys renew FOLDER, then restart it"),
    ("not yet valid", "its certificate is not valid yet", "set this machine's clock"),
    ("mismatch", "its certificate is for other names", "keys renew FOLDER --host NAME with the name used here"),
    ("certificate verify failed", "its certificate is signed by another authority", "the ca.crt of this federation"),
    ("wrong_version_number", "it does not speak TLS", "the port that the coordinator printed"),
    ("wrong version number", "it does not speak TLS", "the port that the coordinator printed"),
    ("record layer failure", "it does not speak TLS", "the port that the coordinator printed"),
    ("refused", "nobody listens there", "python -m fedlearn.deploy.coordinator, or another address"),
    ("timed out", "it does not answer", "another address, or a firewall that lets this port through"),
    ("name or service not known", "there is no such host", "another address"),
    ("disconnected", "it hung up", "again in a moment"),
)


def explain(address: str, error: Exception) -> str:
    """Why a connection failed, and what to try."""
    told = f"{error} {error.__cause__ or ''}".lower()
    why, fix = next(((why, fix) for sign, why, fix in CAUSES if sign in told), (str(error) or type(error).__name__, ""))
    return f"no connection to {address}: {why}" + (f"\n  try       {fix}" if fix else "")


FINAL = ("certificate", "TLS", "not an address", "no such host", "cannot be read", "token", "does not know run")


def is_final(error: ConnectionProblem) -> bool:
    """Whether waiting would not help."""
    return any(sign in str(error) for sign in FINAL)


def read_key_file(path: Path) -> str:
    """What a file of the keys says.

    Raises:
        ConnectionProblem: it cannot be read.
    """
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        fix = "a folder that python -m fedlearn.deploy.keys made"
        raise ConnectionProblem(f"{path} cannot be read: {error.strerror}\n  try       {fix}") from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
