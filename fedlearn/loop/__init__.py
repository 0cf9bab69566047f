"""The training loop, the protocols of engines and trainers, scenarios, and system models."""

from fedlearn.loop.base_engine import BaseEngine, EngineCapabilities, engine_builder, require_engine
from fedlearn.loop.protocols import AsyncEngine, Completion, Engine, MixedRoundEngine, Trainer
from fedlearn.loop.scenario import Scenario, judge
from fedlearn.loop.system_model import SystemModel, constant, lognormal, trace
from fedlearn.loop.training_loop import Schedule, federate, start
from fedlearn.loop.virtual_clock import VirtualClockEngine
from fedlearn.loop.wrappers import EngineWrapper, TrainerWrapper

__all__ = [
    "AsyncEngine",
    "BaseEngine",
    "Completion",
    "Engine",
    "EngineCapabilities",
    "EngineWrapper",
    "MixedRoundEngine",
    "Scenario",
    "Schedule",
    "SystemModel",
    "Trainer",
    "TrainerWrapper",
    "VirtualClockEngine",
    "constant",
    "engine_builder",
    "federate",
    "judge",
    "lognormal",
    "require_engine",
    "start",
    "trace",
]
