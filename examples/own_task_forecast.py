"""Forecast several steps of a series, as a task with its own loss and metrics."""

import numpy as np
from torch import nn

import fedlearn
from strategies import fedavg

PAST, STEPS = 12, 4


def squared_error(outputs, y):
    """Return the loss of each example, in arrays of any framework."""
    return ((outputs - y) ** 2).mean(-1)


forecast = fedlearn.Task(
    name="forecast",
    loss=squared_error,
    metrics=(
        fedlearn.mean_metric("loss", squared_error, higher_is_better=False),
        fedlearn.mean_metric("mae", lambda outputs, y: abs(outputs - y).mean(axis=1), higher_is_better=False),
    ),
    main_metric="mae",
    num_outputs=lambda num_steps: num_steps,
)

rng = np.random.default_rng(0)
phase = rng.uniform(0, 6, 400)
client = np.arange(400) % 5  # each client has a frequency
series = np.sin(phase[:, None] + (0.4 + 0.1 * client[:, None]) * np.arange(PAST + STEPS))
series += rng.normal(0, 0.05, series.shape)
data = fedlearn.from_arrays(series[:, :PAST], series[:, PAST:], assignment=client, task=forecast)
trainer = fedlearn.TorchTrainer(nn.Sequential(nn.Linear(PAST, 32), nn.Tanh(), nn.Linear(32, STEPS)), task=forecast)
scenario = fedlearn.Scenario(name="series", data=data, trainer=trainer)
strategy, engine = fedavg(), fedlearn.vector(data, trainer)
state = fedlearn.start(strategy, trainer.init(1), engine, seed=1)
evaluate, schedule = fedlearn.judge(scenario), fedlearn.Schedule(rounds=20)
for round in fedlearn.federate(strategy, engine, state, schedule=schedule, evaluate=evaluate):
    if round.number % 5 == 0:
        print(f"round {round.number:2}: mean absolute error {round.evaluation.pooled['mae']:.3f}")
