"""A site makes its own keys; only public keys, with proofs and a compared fingerprint, enter a federation."""

import json
import stat
import threading
from base64 import b64encode

import pytest

pytest.importorskip("cryptography", reason="the extra flower is not installed")

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as formats
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlearn.deploy import enrolment, keys
from fedlearn.deploy.key_files import read_admitted
from fedlearn.deploy.node_bindings import read_bindings
from fedlearn.deploy.node_side.masking_keys import read_identities, read_masking_keys
from fedlearn.errors import FedlearnError


@pytest.fixture
def folder(tmp_path):
    keys.create(tmp_path / "keys", ["coordinator.example.org"], ["south=5"])
    return tmp_path / "keys"


@pytest.fixture
def site(tmp_path):
    enrolment.request(tmp_path / "site", "north=0-2:5000")
    return tmp_path / "site"


def path_of(site):
    return site / "north.request.json"


def fingerprint(path):
    return enrolment.fingerprint_of(json.loads(path.read_text())["content"])


def approve(folder, path, **options):
    return enrolment.approve(folder, path, fingerprint=fingerprint(path), **options)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", [".", "coordinator"])
def test_a_site_joins_with_its_own_keys(folder, site, part):
    private = {name: (site / name).read_bytes() for name in ("node.key", "masking.key")}
    answer = approve(folder / part, path_of(site), address="coordinator.example.org:443")
    content = json.loads(answer.read_text())["content"]
    enrolment.accept(site, answer, fingerprint=enrolment.fingerprint_of(content))
    assert content["address"] == "coordinator.example.org:443"
    assert {name: (site / name).read_bytes() for name in private} == private
    assert (site / "ca.crt").read_bytes() == (folder / "ca.crt").read_bytes()
    key = formats.load_ssh_private_key(private["node.key"], None).public_key()
    pem = key.public_bytes(formats.Encoding.PEM, formats.PublicFormat.SubjectPublicKeyInfo)
    assert read_admitted(folder / "coordinator/allowed")[pem] == "north"
    assert str(read_bindings(folder / "coordinator/nodes.yaml")["north"]) == "clients 0-2, at most 5000 examples each"
    masking = read_masking_keys(site)
    assert masking.public_key == read_identities(folder / "coordinator/masking.pub")["north"]
    assert masking.trusted_keys == set(read_identities(folder / "coordinator/masking.pub").values())


def test_nothing_private_is_in_a_file_that_travels_or_at_the_coordinator(folder, site):
    answer = approve(folder, path_of(site))
    secrets = [(site / "masking.key").read_text().strip(), *(site / "node.key").read_text().splitlines()[-4:-2]]
    texts = [path_of(site).read_text(), answer.read_text()]
    texts += [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]
    assert not [secret for secret in secrets for text in texts if secret in text]
    assert not list((folder / "nodes").glob("north*"))
    modes = {stat.S_IMODE((site / name).stat().st_mode) for name in ("node.key", "masking.key")}
    assert modes == {0o600}


def edit(path, change):
    """Change the content of a request, without new proofs."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def sign(path, node_key, masking_key, /, **fields):
    """Write a request with other keys or fields, and with proofs of these keys."""
    content = json.loads(path.read_text())["content"] | fields
    message = enrolment.REQUEST_DOMAIN + enrolment.canonical(content)
    proofs = {
        "node_key": b64encode(node_key.sign(message, ec.ECDSA(hashes.SHA384()))).decode(),
        "masking_key": b64encode(masking_key.sign(message)).decode(),
    }
    path.write_text(json.dumps({"content": content, "proofs": proofs}))


def public_line(key):
    return key.public_key().public_bytes(formats.Encoding.OpenSSH, formats.PublicFormat.OpenSSH).decode()


def keys_of(site):
    node = formats.load_ssh_private_key((site / "node.key").read_bytes(), None)
    return node, Ed25519PrivateKey.from_private_bytes(bytes.fromhex((site / "masking.key").read_text().strip()))


STRANGER = ec.generate_private_key(ec.SECP384R1()), Ed25519PrivateKey.generate()
TAMPERED = {
    "another name": lambda d: d["content"].update(name="south2"),
    "more clients": lambda d: d["content"].update(clients="0-9"),
    "more examples": lambda d: d["content"].update(max_examples=10**6),
    "another node key": lambda d: d["content"].update(node_key=public_line(STRANGER[0])),
    "another masking key": lambda d: d["content"].update(masking_key=STRANGER[1].public_key().public_bytes_raw().hex()),
    "another time": lambda d: d["content"].update(created="2020-01-01T00:00:00+00:00"),
    "another nonce": lambda d: d["content"].update(nonce="0" * 32),
    "a further field": lambda d: d["content"].update(role="admin"),
    "a missing field": lambda d: d["content"].pop("nonce"),
    "a further part": lambda d: d.update(extra=1),
    "no proof of the node key": lambda d: d["proofs"].pop("node_key"),
    "no proof of the masking key": lambda d: d["proofs"].update(masking_key=""),
    "swapped proofs": lambda d: d.update(
        proofs={"node_key": d["proofs"]["masking_key"], "masking_key": d["proofs"]["node_key"]}
    ),
    "a damaged proof": lambda d: d["proofs"].update(node_key="AAAA" + d["proofs"]["node_key"][4:]),
    "a number": lambda d: d["content"].update(name=3),
    "another format": lambda d: d["content"].update(format="fedlearn approval 1"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_request_is_refused_with_any_fingerprint(folder, site, name):
    honest = fingerprint(path_of(site))
    edit(path_of(site), TAMPERED[name])
    before = files_of(folder)
    for given in (honest, fingerprint(path_of(site))):
        with pytest.raises(FedlearnError):
            enrolment.approve(folder, path_of(site), fingerprint=given)
    assert files_of(folder) == before


def test_a_request_of_another_party_with_valid_proofs_has_another_fingerprint(folder, site):
    printed = fingerprint(path_of(site))  # by telephone
    fields = {"node_key": public_line(STRANGER[0]), "masking_key": STRANGER[1].public_key().public_bytes_raw().hex()}
    sign(path_of(site), *STRANGER, **fields)
    with pytest.raises(FedlearnError, match="another fingerprint"):
        enrolment.approve(folder, path_of(site), fingerprint=printed)
    assert approve(folder, path_of(site))  # the proofs alone are valid


def test_a_name_is_used_once_also_after_it_was_revoked(folder, site, tmp_path):
    approve(folder, path_of(site))
    other = tmp_path / "other"
    enrolment.request(other, "north")
    for _ in range(2):
        with pytest.raises(FedlearnError, match="has or had a key"):
            approve(folder, path_of(other))
        if (folder / "coordinator/allowed/north.pub").exists():
            keys.revoke(folder, ["north"])


@pytest.mark.parametrize("part", [".", "coordinator"])
def test_a_new_site_does_not_trust_a_revoked_node_in_masked_sums(folder, site, tmp_path, part):
    approve(folder / part, path_of(site))
    keys.revoke(folder / part, ["north"])
    enrolment.request(tmp_path / "other", "west")
    answer = approve(folder / part, tmp_path / "other/west.request.json")
    text = json.loads(answer.read_text())["content"]["masking_pub"]
    assert [line.split()[1] for line in text.splitlines() if not line.startswith("#")] == ["south", "west"]


def test_two_requests_that_are_approved_at_the_same_time_are_both_trusted(folder, tmp_path, monkeypatch):
    write, waits = enrolment.write_masking_keys, threading.Event()
    for name in ("east", "west"):
        enrolment.request(tmp_path / name, name)

    def write_later(*arguments):
        waits.wait(0.3)
        return write(*arguments)

    monkeypatch.setattr(enrolment, "write_masking_keys", write_later)
    paths = [tmp_path / name / f"{name}.request.json" for name in ("east", "west")]
    threads = [threading.Thread(target=approve, args=(folder, path)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {"east", "west"} <= set(read_identities(folder / "coordinator/masking.pub"))


def test_the_clients_of_another_node_are_refused(folder, site):
    sign(path_of(site), *keys_of(site), clients="4-6")
    before = files_of(folder)
    with pytest.raises(FedlearnError, match="both have client 5"):
        approve(folder, path_of(site))
    assert files_of(folder) == before


@pytest.mark.parametrize("is_revoked", [False, True])
@pytest.mark.parametrize("part", ["node_key", "masking_key", "both"])
def test_a_key_is_used_once_under_any_name(folder, site, tmp_path, part, is_revoked):
    approve(folder, path_of(site))
    if is_revoked:
        keys.revoke(folder, ["north"])
    enrolment.request(tmp_path / "other", "west")
    path = tmp_path / "other/west.request.json"
    node_key, masking_key = keys_of(tmp_path / "other")
    old_node, old_masking = keys_of(site)
    node_key = node_key if part == "masking_key" else old_node
    masking_key = masking_key if part == "node_key" else old_masking
    fields = {"node_key": public_line(node_key), "masking_key": masking_key.public_key().public_bytes_raw().hex()}
    sign(path, node_key, masking_key, **fields)
    before = files_of(folder)
    with pytest.raises(FedlearnError, match="is or was the key of"):
        approve(folder, path)
    assert files_of(folder) == before


@pytest.mark.parametrize("spell", [str.upper, lambda text: f" {text}", lambda text: f"{text[:2]} {text[2:]}"])
def test_a_key_is_used_once_also_with_another_spelling(folder, site, tmp_path, spell):
    approve(folder, path_of(site))
    enrolment.request(tmp_path / "other", "west")
    path, (_, masking_key) = tmp_path / "other/west.request.json", keys_of(site)
    node_key, _ = keys_of(tmp_path / "other")
    text = spell(masking_key.public_key().public_bytes_raw().hex())
    sign(path, node_key, masking_key, node_key=public_line(node_key), masking_key=text)
    before = files_of(folder)
    with pytest.raises(FedlearnError, match="has no valid keys"):
        approve(folder, path)
    assert files_of(folder) == before


@pytest.mark.parametrize("name", ["../north", "", "a b", "north\n", "coordinator/x", "n" * 65])
def test_a_name_that_is_a_path_is_refused(folder, site, name):
    sign(path_of(site), *keys_of(site), name=name)
    before = files_of(folder)
    with pytest.raises(FedlearnError):
        approve(folder, path_of(site))
    assert files_of(folder) == before


@pytest.mark.parametrize("kind", [ec.SECP256R1(), None])
def test_a_weak_or_another_kind_of_key_is_refused(folder, site, kind):
    key = ec.generate_private_key(kind) if kind else rsa.generate_private_key(65537, 2048)
    content = json.loads(path_of(site).read_text())["content"] | {"node_key": public_line(key)}
    edit(path_of(site), lambda document: document.update(content=content))
    with pytest.raises(FedlearnError, match="P-384"):
        approve(folder, path_of(site))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'{"content": 3, "proofs": 3}', b"[" * 10**5, b"x" * 10**6]
)
def test_a_file_that_is_no_request_is_refused(folder, site, data):
    path_of(site).write_bytes(data)
    with pytest.raises(FedlearnError):
        enrolment.approve(folder, path_of(site), fingerprint="0")


def test_a_request_replaces_no_key_of_a_site(site):
    before = files_of(site)
    with pytest.raises(FedlearnError, match="has keys"):
        enrolment.request(site, "north")
    assert files_of(site) == before


ANSWERS = {
    "another authority": lambda d, other: d["content"].update(ca=(other / "ca.crt").read_text()),
    "no certificate": lambda d, other: d["content"].update(ca="x"),
    "another list of keys": lambda d, other: d["content"].update(masking_pub=(other / "masking.pub").read_text()),
    "another address": lambda d, other: d["content"].update(address="evil.example.org:443"),
    "another request": lambda d, other: d["content"].update(request="0" * 64),
    "a further field": lambda d, other: d["content"].update(extra=1),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_tampered_answer_is_refused(folder, site, tmp_path, name):
    keys.create(tmp_path / "other", ["localhost"], ["x"])
    answer = approve(folder, path_of(site))
    printed = enrolment.fingerprint_of(json.loads(answer.read_text())["content"])
    edit(answer, lambda document: ANSWERS[name](document, tmp_path / "other"))
    with pytest.raises(FedlearnError):
        enrolment.accept(site, answer, fingerprint=printed)
    assert not (site / "ca.crt").exists()


@pytest.mark.parametrize("name", ["another request", "another list of keys", "no certificate"])
def test_an_answer_that_does_not_fit_the_keys_is_refused_with_its_own_fingerprint_too(folder, site, tmp_path, name):
    keys.create(tmp_path / "other", ["localhost"], ["x"])
    answer = approve(folder, path_of(site))
    edit(answer, lambda document: ANSWERS[name](document, tmp_path / "other"))
    current = enrolment.fingerprint_of(json.loads(answer.read_text())["content"])
    with pytest.raises(FedlearnError):
        enrolment.accept(site, answer, fingerprint=current)
    assert not (site / "ca.crt").exists()


def test_the_commands_show_fingerprints_and_ask_for_them(folder, tmp_path, capsys, monkeypatch):
    site = tmp_path / "site"
    assert keys.main(["request", str(site), "north=0"]) == 0
    shown = capsys.readouterr().out
    printed = shown.partition("fingerprint ")[2].partition("\n")[0].strip()
    file = site / "north.request.json"
    assert keys.main(["approve", str(folder), str(file)]) == 2
    captured = capsys.readouterr()
    assert "--fingerprint" in captured.err
    assert printed in captured.out
    assert keys.main(["approve", str(folder), str(file), "--fingerprint", "abcd"]) == 2
    assert not (folder / "coordinator/allowed/north.pub").exists()
    assert keys.main(["approve", str(folder), str(file), "--fingerprint", printed]) == 0
    answer = capsys.readouterr().out.partition("fingerprint ")[2].partition("\n")[0].strip()
    assert keys.main(["accept", str(site), str(site / "north.approval.json"), "--fingerprint", answer]) == 0
    assert (site / "ca.crt").exists()
