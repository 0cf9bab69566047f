"""Run a workload in fedlearn, with the default settings of `fedlearn.vector`."""

from __future__ import annotations

from importlib import import_module

from fedlearn import Schedule, federate, start, vector
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import default_initial_parameters
from fedlearn.loop.protocols import Trainer
from fedlearn.runner.environment import keep_freed_memory
from simulations.benchmarks.clock import Clock, Done
from simulations.benchmarks.synthetic import federated_data, pool_of
from simulations.benchmarks.workloads import SEED, Workload
from strategies import fedavg


def run(workload: Workload, framework: str, clock: Clock) -> Done:
    """Run federated averaging with the vector engine."""
    pool_of(workload)
    strategy, model_trainer = fedavg(clients_per_round=workload.cohort_size), trainer(workload, framework)
    engine = vector(federated_data(workload), model_trainer)
    state = start(strategy, model_trainer.init(SEED), engine, seed=SEED)
    variant = engine.describe(workload.cohort_size)
    clock.start()
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=workload.rounds), local=workload.local):
        if done.num_updates < len(done.cohort):
            raise RuntimeError(f"{done.failures[0].reason}\n{done.failures[0].traceback}")
        clock.lap(done.num_examples or 0)
        state = done.state
    engine.close()
    return Done(variant, as_numpy(state.params_D))


def trainer(workload: Workload, framework: str) -> Trainer:
    """Build a trainer for the workload's model."""
    model = import_module(f"simulations.benchmarks.models_{framework}").module(workload)
    trainers = import_module(f"fedlearn.trainers.{framework}")
    task, device = workload.task, workload.device
    keep_freed_memory(framework)  # as in a run of fedlearn
    if framework == "torch":
        result: Trainer = trainers.TorchTrainer(model, task=task, initial=default_initial_parameters, device=device)
    else:
        result = trainers.JaxTrainer(model, task=task, input_shape=workload.input_shape, device=device)
    return result
