"""Personal parameters stay at the client, and shared parameters leave it."""

from dataclasses import replace

import numpy as np
import pytest

from fedlearn import (
    CompositionError,
    LocalRule,
    Schedule,
    SettingError,
    Strategy,
    everyone,
    federate,
    mean,
    proximal,
    serial,
    start,
    vector,
)
from fedlearn.algorithm import PersonalModel
from fedlearn.core import (
    ClientWork,
    Request,
    checkpoint,  # fmt: skip
)
from fedlearn.engines.base import InProcessEngine
from fedlearn.engines.process_pool import ProcessPool
from fedlearn.loop.client_update import client_step, initial_client_state
from fedlearn.loop.local_training import PERSONAL_MODEL, PERSONAL_PARAMETERS
from fedlearn.loop.scenario import Scenario, judge
from fedlearn.privacy.mechanisms import central, example, local
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, check_strategy, linear_problem

TRAINER, DATA = LinearTrainer(3), linear_problem()
KEEPS = LocalRule(personal_parameters=("out.bias",))  # the first number of four
BIAS = Strategy(select=everyone(), local=KEEPS)
ORDER = Request(round=1, seed=1, params_D=TRAINER.init(1), local=LOCAL_SETTINGS)
JUDGE = judge(Scenario(name="linear", data=DATA, trainer=TRAINER, model="linear"))
DITTO = Strategy(select=everyone(), local=LocalRule(personal=PersonalModel(correct=proximal(0.1).correct)))


def run(strategy, engine, *, rounds, state=None, local=LOCAL_SETTINGS):
    state = state or start(strategy, TRAINER.init(1), engine, seed=1)
    rounds = federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=local, evaluate=JUDGE)
    return list(rounds)


def work_of(strategy, *clients, memory=None):
    fresh = initial_client_state(strategy, TRAINER.layout, ORDER.params_D)
    return [ClientWork(client=k, examples=DATA.train(k), client_state=memory or fresh) for k in clients]


def test_parameters_that_stay_are_trained_remembered_and_not_sent():
    updates, _ = client_step(TRAINER, BIAS, ORDER, work_of(BIAS, 0, 1))
    whole, _ = client_step(TRAINER, Strategy(select=everyone()), ORDER, work_of(BIAS, 0, 1))
    assert updates.delta_KD.shape == (2, 3)
    assert updates.num_bytes_K.tolist() == [12, 12]
    assert np.array_equal(updates.delta_KD, whole.delta_KD[:, 1:])
    assert np.allclose(
        updates.client_state[PERSONAL_PARAMETERS][:, 0], ORDER.params_D[0] + whole.delta_KD[:, 0], atol=1e-6
    )
    later, _ = client_step(
        TRAINER, BIAS, ORDER, work_of(BIAS, 0, memory={PERSONAL_PARAMETERS: np.array([9.0], np.float32)})
    )
    assert abs(later.client_state[PERSONAL_PARAMETERS][0, 0] - 9) < 9
    assert not np.allclose(later.client_state[PERSONAL_PARAMETERS], updates.client_state[PERSONAL_PARAMETERS][:1])


def test_the_global_model_keeps_its_first_values_of_what_stays():
    rounds = run(BIAS, vector(DATA, TRAINER), rounds=3)
    assert rounds[-1].state.params_D[0] == TRAINER.init(1)[0]
    assert (rounds[-1].state.params_D[1:] != TRAINER.init(1)[1:]).all()
    assert [item.bytes_up for item in rounds] == [6 * 12] * 3
    assert [item.bytes_down for item in rounds] == [6 * 16] * 3


def test_each_client_is_evaluated_with_its_own_parameters():
    engine = serial(DATA, TRAINER)
    (*_, last) = run(BIAS, engine, rounds=3)
    for k, client in enumerate(last.evaluation.clients):
        own_D = last.state.params_D.copy()
        own_D[0] = engine.client_states[client][PERSONAL_PARAMETERS][0]
        test = DATA.test(client)
        error = np.mean((TRAINER.predict(own_D, test.x)[:, 0] - test.y) ** 2)
        assert last.evaluation.per_client["loss"][k] == pytest.approx(error)
    assert last.evaluation.personal is None


def test_a_client_that_never_took_part_is_evaluated_with_the_first_values():
    engine = serial(DATA, TRAINER)
    current = list(engine.evaluate(ORDER.params_D, [0, 3], BIAS))
    shared = list(engine.evaluate(ORDER.params_D, [0, 3]))
    assert all(np.allclose(a.outputs, b.outputs, atol=1e-6) for a, b in zip(current, shared, strict=True))


def test_what_stays_is_in_the_checkpoint_of_a_simulation(tmp_path):
    whole = run(BIAS, serial(DATA, TRAINER), rounds=4)[-1]
    first = serial(DATA, TRAINER)
    half = run(BIAS, first, rounds=2)[-1]
    path = checkpoint.save(tmp_path, half.state, first.client_states, layout=TRAINER.layout)
    second = vector(DATA, TRAINER, block_size=4)
    state, second.client_states = checkpoint.load(path, TRAINER.layout)
    resumed = run(BIAS, second, rounds=4, state=state)[-1]
    assert np.array_equal(resumed.state.params_D, whole.state.params_D)
    assert np.array_equal(resumed.evaluation.per_client["loss"], whole.evaluation.per_client["loss"])


def test_nothing_may_stay_that_is_not_there_and_something_must_leave():
    for keeps, why in (
        (("body.*",), r"personal_parameters is body\.\*(.|\n)*out\.bias, out\.weight"),
        (("out.*",), "match some parameters, not all"),
    ):
        with pytest.raises(SettingError, match=why):
            Strategy(select=everyone(), local=LocalRule(personal_parameters=keeps)).shared_layout(TRAINER.layout)


def test_what_stays_must_not_leave_beside_the_update():
    def finish(delta_KD, num_steps_K, learning_rate):
        return {}, {"more": delta_KD}

    with pytest.raises(CompositionError, match="vectors more of the local rule"):
        Strategy(select=everyone(), local=KEEPS._replace(after_training=finish))
    with pytest.raises(CompositionError, match="personal_epochs=2"):
        Strategy(select=everyone(), local=LocalRule(personal_epochs=2))


@pytest.mark.parametrize(
    "mechanism", [central(noise_multiplier=0.01), local(noise_multiplier=0.01)], ids=lambda m: m.kind
)
def test_what_stays_needs_no_protection_and_gets_none(mechanism):
    equal = replace(BIAS, aggregate=mean(weighting="equal"))
    mechanism.validate(equal, LOCAL_SETTINGS)
    protected, settings = mechanism.protect(equal, LOCAL_SETTINGS, Population(clients=range(6), rounds=3))
    engine = serial(DATA, TRAINER)
    last = run(protected, engine, rounds=3, local=settings)[-1]
    assert last.state.params_D[0] == TRAINER.init(1)[0], "noise must not change personal parameters"
    assert (last.state.params_D[1:] != TRAINER.init(1)[1:]).all()
    assert all(memory[PERSONAL_PARAMETERS][0] != TRAINER.init(1)[0] for memory in engine.client_states.values())


def test_losses_that_clients_tell_do_not_pass_a_protection():
    telling = Strategy(
        select=everyone(), local=LocalRule(evaluate_models=("w_global",)), aggregate=mean(weighting="equal")
    )
    with pytest.raises(CompositionError, match="loss of w_global"):
        central(noise_multiplier=1.0).protect(telling, LOCAL_SETTINGS, Population(clients=range(6), rounds=3))


def test_example_level_privacy_refuses_steps_that_it_does_not_account_for():
    with pytest.raises(CompositionError, match=r"local\.epochs"):
        example(noise_multiplier=1.0).validate(replace(BIAS, local=KEEPS._replace(personal_epochs=1)), LOCAL_SETTINGS)
    example(noise_multiplier=1.0).validate(BIAS, LOCAL_SETTINGS)


def test_in_parts_each_part_moves_in_its_own_passes_alone():
    """Check that frozen parameters keep their values; weight decay would change them."""
    in_parts = Strategy(select=everyone(), local=KEEPS._replace(personal_epochs=2))
    order = replace(ORDER, local=replace(LOCAL_SETTINGS, weight_decay=0.1))
    updates, _ = client_step(TRAINER, in_parts, order, work_of(in_parts, 2))
    only_bias = LocalRule(correct=lambda grad, w, w_global: grad * np.array([1, 0, 0, 0], np.float32))
    first = TRAINER.fit(replace(order, local=replace(order.local, epochs=2)), only_bias, work_of(in_parts, 2))
    assert np.allclose(updates.client_state[PERSONAL_PARAMETERS], ORDER.params_D[:1] + first.delta_KD[:, :1], atol=1e-6)
    begin_D = ORDER.params_D + np.array([first.delta_KD[0, 0], 0, 0, 0], np.float32)
    only_rest = LocalRule(correct=lambda grad, w, w_global: grad * np.array([0, 1, 1, 1], np.float32))
    then = TRAINER.fit(order, only_rest, [work_of(in_parts, 2)[0]._replace(start_D=begin_D)])
    assert np.allclose(updates.delta_KD, then.delta_KD[:, 1:], atol=1e-6)
    assert updates.num_steps_K.tolist() == then.num_steps_K.tolist()


def test_a_personal_model_is_trained_beside_the_global_one_and_judged_beside_it():
    engine, alone = serial(DATA, TRAINER), serial(DATA, TRAINER)
    last = run(DITTO, engine, rounds=5)[-1]
    plainly = run(Strategy(select=everyone()), alone, rounds=5)[-1]
    assert np.array_equal(last.state.params_D, plainly.state.params_D), "the personal model must not change the update"
    assert last.bytes_up == plainly.bytes_up
    assert last.evaluation.pooled == plainly.evaluation.pooled
    assert last.evaluation.personal.mean("loss") < last.evaluation.mean("loss")
    assert set(engine.client_states[0]) == {PERSONAL_MODEL}


def test_a_client_begins_at_the_best_of_the_models_that_it_compares():
    good_D = np.array([0, 1, 1, 1], np.float32)
    two = Strategy(select=everyone(), local=LocalRule(receives=("other",), evaluate_models=("w_global", "other")))
    order = replace(
        ORDER, params_D=good_D + 5, broadcast={"other": good_D}, local=replace(LOCAL_SETTINGS, learning_rate=1e-6)
    )
    updates, _ = client_step(TRAINER, two, order, work_of(two, 0, 1))
    loss = {name: updates.metrics[f"loss/{name}"] for name in ("w_global", "other")}
    assert (loss["other"].total_K < loss["w_global"].total_K).all()
    assert loss["other"].count_K.tolist() == [len(DATA.train(k)) for k in (0, 1)]
    x, y = DATA.train(0).x, DATA.train(0).y
    assert loss["other"].total_K[0] == pytest.approx(np.sum((TRAINER.predict(good_D, x)[:, 0] - y) ** 2), rel=1e-5)
    assert np.abs(updates.delta_KD).max() < 1e-3


@pytest.mark.framework
@pytest.mark.parametrize("strategy", [BIAS, DITTO, replace(BIAS, local=KEEPS._replace(personal_epochs=1))])
def test_strategies_that_keep_something_meet_the_contract(strategy):
    check_strategy(strategy)


@pytest.mark.process
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_forked_workers_train_all_parts_as_one_process_does():
    rule = KEEPS._replace(personal_epochs=1, personal=DITTO.local.personal)
    ends, pool = [], ProcessPool(TRAINER, DATA, num_processes=2)
    try:
        for used in (pool, None):
            engine = InProcessEngine(DATA, TRAINER, block_size=6, pool=used)
            rounds = run(Strategy(select=everyone(), local=rule), engine, rounds=2)
            ends.append(
                [rounds[-1].state.params_D, *(v for k in DATA.clients for v in engine.client_states[k].values())]
            )
        assert len(pool.processes) == 2
    finally:
        pool.close()
    assert all(np.array_equal(a, b) for a, b in zip(*ends, strict=True))
