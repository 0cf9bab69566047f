"""Requests that the policy of a node accepts or refuses."""

from dataclasses import replace

import numpy as np
import pytest

from fedlearn import FedlearnError, LocalSettings, SettingError
from fedlearn.core import Request
from fedlearn.core.records import ExampleDP
from fedlearn.deploy.node_side.policy import EXAMPLE_POLICY, Policy, read_policy
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.deploy.node_side.required_privacy import RequiredPrivacy
from fedlearn.deploy.node_side.reveal import Reveal

HEART = {"name": "heart", "model": "mlp", "partition": "natural"}
FEDPROX = {"name": "fedprox", "mu": 0.1, "weighting": "examples"}
POPULATION = {"num_clients": 4, "rounds": 10}
WORDS = {"scenario": HEART, "strategy": FEDPROX}
ORDER = Request(round=1, seed=1, params_D=np.zeros(3, np.float32), local=LocalSettings(batch_size=32))


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(EXAMPLE_POLICY)
    return read_policy(path)


def test_the_example_that_is_printed_is_a_policy_that_accepts_what_it_says(example):
    example.check_settings(WORDS)
    example.check_request(ORDER, {}, num_requests_of_run=199, num_requests_total=10_000)
    assert example.reveal.min_test_examples == 10


@pytest.mark.parametrize(
    ("group", "settings", "reason"),
    [
        (
            "scenario",
            {"name": "digits"},
            "scenario digits is not accepted; this node accepts heart",
        ),
        ("scenario", {**HEART, "model": "cnn"}, "model is cnn; this node accepts one of mlp, linear"),
        ("scenario", None, "scenario None is not accepted"),
        ("strategy", {"_target_": "os.system"}, "strategy._target_ is os.system"),
        ("strategy", {**FEDPROX, "mu": 11}, "strategy.mu is 11; this node accepts 0 to 10"),
        ("strategy", {**FEDPROX, "mu": "0.1"}, "strategy.mu is 0.1; this node accepts a number"),
        ("strategy", {**FEDPROX, "mu": True}, "strategy.mu is True"),
        ("strategy", {**FEDPROX, "nu": 1}, "strategy.nu is 1; this node accepts one of mu, clients_per_round"),
        ("strategy", "fedavgg", "strategy fedavgg is not accepted"),
    ],
)
def test_words_outside_the_policy_are_refused_with_the_setting_and_what_is_accepted(example, group, settings, reason):
    with pytest.raises(PolicyViolation, match=reason):
        example.check_settings({**WORDS, group: settings})


def test_training_outside_the_bounds_is_refused(example):
    with pytest.raises(PolicyViolation, match=r"local\.batch_size is 1; this node accepts 8 to 512"):
        example.check_request(
            replace(ORDER, local=LocalSettings(batch_size=1)), {}, num_requests_of_run=0, num_requests_total=0
        )
    with pytest.raises(PolicyViolation, match=r"local\.epochs is 6"):
        example.check_request(
            replace(ORDER, local=LocalSettings(epochs=6)), {}, num_requests_of_run=0, num_requests_total=0
        )


def test_more_rounds_than_accepted_are_refused_in_a_run_and_in_all(example):
    with pytest.raises(PolicyViolation, match="trained 200 rounds of this run; its limit is max_rounds=200"):
        example.check_request(ORDER, {}, num_requests_of_run=200, num_requests_total=200)
    bounded = replace(example, max_rounds_total=300)
    bounded.check_request(ORDER, {}, num_requests_of_run=0, num_requests_total=299)
    with pytest.raises(PolicyViolation, match="trained 300 rounds of all runs"):
        bounded.check_request(ORDER, {}, num_requests_of_run=0, num_requests_total=300)


@pytest.mark.parametrize(
    ("private", "reason"),
    [
        (None, "trains without DP-SGD"),
        (ExampleDP(clip=2.0, noise_multiplier=1.0), "clips to 2.0; this node accepts at most 1.0"),
        (ExampleDP(clip=1.0, noise_multiplier=0.5), "is 0.5; this node accepts at least 0.8"),
        (ExampleDP(clip=1.0, noise_multiplier=0.8), None),
    ],
)
def test_the_minimum_protection_is_demanded_of_every_order(example, private, reason):
    strict = replace(
        example, required_privacy=RequiredPrivacy(minimum="example", max_clip=1.0, min_noise_multiplier=0.8)
    )
    order = replace(ORDER, local=LocalSettings(example_dp=private))
    if reason is None:
        strict.check_request(order, {}, num_requests_of_run=0, num_requests_total=0)
        return
    with pytest.raises(PolicyViolation, match=reason):
        strict.check_request(order, {}, num_requests_of_run=0, num_requests_total=0)


LOCAL_DP = {"name": "local", "clip_norm": 1.0, "noise_multiplier": 2.0}


@pytest.mark.parametrize(
    ("privacy", "reason"),
    [
        (None, "leave the node without noise"),
        ({**LOCAL_DP, "name": "central"}, "leave the node without noise"),
        ({**LOCAL_DP, "clip_norm": 3.0}, "clips to 3.0; this node accepts at most 1.0"),
        ({**LOCAL_DP, "noise_multiplier": 1.0}, "is 1.0; this node accepts at least 2.0"),
        ({**LOCAL_DP, "noise_multiplier": float("nan")}, "expected numbers"),
        ({**LOCAL_DP, "clip_norm": None}, "expected numbers"),
        (LOCAL_DP, None),
    ],
)
def test_a_node_may_ask_that_no_update_leaves_without_noise(example, privacy, reason):
    strict = replace(example, required_privacy=RequiredPrivacy(minimum="local", max_clip=1.0, min_noise_multiplier=2.0))
    if reason is None:
        strict.check_request(ORDER, {"privacy": privacy}, num_requests_of_run=0, num_requests_total=0)
        return
    with pytest.raises(PolicyViolation, match=reason):
        strict.check_request(ORDER, {"privacy": privacy}, num_requests_of_run=0, num_requests_total=0)


def test_privacy_is_one_of_ours_and_fits_what_the_node_tells(example):
    with pytest.raises(PolicyViolation, match=r"privacy is os\.system; this node accepts one of central, distributed"):
        example.check_settings({**WORDS, "privacy": {"name": "os.system"}})
    rounding = replace(example, reveal=Reveal(num_examples="rounded"))
    rounding.check_settings({**WORDS, "privacy": LOCAL_DP, "population": POPULATION})
    with pytest.raises(PolicyViolation, match="exact number of examples"):
        rounding.check_settings({**WORDS, "privacy": "example", "population": POPULATION})


def test_a_node_that_hides_its_number_of_examples_trains_only_where_clients_weigh_the_same(example):
    hiding = replace(example, reveal=Reveal(num_examples="none"))
    with pytest.raises(PolicyViolation, match=r"strategy\.weighting=equal"):
        hiding.check_settings(WORDS)
    hiding.check_settings({**WORDS, "strategy": {**FEDPROX, "weighting": "equal"}})


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (1, 1), (9, 9), (14, 10), (227, 200), (951, 1000)])
def test_a_rounded_number_of_examples_has_one_digit(count, shown):
    assert Reveal(num_examples="rounded").reported_count(count) == shown


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("scenarios: {}", "has no strategies"),
        ("[1, 2]", "has no settings"),
        ("scenarios: {heart: {b: [2, 1, 3]}}\nstrategies: {}", r"scenarios.heart.b is \[2, 1, 3\]"),
        ("scenarios: {}\nstrategies: {}\nmax_round: 3", "max_rounds"),
        ("scenarios: {}\nstrategies: {}\nlocal: {epoch: [1, 2]}", "local.epoch"),
        ("scenarios: {}\nstrategies: {}\nrequired_privacy: {minimum: central}", "required_privacy.minimum is central"),
        (
            "scenarios: {}\nstrategies: {}\nrequired_privacy: {max_clip: 1.0}",
            "null, because required_privacy.minimum is none",
        ),
        ("scenarios: {}\nstrategies: {}\nreveal: {metrics: 1}", "reveal.metrics is 1"),
        ("scenarios: {}\nstrategies: {}\nmax_rounds: 0", "max_rounds is 0"),
        ("scenarios: [", "cannot be read"),
    ],
)
def test_a_file_that_is_no_policy_is_refused_with_what_is_wrong(tmp_path, text, reason):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(FedlearnError, match=reason):
        read_policy(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("allow_targets: [my_code]", "allow_targets has the new name builders"),
        ("protection: {minimum: secagg}", "protection has the new name required_privacy"),
        ("max_rounds_in_all: 3", "max_rounds_in_all has the new name max_rounds_total"),
        ("required_privacy: {min_sum: 3}", r"required_privacy\.min_sum has the new name min_nodes_in_sum"),
        ("required_privacy: {min_clients_in_sum: 3}", r"min_clients_in_sum has the new name min_nodes_in_sum"),
    ],
)
def test_a_key_of_an_earlier_version_is_refused_with_its_new_name(tmp_path, old, new):
    path = tmp_path / "policy.yaml"
    path.write_text(f"scenarios: {{}}\nstrategies: {{}}\n{old}")
    with pytest.raises(FedlearnError, match=new):
        read_policy(path)


def test_a_policy_that_names_nothing_accepts_nothing():
    with pytest.raises(PolicyViolation, match="this node accepts none"):
        Policy(scenarios={}, strategies={}).check_settings(WORDS)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(FedlearnError, match=r"python -m fedlearn\.deploy\.node_side\.policy > policy\.yaml"):
        read_policy(tmp_path / "none.yaml")


def test_settings_errors_of_a_policy_are_setting_errors():
    with pytest.raises(SettingError):
        Reveal(num_examples="some")
