"""A coordinator cannot choose a model or partition that the policy of a node does not accept."""

import pytest

from fedlearn.data.partition import PARTITIONS
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.deploy.rehearse import minimal_policy
from fedlearn.errors import FedlearnError

HEART = "simulations.scenarios.heart.heart"
NATURAL = {"_target_": "fedlearn.data.partition.Natural", "num_clients": None, "test_share": None}
STRATEGY = {"_target_": "strategies.fedavg"}
FLOWER = "flwr.serverapp.strategy.FedAvg"
# its module is allowed, but it reads files
READER = {"_target_": "simulations.datasets.mnist.read_images", "path": "/etc"}


def target(kind: str) -> str:
    return f"fedlearn.data.partition.{PARTITIONS[kind].__name__}"


def check(bounds=None, **settings):
    scenario = {"_target_": HEART, "model": "mlp", "partition": NATURAL, **settings}
    Policy(scenarios={HEART: bounds or {}}, strategies={"strategies.fedavg": {}}).check_settings(
        {"scenario": scenario, "strategy": STRATEGY}
    )


@pytest.mark.parametrize("partition", [NATURAL, {"_target_": target("natural")}, "natural", None])
def test_a_policy_that_names_no_partition_accepts_natural_clients_and_the_default(partition):
    check(partition=partition)


@pytest.mark.parametrize("kind", [kind for kind in PARTITIONS if kind != "natural"])
@pytest.mark.parametrize("form", ["name", "mapping"])
def test_a_partition_that_moves_rows_between_clients_needs_the_consent_of_the_node(kind, form):
    partition = kind if form == "name" else {"_target_": target(kind), "num_clients": 1}
    with pytest.raises(PolicyViolation, match=f"partition is {kind}; this node accepts one of natural"):
        check(partition=partition)
    check({"partition": {"one_of": ["natural", kind]}}, partition=partition)


@pytest.mark.parametrize(
    ("bounds", "settings", "reason"),
    [
        ({}, {"partition": READER}, "partition is simulations.datasets.mnist.read_images"),
        ({}, {"partition": {"_target_": "my_code.Mine"}}, "partition is my_code.Mine"),
        ({}, {"partition": {**NATURAL, "order": READER}}, "partition.order has a _target_"),
        ({}, {"partition": [NATURAL]}, "has a _target_"),
        ({}, {"partition": {**NATURAL, "_args_": [1]}}, "partition._args_"),
        ({}, {"partition": {"num_clients": 3}}, "partition is None"),
        ({}, {"model": READER}, "model is simulations.datasets.mnist.read_images"),
        ({}, {"model": {"_target_": "torch.load", "f": "/etc/passwd"}}, "model is torch.load"),
        ({}, {"model": [READER]}, "has a _target_"),
        ({}, {"model": {"hidden": 3}}, "model is None"),
        ({"model": {"one_of": ["mlp"]}}, {"model": "cnn"}, "model is cnn; this node accepts one of mlp"),
        ({"model": {"one_of": ["my.Net"]}}, {"model": {"_target_": "my.Net", "a": {"b": READER}}}, "has a _target_"),
        ({"model": {"one_of": ["my.Net"]}}, {"model": "mlp"}, "model is mlp; this node accepts one of my.Net"),
        ({}, {"path": READER}, "path has a _target_"),
        ({}, {"seed": [{"deep": READER}]}, "has a _target_"),
        ({}, {"_args_": [3]}, "scenario._args_"),
        ({}, {"_partial_": True}, "scenario._partial_"),
        ({}, {"seed": "${oc.env:HOME}"}, "interpolation"),
        ({}, {"partition": {**NATURAL, "num_clients": "${oc.env:HOME}"}}, "interpolation"),
        (
            {"partition": {"one_of": ["dirichlet"]}, "partition.alpha": [0.5, 10]},
            {"partition": {"_target_": target("dirichlet"), "alpha": 0.1}},
            "partition.alpha is 0.1; this node accepts 0.5 to 10",
        ),
        (
            {"partition": {"one_of": ["dirichlet"]}, "partition.alpha": [0.5, 10]},
            {"partition": {"_target_": target("dirichlet"), "alpha": None}},
            "partition.alpha is None",
        ),
        ({"partition": {"one_of": ["dirichlet"]}, "partition.alpha": [0.5, 10]}, {"partition": "dirichlet"}, "alpha"),
        ({"partition.test_share": [0.1, 0.5]}, {"partition": {**NATURAL, "test_share": 0}}, "test_share is 0"),
    ],
)
def test_a_hostile_coordinator_is_refused(bounds, settings, reason):
    with pytest.raises(PolicyViolation, match=reason):
        check(bounds, **settings)


@pytest.mark.parametrize("group", ["strategy", "privacy", "compress"])
def test_no_group_of_a_request_holds_an_interpolation(group):
    request = {"scenario": {"_target_": HEART}, "strategy": STRATEGY}
    request[group] = {**request.get(group, {}), "x": ["${oc.env:HOME}"]}
    with pytest.raises(PolicyViolation, match="interpolation"):
        Policy(scenarios={HEART: {}}, strategies={"strategies.fedavg": {}}).check_settings(request)


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": {**STRATEGY, "weighting": READER}},
        {"strategy": {**STRATEGY, "parts": [{"deep": READER}]}},
        {"strategy": {**STRATEGY, "_args_": [1]}},
        {"privacy": {"_target_": "fedlearn.privacy.mechanisms.central", "clip_norm": READER}},
        {"compress": {"_target_": "fedlearn.compression.codecs.top_k", "share": READER}},
    ],
)
def test_no_group_of_a_request_runs_code_below_its_builder(settings):
    policy = Policy(scenarios={HEART: {}}, strategies={"strategies.fedavg": {}})
    with pytest.raises(PolicyViolation, match="plain values below a builder"):
        policy.check_settings({"scenario": {"_target_": HEART}, "strategy": STRATEGY, **settings})


def test_parts_of_a_strategy_may_stand_below_it():
    flower = {"_target_": "fedlearn.flower.from_flower.from_flower", "flower": {"_target_": FLOWER}}
    composed = {"_target_": "fedlearn.Strategy", "select": {"_target_": "fedlearn.algorithm.everyone"}}
    policy = Policy(scenarios={HEART: {}}, strategies={flower["_target_"]: {}, "fedlearn.Strategy": {}})
    for strategy in (flower, composed):
        policy.check_settings({"scenario": {"_target_": HEART}, "strategy": strategy})


def test_a_rehearsal_accepts_its_own_settings_and_no_other_partition():
    rule = {"_target_": "strategies.krum", "num_malicious": 1}
    settings = {
        "scenario": {"_target_": HEART, "model": "mlp", "partition": {"_target_": target("iid"), "num_clients": 2}},
        "strategy": {"_target_": "strategies.nnm", "rule": rule},
    }
    policy = Policy(**minimal_policy(settings))
    policy.check_settings(settings)
    with pytest.raises(PolicyViolation, match="partition is natural; this node accepts one of iid"):
        policy.check_settings({**settings, "scenario": {**settings["scenario"], "partition": NATURAL}})


def test_the_consent_of_the_node_covers_own_code_and_its_settings():
    bounds = {"model": {"one_of": ["my.Net"]}, "model.hidden": [1, 64], "partition": {"one_of": ["my.Mine"]}}
    own = {"_target_": "my.Mine", "num_clients": 3}
    check(bounds, model={"_target_": "my.Net", "hidden": 8}, partition=own)
    with pytest.raises(PolicyViolation, match=r"model\.hidden is 65; this node accepts 1 to 64"):
        check(bounds, model={"_target_": "my.Net", "hidden": 65}, partition=own)


def test_bounds_of_a_setting_that_the_partition_lacks_do_not_apply():
    check({"partition": {"one_of": ["natural", "dirichlet"]}, "partition.alpha": [0.5, 10]}, partition=NATURAL)


@pytest.mark.parametrize("old", ["num_clients", "alpha", "classes_per_client", "test_share"])
def test_bounds_by_an_old_name_are_refused_with_the_new_one(old):
    with pytest.raises(FedlearnError, match=f"partition.{old}"):
        Policy(scenarios={HEART: {old: [0, 3]}}, strategies={})
