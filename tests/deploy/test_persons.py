"""Persons call a coordinator with tokens; their roles decide which requests it accepts."""

import hmac
import json
import stat
import threading
import time

import pytest

pytest.importorskip("cryptography", reason="the extra flower is not installed")

from fedlearn.deploy import keys, persons
from fedlearn.deploy.persons import Persons, PersonsError, Role, add_person, read_persons, revoke_person, token_digest
from fedlearn.errors import SettingError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "persons.json"


def test_a_token_names_its_person_until_it_is_revoked(path):
    tokens = {name: add_person(path, name, role) for name, role in [("ada", "admin"), ("ben", "viewer")]}
    known = Persons(path)
    for name, token in tokens.items():
        assert known.authenticate(token.encode()).name == name
        assert known.find({"authorization": f"Bearer {token}"}).name == name
        assert known.find({"authorization": f"bearer  {token}"}).name == name
    revoke_person(path, "ada")
    assert known.authenticate(tokens["ada"].encode()) is None
    assert known.authenticate(tokens["ben"].encode()).role is Role.VIEWER


@pytest.mark.parametrize("change", ["", "x", "{t}x", "{t} ", "{t}\x00", "x{t}", "{d}", "\u00ff", "{t}" * 1000])
def test_no_other_token_is_accepted(path, change):
    token = add_person(path, "ada", "admin")
    wrong = change.format(t=token, d=token_digest(token.encode()))
    assert Persons(path).authenticate(wrong.encode()) is None
    assert Persons(path, token_digest(b"local")).authenticate(wrong.encode()) is None


@pytest.mark.parametrize("headers", [{}, {"authorization": "{t}"}, {"authorization": "Basic {t}"}, {"cookie": "{t}"}])
def test_a_token_has_one_place_in_the_headers(path, headers):
    token = add_person(path, "ada", "admin")
    assert Persons(path).find({name: value.format(t=token) for name, value in headers.items()}) is None


def test_a_token_is_compared_with_all_digests_in_constant_time(path, monkeypatch):
    token, seen, real = add_person(path, "ada", "admin"), [], hmac.compare_digest
    for number in range(4):
        add_person(path, f"p{number}", "viewer")

    def compare(left, right):
        seen.append((left, right))
        return real(left, right)

    monkeypatch.setattr(persons.hmac, "compare_digest", compare)
    known = Persons(path)
    for sent in (token.encode(), b"wrong", b""):
        seen.clear()
        known.authenticate(sent)
        assert len(seen) == 6  # five persons, and the process of the coordinator
        assert all(len(left) in (0, 64) and len(right) == 64 for left, right in seen)


def test_the_file_has_no_token_and_is_for_its_owner_only(path):
    token = add_person(path, "ada", "admin")
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_name_is_never_used_twice(path):
    add_person(path, "ada", "admin")
    with pytest.raises(PersonsError, match="ada exists"):
        add_person(path, "ada", "viewer")
    revoke_person(path, "ada")
    with pytest.raises(PersonsError, match="ada was revoked"):
        add_person(path, "ada", "admin")
    with pytest.raises(PersonsError, match="ada has no valid token"):
        revoke_person(path, "ada")


@pytest.mark.parametrize("name", ["", "../ada", "a b", "coordinator", "ada\n", "x" * 65, ".hidden", "\u00e4"])
def test_a_name_that_is_unsafe_in_paths_or_logs_is_refused(path, name):
    with pytest.raises(SettingError):
        add_person(path, name, "viewer")
    assert not path.exists()


@pytest.mark.parametrize("role", ["", "root", "coordinator", "Admin"])
def test_a_role_that_no_person_has_is_refused(path, role):
    with pytest.raises(SettingError, match="one of viewer, submitter, admin"):
        add_person(path, "ada", role)


def _edit(path, **fields):
    content = json.loads(path.read_text())
    content["persons"][0] |= fields
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text("[]"),
        lambda path: _edit(path, role="coordinator"),
        lambda path: _edit(path, role=3),
        lambda path: _edit(path, token_sha256=""),
        lambda path: path.write_text(json.dumps({"persons": json.loads(path.read_text())["persons"] * 2})),
    ],
)
def test_a_missing_or_damaged_file_admits_nobody(path, damage):
    token = add_person(path, "ada", "admin")
    known = Persons(path)
    assert known.authenticate(token.encode())
    damage(path)
    assert known.authenticate(token.encode()) is None
    assert known.authenticate(b"") is None


def test_a_revocation_is_not_lost_when_another_person_is_added_at_the_same_time(path, monkeypatch):
    token, write, waits = add_person(path, "ada", "admin"), persons._write, threading.Event()

    def write_later(*arguments):
        waits.wait(0.3)
        write(*arguments)

    monkeypatch.setattr(persons, "_write", write_later)
    adding = threading.Thread(target=add_person, args=(path, "ben", "viewer"))
    adding.start()
    time.sleep(0.1)
    monkeypatch.setattr(persons, "_write", write)
    revoke_person(path, "ada")
    adding.join()
    assert Persons(path).authenticate(token.encode()) is None
    assert set(read_persons(path)) == {"ada", "ben"}


def test_each_role_includes_the_roles_below_it():
    order = [Role.VIEWER, Role.SUBMITTER, Role.ADMIN, Role.COORDINATOR]
    assert [[item.includes(other) for other in order] for item in order] == [
        [i >= j for j in range(4)] for i in range(4)
    ]


def test_the_commands_add_revoke_and_list_persons(tmp_path, capsys):
    folder = tmp_path / "keys"
    keys.create(folder, ["localhost"], [])
    assert [*read_persons(folder / "coordinator/persons.json")] == ["operator"]
    assert keys.main(["person", "add", str(folder), "ben", "--role", "submitter"]) == 0
    shown = capsys.readouterr().out
    token = (folder / "persons/ben/token").read_text()
    assert token not in shown
    assert Persons(folder / "coordinator/persons.json").authenticate(token.encode()).role is Role.SUBMITTER
    assert {path.name for path in (folder / "persons/ben").iterdir()} == {"token", "ca.crt"}
    assert stat.S_IMODE((folder / "persons/ben/token").stat().st_mode) == 0o600
    assert keys.main(["person", "revoke", str(folder / "coordinator"), "ben"]) == 0
    assert keys.main(["person", "list", str(folder)]) == 0
    assert "ben                  submitter  revoked" in capsys.readouterr().out
    assert keys.main(["person", "add", str(folder), "ben", "--role", "viewer"]) == 2
    assert keys.main(["person", "add", str(folder), "cy", "--role", "root"]) == 2
