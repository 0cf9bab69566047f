"""Federated, privacy-preserving learning: one experiment, simulated or deployed, in PyTorch or JAX.

The names here run experiments and write strategies. ``docs/api.md`` lists them, and the namespaces with all others.
"""

from typing import TYPE_CHECKING

from fedlearn.algorithm.aggregation import Aggregator, expected_mean, mean, stacked
from fedlearn.algorithm.client_selection import Selector, everyone, poisson, uniform
from fedlearn.algorithm.local_rule import LocalRule, proximal
from fedlearn.algorithm.server_optimizers import adaptive, sgd
from fedlearn.algorithm.strategy import CompositionError, Strategy
from fedlearn.algorithm.transforms import Context, Stage, Transform, chain, clip
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.lazy_names import LazyName, lazy_names
from fedlearn.core.metric import Metric, mean_metric
from fedlearn.core.records import Array, Examples, LocalSettings, Round, State, Updates
from fedlearn.core.tasks import Task
from fedlearn.core.version import VERSION
from fedlearn.data.from_arrays import from_arrays
from fedlearn.engines.base import serial, vector
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.loop.scenario import Scenario, judge
from fedlearn.loop.schedule import Schedule
from fedlearn.loop.training_loop import federate, start

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from fedlearn import algorithm as algorithm
    from fedlearn import compression as compression
    from fedlearn import core as core
    from fedlearn import data as data
    from fedlearn import engines as engines
    from fedlearn import errors as errors
    from fedlearn import extend as extend
    from fedlearn import flower as flower
    from fedlearn import loop as loop
    from fedlearn import privacy as privacy
    from fedlearn import robust as robust
    from fedlearn import trainers as trainers
    from fedlearn.data.hugging_face import from_datasets
    from fedlearn.trainers.jax import JaxTrainer
    from fedlearn.trainers.torch import TorchTrainer

    # load, run and tune of fedlearn.runner; an import would go up the layers
    load: Callable[..., Any]
    run: Callable[..., Any]
    tune: Callable[..., Any]
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "JaxTrainer": LazyName("fedlearn.trainers.jax", "jax"),
            "TorchTrainer": LazyName("fedlearn.trainers.torch", "torch"),
            "from_datasets": LazyName("fedlearn.data.hugging_face", "data"),
            "load": LazyName("fedlearn.runner.trained_model"),
            "run": LazyName("fedlearn.runner.python_run"),
            "tune": LazyName("fedlearn.runner.tuning.tune"),
        },
        namespaces=(
            "algorithm",
            "callbacks",
            "compression",
            "core",
            "data",
            "engines",
            "errors",
            "extend",
            "flower",
            "loop",
            "privacy",
            "robust",
            "testing",
            "trainers",
        ),
    )

__version__ = VERSION

__all__ = [
    "Aggregator",
    "Array",
    "CompositionError",
    "Context",
    "Examples",
    "FederatedData",
    "FedlearnError",
    "JaxTrainer",
    "Layout",
    "LocalRule",
    "LocalSettings",
    "Metric",
    "Round",
    "Scenario",
    "Schedule",
    "Selector",
    "SettingError",
    "Stage",
    "State",
    "Strategy",
    "Task",
    "TorchTrainer",
    "Transform",
    "Updates",
    "adaptive",
    "chain",
    "clip",
    "everyone",
    "expected_mean",
    "federate",
    "from_arrays",
    "from_datasets",
    "judge",
    "load",
    "mean",
    "mean_metric",
    "poisson",
    "proximal",
    "run",
    "serial",
    "sgd",
    "stacked",
    "start",
    "tune",
    "uniform",
    "vector",
]
