"""A coordinator cannot choose an option or a value that the policy of a node does not accept."""

import pytest

from fedlearn.data.partition import PARTITIONS
from fedlearn.deploy.node_side.bounds import DEFAULT_BOUNDS, LOCAL_BOUNDS, require_local_within
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.deploy.rehearse import minimal_policy
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.runner.registry import GROUPS, installed_registry, parameter_types

NATURAL = {"name": "natural", "num_clients": None, "test_share": None}
OWN_CODE = """
from dataclasses import dataclass

from fedlearn.data.partition_kinds import Iid


def net(*, hidden: int = 8):
    return hidden


@dataclass(frozen=True)
class Mine(Iid):
    kind = "mine"
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    parameter_types.cache_clear()
    return {"model": {"net": "own_code.net"}, "partition": {"mine": "own_code.Mine"}}


def check(bounds=None, builders=None, **settings):
    scenario = {"name": "heart", "model": "mlp", "partition": NATURAL, **settings}
    policy = Policy(scenarios={"heart": bounds or {}}, strategies={"fedavg": {}}, builders=builders or {})
    return policy.check_settings({"scenario": scenario, "strategy": "fedavg"})


@pytest.mark.parametrize("partition", [NATURAL, {"name": "natural"}, "natural", None])
def test_a_policy_that_names_no_partition_accepts_natural_clients_and_the_default(partition):
    check(partition=partition)


@pytest.mark.parametrize("kind", [kind for kind in PARTITIONS if kind != "natural"])
@pytest.mark.parametrize("form", ["name", "mapping"])
def test_a_partition_that_moves_rows_between_clients_needs_the_consent_of_the_node(kind, form):
    partition = kind if form == "name" else {"name": kind, "num_clients": 1}
    with pytest.raises(PolicyViolation, match=f"partition is {kind}; this node accepts one of natural"):
        check(partition=partition)
    check({"partition": {"one_of": ["natural", kind]}}, partition=partition)


@pytest.mark.parametrize(
    ("bounds", "settings", "reason"),
    [
        ({}, {"partition": {"num_clients": 3}}, "partition is None"),
        ({}, {"model": {"hidden": 3}}, "model is None"),
        (
            {},
            {"model": {"name": "mlp", "hidden": 3}},
            r"hidden is 3; this node accepts no setting: model mlp",
        ),
        ({"model": {"one_of": ["mlp"]}}, {"model": "linear"}, "model is linear; this node accepts one of mlp"),
        ({}, {"path": "/etc"}, "scenario.path is /etc; this node accepts one of framework, model, partition, seed"),
        ({}, {"device": "cuda:0"}, "scenario.device is cuda:0"),
        (
            {"partition": {"one_of": ["dirichlet"]}, "partition.alpha": [0.5, 10]},
            {"partition": {"name": "dirichlet", "alpha": 0.1}},
            "partition.alpha is 0.1; this node accepts 0.5 to 10",
        ),
        (
            {"partition": {"one_of": ["dirichlet"]}, "partition.alpha": [0.5, 10]},
            {"partition": {"name": "dirichlet", "alpha": None}},
            "partition.alpha is None",
        ),
        ({"partition": {"one_of": ["dirichlet"]}, "partition.alpha": [0.5, 10]}, {"partition": "dirichlet"}, "alpha"),
        ({"partition.test_share": [0.1, 0.5]}, {"partition": {**NATURAL, "test_share": 0}}, "test_share is 0"),
        ({"partition.test_share": [0.1, 0.5]}, {"partition": None}, "test_share is None"),
        ({}, {"partition": {**NATURAL, "num_clients": 10**6}}, "num_clients is 1000000; this node accepts 1 to 10000"),
    ],
)
def test_a_hostile_coordinator_is_refused(bounds, settings, reason):
    with pytest.raises(PolicyViolation, match=reason):
        check(bounds, **settings)


def test_a_strategy_inside_a_strategy_needs_the_consent_of_the_node_too():
    nested = {"name": "nnm", "rule": {"name": "krum", "num_to_keep": 3}}
    order = {"scenario": "heart", "strategy": nested}
    with pytest.raises(PolicyViolation, match=r"strategy\.rule krum is not accepted; this node accepts nnm"):
        Policy(scenarios={"heart": {}}, strategies={"nnm": {}}).check_settings(order)
    Policy(scenarios={"heart": {}}, strategies={"nnm": {}, "krum": {}}).check_settings(order)
    bounded = Policy(scenarios={"heart": {}}, strategies={"nnm": {}, "krum": {"num_to_keep": [1, 2]}})
    with pytest.raises(PolicyViolation, match="num_to_keep is 3; this node accepts 1 to 2"):
        bounded.check_settings(order)
    with pytest.raises(PolicyViolation, match=r"strategy\.rule is krum; this node accepts one of rfa"):
        Policy(scenarios={"heart": {}}, strategies={"nnm": {"rule": {"one_of": ["rfa"]}}, "krum": {}}).check_settings(
            order
        )


def test_a_rehearsal_accepts_its_own_settings_and_no_other_partition():
    scenario = {"name": "heart", "model": "mlp", "partition": {"name": "iid", "num_clients": 2}}
    settings = {"scenario": scenario, "strategy": {"name": "nnm", "rule": {"name": "krum", "num_malicious": 1}}}
    policy = Policy(**minimal_policy(settings, {}))
    policy.check_settings(settings)
    with pytest.raises(PolicyViolation, match="partition is natural; this node accepts one of iid"):
        policy.check_settings({**settings, "scenario": {**scenario, "partition": NATURAL}})


def test_builders_of_the_operator_have_names_and_bounds(own_code):
    current = {"name": "mine", "num_clients": 3}
    bounds = {"model.hidden": [1, 64], "partition": {"one_of": ["mine"]}}
    resolved = check(bounds, own_code, model={"name": "net", "hidden": 8}, partition=current)
    assert resolved["scenario"]["model"] == {"_target_": "own_code.net", "hidden": 8}
    with pytest.raises(PolicyViolation, match=r"model\.hidden is 65; this node accepts 1 to 64"):
        check(bounds, own_code, model={"name": "net", "hidden": 65}, partition=current)
    with pytest.raises(PolicyViolation, match=r"model\.hidden is large; this node accepts a whole number"):
        check(bounds, own_code, model={"name": "net", "hidden": "large"}, partition=current)
    check(bounds, own_code, model="mlp", partition=current)  # this model has no setting hidden


@pytest.mark.parametrize(
    ("builders", "reason"),
    [
        ({"strategies": {"mine": "my.mine"}}, r"builders\.strategies is"),
        ({"strategy": {"fedavg": "my.mine"}}, "a name that no installed option has"),
        ({"strategy": {"my.mine": "my.mine"}}, "a name of letters, digits and _"),
        ({"strategy": {"mine": "mine"}}, "a dotted name, module and builder"),
        ({"strategy": {"mine": {"_target_": "my.mine"}}}, "a dotted name, module and builder"),
        (["my"], "a mapping of groups"),
    ],
)
def test_invalid_builders_of_an_operator_are_refused(builders, reason):
    with pytest.raises(SettingError, match=reason):
        Policy(scenarios={}, strategies={}, builders=builders)


def test_bounds_of_a_setting_that_the_partition_lacks_do_not_apply():
    check({"partition": {"one_of": ["natural", "dirichlet"]}, "partition.alpha": [0.5, 10]}, partition=NATURAL)


@pytest.mark.parametrize("old", ["num_clients", "alpha", "classes_per_client", "test_share"])
def test_bounds_by_an_old_name_are_refused_with_the_new_one(old):
    with pytest.raises(FedlearnError, match=f"partition.{old}"):
        Policy(scenarios={"heart": {old: [0, 3]}}, strategies={})


@pytest.mark.parametrize(
    ("accepts", "fix"),
    [
        ({"scenarios": {"simulations.scenarios.heart.heart": {}}, "strategies": {}}, r"try       heart: \{\}"),
        ({"scenarios": {}, "strategies": {"strategies.fedprox": {}}}, r"try       fedprox: \{\}"),
        ({"scenarios": {}, "strategies": {"my_code.mine": {}}}, r"builders: \{strategy: \{mine: my_code\.mine\}\}"),
    ],
)
def test_a_policy_with_a_dotted_name_is_refused_with_the_name_of_the_option(accepts, fix):
    with pytest.raises(SettingError, match=fix) as refused:
        Policy(**accepts)
    assert len(str(refused.value).splitlines()) == 3


def test_every_whole_number_of_an_installed_option_has_a_default_bound():
    pytest.importorskip("flwr")
    registry, groups = installed_registry(), {"scenario", "partition", "strategy", "privacy", "compress", "flower"}
    assert groups < set(GROUPS)
    hints = {
        (group, name, key): hint
        for group in groups
        for name, target in registry.builders[group].items()
        for key, hint in parameter_types(str(target)).items()
    }
    whole = {key for (_, _, key), hint in hints.items() if hint is int or hint == (int | None)}
    assert whole == set(DEFAULT_BOUNDS)


@pytest.mark.parametrize("key", LOCAL_BOUNDS)
def test_local_training_has_default_bounds(key):
    local = {"epochs": 1, "steps": None, "batch_size": 32, "learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    require_local_within(local, {})
    with pytest.raises(PolicyViolation, match=rf"local\.{key} is"):
        require_local_within({**local, key: 10**7}, {})
    bounds = {key: [0, 10**8], "batch_size": [0, 10**8]}
    require_local_within({**local, key: 10**7}, bounds)


def test_the_examples_of_one_request_are_bounded():
    local = {"epochs": 1, "steps": 10_000, "batch_size": 2_000, "learning_rate": 0, "momentum": 0, "weight_decay": 0}
    with pytest.raises(PolicyViolation, match="is 20000000; this node accepts at most 10000000"):
        require_local_within(local, {})


LOCAL_DP = {"name": "local", "clip_norm": 1.0, "noise_multiplier": 1.0}


@pytest.mark.parametrize(
    ("privacy", "population", "reason"),
    [
        (
            {**LOCAL_DP, "epsilon": 1.0},
            {"num_clients": 4, "rounds": 10},
            "this node accepts a calibrated noise_multiplier",
        ),
        (LOCAL_DP, {"num_clients": 4, "rounds": 201}, "population.rounds is 201; this node accepts 1 to 200"),
        (LOCAL_DP, {"num_clients": 10**7, "rounds": 1}, "population.num_clients is 10000000; this node accepts 1 to"),
        (LOCAL_DP, {"num_clients": 4, "rounds": True}, "population.rounds is True"),
        (LOCAL_DP, {"num_clients": 4}, "this node accepts num_clients and rounds"),
        (LOCAL_DP, {"num_clients": 4, "rounds": 1, "more": 1}, "this node accepts num_clients and rounds"),
        (LOCAL_DP, None, "this node accepts num_clients and rounds"),
        (
            {"name": "ftrl", "noise_multiplier": 1.0, "bands": 10**6},
            {"num_clients": 4, "rounds": 1},
            "privacy.bands is",
        ),
    ],
)
def test_a_node_calibrates_nothing_and_bounds_the_population(privacy, population, reason):
    order = {"scenario": "heart", "strategy": "fedavg", "privacy": privacy, "population": population}
    with pytest.raises(PolicyViolation, match=reason):
        Policy(scenarios={"heart": {}}, strategies={"fedavg": {}}).check_settings(order)


def test_settings_beyond_the_known_groups_are_refused():
    policy = Policy(scenarios={"heart": {}}, strategies={"fedavg": {}})
    for more in ({"allow_targets": ["os"]}, {"builders": {}}, {"framework": "torch"}, {"buffers": ["average"]}):
        with pytest.raises(PolicyViolation):
            policy.check_settings({"scenario": "heart", "strategy": "fedavg", **more})


def check_model(model, models=None, bounds=None):
    policy = Policy(scenarios={"text": bounds or {}}, strategies={"fedavg": {}}, models=models or {})
    scenario = {"name": "text", "model": model, "partition": NATURAL}
    return policy.check_settings({"scenario": scenario, "strategy": "fedavg"})["scenario"]["model"]


def test_a_request_names_a_pretrained_model_and_the_operator_its_folder():
    built = check_model({"name": "hf", "path": "bert", "rank": 4, "revision": "main"}, {"bert": "/srv/bert"})
    assert (built["path"], built["rank"], built["revision"]) == ("/srv/bert", 4, None)
    for bounds in ({"model.path": {"one_of": ["bert"]}}, {"model.rank": [1, 4]}):
        check_model({"name": "hf", "path": "bert", "rank": 4}, {"bert": "/srv/bert"}, bounds)


@pytest.mark.parametrize(
    "path",
    [
        "/etc",
        "../bert",
        "~/bert",
        "bert/../../etc",
        "owner/bert",
        "hf://owner/bert",
        ".",
        "..",
        "",
        "other",
        None,
        1,
        ["bert"],
    ],
)
def test_no_request_chooses_a_folder_or_a_name_on_the_hub(path):
    with pytest.raises(PolicyViolation, match=r"model\.path"):
        check_model({"name": "hf", "path": path}, {"bert": "/srv/bert"})
    with pytest.raises(PolicyViolation, match=r"no pretrained model|not a path|model\.path"):
        check_model({"name": "hf", "path": path})


def test_bounds_hold_for_the_settings_of_a_pretrained_model():
    with pytest.raises(PolicyViolation, match=r"model\.rank"):
        check_model({"name": "hf", "path": "bert", "rank": 8}, {"bert": "/srv/bert"}, {"model.rank": [1, 4]})
    with pytest.raises(PolicyViolation, match=r"model\.rank"):
        check_model({"name": "hf", "path": "bert", "rank": 100_000}, {"bert": "/srv/bert"})


@pytest.mark.parametrize("models", [{"bert": "relative"}, {"a/b": "/srv"}, ["bert"], {"bert": 1}])
def test_wrong_folders_of_models_in_a_policy_are_refused(models):
    with pytest.raises(SettingError, match=r"models"):
        Policy(scenarios={"text": {}}, strategies={"fedavg": {}}, models=models)
