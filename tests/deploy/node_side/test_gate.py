"""Each answer of a node that depends on its data is in an allow list, and is counted, charged and limited."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clinic import NUM_FEATURES, model
from evaluation_attack import num_correct, recovered_records
from needs import needs

import fedlearn
from fedlearn.core import LocalSettings
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.random import secret_normals
from fedlearn.core.serialization import WireError
from fedlearn.deploy.node_side.client_states import ClientStateError
from fedlearn.deploy.node_side.gate import allowed_content
from fedlearn.deploy.node_side.noisy_evaluation import LOSS_STEPS, geometric_noise
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.policy_violation import NodeRefusal
from fedlearn.deploy.node_side.query_log import EvaluationLimits, QueryLog
from fedlearn.deploy.node_side.required_privacy import PRIVACY_LEVELS, RequiredPrivacy
from fedlearn.deploy.node_side.reveal import Reveal
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.privacy.mechanisms import central, distributed, example, local, none, secagg
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.protocol.messages import RequestKind
from fedlearn.protocol.refusals import RefusalCode
from strategies import fedavg, scaffold

needs("dp_accounting", reason="the extra privacy is not installed")

NOISY = {"example": example, "local": local, "central": central, "distributed": distributed}
STRICT = {
    "max_rounds": 1,
    "max_rounds_total": 1,
    "required_privacy": RequiredPrivacy(minimum="example", max_epsilon=0.1),
}


def asked(clinic, *, is_fresh=True):
    """Return a function that evaluates a model at client 0 of a clinic, each time in a new run or round."""
    number = iter(range(10**6))

    def ask(params_D):
        changes = {"run": f"run{next(number)}"} if is_fresh else {"round": next(number)}
        response = clinic.evaluate(params_D, clients=(0,), **changes)
        arrays = response.content.arrays
        return None if response.refusal else (float(arrays["sum/loss"][0]), arrays["sum/confusion"][0])

    return ask


def stolen(clinic, is_fresh):
    test = clinic.test[0]
    records = recovered_records(asked(clinic, is_fresh=is_fresh), NUM_FEATURES, num_directions=4)
    return num_correct(records, test.x, test.y)


def test_the_attack_recovers_records_from_exact_evaluations_without_limits(clinic):
    open_node = clinic(policy={"max_rounds": 10**6})
    assert stolen(open_node, is_fresh=False) >= 1


@pytest.mark.parametrize("is_fresh", [True, False], ids=["new runs", "new rounds"])
@pytest.mark.parametrize(
    "reveal",
    [Reveal(), Reveal(metrics=True), Reveal(metrics="noised"), Reveal(metrics=False)],
    ids=["default", "exact", "noised", "off"],
)
def test_evaluations_give_no_record_away_under_a_strict_policy(clinic, reveal, is_fresh):
    assert stolen(clinic(policy={**STRICT, "reveal": reveal}), is_fresh) == 0


@pytest.mark.parametrize("metrics", [None, False])
@pytest.mark.parametrize("minimum", PRIVACY_LEVELS)
def test_exact_metrics_leave_only_without_required_privacy_or_by_the_operators_word(clinic, minimum, metrics):
    required = RequiredPrivacy(minimum=minimum)
    node = clinic(policy={"required_privacy": required, "reveal": Reveal(metrics=metrics)})
    leaves = minimum == "none" and metrics is None
    assert node.hello().content.metadata["supports_metrics"] is leaves
    refusal = node.evaluate().refusal
    assert (refusal is None) if leaves else (refusal.code == RefusalCode.EVALUATION_WITHHELD)


# data-dependent values that leave, by policy and kind of request; the operators' page has this table
UPDATE = {"delta", "payload", "payload_length", "num_examples", "num_steps"}
LOSSES = {"total/loss", "count/loss"}
METRICS = {"num_examples", "sum/loss", "sum/confusion"}
METRICS |= {f"metric/{name}" for name in ("loss", "accuracy", "auc", "auprc", "precision", "recall", "f1")}
FIT = {  # (required privacy, strategy and mechanism) -> arrays
    ("none", "fedavg"): UPDATE | LOSSES,
    ("none", "scaffold"): UPDATE | LOSSES | {"extra/change"},
    ("none", "example"): UPDATE,
    ("none", "local"): UPDATE,
    ("example", "example"): UPDATE,
    ("local", "local"): UPDATE,
    ("secagg", "secagg"): set(),
    ("none", "secagg"): set(),
}
STRATEGIES = {
    "fedavg": (fedavg(weighting="equal"), None),
    "scaffold": (scaffold(), None),
    "example": (fedavg(), example(noise_multiplier=1.0)),
    "local": (fedavg(weighting="equal"), local(noise_multiplier=1.0)),
    "secagg": (fedavg(weighting="equal", clients_per_round=2), secagg()),
}


@pytest.mark.parametrize(("minimum", "name"), FIT)
def test_the_arrays_of_an_update_follow_from_policy_and_guarantee(clinic, minimum, name):
    strategy, mechanism = STRATEGIES[name]
    node = clinic(strategy=strategy, mechanism=mechanism, policy={"required_privacy": RequiredPrivacy(minimum=minimum)})
    protected, _ = node.strategy(None, None, node.local)
    allowed = allowed_content(RequestKind.FIT, node.node.policy, strategy=protected)
    assert set(allowed.arrays) == FIT[minimum, name]
    assert allowed.hides_counts is (name == "local")


def test_a_further_vector_stays_even_if_a_strategy_with_it_passes_all_other_checks(clinic):
    node = clinic(strategy=fedavg(weighting="equal"), mechanism=local(noise_multiplier=1.0))
    protected, _ = node.strategy(None, None, node.local)
    object.__setattr__(protected, "local", scaffold().local)  # a strategy refuses this pair
    allowed = allowed_content(RequestKind.FIT, node.node.policy, strategy=protected)
    assert not [name for name in allowed.arrays if name.startswith("extra/")]


@pytest.mark.parametrize("minimum", PRIVACY_LEVELS)
@pytest.mark.parametrize("metrics", [None, True, False, "noised"])
def test_the_values_of_other_responses_follow_from_the_policy(minimum, metrics):
    required = RequiredPrivacy(minimum=minimum)
    policy = Policy(scenarios={}, strategies={}, required_privacy=required, reveal=Reveal(metrics=metrics))
    leaves = metrics in (True, "noised") or (metrics is None and minimum == "none")
    assert set(allowed_content(RequestKind.EVALUATE, policy).arrays) == (METRICS if leaves else set())
    assert allowed_content(RequestKind.INIT, policy).arrays == ("params",)
    assert allowed_content(RequestKind.MASK, policy, clients=(3,)).arrays == ["response/3"]
    hello = allowed_content(RequestKind.HELLO, policy)
    assert not hello.arrays
    assert {"num_examples", "names", "num_classes"} <= set(hello.fields)


def test_the_table_on_the_operators_page_is_that_of_the_code():
    page = (Path(fedlearn.__file__).parent / "deploy/README.md").read_text()
    rows = re.findall(r"^\| (none|example|local|secagg) \| (\w+) \|(.*)\|$", page, re.MULTILINE)
    equal = fedavg(weighting="equal", clients_per_round=2)
    mechanisms = {kind: make(noise_multiplier=1.0) for kind, make in NOISY.items()}
    mechanisms |= {"secagg": secagg(), "none": none()}
    assert {(minimum, kind) for minimum, kind, _ in rows} >= {(kind, kind) for kind in PRIVACY_LEVELS}
    for minimum, kind, cells in rows:
        _, vectors, counts, losses, metrics = (cell.strip() for cell in cells.split("|"))
        policy = Policy(scenarios={}, strategies={}, required_privacy=RequiredPrivacy(minimum=minimum))
        sends = scaffold() if vectors == "yes" else equal
        strategy, _ = mechanisms[kind].protect(sends, LocalSettings(), Population(clients=range(4), rounds=1))
        allowed = allowed_content(RequestKind.FIT, policy, strategy=strategy)
        assert ("extra/change" in allowed.arrays) is (vectors == "yes"), (minimum, kind)
        assert ("num_steps" in allowed.arrays and not allowed.hides_counts) is (counts == "yes"), (minimum, kind)
        assert ("total/loss" in allowed.arrays) is (losses == "yes"), (minimum, kind)
        assert {True: "exact", False: "none"}[policy.metrics] == metrics, (minimum, kind)


LEAKS = {
    "array": lambda node, r: replace(r, content=replace(r.content, arrays={**r.content.arrays, "x": node.test[0].x})),
    "metadata": lambda node, r: replace(r, content=replace(r.content, metadata={"age": 41})),
    "client": lambda node, r: replace(r, clients=(7,)),
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("kind", [RequestKind.HELLO, RequestKind.INIT, RequestKind.FIT, RequestKind.EVALUATE])
def test_a_handler_that_adds_a_value_cannot_send_it(clinic, kind, leak, caplog):
    node = clinic()
    handler = node.node._handlers[kind]
    node.node._handlers[kind] = lambda request: LEAKS[leak](node, handler(request))
    if (kind, leak) == (RequestKind.HELLO, "client"):
        return  # the response to a hello names the clients of the node
    response = getattr(node, kind.value)()
    assert response.refusal.code == RefusalCode.WITHHELD
    assert not response.content.arrays
    assert response.refusal.reference in caplog.text


@pytest.mark.parametrize("precision", ["rounded", "none"])
def test_counts_more_precise_than_the_policy_do_not_leave(clinic, precision):
    node = clinic(policy={"reveal": Reveal(num_examples=precision)})
    handler = node.node._handlers[RequestKind.HELLO]

    def exact(request):
        response = handler(request)
        metadata = {**response.content.metadata, "num_examples": [41, 37]}
        return replace(response, content=replace(response.content, metadata=metadata))

    assert node.hello().refusal is None
    node.node._handlers[RequestKind.HELLO] = exact
    assert node.hello().refusal.code == RefusalCode.WITHHELD


SECRET = "row 6 has acme in /data/insurance.csv"
ERRORS = (
    ValueError(SECRET),
    KeyError(SECRET),
    OSError(SECRET),
    FedlearnError(SECRET),
    SettingError("insurance", SECRET, SECRET, SECRET),
    WireError(SECRET),
    ClientStateError(SECRET),
    MemoryError(SECRET),
)
PLACES = ("scenario", "strategy", "train", "test", "fit", "predict", "init")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_no_error_at_the_node_reaches_the_coordinator_in_words(clinic, place, error, caplog):
    node = clinic()

    def fail(*_, **__):
        raise error

    owner = node if place in ("scenario", "strategy") else node.trainer
    if place in ("train", "test"):
        object.__setattr__(node.scenario_value.data, place, fail)
    else:
        object.__setattr__(owner, place, fail)
    for kind in (RequestKind.HELLO, RequestKind.INIT, RequestKind.FIT, RequestKind.EVALUATE):
        packed = getattr(node, kind.value)().pack()
        assert b"acme" not in packed
        assert b"insurance" not in packed
    assert SECRET in caplog.text


def test_an_update_that_is_not_finite_reveals_no_row(clinic, caplog):
    node = clinic()
    node.train[0].x[3, 0] = np.nan
    response = node.fit()
    ((failure,), reference) = response.failures, response.reference
    assert "first 3" in caplog.text
    assert reference in caplog.text
    assert b"first 3" not in response.pack()
    assert failure.client == 0


def test_a_scenario_that_fails_counts_like_one_that_succeeds(clinic):
    node = clinic(policy={"max_scenarios": 2})

    def settings(value):
        return {"scenario": {"name": "heart", "categories": value}, "strategy": {}}

    def fail(_):
        raise ValueError(SECRET)

    assert node.hello(settings=settings("a")).refusal is None
    node.scenario = fail
    assert node.hello(settings=settings("b")).refusal.code == RefusalCode.SCENARIO
    assert node.hello(settings=settings("c")).refusal.code == RefusalCode.SCENARIO_LIMIT
    node.restart()
    assert node.hello(settings=settings("c")).refusal.code == RefusalCode.SCENARIO_LIMIT
    assert node.hello(settings=settings("b")).refusal.code == RefusalCode.SCENARIO


def test_a_node_evaluates_one_model_per_round(clinic):
    node = clinic()
    assert node.evaluate(model(1), round=2).refusal is None
    assert node.evaluate(model(2), round=2).refusal.code == RefusalCode.EVALUATION_REPEATED
    assert node.evaluate(model(2), round=1).refusal.code == RefusalCode.EVALUATION_REPEATED
    assert node.evaluate(model(1), round=2, clients=(0,)).refusal.code == RefusalCode.EVALUATION_REPEATED
    assert node.evaluate(model(1), round=2, id="2").refusal is None
    assert node.evaluate(model(1), round=2, state_rounds=(0, 0)).refusal is None  # the personal models of the round
    assert node.evaluate(model(1), round=2, state_rounds=(0, 1)).refusal.code == RefusalCode.EVALUATION_REPEATED
    assert node.evaluate(model(2), round=3).refusal is None
    node.restart()
    assert node.evaluate(model(3), round=3).refusal.code == RefusalCode.EVALUATION_REPEATED


def test_a_run_that_trains_another_model_than_it_evaluated_is_closed(clinic):
    node = clinic()
    assert node.fit(model(0), round=1).refusal is None
    assert node.evaluate(model(1), round=1).refusal is None
    assert node.fit(model(1), round=2).refusal is None
    assert node.evaluate(model(2), round=2).refusal is None
    assert node.fit(model(9), round=3).refusal.code == RefusalCode.RUN_CLOSED
    node.restart()
    assert node.fit(model(2), round=3).refusal.code == RefusalCode.RUN_CLOSED
    assert node.evaluate(model(3), round=3).refusal.code == RefusalCode.RUN_CLOSED
    assert node.fit(model(0), round=1, run="another").refusal is None


def test_a_resumed_run_may_repeat_rounds_with_other_models(clinic):
    node = clinic()
    for round in (1, 2, 3):
        assert node.fit(model(round), round=round).refusal is None
        assert node.evaluate(model(round + 1), round=round).refusal is None
    assert node.fit(model(7), round=2).refusal is None  # from a checkpoint of round 1
    assert node.evaluate(model(8), round=2).refusal is None
    assert node.fit(model(8), round=3).refusal is None
    assert node.fit(model(9), round=5).refusal is None  # this node is not in the cohort of round 4


def test_evaluations_end_at_the_limits_of_a_run_and_of_all_runs(clinic):
    node = clinic(policy={"max_rounds": 3, "max_evaluations_total": 5})
    results = [node.evaluate(model(round), round=round).refusal for round in range(1, 5)]
    assert [refusal and refusal.code for refusal in results] == [None] * 3 + [RefusalCode.EVALUATION_LIMIT]
    results = [node.evaluate(model(round), round=round, run="b").refusal for round in range(1, 4)]
    assert [refusal and refusal.code for refusal in results] == [None] * 2 + [RefusalCode.EVALUATION_LIMIT]


@pytest.mark.parametrize(
    ("keys", "limits"),
    [
        ({"max_rounds": 7}, EvaluationLimits(of_run=7, total=70)),
        ({"max_rounds": 7, "max_rounds_total": 9}, EvaluationLimits(of_run=7, total=9)),
        ({"max_rounds": 7, "max_rounds_total": 9, "max_evaluations_total": 4}, EvaluationLimits(of_run=7, total=4)),
    ],
)
def test_the_limit_of_evaluations_follows_from_the_limits_of_rounds(keys, limits):
    assert Policy(scenarios={}, strategies={}, **keys).evaluation_limits == limits


def test_a_run_keeps_its_scenario(clinic):
    node = clinic()
    other = {"scenario": {"name": "heart", "test_share": 0.9}, "strategy": {}}
    assert node.fit().refusal is None
    assert node.evaluate(settings=other).refusal.code == RefusalCode.OTHER_SCENARIO
    assert node.fit(round=2, settings=other).refusal.code == RefusalCode.OTHER_SCENARIO


def test_noised_evaluations_are_paid_for_by_the_nodes_ledger_until_its_limit(clinic):
    required = RequiredPrivacy(minimum="local", max_epsilon=1.0)
    node = clinic(policy={"required_privacy": required, "reveal": Reveal(metrics="noised", metrics_epsilon=0.3)})
    refusals = [node.evaluate(model(round), round=round).refusal for round in range(4)]
    assert [refusal and refusal.code for refusal in refusals] == [None] * 3 + [RefusalCode.EPSILON_LIMIT]
    ((event, count),) = node.node.budget.ledger().client_history(1)
    assert (event.epsilon, count) == (0.3, 3)


def test_noised_evaluations_have_noise_and_no_exact_value(clinic):
    exact = clinic().evaluate(model(1)).content.arrays
    node = clinic(policy={"reveal": Reveal(metrics="noised", metrics_epsilon=1.0), "max_rounds": 10**6})
    noisy = [node.evaluate(model(1), run=f"run{i}").content.arrays for i in range(60)]
    assert noisy[0].keys() == exact.keys()
    confusion = np.array([each["sum/confusion"][0] for each in noisy])
    assert np.allclose(confusion.mean(0), exact["sum/confusion"][0], atol=2.0)
    assert (confusion.std(0) > 1).all()
    assert len({each["sum/loss"][0] for each in noisy}) > 20
    for each in noisy[:20]:
        assert each["num_examples"].tolist() == np.maximum(1, each["sum/confusion"].sum((1, 2))).tolist()
        assert np.isnan(each["metric/auc"]).all()


def test_the_distribution_of_the_noise_is_the_promised_one():
    noise = geometric_noise((200_000,), 2, 1.0)
    counts = {value: (noise == value).mean() for value in range(-3, 4)}
    ratios = [counts[value + 1] / counts[value] for value in (0, 1, 2)]
    assert np.allclose(ratios, np.exp(-0.5), rtol=0.05)
    assert abs(noise.mean()) < 0.05
    assert geometric_noise((9,), LOSS_STEPS, 0.1).dtype == np.int64


def test_noise_of_real_clients_does_not_follow_from_a_global_generator():
    draws = []
    for _ in range(2):
        np.random.seed(0)  # noqa: NPY002
        draws.append((secret_normals((8,)), geometric_noise((8,), 1000, 0.1)))
    assert not np.array_equal(draws[0][0], draws[1][0])
    assert not np.array_equal(draws[0][1], draws[1][1])


def test_noised_metrics_need_bounded_sums_and_the_global_model(clinic):
    noised = {"reveal": Reveal(metrics="noised")}
    node = clinic(policy=noised, task="regression")
    assert node.hello().content.metadata["supports_metrics"] is False
    assert node.evaluate().refusal.code == RefusalCode.EVALUATION_WITHHELD
    personal = clinic(policy=noised).evaluate(state_rounds=(0, 0))
    assert personal.refusal.code == RefusalCode.EVALUATION_WITHHELD


def test_noised_metrics_do_not_reveal_whether_a_client_has_held_out_examples(clinic):
    node = clinic(policy={"reveal": Reveal(metrics="noised")})
    node.test[1] = replace(node.test[1], x=node.test[1].x[:0], y=node.test[1].y[:0])
    assert node.evaluate().clients == (0, 1)


def test_a_repeated_request_gets_the_stored_response_and_is_charged_once(clinic):
    required = RequiredPrivacy(minimum="local", max_epsilon=50.0)
    node = clinic(policy={"required_privacy": required, "max_rounds": 2}, mechanism=local(noise_multiplier=1.0))
    node.local = replace(node.local, epochs=1)
    accept = {"name": "local", "clip_norm": 1.0, "noise_multiplier": 1.0}
    settings = {"scenario": {"name": "heart"}, "strategy": {}, "privacy": accept}
    first = node.fit(settings=settings)
    spent = node.node.budget.ledger()
    for _ in range(2):
        again = node.fit(settings=settings, id="2")
        assert np.array_equal(again.content.arrays["delta"], first.content.arrays["delta"])
        assert (again.id, again.clients) == ("2", first.clients)
        node.restart()
    assert node.node.budget.ledger() == spent
    assert node.node.client_states.request_counts("run") == (1, 1)
    other = node.fit(settings=settings, seed=2)  # another request of the round trains again, and pays again
    assert not np.array_equal(other.content.arrays["delta"], first.content.arrays["delta"])
    assert node.node.client_states.request_counts("run") == (2, 2)
    assert sum(count for _, count in node.node.budget.ledger().client_history(0)) == 2
    assert np.array_equal(node.fit(settings=settings, seed=2).content.arrays["delta"], other.content.arrays["delta"])
    assert "max_rounds=2" in node.fit(settings=settings, seed=3).refusal.reason
    stored = [path for path in node.folder.rglob("*") if path.is_file()]
    assert len([path for path in stored if path.name.startswith("response_")]) == 1
    assert {path.stat().st_mode & 0o777 for path in stored} == {0o600}


def test_a_stored_response_does_not_outlive_the_policy_that_let_it_out(clinic):
    node = clinic()
    exact = node.evaluate(model(1)).content.arrays["sum/loss"]
    node.restart(reveal=Reveal(metrics="noised"))
    response = node.evaluate(model(1), id="2")
    assert response.refusal or not np.array_equal(response.content.arrays["sum/loss"], exact)


def test_a_request_is_counted_and_charged_on_disk_before_it_trains(clinic):
    required = RequiredPrivacy(minimum="local", max_epsilon=50.0)
    node = clinic(policy={"required_privacy": required}, mechanism=local(noise_multiplier=1.0))
    accept = {"name": "local", "clip_norm": 1.0, "noise_multiplier": 1.0}
    settings = {"scenario": {"name": "heart"}, "strategy": {}, "privacy": accept}
    found = []

    def fit(*_):
        found.append({path.name: json.loads(path.read_text()) for path in node.folder.glob("*.json")})
        raise KeyboardInterrupt

    object.__setattr__(node.trainer, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        node.fit(settings=settings)
    assert found[0]["requests.json"] == {"run": 1}
    assert found[0]["ledger.json"]["groups"]
    assert set(found[0]["queries.json"]["runs"]) == {"run"}


def test_the_steps_taken_are_the_steps_charged(clinic, caplog):
    required = RequiredPrivacy(minimum="example", max_epsilon=50.0)
    node = clinic(policy={"required_privacy": required}, mechanism=example(noise_multiplier=1.0))
    assert node.fit().refusal is None
    fit = node.trainer.fit

    def longer(*arguments):
        updates = fit(*arguments)
        return replace(updates, num_steps_K=updates.num_steps_K + 1)

    object.__setattr__(node.trainer, "fit", longer)
    assert node.fit(round=2).refusal.code == RefusalCode.WITHHELD
    assert "took 2 steps, charged 1" in caplog.text


def test_a_refused_training_request_does_not_allow_another_evaluation_of_the_round(clinic):
    node = clinic(policy={"max_rounds": 2})
    for round in (1, 2):
        assert node.fit(model(round), round=round).refusal is None
    assert node.evaluate(model(3), round=2).refusal is None
    assert "max_rounds=2" in node.fit(model(9), round=2).refusal.reason
    assert node.evaluate(model(9), round=2).refusal.code == RefusalCode.EVALUATION_REPEATED


def test_a_refused_request_costs_nothing(clinic):
    required = RequiredPrivacy(minimum="secagg", max_epsilon=50.0)
    node = clinic(
        policy={"required_privacy": required},
        strategy=fedavg(weighting="equal", clients_per_round=2),
        mechanism=secagg(),
    )
    assert node.fit().refusal
    assert not (node.folder / "ledger.json").exists()
    assert node.node.client_states.request_counts("run") == (0, 0)


def test_a_limit_of_epsilon_refuses_a_mechanism_without_epsilon(clinic):
    budget = clinic().node.budget
    budget = replace(budget, required=RequiredPrivacy(minimum="secagg", max_epsilon=1.0))
    release = Release(round=1, clients=(0,), num_examples=(10,), num_steps=(1,))
    equal = fedavg(weighting="equal", clients_per_round=2)
    for mechanism in (secagg(), central(noise_multiplier=5.0)):
        strategy, _ = mechanism.protect(equal, clinic().local, Population(clients=range(4), rounds=1))
        with pytest.raises(NodeRefusal, match="has no epsilon for the clients of this node"):
            budget.charge_training(strategy.privacy_guarantee, release)
    with pytest.raises(NodeRefusal, match="privacy=none has no epsilon"):
        budget.charge_training(None, release)


def test_a_damaged_query_log_is_no_empty_one(tmp_path):
    (tmp_path / "queries.json").write_text('{"scenarios": [], "runs": {"run": {"count": 1}}}')
    with pytest.raises(ClientStateError, match="the number of answers of this node is unknown"):
        QueryLog(tmp_path).admit_scenario({}, limit=9)


def test_a_policy_with_a_wrong_value_of_metrics_is_refused():
    for changes in ({"metrics": "yes"}, {"metrics_epsilon": 0}, {"metrics_epsilon": float("nan")}, {"metrics": 1}):
        with pytest.raises(SettingError):
            Reveal(**changes)
    assert Reveal().metrics is None
