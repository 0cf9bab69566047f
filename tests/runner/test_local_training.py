"""Settings of local training from a configuration: functions by name, and no other code."""

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings, Schedule, SettingError, federate, serial, start
from fedlearn.core.records import Request
from fedlearn.core.serialization import WireError
from fedlearn.deploy.node_side.bounds import require_local_within
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.protocol.training_order import pack_order, read_order
from fedlearn.runner.local_training import build_local
from fedlearn.testing import LinearTrainer, linear_problem


def halving(round, step, num_steps, base=0.5):
    return base ** (round - 1)


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.optim.lr_scheduler.os.system", 3])
@pytest.mark.parametrize("setting", ["optimizer", "schedule"])
def test_a_target_outside_of_the_frameworks_is_not_imported(setting, name):
    for value in ({"_target_": name}, name):
        with pytest.raises(SettingError) as caught:
            build_local({setting: value}, allow=["numpy"])
        assert caught.value.setting.startswith(f"local.{setting}")


def test_a_function_of_another_module_is_refused_although_an_allowed_module_imports_it():
    with pytest.raises(SettingError, match=r"local\.schedule"):
        build_local({"schedule": {"_target_": f"{__name__}.np.mean"}}, allow=[__name__])


def test_a_function_of_an_allowed_module_receives_its_values():
    target = {"_target_": f"{__name__}.halving", "base": 0.1}
    assert build_local({"schedule": target}, allow=[__name__]).schedule(3, 0, 1) == pytest.approx(0.01)


def test_errors_name_the_setting_and_a_value_that_works():
    with pytest.raises(SettingError) as caught:
        build_local({"schedule": {"name": "cosine", "warm": 2}}, allow=[])
    assert caught.value.setting == "local.schedule.warm"
    assert caught.value.fix == "'local.schedule={name:cosine,warmup:2}'"


def last_params(strategy, local, *, rounds, stop=None):
    engine = serial(linear_problem(), LinearTrainer(3))
    state = start(strategy, np.zeros(4, np.float32), engine, seed=1)
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=local):
        if done.number == stop:
            state = done.state
            break
        state = done.state
    if stop:
        *_, done = federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=local)
        state = done.state
    return state.params_D


@pytest.mark.parametrize(
    "schedule", ["cosine", {"name": "step", "every": 2}, {"name": "linear", "over": "steps"}, halving]
)
def test_a_resumed_run_follows_the_schedule_of_an_uninterrupted_run(schedule):
    local = LocalSettings(optimizer="adam", schedule=schedule, batch_size=4, max_grad_norm=1.0)
    strategy = strategies.fedprox(mu=0.1)
    whole = last_params(strategy, local, rounds=6)
    assert np.array_equal(whole, last_params(strategy, local, rounds=6, stop=2))
    assert not np.array_equal(whole, last_params(strategy, LocalSettings(optimizer="adam", batch_size=4), rounds=6))


@pytest.mark.parametrize("strategy", [strategies.fedcm(), strategies.proxskip()], ids=["fedcm", "proxskip"])
@pytest.mark.parametrize(
    "local", [{"optimizer": "adam"}, {"momentum": 0.9}, {"schedule": {"name": "linear", "over": "steps"}}], ids=str
)
def test_a_strategy_for_plain_sgd_refuses_other_steps(strategy, local):
    with pytest.raises(SettingError, match="correct for plain SGD only"):
        last_params(strategy, LocalSettings(**local), rounds=1)
    last_params(strategy, LocalSettings(schedule="cosine"), rounds=1)


ORDER = Request(round=1, seed=1, params_D=np.zeros(4, np.float32))


def test_a_node_receives_the_settings_of_the_run():
    local = LocalSettings(
        optimizer={"name": "adam", "betas": (0.8, 0.9)}, schedule={"name": "cosine", "rounds": 3}, class_weights=[1, 2]
    )
    order = Request(round=1, seed=1, params_D=ORDER.params_D, local=local)
    assert read_order(pack_order(order), 1).local == local


@pytest.mark.parametrize("setting", ["optimizer", "schedule"])
def test_no_message_contains_a_function(setting):
    order = Request(round=1, seed=1, params_D=ORDER.params_D, local=LocalSettings(**{setting: halving}))
    with pytest.raises(SettingError, match="a message to a node contains no code"):
        pack_order(order)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"_target_": "os.system"}}, {"optimizer": {"name": "adam", "_target_": "os.system"}},
        {"schedule": {"name": "cosine", "end": 1e9}}, {"schedule": {"_target_": "os.system"}}, {"optimizer": None},
        {"class_weights": "all"}, {"max_grad_norm": -1}, {"code": "x"},
    ],
)  # fmt: skip
def test_a_node_cannot_read_other_local_settings(changes):
    payload = pack_order(ORDER)
    payload.metadata["local"].update(changes)
    with pytest.raises(WireError):
        read_order(payload, 1)


LOCAL = {"epochs": 1, "steps": None, "batch_size": 32, "learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "lion"}, {"optimizer": {"name": "radam", "foreach": True}}, {"optimizer": "os.system"},
        {"class_weights": (1.0, 1e9)}, {"max_grad_norm": 1e12}, {"micro_batch_size": 10**7},
    ],
)  # fmt: skip
def test_a_node_accepts_portable_optimizers_and_bounded_values_only(changes):
    require_local_within({**LOCAL, "optimizer": {"name": "adam", "eps": 1e-6}, "schedule": "cosine"}, {})
    with pytest.raises(PolicyViolation, match=f"local.{next(iter(changes))}"):
        require_local_within({**LOCAL, **changes}, {})


def test_a_policy_bounds_the_names_of_optimizers_and_schedules():
    bounds = {"optimizer": {"one_of": ["sgd", "radam"]}, "schedule": {"one_of": ["constant"]}}
    accepted = {**LOCAL, "optimizer": "radam", "schedule": "constant"}
    require_local_within(accepted, bounds)
    for refused in ({"optimizer": "adam"}, {"schedule": {"name": "cosine", "rounds": 3}}):
        with pytest.raises(PolicyViolation, match="this node accepts one of"):
            require_local_within({**accepted, **refused}, bounds)
