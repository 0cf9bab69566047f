"""The training loop, the protocols of engines and trainers, scenarios, and system models."""

from fedlearn.loop.base_engine import BaseEngine, EngineCapabilities, engine_builder, require_engine
from fedlearn.loop.client_update import client_step, initial_client_state
from fedlearn.loop.local_training import personal_model
from fedlearn.loop.protocols import AsyncEngine, Completion, Engine, MixedRoundEngine, Trainer
from fedlearn.loop.scenario import Scenario, judge
from fedlearn.loop.schedule import Schedule
from fedlearn.loop.system_model import SystemModel, constant, lognormal, trace
from fedlearn.loop.training_loop import federate, start
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
    "client_step",
    "constant",
    "engine_builder",
    "federate",
    "initial_client_state",
    "judge",
    "lognormal",
    "personal_model",
    "require_engine",
    "start",
    "trace",
]
