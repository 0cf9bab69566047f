from dataclasses import replace

import numpy as np
import pytest

from fedlearn import (
    Examples,
    LocalRule,
    Scenario,
    Schedule,
    SettingError,
    Strategy,
    Transform,
    everyone,
    federate,
    judge,
    mean,
    serial,
    start,
    uniform,
    vector,
)
from fedlearn.core import Evaluation
from fedlearn.core.records import Failure
from fedlearn.errors import TooManyFailures
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, linear_problem

TRAINER = LinearTrainer(3)


def run(strategy, *, rounds=3, data=None, engine=serial, seed=1, evaluate=None, **schedule):
    built = engine(data or linear_problem(), TRAINER)
    state = start(strategy, TRAINER.init(seed), built, seed=seed)
    plan = Schedule(rounds=rounds, **schedule)
    return list(federate(strategy, built, state, schedule=plan, local=LOCAL_SETTINGS, evaluate=evaluate))


def everyone_equal():
    return Strategy(select=everyone(), aggregate=mean(weighting="equal"))


def test_a_round_tells_what_it_did():
    (item,) = run(Strategy(select=uniform(4)), rounds=1)
    assert item.number == 1
    assert len(item.cohort) == item.num_updates == 4
    assert list(item.cohort) == sorted(item.cohort)
    assert item.num_examples == sum(5 + 4 * k for k in item.cohort)
    assert (item.bytes_up, item.bytes_down) == (4 * 16, 4 * 16)
    assert item.metrics["loss"] > 0
    assert item.evaluation is None
    assert item.seconds > 0


@pytest.mark.parametrize("engine", [serial, vector])
def test_the_server_hears_of_each_client_what_it_told_and_nothing_of_one_that_failed(engine):
    heard = []

    def listen(update_D, memory, context):
        heard.append(context)
        return update_D, memory

    (item,) = run(Strategy(select=everyone(), server=Transform(update=listen)), data=spoilt(2), rounds=1, engine=engine)
    (context,) = heard
    assert context.clients_K.tolist() == [0, 1, 3, 4, 5]
    assert context.num_examples_K.tolist() == [5, 9, 17, 21, 25]
    seen = context.num_examples_K @ context.metrics["loss"] / context.num_examples_K.sum()
    assert seen == pytest.approx(item.metrics["loss"])


def test_federated_averaging_is_the_mean_of_the_clients_models():
    item = run(Strategy(select=everyone()), rounds=1)[0]
    data = linear_problem()
    alone = [run(Strategy(select=everyone()), rounds=1, data=replace(data, clients=[k]))[0] for k in range(6)]
    models_KD = np.stack([a.state.params_D for a in alone])
    expected = np.average(models_KD.astype(np.float64), axis=0, weights=[5 + 4 * k for k in range(6)])
    assert np.allclose(item.state.params_D, expected, atol=1e-6)


def test_the_cohort_depends_on_the_seed_and_the_round_only():
    strategy = Strategy(select=uniform(2))
    cohorts = [r.cohort for r in run(strategy, rounds=8)]
    assert cohorts == [r.cohort for r in run(strategy, rounds=8, engine=vector)]
    assert len(set(cohorts)) > 1
    assert cohorts != [r.cohort for r in run(strategy, rounds=8, seed=2)]


def spoilt(*clients):
    data = linear_problem()

    def train(client):
        examples = data.train(client)
        return Examples(examples.x * np.float32("nan"), examples.y) if client in clients else examples

    return replace(data, train=train)


def test_a_poisoned_update_never_touches_the_model():
    rounds = run(everyone_equal(), data=spoilt(2))
    sound = run(everyone_equal(), data=replace(linear_problem(), clients=[0, 1, 3, 4, 5]))
    assert np.array_equal(rounds[-1].state.params_D, sound[-1].state.params_D)
    assert [f.client for f in rounds[0].failures] == [2]
    assert rounds[0].num_updates == 5


def test_too_many_failures_stop_the_run_and_name_the_first():
    with pytest.raises(TooManyFailures, match=r"2 of 6 clients failed.*max_failures=0.3.*client 1, at stage update"):
        run(everyone_equal(), data=spoilt(1, 2), max_failures=0.3)
    assert len(run(everyone_equal(), data=spoilt(1, 2), max_failures=0.4)) == 3


def test_a_round_with_no_update_at_all_always_stops():
    with pytest.raises(TooManyFailures) as caught:
        run(everyone_equal(), data=spoilt(*range(6)), max_failures=0.99)
    assert len(caught.value.failures) == 6
    assert all(isinstance(failure, Failure) for failure in caught.value.failures)


def test_an_error_at_one_client_is_a_failure_with_its_traceback_in_every_engine():
    data = linear_problem()

    def train(client):
        if client == 3:
            raise RuntimeError("disk gone")
        return data.train(client)

    for engine in (serial, vector):
        item = run(everyone_equal(), data=replace(data, train=train), engine=engine, rounds=1)[0]
        assert [(f.client, f.stage, f.reason) for f in item.failures] == [(3, "data", "RuntimeError: disk gone")]
        assert "in train" in item.failures[0].traceback


class Stumbling(LinearTrainer):
    def fit(self, order, rule, work):
        if any(item.client == 2 for item in work):
            raise ValueError("cannot train on this")
        return super().fit(order, rule, work)


def test_one_client_that_breaks_a_block_is_found_and_the_others_are_kept():
    engine = vector(linear_problem(), Stumbling(3))
    strategy = everyone_equal()
    state = start(strategy, TRAINER.init(1), engine, seed=1)
    item = next(federate(strategy, engine, state, schedule=Schedule(rounds=1), local=LOCAL_SETTINGS))
    assert [(f.client, f.stage) for f in item.failures] == [(2, "fit")]
    assert item.num_updates == 5


def test_clients_with_no_or_one_example():
    data = linear_problem()

    def train(client):
        keep = {0: 0, 1: 1}.get(client, 9)
        return Examples(data.train(client).x[:keep], data.train(client).y[:keep])

    item = run(everyone_equal(), data=replace(data, train=train), rounds=1, engine=vector)[0]
    assert [(f.client, f.reason) for f in item.failures] == [(0, "ValueError: client 0 has no training examples")]
    assert np.isfinite(item.state.params_D).all()


def mean_squared(params_D, predictions):
    errors = [np.mean((p.outputs[:, 0] - p.targets) ** 2) for p in predictions]
    ids = tuple(p.client for p in predictions)
    counts = np.array([len(p.targets) for p in predictions])
    return Evaluation(pooled={"loss": float(np.mean(errors))}, clients=ids, num_examples_K=counts, per_client={})


def test_evaluation_comes_every_nth_round_and_in_the_last():
    rounds = run(everyone_equal(), rounds=7, evaluate=mean_squared, evaluate_every=3)
    assert [r.number for r in rounds if r.evaluation] == [3, 6, 7]
    assert rounds[6].evaluation.pooled["loss"] < rounds[2].evaluation.pooled["loss"]


def test_a_large_population_is_judged_by_one_fixed_sample():
    rounds = run(everyone_equal(), rounds=3, evaluate=mean_squared, evaluate_clients=4)
    judges = {r.evaluation.clients for r in rounds}
    assert len(judges) == 1
    assert len(judges.pop()) == 4


def test_the_scenarios_own_test_judges_a_model_of_which_no_client_holds_anything_out():
    data = linear_problem()
    whole = data.test(0)
    nothing = replace(data, test=lambda client: Examples(whole.x[:0], whole.y[:0]), pooled_test=lambda: whole)
    scenario = Scenario(name="linear", data=nothing, trainer=TRAINER, model="linear")
    rounds = run(everyone_equal(), data=nothing, evaluate=judge(scenario))
    expected = np.mean((TRAINER.predict(rounds[-1].state.params_D, whole.x)[:, 0] - whole.y) ** 2)
    assert rounds[-1].evaluation.pooled["loss"] == pytest.approx(expected)
    assert rounds[-1].evaluation.clients == ()
    assert np.isnan(rounds[-1].evaluation.mean("loss"))
    current = Strategy(
        select=everyone(), local=LocalRule(personal_parameters=("out.bias",))
    )  # no model is common to all clients
    assert all(item.evaluation is None for item in run(current, data=nothing, evaluate=judge(scenario)))
    alone = replace(scenario, data=replace(nothing, pooled_test=None))
    assert all(item.evaluation is None for item in run(everyone_equal(), data=nothing, evaluate=judge(alone)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("rounds", 0), ("evaluate_every", 0), ("evaluate_clients", 0), ("max_failures", 1.01)],
)
def test_a_schedule_out_of_range_is_refused_by_name(setting, value):
    with pytest.raises(SettingError, match=f"{setting} is {value}"):
        Schedule(**{"rounds": 1, setting: value})
