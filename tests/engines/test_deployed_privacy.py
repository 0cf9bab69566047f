"""Real node services under a privacy setting: the content of their responses, and noise that the node draws itself."""

from dataclasses import replace

import numpy as np
import pytest
from needs import needs
from sample_messages import training_request

from fedlearn import Schedule, federate, start
from fedlearn.core import Failure
from fedlearn.errors import FedlearnError, TooManyFailures
from fedlearn.runner.instantiation import build
from fedlearn.runner.registry import installed_registry
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn.core.records import ExampleDP
from fedlearn.core.serialization import unpack
from fedlearn.deploy.coordinator_side.remote_scenario import remote_scenario
from fedlearn.deploy.node_side.local_clients import LocalClients
from fedlearn.deploy.node_side.privacy_budget import PrivacyBudget
from fedlearn.deploy.node_side.required_privacy import RequiredPrivacy
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.protocol.refusals import RefusalCode

needs("dp_accounting", reason="the extra privacy is not installed")

EQUAL = {"strategy": {"weighting": "equal"}}


def record_responses(built):
    """Record the training responses of each node, as they leave it."""
    kept = []
    for node, site in built.sites.items():

        def answer(payload, site=site):
            reply = site.respond_to_bytes(payload)
            parcel = unpack(reply)
            kept.extend([parcel] if parcel.metadata["kind"] == "fit" else [])
            return reply

        built.grid.nodes[node] = answer
    return kept


def run(built, kind, rounds=3, **settings):
    words = {"name": kind, **settings}
    scenario = remote_scenario(built.engine)
    strategy = build(built.settings["strategy"], "strategy", allow=built.allow)
    population = Population(clients=built.engine.clients, rounds=rounds)
    strategy, local = build(installed_registry().resolve("privacy", words), "privacy").protect(
        strategy, LOCAL_SETTINGS, population
    )
    found = {"noise_multiplier": strategy.privacy_guarantee.noise_multiplier, "epsilon": None}
    built.engine.set_privacy({**words, **found}, rounds=rounds)
    state = start(strategy, scenario.trainer.init(1), built.engine, seed=1)
    return list(federate(strategy, built.engine, state, schedule=Schedule(rounds=rounds), local=local))


@pytest.mark.parametrize("clip", ["fixed", "adaptive"])
def test_updates_are_clipped_before_they_leave_and_counts_and_metrics_stay(federation, clip):
    built = federation(words=EQUAL)
    left = record_responses(built)
    rounds = run(built, "central", clip_norm=0.05, noise_multiplier=0.1, clip=clip)
    deltas_KD = np.concatenate([parcel.arrays["delta"] for parcel in left])
    size = built.engine.layout.num_parameters
    assert deltas_KD.shape == (12, size + (clip == "adaptive"))
    bound = 0.05 if clip == "fixed" else 0.05 * 1.3**3
    assert 0.04 < np.linalg.norm(deltas_KD[:, :size], axis=1).max() <= bound * (1 + 1e-5)
    for parcel in left:
        assert set(parcel.arrays["num_examples"].tolist()) == {1}
        assert not [name for name in parcel.arrays if name.startswith(("total/", "count/"))]
    assert [done.privacy.value for done in rounds] == sorted(done.privacy.value for done in rounds)


def test_noise_that_is_added_at_nodes_or_coordinator_does_not_follow_from_the_seed(federation):
    for kind in ("central", "local"):
        item, other = (
            run(federation(words=EQUAL, run=name), kind, rounds=1, noise_multiplier=1.0) for name in ("a", "b")
        )
        assert not np.array_equal(item[-1].state.params_D, other[-1].state.params_D)


def test_local_noise_is_there_when_an_update_leaves(federation):
    built = federation(words={**EQUAL, "scenario": {"num_features": 5000}})
    left = record_responses(built)
    run(built, "local", rounds=1, clip_norm=0.5, noise_multiplier=4.0)
    deltas_KD = np.concatenate([parcel.arrays["delta"] for parcel in left])
    assert deltas_KD.std() == pytest.approx(4.0 * 0.5, rel=0.02)
    assert np.abs(np.corrcoef(deltas_KD)[np.triu_indices(4, 1)]).max() < 0.1


def test_a_node_that_asks_for_noise_refuses_an_order_without(federation):
    strict = {"required_privacy": RequiredPrivacy(minimum="local", min_noise_multiplier=2.0)}
    built = federation(words=EQUAL, policy=strict)
    with pytest.raises((FedlearnError, TooManyFailures), match="this node requires privacy=local"):
        run(built, "central", rounds=1, noise_multiplier=1.0)
    assert len(run(federation(words=EQUAL, policy=strict), "local", rounds=1, clip_norm=1.0, noise_multiplier=2.0)) == 1


def test_an_empty_poisson_cohort_is_a_round_that_releases_noise(federation):
    built = federation(words={"strategy": {"weighting": "equal", "clients_per_round": 1}})
    rounds = run(built, "central", rounds=24, noise_multiplier=1.0)
    assert min(len(done.cohort) for done in rounds) == 0
    quiet = next(i for i, done in enumerate(rounds) if not done.cohort)
    before = rounds[quiet - 1].state.params_D if quiet else None
    assert before is None or not np.array_equal(before, rounds[quiet].state.params_D)


def test_a_nodes_own_ledger_outlives_runs_and_refuses_what_would_pass_its_limit(federation, tmp_path):
    limit = {"required_privacy": RequiredPrivacy(minimum="local", max_epsilon=2.5)}
    noise = {"clip_norm": 1.0, "noise_multiplier": 8.0}
    first = run(federation(words=EQUAL, policy=limit), "local", rounds=2, **noise)
    assert (tmp_path / "memory0/ledger.json").exists()
    again = federation(words=EQUAL, policy=limit, run="another-run")
    with pytest.raises((FedlearnError, TooManyFailures), match=r"would exceed required_privacy\.max_epsilon"):
        run(again, "local", rounds=9, **noise)
    spent = PrivacyBudget(tmp_path / "memory0").ledger()
    ((_, rounds),) = spent.client_history(0)
    assert rounds > len(first) == 2
    assert max_epsilon_bounds(spent.histories, delta=1e-5).value <= 2.5


def test_a_damaged_ledger_is_no_empty_one(federation, tmp_path):
    built = federation(words=EQUAL, policy={"required_privacy": RequiredPrivacy(minimum="local", max_epsilon=2.5)})
    for number in (0, 1):
        (tmp_path / f"memory{number}/ledger.json").write_text("{")
    with pytest.raises((FedlearnError, TooManyFailures), match="the node cannot read the state of its clients"):
        run(built, "local", rounds=1, clip_norm=1.0, noise_multiplier=8.0)


def test_dp_sgd_at_a_node_follows_the_words_that_are_accounted_for_not_the_orders_numbers(federation, monkeypatch):
    built = federation(words=EQUAL)
    remote_scenario(built.engine)
    site, seen = built.sites[101], []
    words = {**built.order, "privacy": {"name": "example", "noise_multiplier": 3.0}}
    words["population"] = {"num_clients": 4, "rounds": 1}

    def train(self, strategy, order, client, state_round):
        seen.append(order.local.example_dp)
        return Failure(client=client, stage="fit", reason="not trained")

    monkeypatch.setattr(LocalClients, "train", train)
    quiet = replace(LOCAL_SETTINGS, example_dp=ExampleDP(clip=9.0, noise_multiplier=0.0))
    for asked in (words, built.order):
        site.respond(training_request(built.engine.layout, asked, quiet))
    assert seen == [ExampleDP(clip=1.0, noise_multiplier=3.0), None]


def test_dp_sgd_at_nodes_clips_each_example_of_a_model_with_several_inputs(federation):
    pytest.importorskip("torch")
    built = federation(scenario="several_inputs", words=EQUAL)
    left = record_responses(built)
    rounds = run(built, "example", rounds=1, clip=1e-3, noise_multiplier=1e-2)
    deltas_KD = np.concatenate([parcel.arrays["delta"] for parcel in left])
    most = LOCAL_SETTINGS.learning_rate * 1e-3 * 12  # at most 12 steps; the noise is a hundredth of it
    assert len(deltas_KD) == 4
    assert 0 < np.linalg.norm(deltas_KD, axis=1).max() <= most
    assert rounds[-1].privacy.value > 0
    free = federation(scenario="several_inputs", words=EQUAL, run="free")
    sent = record_responses(free)
    run(free, "example", rounds=1, clip=1e3, noise_multiplier=1e-9)
    assert np.linalg.norm(sent[0].arrays["delta"], axis=1).max() > most


def order_to(built, node, privacy, strategy, **local):
    """Return the response of a node to a training request that no honest coordinator sends."""
    built.engine.open()
    layout = built.engine.layout
    target = {"name": privacy, "noise_multiplier": 2.0}
    settings = {**built.order, "strategy": strategy, "privacy": target}
    settings["population"] = {"num_clients": 4, "rounds": 1}
    zeros = {"server": np.zeros(layout.num_parameters, np.float32)} if strategy["name"] == "scaffold" else {}
    request = training_request(layout, settings, replace(LOCAL_SETTINGS, **local), broadcast=zeros)
    return built.sites[node].respond(request)


HOSTILE = [
    ("local", {"name": "scaffold"}, "also sends change without noise"),
    ("local", {"name": "fedavg"}, "strategy.weighting=equal"),
    (
        "example",
        {"name": "fedrep", "personal_parameters": "out.bias", "head_epochs": 50},
        "takes further steps",
    ),
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=["scaffold", "weights", "fedrep"])
def test_a_node_refuses_a_strategy_whose_upload_the_mechanism_does_not_cover(federation, tmp_path, hostile):
    privacy, strategy, reason = hostile
    required = RequiredPrivacy(minimum=privacy, max_epsilon=50.0)
    accepted = {name: {} for name in ("fedavg", "scaffold", "fedrep")}
    built = federation(words=EQUAL, policy={"required_privacy": required, "strategies": accepted})
    refusal = order_to(built, 101, privacy, strategy).refusal
    assert refusal.stage == "policy"
    assert reason in refusal.reason
    assert not (tmp_path / "memory0/ledger.json").exists()
    assert not (tmp_path / "memory0/requests.json").exists()


def test_a_trainer_without_dp_sgd_is_refused_before_anything_is_charged(federation, tmp_path, monkeypatch):
    required = RequiredPrivacy(minimum="example", max_epsilon=50.0)
    built = federation(words=EQUAL, policy={"required_privacy": required})
    monkeypatch.setattr(LinearTrainer, "supports_dp_sgd", False)
    refusal = order_to(built, 101, "example", built.order["strategy"]).refusal
    assert refusal.code == RefusalCode.STRATEGY
    assert not (tmp_path / "memory0/ledger.json").exists()
