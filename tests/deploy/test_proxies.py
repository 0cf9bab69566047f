"""A check of the connection goes the same way as the traffic: through the proxy of the environment, or past it."""

import socket
import threading
import time
from base64 import b64encode

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn.deploy import keys, node
from fedlearn.deploy.connectivity import ConnectionProblem, check_connection, join_address
from fedlearn.deploy.proxies import exclude_from_proxies, find_proxy

pytestmark = pytest.mark.framework
VARIABLES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy")


@pytest.fixture(autouse=True)
def _no_proxy_of_this_machine(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # restored at the end, also where a test sets it
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("k") / "keys"
    keys.create(folder, ["localhost", "127.0.0.1", "::1", "coordinator.hospital"], ["north"])
    return folder


@pytest.fixture
def coordinator(folder):
    """Return the port of a server with the coordinator's certificate, which closes after TLS."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "coordinator/server.crt", folder / "coordinator/server.key")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    plain, _ = server.accept()
                except OSError:
                    return
                try:
                    with context.wrap_socket(plain, server_side=True) as secure:
                        secure.recv(1000)
                        secure.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                except OSError:
                    pass

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


class Proxy:
    """A small CONNECT proxy that resolves each name to this machine."""

    def __init__(self, answer=b"200 OK"):
        self.server, self.heads, self.answer = socket.create_server(("127.0.0.1", 0)), [], answer
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def _handle(self, client):
        head = client.recv(4000).decode()
        self.heads.append(head)
        if not self.answer:
            time.sleep(30)
            return
        client.sendall(b"HTTP/1.1 " + self.answer + b"\r\n\r\n")
        if self.answer.startswith(b"200"):
            port = int(head.split()[1].rpartition(":")[2])
            target = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=_copy, args=(client, target), daemon=True).start()
            _copy(target, client)
        client.close()


def _copy(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def check(folder, host, port, timeout_s=5.0):
    check_connection(join_address(host, port), folder / "ca.crt", timeout_s=timeout_s)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_name_that_only_the_proxy_knows_is_reached_through_it(folder, coordinator, monkeypatch, variable):
    with pytest.raises(ConnectionProblem, match="no such host"):
        check(folder, "coordinator.hospital", coordinator)
    proxy = Proxy()
    monkeypatch.setenv(variable, proxy.url)
    check(folder, "coordinator.hospital", coordinator)
    assert proxy.heads[0].startswith(f"CONNECT coordinator.hospital:{coordinator} ")
    assert find_proxy("coordinator.hospital", coordinator) == f"{variable.upper()}={proxy.url}"


def test_a_password_of_a_proxy_is_sent_to_it_and_never_shown(folder, coordinator, monkeypatch):
    proxy = Proxy()
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//ada:s3cret@"))
    check(folder, "coordinator.hospital", coordinator)
    assert b64encode(b"ada:s3cret").decode() in proxy.heads[0]
    assert "s3cret" not in find_proxy("coordinator.hospital", coordinator)
    proxy.answer = b"403 Forbidden"
    with pytest.raises(ConnectionProblem) as refused:
        check(folder, "coordinator.hospital", coordinator)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize("answer", [b"403 Forbidden", b"407 Proxy Authentication Required", b"502 Bad Gateway"])
def test_a_proxy_that_refuses_is_named(folder, coordinator, monkeypatch, answer):
    proxy = Proxy(answer)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    with pytest.raises(
        ConnectionProblem, match=rf"through the proxy: {answer.decode()}\n  see       HTTPS_PROXY={proxy.url}"
    ):
        check(folder, "coordinator.hospital", coordinator)


@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_a_dead_or_silent_proxy_ends_with_a_clear_line(folder, coordinator, monkeypatch, kind):
    if kind == "dead":
        with socket.create_server(("127.0.0.1", 0)) as closed:
            url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    else:
        url = Proxy(b"").url
    monkeypatch.setenv("HTTPS_PROXY", url)
    start = time.monotonic()
    with pytest.raises(ConnectionProblem, match=rf"through the proxy: .+\n  see       HTTPS_PROXY={url}\n  advice"):
        check(folder, "localhost", coordinator, timeout_s=1.0)
    assert time.monotonic() - start < 30


def test_a_node_says_which_proxy_it_uses_and_ends_when_it_is_dead(folder, coordinator, monkeypatch, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("HTTPS_PROXY", url)
    settings = node.Node(
        coordinator=f"coordinator.hospital:{coordinator}",
        keys=folder / "nodes/north",
        state=tmp_path,
        socket=tmp_path / "s",
        trainer_args=None,
        connect_timeout_s=0.0,
    )
    with pytest.raises(ConnectionProblem, match="through the proxy"):
        node._wait_for_coordinator(settings)
    assert f"HTTPS_PROXY={url} used\n" in capsys.readouterr().out


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_hosts_in_no_proxy_are_reached_directly(folder, coordinator, monkeypatch, host):
    proxy = Proxy(b"403 Forbidden")
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", "example.org")
    with pytest.raises(ConnectionProblem, match="through the proxy"):
        check(folder, host, coordinator)
    exclude_from_proxies("localhost", "127.0.0.1", "::1")
    check(folder, host, coordinator)
    assert find_proxy("localhost", 1) == find_proxy("::1", 1) == find_proxy("www.example.org", 1) == ""
    assert find_proxy("coordinator.hospital", 1)


def test_a_wrong_certificate_behind_a_proxy_is_of_the_coordinator(folder, coordinator, monkeypatch, tmp_path):
    keys.create(tmp_path / "other", ["localhost"], [])
    monkeypatch.setenv("HTTPS_PROXY", Proxy().url)
    with pytest.raises(ConnectionProblem, match="signed by another authority"):
        check_connection(f"localhost:{coordinator}", tmp_path / "other/ca.crt", timeout_s=5.0)


def test_an_ipv6_address_is_reached(folder):
    import ssl

    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "coordinator/server.crt", folder / "coordinator/server.key")

    def serve():
        plain, _ = server.accept()
        with context.wrap_socket(plain, server_side=True) as secure:
            secure.recv(1000)

    threading.Thread(target=serve, daemon=True).start()
    check(folder, "::1", server.getsockname()[1])
