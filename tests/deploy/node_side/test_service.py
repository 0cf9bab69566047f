"""The service of a node answers each request, whatever its content, or refuses it with a reason."""

import sys
from types import ModuleType

import numpy as np
import pytest

from fedlearn import Scenario, Stage, Strategy, Transform, everyone
from fedlearn.core import Request
from fedlearn.core.serialization import Payload
from fedlearn.deploy.node_side import service as services
from fedlearn.deploy.node_side.client_states import ClientStates
from fedlearn.deploy.node_side.experiment import NodeConfig
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.reveal import Reveal
from fedlearn.deploy.node_side.service import NodeService
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.refusals import RefusalCode
from fedlearn.protocol.training_order import pack_order
from fedlearn.testing import LinearTrainer, linear_problem

WORDS = {"scenario": "problem", "strategy": "noting"}
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

    def of(own=None, **policy):
        accepted = {"scenarios": {"problem": {}}, "strategies": {"noting": {}}, "builders": BUILDERS, **policy}
        return NodeService(
            own or NodeConfig(clients=(0, 2)), Policy(**accepted), ClientStates(tmp_path / "client_states")
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
    assert sum(isinstance(one, dict) for one in SEEN) == 1


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
