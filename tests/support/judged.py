"""A small experiment with a fixed model, whose judgement tests compare with independent implementations."""

import numpy as np

from fedlearn import Schedule, serial
from fedlearn.core.records import LocalSettings, ServerState
from fedlearn.data.column_types import Category, Number
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.inputs import TableInputs
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.mechanisms.base import none
from fedlearn.runner.evaluation import evaluate_final_model
from fedlearn.runner.experiment import Experiment
from fedlearn.runner.plan import Plan
from fedlearn.testing import LinearTrainer
from strategies import fedavg

NUM_FEATURES = 3
COLUMNS = (Number(name="age", centre=50.0, spread=10.0), Category(name="sex", levels=("f", "m")))
TARGETS = {
    "binary": Target(name="relapse", task="binary", classes=("no", "yes")),
    "multiclass": Target(name="stage", task="multiclass", classes=("I", "II", "III")),
    "regression": Target(name="days", task="regression", centre=20.0, spread=5.0, unit="days"),
}


class Model(LinearTrainer):
    """Linear scores; ``multiclass`` has one row of weights for each class."""

    def __init__(self, num_outputs=1):
        super().__init__(NUM_FEATURES * num_outputs)
        self.num_outputs = num_outputs

    def predict(self, params_D, x):
        return np.asarray(x @ np.asarray(params_D).reshape(self.num_outputs, NUM_FEATURES).T, np.float32)


def experiment(task="binary", num_clients=4, size=60, subgroups=(), **scenario):
    rng = np.random.default_rng(0)
    count = num_clients * size
    is_male = rng.random(count) < 0.5
    x = np.stack([rng.normal(size=count), ~is_male, is_male], axis=1).astype(np.float32)
    noisy = x[:, 0] + rng.normal(size=count)
    y = {"binary": noisy > 1, "multiclass": np.digitize(noisy, [-0.5, 0.8]), "regression": noisy}[task]
    y = y.astype(np.float32 if task == "regression" else np.int64)
    rows = np.split(np.arange(count), num_clients)
    data = from_arrays(x, y, assignment=rows, task=task, test_share=0.5, seed=1)
    trainer = Model(3 if task == "multiclass" else 1)
    preprocessing = Preprocessing(inputs=TableInputs(columns=COLUMNS), target=TARGETS[task])
    fields = {"name": "x", "data": data, "trainer": trainer, "preprocessing": preprocessing} | scenario
    plan = Plan(
        strategy=fedavg(), schedule=Schedule(rounds=5), local=LocalSettings(), privacy=none(), seed=1,
        subgroups=subgroups,
    )  # fmt: skip
    return Experiment(plan=plan, scenario=Scenario(**fields), engine=serial(fields["data"], trainer))


def state_of(given):
    weights = {1: [1.0, -0.3, -0.2], 3: [-1, 0.1, 0.2, 0.1, 0.3, 0.2, 1, -0.4, 0.1]}
    params = np.array(weights[given.scenario.trainer.num_outputs], np.float32)
    return ServerState(round=5, seed=1, params_D=params)


def judged(*args, **kwargs):
    given = experiment(*args, **kwargs)
    return given, evaluate_final_model(given, state_of(given))
