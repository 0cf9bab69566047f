"""A node writes each request and each response to its audit log before the response leaves; no value enters it."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from clinic import NUM_FEATURES
from needs import needs

from fedlearn.core import Request
from fedlearn.core.serialization import Payload
from fedlearn.deploy import audit_log
from fedlearn.deploy.audit_log import read_events, verify
from fedlearn.deploy.history import main as history
from fedlearn.deploy.history import summarize_runs
from fedlearn.deploy.node_side import disk_limits
from fedlearn.deploy.node_side.node_audit import ORDER_FIELDS, order_digest, policy_digest
from fedlearn.protocol.messages import RequestKind
from fedlearn.protocol.training_order import pack_order

needs("dp_accounting", reason="the extra privacy is not installed")


@pytest.fixture
def events(clinic):
    """Return ``events(clinic) -> lines of its audit log``."""
    return lambda site: read_events(site.node.client_states.folder)


def test_each_request_of_a_run_is_one_line_with_sizes_and_digests(clinic, events):
    site = clinic()
    site.fit(round=1)
    site.evaluate(None, round=1)
    site.fit(round=2)
    lines = events(site)
    assert [(line["event"], line["kind"], line["round"]) for line in lines] == [
        ("request", "fit", 1),
        ("request", "evaluate", 1),
        ("request", "fit", 2),
    ]
    assert lines[0]["sent"]["delta"] == 4 * (NUM_FEATURES + 1) * len(lines[0]["clients"])
    assert lines[0]["num_bytes"] == sum(lines[0]["sent"].values())
    assert lines[0]["policy_sha256"] == policy_digest(site.node.policy)
    assert lines[0]["order_sha256"] != lines[2]["order_sha256"]
    assert verify(site.node.client_states.folder).problems == ()


def test_a_refusal_has_its_code_and_sends_nothing(clinic, events):
    site = clinic(policy={"max_rounds": 1})
    site.fit(round=1)
    response = site.fit(round=2)
    line = events(site)[-1]
    assert (line["event"], line["code"], line["sent"]) == ("request.refused", str(response.refusal.code), {})
    assert line["reference"] == response.refusal.reference
    assert site.node.respond_to_bytes(b"no request")
    assert events(site)[-1]["code"] == "request"


def test_no_number_of_refused_requests_fills_the_disk(clinic, events, monkeypatch):
    site = clinic(policy={"max_rounds": 1})
    site.fit(round=1)
    before = len(events(site))
    for _ in range(200):
        assert site.fit(round=2).refusal.code == "policy"
        assert site.node.respond_to_bytes(b"no request")
    lines = events(site)[before:]
    assert len(lines) == 100
    assert {line["event"] for line in lines} == {"request.refused"}
    now = time.monotonic()
    monkeypatch.setattr(audit_log.time, "monotonic", lambda: now + 3601.0)
    assert site.fit(round=2).refusal
    assert events(site)[-1]["omitted_refusals"] == {"policy": 150, "request": 150}
    assert site.fit(round=2).refusal
    assert "omitted_refusals" not in events(site)[-1]
    assert verify(site.node.client_states.folder).problems == ()


@pytest.mark.parametrize(
    ("total", "free", "is_refused"),
    [(2**40, 2**27, True), (2**40, 2**29, False), (10**6, 6 * 10**4, False), (10**6, 10**4, True)],
)
def test_requests_leave_some_space_on_the_disk_of_a_node(clinic, events, monkeypatch, total, free, is_refused):
    site = clinic()
    monkeypatch.setattr(disk_limits.shutil, "disk_usage", lambda folder: SimpleNamespace(total=total, free=free))
    for name in (lambda: site.fit(round=1), lambda: site.evaluate(None, round=1)):
        response = name()
        assert (response.refusal is not None and response.refusal.code == "disk") == is_refused
    folder = site.node.client_states.folder
    written = {path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert (written == {"audit.jsonl", "audit_head.json"}) == is_refused


def test_nothing_leaves_without_a_line(clinic, monkeypatch):
    site = clinic()

    def full(*arguments, **fields):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(site.node.audit.log, "append", full)
    response = site.fit(round=1)
    assert response.refusal.code == "internal"
    assert not response.content.arrays
    assert site.node.respond_to_bytes(b"no request")


def test_no_value_of_an_update_a_metric_or_an_example_enters_the_log(clinic, events):
    site = clinic()
    fit, metrics = site.fit(round=1), site.evaluate(None, round=1)
    text = json.dumps(events(site))
    for response in (fit, metrics):
        for array in response.content.arrays.values():
            for value in np.ravel(array):
                if value != round(float(value)):
                    assert f"{float(value):.5g}" not in text


def digest_of(request):
    return order_digest({name: getattr(request, name) for name in ORDER_FIELDS})


def test_the_digest_of_an_order_changes_with_each_part_but_its_id(clinic):
    order = Request(round=1, seed=1, params_D=np.zeros(5, np.float32))
    request = clinic().request(RequestKind.FIT, shared=pack_order(order), state_rounds=(0, 0))
    digest = digest_of(request)
    assert digest_of(replace(request, id="other")) == digest
    shared = Payload(metadata=request.shared.metadata, arrays={n: a + 1 for n, a in request.shared.arrays.items()})
    for changes in (
        {"round": 9},
        {"run": "other"},
        {"clients": (1,), "state_rounds": (0,)},
        {"kind": RequestKind.MASK},
        {"shared": shared},
    ):
        assert digest_of(replace(request, **changes)) != digest


def test_the_history_names_person_bytes_and_refusals_of_each_run(clinic, events, capsys, monkeypatch):
    site = clinic(policy={"max_rounds": 1})
    site.hello(content=Payload(metadata={"person": "ada\x1b[2J", "folder": "heart/x", "epsilon": "not ours"}))
    site.fit(round=1)
    site.fit(round=2)
    (row,) = summarize_runs(events(site))
    assert (row["person"], row["folder"], row["rounds"], row["num_refused"]) == ("ada [2J", "heart/x", 2, 1)
    assert row["outcome"].startswith("refused: policy")
    assert row["bytes_sent"] > 0
    folder = str(site.node.client_states.folder)
    assert history([folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row]
    assert history([folder]) == history([folder, "--events"]) == history([folder, "--csv"]) == 0
    assert "heart/x" in capsys.readouterr().out
    assert history([folder, "--verify"]) == 0
    path = site.node.client_states.folder / "audit.jsonl"
    path.write_text(path.read_text().replace("heart/x", "heart/y"))
    assert history([folder, "--verify"]) == 3
    assert "line 1: it was changed" in capsys.readouterr().out


def test_a_folder_without_a_log_is_refused(tmp_path, capsys):
    assert history([str(tmp_path)]) == 2
    assert "has no audit.jsonl" in capsys.readouterr().err
