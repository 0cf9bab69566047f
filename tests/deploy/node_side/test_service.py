"""The service of a node answers each request, whatever its content, or refuses it with a reason."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from fedlearn import Scenario, Stage, Strategy, Transform, everyone
from fedlearn.core import Request
from fedlearn.core.serialization import Payload
from fedlearn.deploy.audit_log import read_events
from fedlearn.deploy.node_side import service as services
from fedlearn.deploy.node_side.client_states import ClientStates
from fedlearn.deploy.node_side.experiment import NodeConfig
from fedlearn.deploy.node_side.node_audit import policy_digest
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.privacy_budget import PrivacyBudget
from fedlearn.deploy.node_side.reveal import Reveal
from fedlearn.deploy.node_side.service import NodeService
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.refusals import RefusalCode
from fedlearn.protocol.training_order import pack_order
from fedlearn.testing import LinearTrainer, linear_problem

WORDS = {"scenario": "problem", "strategy": "noting"}
HELLO = {"kind": RequestKind.HELLO, "run": "second", "round": 0, "id": "2", "settings": WORDS}
BUILDERS = {"scenario": {"problem": "site_code.problem"}, "strategy": {"noting": "site_code.noting"}}
SEEN = []


def problem(*, path: str | None = None, framework: str = "torch", device: str = "cpu"):
    SEEN.append({"path": path, "framework": framework, "device": device})
    data = linear_problem(num_clients=3)
    return Scenario(name="linear", data=data, trainer=LinearTrainer(3), model="linear")


def noting():
    """Return a strategy whose client half records whether clients run in a deployment."""

    def update(delta_KD, memory, context):
        SEEN.append(context.deployed)
        return delta_KD, memory

    return Strategy(select=everyone(), stages=(Stage(client=Transform(update=update)),))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return ``make(own, policy) -> service`` with the builders above, which its operator has registered."""
    SEEN.clear()
    module = ModuleType("site_code")
    for builder in (problem, noting):
        monkeypatch.setattr(builder, "__module__", "site_code")
        setattr(module, builder.__name__, builder)
    monkeypatch.setitem(sys.modules, "site_code", module)

    def of(separate=None, **policy):
        accepted = {"scenarios": {"problem": {}}, "strategies": {"noting": {}}, "builders": BUILDERS, **policy}
        return NodeService(
            separate or NodeConfig(clients=(0, 2)), Policy(**accepted), ClientStates(tmp_path / "client_states")
        )

    return of


def request_to_fit(*, clients=(0,), round=1, deployed=True, run="run", **changes):
    order = Request(round=round, seed=1, params_D=np.zeros(4, np.float32), deployed=deployed)
    fields = {"kind": RequestKind.FIT, "run": run, "round": round, "id": "1", "settings": WORDS, "clients": clients}
    fields |= {"state_rounds": (0,) * len(clients), "layout": LinearTrainer(3).layout.digest}
    return NodeRequest(**{**fields, "shared": pack_order(order), **changes})


def fit(site, **fields):
    return site.respond(request_to_fit(**fields))


def test_data_framework_and_device_are_the_operators_whatever_an_order_says(make, tmp_path):
    fit(make(NodeConfig(clients=(0,), data=tmp_path, framework="jax", device="cuda:1")))
    assert SEEN[0] == {"path": str(tmp_path), "framework": "jax", "device": "cuda:1"}


def test_without_data_of_its_own_a_site_searches_and_does_not_open_what_an_order_names(make):
    fit(make())
    assert SEEN[0]["path"] is None


def test_clients_are_real_even_if_an_order_denies_it_so_that_their_noise_cannot_follow_from_its_seed(make):
    fit(make(), deployed=False)
    assert SEEN[1] is True


def test_scenario_and_strategy_are_built_once(make):
    site = make()
    for round in (1, 2, 3):
        fit(site, round=round)
    assert sum(isinstance(item, dict) for item in SEEN) == 1


def test_numbers_of_examples_are_told_as_the_policy_says(make):
    exact = fit(make(), clients=(0, 2)).content.arrays["num_examples"]
    assert exact.tolist() == [5, 13]
    rounded = fit(make(reveal=Reveal(num_examples="rounded")), clients=(0, 2)).content.arrays
    assert rounded["num_examples"].tolist() == [5, 10]
    assert rounded["count/loss"].tolist() == [5, 10]
    exact = fit(make(), clients=(0, 2)).content.arrays
    assert np.allclose(rounded["total/loss"] / rounded["count/loss"], exact["total/loss"] / exact["count/loss"])


def test_an_order_that_breaks_the_site_is_answered_and_the_next_one_too(make, caplog):
    site = make()
    assert "another layout" in fit(site, layout="x").refusal.reason
    assert fit(site).clients == (0,)


def test_a_site_that_is_busy_says_so_instead_of_piling_requests_up(make, monkeypatch):
    site = make()
    monkeypatch.setattr(services, "LOCK_TIMEOUT_S", 0.1)
    with site._lock:
        assert "still busy" in fit(site).refusal.reason
    assert fit(site).clients == (0,)


def other_order(seed):
    """Return the fields of a training request with another seed, for the same round."""
    order = Request(round=1, seed=seed, params_D=np.zeros(4, np.float32))
    return {"shared": pack_order(order)}


def test_each_order_counts_before_it_trains_and_another_order_for_the_round_counts_again(make, tmp_path):
    site = make(max_rounds=2)
    for seed in (1, 2):
        assert fit(site, **other_order(seed)).refusal is None
    assert "max_rounds=2" in fit(site, **other_order(3)).refusal.reason
    assert fit(site, run="another").refusal is None
    assert ClientStates(tmp_path / "client_states").request_counts("run") == (2, 3)


HOSTILE_VALUES = (
    None,
    True,
    -1,
    2**60,
    0.5,
    "x",
    "../..",
    [],
    [[1]],
    {},
    {"_target_": "os.system"},
    {"_target_": ["a"]},
)
GROUPS = ("scenario", "strategy", "privacy", "compress", "buffers", "population")
NO_MECHANISM = "none"
HOSTILE_FIELDS = [
    *({"settings": {**WORDS, group: value}} for value in HOSTILE_VALUES for group in GROUPS),
    *({"settings": {**WORDS, "privacy": NO_MECHANISM, "population": value}} for value in HOSTILE_VALUES),
    *({"state_rounds": rounds} for rounds in (None, (2**50,), (7,))),
    *({"run": run} for run in ("", "../etc", "a/b", "x" * 200, ".", "-")),
    {"shared": Payload()},
    {"shared": Payload(metadata={"seed": 1, "local": {"epochs": 10**90}}, arrays={"params": np.zeros(4, np.float32)})},
    {"content": Payload(metadata={"registered": {"0": "zz"}, "seed": "1"})},
    {"content": Payload(metadata={"seed": 10**90}, arrays={"message/0": np.zeros((2, 2), np.uint8)})},
    {"clients": (), "state_rounds": ()},
    {"clients": (0, 1, 2), "state_rounds": (0, 0, 0)},
]  # fmt: skip


def test_a_response_that_cannot_be_packed_is_refused(make, monkeypatch):
    site, request = make(), request_to_fit()
    broken = NodeResponse.to(request, content=Payload(metadata={"share": float("nan")}))
    monkeypatch.setattr(site, "respond", lambda request: broken)
    response = NodeResponse.unpack(site.respond_to_bytes(request.pack()), request, max_bytes=2**20)
    assert response.refusal.code == RefusalCode.INTERNAL


@pytest.mark.parametrize("kind", RequestKind)
def test_a_service_responds_to_any_request_with_results_or_a_refusal(make, kind):
    site = make()
    for changes in HOSTILE_FIELDS:
        request = request_to_fit(**{"kind": kind, **changes})
        response = NodeResponse.unpack(site.respond_to_bytes(request.pack()), request, max_bytes=2**20)
        assert response.refusal is None or response.refusal.reason, changes
        assert response.refusal is None or "Traceback" not in response.refusal.reason
    assert fit(site).clients == (0,)


class Killed(BaseException):
    """Ends a request as a kill of the process does: no block cleans up."""


@pytest.fixture
def private(make, monkeypatch):
    """Return a service that charges each training, and a list of the rounds that it has charged."""
    site, charges = make(), []
    monkeypatch.setattr(type(site.budget), "charge_training", lambda self, guarantee, release: charges.append(release))
    return site, charges


def killed_in_training(site, monkeypatch, **fields):
    """Send a request to a service that is killed in the training."""
    with monkeypatch.context() as patch:
        patch.setattr(services.LocalClients, "train", lambda *arguments: (_ for _ in ()).throw(Killed))
        patch.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: None)  # a killed process removes nothing
        with pytest.raises(Killed):
            fit(site, **fields)


def test_a_request_after_a_kill_trains_and_is_not_charged_twice(private, make, monkeypatch):
    site, charges = private
    killed_in_training(site, monkeypatch)
    restarted = make()
    response = fit(restarted)
    assert response.clients == (0,)
    assert len(charges) == 1
    assert restarted.client_states.request_counts("run") == (1, 1)


def test_a_replayed_request_gets_the_stored_response_also_after_a_restart(private, make):
    site, charges = private
    first = fit(site)
    for again in (site, make(), make()):
        replayed = fit(again, id="another id")
        assert replayed.content.arrays["delta"].tobytes() == first.content.arrays["delta"].tobytes()
    assert len(charges) == 1


def test_only_the_equal_request_is_free_after_a_kill(private, make, monkeypatch):
    site, charges = private
    killed_in_training(site, monkeypatch)
    assert fit(make(), round=2).clients == (0,)
    assert len(charges) == 2
    assert fit(make()).clients == (0,)  # round 2 replaced the free attempt of round 1
    assert len(charges) == 3


def test_a_request_whose_response_has_left_costs_again_when_its_response_is_deleted(private, make, monkeypatch):
    site, charges = private
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda self, missing_ok=False: None)  # killed after it has stored
        fit(site)
    for number in range(12):
        fit(make(), run=f"other{number}")
    assert len(charges) == 13
    fit(make())
    assert len(charges) == 14


def test_training_that_fails_is_paid_for_each_time(private, make, monkeypatch):
    _, charges = private

    def raises(*arguments):
        raise RuntimeError("the scanner is offline")

    monkeypatch.setattr(services.LocalClients, "train", raises)
    for _ in range(2):
        assert fit(make()).refusal.code == RefusalCode.INTERNAL
    assert len(charges) == 2


def test_a_node_reads_changed_data_at_the_next_hello_and_refuses_without_them(make, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.csv").write_text("1")
    site = make(NodeConfig(clients=(0,), data=folder))
    hello = NodeRequest(kind=RequestKind.HELLO, run="run", round=0, id="1", settings=WORDS)
    for _ in range(2):
        assert site.respond(hello).refusal is None
    assert len([seen for seen in SEEN if isinstance(seen, dict)]) == 1
    (folder / "a.csv").write_text("23")
    assert site.respond(hello).refusal is None
    assert len([seen for seen in SEEN if isinstance(seen, dict)]) == 2


def test_a_run_without_a_hello_request_does_not_train_on_removed_data(make, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.csv").write_text("1")
    site = make(NodeConfig(clients=(0,), data=folder))
    assert fit(site, run="first").refusal is None
    (folder / "a.csv").unlink()
    assert fit(site, run="first", round=2).refusal is None  # a run keeps its data
    assert len([seen for seen in SEEN if isinstance(seen, dict)]) == 1
    assert fit(site, run="second").refusal is None
    assert len([seen for seen in SEEN if isinstance(seen, dict)]) == 2


def test_the_audit_log_has_the_policy_that_accepted_the_request(make, monkeypatch):
    site = make()
    first, second = site.policy, replace(site.policy, max_rounds=1)
    epsilon, policies, hello = PrivacyBudget.epsilon, [first], NodeRequest(**HELLO)
    monkeypatch.setattr(site, "_policy_file", SimpleNamespace(current=lambda: policies[-1]))

    def change_the_policy_first(budget):
        if len(policies) == 1:  # another request arrives between the work and the line of the log
            policies.append(second)
            assert site.respond(hello).refusal is None
        return epsilon(budget)

    monkeypatch.setattr(PrivacyBudget, "epsilon", change_the_policy_first)
    assert fit(site, run="first").refusal is None
    digests = {line["kind"]: line["policy_sha256"] for line in read_events(site.client_states.folder)}
    assert digests == {"fit": policy_digest(first), "hello": policy_digest(second)}
