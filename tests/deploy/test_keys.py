from __future__ import annotations

import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization as formats

from fedlearn.deploy import certificates, keys
from fedlearn.deploy.certificates import expiry, hosts_of
from fedlearn.deploy.connectivity import ConnectionProblem, check_connection
from fedlearn.deploy.node_bindings import read_bindings
from fedlearn.deploy.node_side.masking_keys import read_identities, read_masking_keys
from fedlearn.errors import FedlearnError, SettingError

HOSTS = ["localhost", "127.0.0.1", "::1", "coordinator.example.org"]


@pytest.fixture
def keys_folder(tmp_path):
    folder = tmp_path / "keys"
    keys.create(folder, HOSTS, ["a", "b"], days=30)
    return folder


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_secrets_are_readable_by_their_owner_only(keys_folder):
    secrets = [*keys_folder.rglob("*.key"), *keys_folder.rglob("token"), *keys_folder.rglob("*.secret")]
    assert len(secrets) == 1 + 1 + 2 * 2 + 1 + 1  # authority, server, nodes, token, executor
    assert {mode(path) for path in secrets} == {0o600}


def test_each_part_holds_what_it_needs_and_nothing_else(keys_folder):
    assert {path.name for path in (keys_folder / "nodes/a").iterdir()} == {
        "node.key",
        "ca.crt",
        "masking.key",
        "masking.pub",
    }
    assert {path.name for path in (keys_folder / "operator").iterdir()} == {"token", "ca.crt"}
    assert not list((keys_folder / "coordinator").rglob("node.key"))
    assert not list((keys_folder / "coordinator").rglob("ca.key"))


def test_all_parts_know_the_same_keys_for_masked_sums_and_a_node_its_own(keys_folder):
    keys.add(keys_folder, ["c"])
    lists = {path.read_text() for path in keys_folder.rglob("masking.pub")}
    assert len(lists) == 1
    assert (
        read_masking_keys(keys_folder / "nodes/a").public_key in read_masking_keys(keys_folder / "nodes/c").trusted_keys
    )
    keys.revoke(keys_folder, ["b"])
    assert [*read_identities(keys_folder / "coordinator/masking.pub")] == ["a", "c"]
    with pytest.raises(FedlearnError, match="does not have the public key of this node"):
        read_masking_keys(keys_folder / "nodes/b")


def test_a_node_has_a_p384_key_in_the_format_that_flower_reads(keys_folder):
    private = formats.load_ssh_private_key((keys_folder / "nodes/a/node.key").read_bytes(), None)
    public = formats.load_ssh_public_key((keys_folder / "coordinator/allowed/a.pub").read_bytes())
    assert private.curve.name == "secp384r1"
    assert private.public_key() == public


def test_nothing_is_overwritten(keys_folder):
    before = {path: path.read_bytes() for path in keys_folder.rglob("*") if path.is_file()}
    with pytest.raises(keys.KeysError, match="already has an authority"):
        keys.create(keys_folder, HOSTS, ["c"])
    with pytest.raises(keys.KeysError, match="has or had a key"):
        keys.add(keys_folder, ["a"])
    assert {path: path.read_bytes() for path in before} == before


def test_renewal_keeps_hosts_and_authority_and_nodes(keys_folder):
    old = (keys_folder / "coordinator/server.crt").read_bytes()
    kept = {path: path.read_bytes() for path in (keys_folder / "nodes").rglob("*") if path.is_file()}
    keys.renew(keys_folder, days=90)
    certificate = x509.load_pem_x509_certificate((keys_folder / "coordinator/server.crt").read_bytes())
    assert certificate.public_bytes(formats.Encoding.PEM) != old
    assert hosts_of(certificate) == HOSTS
    left = expiry(keys_folder / "coordinator/server.crt") - datetime.now(UTC)
    assert timedelta(days=89) < left < timedelta(days=91)
    assert {path: path.read_bytes() for path in kept} == kept


def test_the_coordinator_can_always_reach_itself(tmp_path):
    keys.create(tmp_path / "k", ["coordinator.example.org"], [])
    assert "server    coordinator.example.org, localhost " in keys.describe(tmp_path / "k")


def test_a_revoked_name_is_never_given_out_again(keys_folder):
    keys.revoke(keys_folder / "coordinator", ["a"])
    assert not (keys_folder / "coordinator/allowed/a.pub").exists()
    assert "revoked   a" in keys.describe(keys_folder)
    with pytest.raises(keys.KeysError):
        keys.add(keys_folder, ["a"])
    with pytest.raises(keys.KeysError, match="expected  one of b"):
        keys.revoke(keys_folder, ["a"])


@pytest.mark.parametrize(
    ("hosts", "nodes", "days"),
    [([], ["a"], 1), (["two words"], ["a"], 1), (["localhost"], ["../a"], 1), (["localhost"], ["a"], 0)],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(tmp_path, hosts, nodes, days):
    with pytest.raises(SettingError):
        keys.create(tmp_path / "keys", hosts, nodes, days=days)
    assert not (tmp_path / "keys").exists()


def test_the_command_makes_and_shows(tmp_path, capsys):
    assert keys.main(["create", str(tmp_path / "k"), "--host", "localhost", "--nodes", "a"]) == 0
    assert keys.main(["add", str(tmp_path / "k"), "b"]) == 0
    assert "allowed   b" in capsys.readouterr().out
    assert keys.main(["revoke", str(tmp_path / "k"), "nobody"]) == 2


@pytest.fixture
def listen():
    """Return ``listen(folder of a server's certificate) -> port``; without a folder the server does not use TLS."""
    open_sockets = []

    def serve(folder=None):
        server = socket.create_server(("127.0.0.1", 0))
        open_sockets.append(server)
        context = None
        if folder:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "server.crt", folder / "server.key")

        def answer():
            try:
                while True:
                    connection, _ = server.accept()
                    connection.settimeout(5)
                    try:
                        if context:
                            context.wrap_socket(connection, server_side=True).close()
                        else:
                            connection.recv(1)
                            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    except OSError:
                        pass
                    connection.close()
            except OSError:
                pass

        threading.Thread(target=answer, daemon=True).start()
        return server.getsockname()[1]

    yield serve
    for server in open_sockets:
        server.close()


def test_the_certificate_is_trusted_under_each_of_its_names(keys_folder, listen):
    port = listen(keys_folder / "coordinator")
    for host in ("localhost", "127.0.0.1"):
        check_connection(f"{host}:{port}", keys_folder / "nodes/a/ca.crt", timeout_s=5)


def test_an_expired_certificate_is_named(keys_folder, listen, monkeypatch):
    monkeypatch.setattr(certificates, "CLOCK_SKEW", timedelta(days=3))
    monkeypatch.setattr(certificates, "datetime", LongAgo)
    keys.renew(keys_folder, days=1)
    with pytest.raises(ConnectionProblem, match="its certificate has expired"):
        check_connection(f"localhost:{listen(keys_folder / 'coordinator')}", keys_folder / "ca.crt", timeout_s=5)


class LongAgo(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) - timedelta(days=2)


def test_the_wrong_authority_is_named(keys_folder, listen, tmp_path):
    keys.create(tmp_path / "others", HOSTS, [])
    with pytest.raises(ConnectionProblem, match="signed by another authority"):
        check_connection(f"localhost:{listen(keys_folder / 'coordinator')}", tmp_path / "others/ca.crt", timeout_s=5)


def test_the_wrong_name_is_named(tmp_path, listen):
    keys.create(tmp_path / "k", ["elsewhere.example.org"], [])
    with pytest.raises(ConnectionProblem, match="for other names"):
        check_connection(f"127.0.0.1:{listen(tmp_path / 'k/coordinator')}", tmp_path / "k/ca.crt", timeout_s=5)


def test_a_port_without_tls_is_named(keys_folder, listen):
    with pytest.raises(ConnectionProblem, match="does not speak TLS"):
        check_connection(f"localhost:{listen()}", keys_folder / "ca.crt", timeout_s=5)


def test_nobody_there_is_named(keys_folder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionProblem, match="no program listens there"):
        check_connection(f"127.0.0.1:{port}", keys_folder / "ca.crt", timeout_s=5)


def test_client_ids_are_bound_to_keys_at_the_coordinator_and_at_each_node(tmp_path, capsys):
    folder = tmp_path / "k"
    keys.create(folder, ["localhost"], ["north=0-2:5000", "south"])
    keys.add(folder, ["west=7"])
    assert keys.main(["bind", str(folder), "south=3"]) == 0
    assert "allowed   north   clients 0-2, at most 5000 examples each" in capsys.readouterr().out
    north, south, west = (read_masking_keys(folder / "nodes" / name) for name in ("north", "south", "west"))
    clients = {north.public_key: {0, 1, 2}, south.public_key: {3}, west.public_key: {7}}
    assert north.clients == south.clients == west.clients == clients
    assert keys.main(["bind", str(folder), "south=2"]) == 2
    assert keys.main(["bind", str(folder), "south"]) == 2
    assert keys.main(["bind", str(folder), "east=9"]) == 2
    assert keys.main(["add", str(folder), "east=7"]) == 2
    assert not (folder / "nodes/east").exists()
    keys.revoke(folder, ["north"])
    keys.bind(folder / "coordinator", ["south=0-3"])
    assert [*read_bindings(folder / "coordinator/nodes.yaml")] == ["south", "west"]


def test_a_coordinator_cannot_give_a_key_the_clients_of_another_node(tmp_path):
    folder = tmp_path / "k"
    keys.create(folder, ["localhost"], ["north=0-2", "south=3", "west"])
    north, south, west = (read_masking_keys(folder / "nodes" / name) for name in ("north", "south", "west"))
    N, S, W = north.public_key, south.public_key, west.public_key
    fine = {0: N, 2: N, 3: S, 8: W, 9: W}
    assert north.check_registered(fine, (0, 1, 2)) == west.check_registered(fine, (8, 9)) == fine
    for wrong in ({0: N, 3: N}, {0: N, 4: S}, {0: S}, {0: W}, {0: N, 3: W}, {0: b"x" * 32}):
        with pytest.raises(FedlearnError, match=r"masking\.pub"):
            north.check_registered(wrong, (0, 1, 2))
    for wrong in ({8: N}, {7: W, 8: W}, {8: S}):  # its own clients are known to west, though not in the file
        with pytest.raises(FedlearnError, match=r"masking\.pub"):
            west.check_registered(wrong, (8, 9))


@pytest.mark.parametrize(
    "text", ["{key} a 0\n{other} b 0", "{key} a\n{key} b", "{key} a 0 1", "{key}", "zz a", "{key} a x"]
)
def test_trusted_keys_that_are_ambiguous_are_refused(keys_folder, text):
    identities = read_identities(keys_folder / "masking.pub")
    path = keys_folder / "nodes/a/masking.pub"
    path.write_text(text.format(key=identities["a"].hex(), other=identities["b"].hex()))
    with pytest.raises(FedlearnError, match="cannot be read"):
        read_masking_keys(keys_folder / "nodes/a")
