"""A hostile coordinator can neither fill the memory of a node with a response nor send its requests elsewhere."""

import gzip

import pytest
from needs import needs

needs("httpx")

import httpx  # noqa: E402

from fedlearn.flower.response_limits import limit_responses  # noqa: E402


def client(answer, **options):
    built = httpx.Client(transport=httpx.MockTransport(answer), follow_redirects=True)
    limit_responses(built, **options)
    return built


def endless():
    while True:
        yield b"x" * 1000


def test_a_response_without_an_end_is_cut_at_the_limit():
    with pytest.raises(httpx.RemoteProtocolError, match="more than 5000 bytes"):
        client(lambda request: httpx.Response(200, content=endless()), max_bytes=5000).post("https://c/")
    assert (
        len(client(lambda request: httpx.Response(200, content=b"x" * 5000), max_bytes=5000).post("https://c/").content)
        == 5000
    )


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip", "zstd"])
def test_a_compressed_response_is_refused_before_it_is_expanded(encoding):
    bomb = gzip.compress(b"\0" * 10**6)
    answer = httpx.Response(200, stream=httpx.ByteStream(bomb), headers={"content-encoding": encoding})
    with pytest.raises(httpx.RemoteProtocolError, match="compressed"):
        client(lambda request: answer).post("https://c/")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirection_reaches_no_other_machine(status):
    hosts = []

    def answer(request):
        hosts.append(request.url.host)
        return httpx.Response(status, headers={"location": "https://intranet.hospital/"})

    with pytest.raises(httpx.HTTPStatusError):
        client(answer).post("https://coordinator/").raise_for_status()
    assert hosts == ["coordinator"]


def test_the_clients_of_nodes_and_persons_follow_no_redirection(tmp_path):
    needs("flwr", "cryptography")
    from fedlearn.deploy import keys
    from fedlearn.flower.compat.control import ControlClient
    from fedlearn.flower.compat.fleet import FleetClient

    keys.create(tmp_path, ["localhost"], ["north"])
    certificates = (tmp_path / "ca.crt").read_bytes()
    key = (tmp_path / "nodes/north/node.key").read_bytes()
    fleet = FleetClient("localhost:1", certificates=certificates, private_key=key)
    control = ControlClient("localhost:1", certificates=certificates, token="token")
    for client in (fleet, control):
        assert client._client._client.follow_redirects is False
        client.close()
    assert fleet._client._client.event_hooks["response"]
