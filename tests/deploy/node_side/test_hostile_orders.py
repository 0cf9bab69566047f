"""No order of a coordinator makes a node import, call, read or write anything that its operator has not registered.

Each hostile order changes a valid order at one place. The node must refuse it in bounded time, before it builds a part.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.core import LocalSettings, Request
from fedlearn.deploy.node_side import experiment
from fedlearn.deploy.node_side.client_states import ClientStates
from fedlearn.deploy.node_side.experiment import NodeConfig
from fedlearn.deploy.node_side.policy import EXAMPLE_POLICY, Policy, read_policy
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.deploy.node_side.service import NodeService
from fedlearn.protocol.messages import NodeRequest, NodeResponse, RequestKind
from fedlearn.protocol.training_order import pack_order

LIMIT_S = 2.0  # limit of one refusal
SECRET = "hunter2-very-secret"
NAMES = ("heart", "fedavg", "fedprox", "nnm", "krum", "flower", "local", "topk", "natural", "dirichlet", "mlp")
ORDER = {
    "scenario": {"name": "heart", "framework": "torch", "model": "mlp", "seed": 1, "partition": {"name": "natural"}},
    "strategy": {"name": "nnm", "rule": {"name": "krum", "num_malicious": 1}, "clients_per_round": 4},
    "privacy": {"name": "local", "clip_norm": 1.0, "noise_multiplier": 1.0},
    "population": {"num_clients": 4, "rounds": 10},
    "compress": {"name": "topk", "share": 0.1},
    "buffers": "refuse",
}
TARGETS = (
    "os.system",
    "builtins.eval",
    "subprocess.getoutput",
    "pathlib.Path.write_text",
    "fedlearn.deploy.keys.main",
    "fedlearn.deploy.processes.Child.start",
    "fedlearn.deploy.submit.compose_request",
    "fedlearn.runner.instantiation.build",
    "fedlearn.runner.builders.import_module",
    "fedlearn.core.checkpoint.os.remove",
    "fedlearn.algorithm.aggregation.np.save",
    "fedlearn.algorithm.strategy.Strategy.__init__",
    "flwr.serverapp.strategy.FedAvg.start",
    "flwr.serverapp.strategy",
    "simulations.run.main",
    "simulations.scenarios.heart.heart",
    "strategies.fedavg",
    "strategies._hidden",
    "fedlearn.data.partition.Dirichlet",
    "ｏｓ.system",
    "os .system",
    "os\u200b.system",
)
SPECIAL_KEYS = ("_target_", "_args_", "_partial_", "_convert_", "_recursive_", "_self_", "_name_")
TEXTS = (
    "${oc.env:SECRET_OF_THE_NODE}",
    "a ${oc.env:SECRET_OF_THE_NODE} b",
    "${oc.decode:${oc.env:SECRET_OF_THE_NODE}}",
    "${hydra:runtime.cwd}",
    "../../etc/passwd",
    "/etc/passwd",
    "~/.ssh/id_rsa",
    "file:///etc/passwd",
    "x" * 100_000,
    "\x1b[2J\r\n",
    "\ud800",
    "heart\x00",
    "ｈｅａｒｔ",
    "Heart",
    " heart",
    "heart ",
    "self",
    "__class__",
    *TARGETS,
)
NUMBERS = (True, -1, 0.5, 2**31, 2**63, 10**90, -(10**90), 1e300, float("nan"), float("inf"), float("-inf"))
EXTRA_KEYS = (*SPECIAL_KEYS, "self", "path", "device", "deployed", "encoder", "allow_targets", "argv")
CODE = st.builds(
    lambda target, more: {"_target_": target, **more},
    st.sampled_from(TARGETS),
    st.dictionaries(st.sampled_from(EXTRA_KEYS), st.sampled_from((TEXTS[0], [1]))),
)
LEAVES = st.one_of(st.sampled_from(TEXTS), st.sampled_from(NUMBERS), CODE, st.text(max_size=5), st.binary(max_size=3))
KEYS = st.one_of(st.sampled_from(EXTRA_KEYS), st.text(max_size=4))
HOSTILE = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=6,
)


def places(node, path=()):
    """Return the path of each value in an order."""
    found = [path]
    for key, value in node.items() if isinstance(node, dict) else ():
        found += places(value, (*path, key))
    return found[1:] if not path else found


PLACES = places(ORDER)


def changed(path, key, value):
    """Return the order with a hostile value at a path, or under a new key at this path."""
    order = deepcopy(ORDER)
    node = order
    for part in path[:-1]:
        node = node[part]
    inside = node[path[-1]]
    if key is not None and isinstance(inside, dict):
        inside[key] = value
    else:
        node[path[-1]] = value
    return order


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "policy.yaml"
    path.write_text(EXAMPLE_POLICY)
    example = read_policy(path)
    accepted = {name: {} for name in ("fedavg", "fedprox", "nnm", "krum", "flower")}
    return Policy(scenarios=example.scenarios, strategies=accepted, local=example.local)


def run_time(function):
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


def is_plain_change(order):
    """Return whether an order has only names of options and values that a coordinator may choose."""
    text = repr(order)
    return not any(special in text for special in (*SPECIAL_KEYS, "${", "etc/passwd"))


@pytest.fixture(scope="module")
def warm(policy):
    """Import the builders of the valid order, so that each later import is due to a hostile order."""
    policy.check_settings(ORDER)
    return set(sys.modules)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(path=st.sampled_from(PLACES), key=st.none() | KEYS, value=HOSTILE)
def test_a_changed_order_is_refused_or_has_only_registered_builders(policy, warm, path, key, value):
    order = changed(path, key, value)
    try:
        resolved, seconds = run_time(lambda: policy.check_settings(order))
    except PolicyViolation as error:
        refusal = str(error)
        assert len(refusal) < 2_000
        assert refusal.isprintable(), refusal
        assert SECRET not in refusal
    else:
        assert seconds < LIMIT_S
        assert set(targets(resolved)) <= registered(policy)
        assert is_plain_change(order)
    assert {name for name in set(sys.modules) - warm if not name.startswith(("hypothesis", "_hypothesis"))} == set()


def targets(node):
    """Return each ``_target_`` of resolved settings."""
    if isinstance(node, dict):
        here = [node["_target_"]] if "_target_" in node else []
        return here + [target for value in node.values() for target in targets(value)]
    return [target for value in node for target in targets(value)] if isinstance(node, list) else []


def registered(policy):
    return {target for group in policy.registry.builders.values() for target in group.values() if target}


BOMBS = {
    "a deep list": lambda: json.loads("[" * 900 + "]" * 900),
    "a deep mapping": lambda: json.loads('{"a":' * 900 + "1" + "}" * 900),
    "a long list": lambda: [0] * 1_000_000,
    "a wide mapping": lambda: {str(number): number for number in range(300_000)},
    "a long text": lambda: "x" * 8_000_000,
    "a long key": lambda: {"x" * 8_000_000: 1},
    "a huge number": lambda: 10**99,
    "many nested options": lambda: nested_rules(50),
}


def nested_rules(depth):
    rule = {"name": "krum"}
    for _ in range(depth):
        rule = {"name": "nnm", "rule": rule}
    return rule


@pytest.mark.parametrize("path", [("scenario",), ("scenario", "model"), ("strategy", "rule"), ("population", "rounds")])
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_large_or_deep_order_is_refused_in_bounded_time(policy, bomb, path):
    order = changed(path, None, BOMBS[bomb]())

    def refused():
        with pytest.raises(PolicyViolation) as error:
            policy.check_settings(order)
        return str(error.value)

    text, seconds = run_time(refused)
    assert seconds < LIMIT_S
    assert len(text) < 2_000


@pytest.fixture
def node(tmp_path, policy, monkeypatch):
    """Return a node whose builders fail the test if anything is built."""
    pytest.importorskip("cbor2")
    importlib.import_module("fedlearn.deploy.node_side.masked_clients")  # a request of the kind mask imports it
    monkeypatch.setenv("SECRET_OF_THE_NODE", SECRET)
    monkeypatch.setattr(experiment, "build", lambda *a, **k: pytest.fail("the node has built something"))
    return NodeService(NodeConfig(clients=(0,)), policy, ClientStates(tmp_path / "states"))


SURE = [
    *({"_target_": target} for target in TARGETS),
    *({"_target_": target, "_partial_": True, "self": {"_target_": target}} for target in TARGETS),
    {"name": "fedavg", "_target_": "os.system"},
    [{"deep": [{"_target_": "os.system"}]}],
    {"name": {"_target_": "os.system"}},
    {"name": ["fedavg"]},
    {"name": "fedavg", "_args_": [1]},
    {"name": "fedavg", "weighting": "${oc.env:SECRET_OF_THE_NODE}"},
    {"name": "fedavg", "${oc.env:SECRET_OF_THE_NODE}": 1},
    {"name": "strategies.fedavg"},
    *TARGETS,
]


OPTIONS = ("scenario", "strategy", "rule", "privacy", "partition", "compress")
PATHS_OF_OPTIONS = [path for path in PLACES if path[-1] in OPTIONS]


@pytest.mark.parametrize("kind", RequestKind)
def test_no_request_with_code_reaches_a_builder_and_none_tells_a_secret(node, kind, tmp_path):
    order = Request(round=1, seed=1, params_D=np.zeros(3, np.float32), local=LocalSettings())
    loaded = set(sys.modules)
    for path in PATHS_OF_OPTIONS:
        for value in SURE:
            request = NodeRequest(
                kind=kind,
                run="run",
                round=1,
                id="1",
                settings=changed(path, None, value),
                clients=() if kind == RequestKind.HELLO else (0,),
                state_rounds=None if kind == RequestKind.HELLO else (0,),
                shared=pack_order(order),
            )
            response = node.respond_to_bytes(request.pack())
            assert SECRET.encode() not in response
            assert NodeResponse.unpack(response, request, max_bytes=2**20).refusal is not None
    assert {name for name in set(sys.modules) - loaded if not name.startswith("hypothesis")} == set()
    written = {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert set(written) <= {".lock", "audit.jsonl", ".audit.jsonl.lock", "audit_head.json"}
    assert all(SECRET.encode() not in content for content in written.values())
