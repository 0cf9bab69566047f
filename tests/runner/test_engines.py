"""The builder and the engine state the capabilities of an engine; none is guessed from a name."""

import pickle
import sys
from types import ModuleType

import numpy as np
import pytest
from omegaconf import OmegaConf

from fedlearn import FedlearnError, Schedule, SettingError, federate, start
from fedlearn.algorithm.aggregation import PartialAggregate, accumulate
from fedlearn.engines.base import InProcessEngine, serial, vector
from fedlearn.engines.byzantine import ByzantineEngine
from fedlearn.loop.base_engine import BaseEngine, engine_builder, stated_capabilities
from fedlearn.loop.scenario import Scenario
from fedlearn.loop.wrappers import EngineWrapper
from fedlearn.privacy.audit import ObservingEngine
from fedlearn.robust.poisoning import sign_flip
from fedlearn.runner.compose import compose
from fedlearn.runner.experiment import build_experiment
from fedlearn.runner.plan import build_plan
from fedlearn.runner.start import parse_args
from fedlearn.testing import LOCAL_SETTINGS, LinearTrainer, linear_problem
from strategies import fedavg

MODULE = ModuleType("own_engines")
BUILT, CLOSED = [], []


def offered(thing):
    thing.__module__ = MODULE.__name__
    setattr(MODULE, thing.__name__, thing)
    return thing


@offered
def small_problem():
    BUILT.append("scenario")
    return Scenario(name="small", data=linear_problem(), trainer=LinearTrainer(3), model="linear")


@offered
class Crowd(InProcessEngine):
    """States as a class attribute that it runs in process."""

    def __init__(self, data, trainer):
        super().__init__(data, trainer, block_size=2)


@offered
@engine_builder(in_process=True)
def thread_of_one(data, trainer):
    return InProcessEngine(data, trainer, block_size=1)


@offered
def vector_of_silence(data, trainer):
    """Build an engine without stating a capability."""
    return InProcessEngine(data, trainer, block_size=1)


@offered
@engine_builder(rebuilds_scenario=True)
def far_away(data, trainer, again, *, seats: int = 1):
    """Build an engine in other processes, from the function that builds the scenario there."""
    scenario = pickle.loads(pickle.dumps(again))()  # noqa: S301
    assert scenario.trainer.layout == trainer.layout
    return Far(scenario.data, scenario.trainer, block_size=seats)


class Far(InProcessEngine):
    in_process = False


class Boaster(BaseEngine):
    def fit(self, request, strategy, cohort):
        yield from ()

    def evaluate(self, params_D, cohort, personal_strategy=None):
        yield from ()

    def close(self):
        CLOSED.append(type(self).__name__)


@offered
@engine_builder(in_process=True)
def boasts(data, trainer):
    return Boaster(data.clients, trainer.layout)


@offered
def hides_that_it_is_deployed(data, trainer):
    engine = Boaster(data.clients, trainer.layout)
    engine.deployed = True
    return engine


@offered
def lacks_members(data, trainer):
    class Bare:
        clients, layout, client_states = data.clients, trainer.layout, {}

        def close(self):
            CLOSED.append("Bare")

    return Bare()


@pytest.fixture(autouse=True)
def own_engines(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE.__name__, MODULE)
    BUILT.clear()
    CLOSED.clear()


def composed(engine, *words):
    cfg = compose(parse_args(["allow_targets=[own_engines]", "rounds=2", "engine=serial", *words]))[0].cfg
    OmegaConf.set_struct(cfg, False)
    cfg.model = cfg.partition = None  # the default scenario has both
    cfg.scenario = {"_target_": "own_engines.small_problem"}
    cfg.engine = {"_target_": f"own_engines.{engine}"} if "." not in engine else {"_target_": engine}
    return cfg


NEED = {
    "poisoning": ["poisoning=label_flip"],
    "forging": ["poisoning=sign_flip", "poisoning.fraction=0.4"],
    "strategy.num_root_examples": ["strategy=fltrust", "strategy.num_root_examples=10"],
}


@pytest.mark.parametrize("engine", ["Crowd", "thread_of_one", "fedlearn.serial"])
@pytest.mark.parametrize("words", [NEED["forging"], NEED["strategy.num_root_examples"]])
def test_an_in_process_engine_of_any_name_gets_attacks_and_root_datasets(engine, words):
    cfg = composed(engine, *words)
    built = build_experiment(cfg)
    state = start(built.plan.strategy, np.zeros(4, np.float32), built.engine, seed=1)
    *_, last = federate(built.plan.strategy, built.engine, state, schedule=Schedule(rounds=2), local=LOCAL_SETTINGS)
    assert np.isfinite(last.state.params_D).all()
    assert isinstance(built.engine, ByzantineEngine) == (words == NEED["forging"])


@pytest.mark.parametrize("words", NEED.values(), ids=NEED)
@pytest.mark.parametrize("engine", ["vector_of_silence", "far_away", "fedlearn.engines.ray.engine.ray"])
def test_an_engine_that_does_not_state_it_is_refused_before_any_data(engine, words):
    cfg = composed(engine, *words)
    with pytest.raises(SettingError, match="does not state in_process=True") as refused:
        build_experiment(cfg)
    assert ("@engine_builder(in_process=True)" in str(refused.value)) == ("." not in engine)
    assert not BUILT


@pytest.mark.framework
def test_an_engine_of_a_coordinator_is_refused_in_a_simulation_before_any_data():
    with pytest.raises(SettingError, match=r"engine is grid(.|\n)*fedlearn\.deploy\.submit"):
        build_experiment(composed("fedlearn.engines.deployed.grid"))
    assert not BUILT


def test_an_engine_in_other_processes_gets_the_function_that_rebuilds_the_scenario():
    cfg = composed("far_away")
    cfg.engine.seats = 3
    assert build_experiment(cfg).engine.block_size == 3
    assert BUILT == ["scenario"] * 2


@pytest.mark.parametrize(
    ("engine", "message", "closed"),
    [
        ("boasts", r"Boaster\.in_process is False", ["Boaster"]),
        ("hides_that_it_is_deployed", r"Boaster\.deployed is True", ["Boaster"]),
        ("lacks_members", r"add the line: in_process = False", ["Bare"]),
    ],
)
def test_a_built_engine_that_differs_is_refused_and_closed(engine, message, closed):
    with pytest.raises(SettingError, match=message):
        build_experiment(composed(engine))
    assert closed == CLOSED


def test_a_capability_is_true_or_false():
    cfg = composed("far_away", "poisoning=label_flip")
    MODULE.far_away.in_process = "yes"
    try:
        with pytest.raises(SettingError, match=r"engine\.in_process is yes"):
            build_plan(cfg)
    finally:
        MODULE.far_away.in_process = False
    assert stated_capabilities(Crowd).in_process
    assert not stated_capabilities(Far).in_process


def test_the_loop_refuses_an_engine_without_a_member_by_name():
    strategy, engine = fedavg(), serial(linear_problem(), LinearTrainer(3))
    state = start(strategy, np.zeros(4, np.float32), engine, seed=1)
    with pytest.raises(SettingError, match=r"elapsed_s is missing(.|\n)*elapsed_s = None"):
        next(federate(strategy, without(engine, "elapsed_s"), state, schedule=Schedule(rounds=1)))


def without(engine, name):
    """Return the engine as an object without one of its members."""
    names = [n for n in dir(engine) if not n.startswith("_") and n != name]
    return type("Partial", (), {n: getattr(engine, n) for n in names})()


class Folding(EngineWrapper):
    """States that it runs in process, but returns a partial aggregate."""

    def fit(self, request, strategy, cohort):
        whole = PartialAggregate(aggregator_state=strategy.aggregate.init(self.layout))
        for result in self.engine.fit(request, strategy, cohort):
            whole = accumulate(whole, strategy.aggregate, result)
        yield whole


@pytest.mark.parametrize(
    "around",
    [
        lambda engine: ByzantineEngine(engine, sign_flip(fraction=0.3), frozenset({0})),
        lambda engine: ObservingEngine(engine, BUILT.append),
    ],
)
def test_attacks_and_audits_refuse_partial_aggregates_instead_of_missing_them(around):
    engine, strategy = around(Folding(vector(linear_problem(), LinearTrainer(3)))), fedavg()
    state = start(strategy, np.zeros(4, np.float32), engine, seed=1)
    with pytest.raises(FedlearnError, match="the update of each client"):
        next(federate(strategy, engine, state, schedule=Schedule(rounds=1)))


def test_client_states_that_are_set_on_a_wrapped_engine_reach_it():
    inner = vector(linear_problem(), LinearTrainer(3))
    outer = ByzantineEngine(inner, sign_flip(fraction=0.3), frozenset({0}))
    outer.client_states = {0: {"w": np.ones(4)}}
    assert inner.client_states is outer.client_states
