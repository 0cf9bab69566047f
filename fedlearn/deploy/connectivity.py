"""Check the connection to a coordinator, and explain a failed connection."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from fedlearn.advice import label, option
from fedlearn.core.plain_text import plain_line
from fedlearn.deploy.proxies import find_proxy
from fedlearn.errors import FedlearnError

CONNECT_TIMEOUT_S = 15.0  # seconds to connect
HOST = re.compile(
    r"\w([\w.-]*\w)?|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]|[0-9A-Fa-f:.]*::[0-9A-Fa-f:.]*"
)  # a name, or an IP address


class ConnectionProblem(FedlearnError):
    """Report a coordinator that is unreachable, not authenticated, or refuses the caller."""


def check_connection(address: str, root_certificate: Path, *, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
    """Connect with TLS, in the same way as all further requests, and close the connection.

    The connection uses the proxy of the environment, if there is one.

    Args:
        address: address of the coordinator, ``host:port``.
        root_certificate: file with the certificate of the authority that signs the server certificate.
        timeout_s: seconds to connect, > 0.

    Raises:
        ConnectionProblem: No server answers, the proxy does not work, or the server is not the coordinator.
    """
    host, port = parse_address(address)
    proxy = find_proxy(host, port)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=read_key_file(root_certificate))
        with httpx.Client(verify=context, timeout=timeout_s) as client:
            client.get(f"https://{join_address(host, port)}/health")
    except (httpx.ReadError, httpx.RemoteProtocolError):
        if proxy:
            raise ConnectionProblem(f"no connection to {address}: the proxy closed it\n  see       {proxy}") from None
    except (OSError, httpx.TransportError, httpx.InvalidURL, ValueError) as error:
        raise ConnectionProblem(explain_with_proxy(address, error, proxy)) from error


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port of an address.

    >>> parse_address("coordinator.example.org:8000"), parse_address("[::1]:443")
    (('coordinator.example.org', 8000), ('::1', 443))

    Raises:
        ConnectionProblem: The address has another form; the error has the nearest address of this form.
    """
    if parts := _split_address(address):
        return parts
    bare = re.sub(r"^[A-Za-z][\w+.-]*://([^@/]*@)?|[/?#].*$", "", address)
    tries = (bare, f"{bare}:8000", f"{bare.rpartition(':')[0]}:8000", "localhost:8000")
    nearest = next(text for text in tries if _split_address(text))
    causes = {"://": ", without https://", "/": ", without a path"}
    cause = next((text for sign, text in causes.items() if sign in address), "")
    problem = f"{plain_line(option('--coordinator', address))} is not an address"
    expected = f"host:port or [IPv6]:port, with a port from 1 to 65535{cause}"
    raise ConnectionProblem(f"{problem}\n  expected  {expected}\n  try       {option('--coordinator', nearest)}")


def _split_address(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    is_valid = HOST.fullmatch(host) and re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 2**16
    return (host.strip("[]"), int(port)) if is_valid else None


CAUSES = (
    (
        "expired",
        "its certificate has expired",
        "a correct clock on this machine, or ask the operator of the coordinator to renew the certificate",
    ),
    ("not yet valid", "its certificate is not valid yet", "a correct clock on this machine"),
    (
        "mismatch",
        "its certificate is for other names",
        "one of its names, or ask the operator of the coordinator for keys renew FOLDER --host NAME",
    ),
    ("certificate verify failed", "its certificate is signed by another authority", "the ca.crt of this federation"),
    ("wrong_version_number", "it does not speak TLS", "the port that the coordinator printed"),
    ("wrong version number", "it does not speak TLS", "the port that the coordinator printed"),
    ("record layer failure", "it does not speak TLS", "the port that the coordinator printed"),
    ("refused", "no program listens there", "start the coordinator, or use another address"),
    ("timed out", "it does not answer", "another address, or a firewall rule for this port"),
    ("name or service not known", "no such host exists", "another address"),
    ("disconnected", "it closed the connection", "again in a moment"),
)


def explain(address: str, error: Exception) -> str:
    """Return the cause of a failed connection, and one thing to try."""
    text = f"{error} {error.__cause__ or ''}".lower()
    unknown = (str(error) or type(error).__name__, "")
    cause, fix = next(((cause, fix) for sign, cause, fix in CAUSES if sign in text), unknown)
    return f"no connection to {address}: {cause}" + (f"\n{label(fix)}" if fix else "")


def explain_with_proxy(address: str, error: Exception, proxy: str) -> str:
    """Return the cause of a failed connection. Errors before TLS are of the proxy, if there is one."""
    text = explain(address, error)
    is_of_coordinator = any(cause in text for cause in ("certificate", "TLS"))
    if not proxy or is_of_coordinator:
        return text
    detail = plain_line(str(error) or type(error).__name__)
    fix = "a proxy that allows CONNECT to this port, or NO_PROXY with the host of the coordinator"
    return f"no connection to {address} through the proxy: {detail}\n  see       {proxy}\n  advice    {fix}"


@contextmanager
def explained_errors(address: str, *others: type[Exception]) -> Iterator[None]:
    """Raise a `ConnectionProblem` in place of errors of a request to the coordinator.

    Args:
        address: address of the coordinator.
        others: types of errors that also mean a problem with the response.
    """
    problems: tuple[type[Exception], ...] = (httpx.TransportError, *others)
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise ConnectionProblem(describe_refusal(address, error.response)) from error
    except problems as error:
        raise ConnectionProblem(explain(address, error)) from error


def describe_refusal(address: str, response: httpx.Response) -> str:
    """Return the reason of a coordinator that refuses a request of a person."""
    if response.status_code == httpx.codes.UNAUTHORIZED:
        problem, expected = f"{address} does not accept this token", "--keys with the folder of a person"
        return f"{problem}\n  expected  {expected}\n  try       --keys keys/operator"
    try:
        content = json.loads(response.text)
        text = content.get("public_details") or content.get("message") or content.get("detail") or response.text
    except (ValueError, AttributeError):
        text = response.text
    problem = f"{address} refuses the call: {plain_line(str(text))} (HTTP {response.status_code})"
    if response.status_code == httpx.codes.FORBIDDEN:
        problem += "\n  expected  a role that allows it\n  advice    another --keys, or a request to an admin"
    return problem


FINAL = ("certificate", "TLS", "not an address", "no such host", "cannot be read", "token", "does not know run")


def is_final(error: ConnectionProblem) -> bool:
    """Return whether a further attempt would fail for the same cause."""
    return any(sign in str(error) for sign in FINAL)


def read_key_file(path: Path) -> str:
    """Return the text of a key file.

    Raises:
        ConnectionProblem: The file cannot be read.
    """
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        fix = "choose a folder for --keys that python -m fedlearn.deploy.keys created"
        raise ConnectionProblem(f"{path} cannot be read: {error.strerror}\n  advice    {fix}") from error


def join_address(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around an IPv6 address.

    >>> join_address("localhost", 8000), join_address("::1", 8000)
    ('localhost:8000', '[::1]:8000')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that no program uses at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
