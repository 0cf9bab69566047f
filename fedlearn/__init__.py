"""Federated, privacy-preserving learning: strategies are data, engines carry orders, the loop is a generator."""

from array_api_compat import array_namespace

from fedlearn.aggregate import Aggregator, add_rows, add_totals, expected_mean, mean, stacked, value
from fedlearn.arrays import as_numpy, like
from fedlearn.asynchrony import Asynchrony, hinge, polynomial, staleness_weight, unweighted
from fedlearn.clip import clip, clip_norm
from fedlearn.data.federated import FederatedData
from fedlearn.engines.clocked import ClockedEngine
from fedlearn.engines.serial import serial
from fedlearn.engines.vector import vector
from fedlearn.errors import FedlearnError, SettingError, is_count, is_number, require
from fedlearn.layout import Layout, first_parameters
from fedlearn.local import LocalRule, Personal, patterns, plain, proximal
from fedlearn.loop import Schedule, federate, start
from fedlearn.optim import adaptive, from_optax, onto_simplex, sgd, zeros
from fedlearn.records import (
    Array,
    Evaluation,
    Examples,
    Failure,
    LocalSettings,
    Memory,
    Order,
    Predictions,
    Round,
    State,
    Updates,
    Work,
)
from fedlearn.robust import (
    chosen_by_krum,
    coordinate_median,
    equal_mean,
    krum_order,
    mean_around_median,
    squared_distances,
    trimmed_mean,
    withstood,
)
from fedlearn.scenario import Scenario, judge
from fedlearn.select import (
    SamplingLaw,
    Selector,
    everyone,
    learning,
    min_separation,
    poisson,
    round_robin,
    selection,
    training_loss,
    uniform,
    values_of,
    weighted,
)
from fedlearn.strategy import CompositionError, Strategy
from fedlearn.system import System, constant, lognormal, trace
from fedlearn.transform import Context, Stage, Transform, chain, identity

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Array",
    "Asynchrony",
    "ClockedEngine",
    "CompositionError",
    "Context",
    "Evaluation",
    "Examples",
    "Failure",
    "FederatedData",
    "FedlearnError",
    "Layout",
    "LocalRule",
    "LocalSettings",
    "Memory",
    "Order",
    "Personal",
    "Predictions",
    "Round",
    "SamplingLaw",
    "Scenario",
    "Schedule",
    "Selector",
    "SettingError",
    "Stage",
    "State",
    "Strategy",
    "System",
    "Transform",
    "Updates",
    "Work",
    "adaptive",
    "add_rows",
    "add_totals",
    "array_namespace",
    "as_numpy",
    "chain",
    "chosen_by_krum",
    "clip",
    "clip_norm",
    "constant",
    "coordinate_median",
    "equal_mean",
    "everyone",
    "expected_mean",
    "federate",
    "first_parameters",
    "from_optax",
    "hinge",
    "identity",
    "is_count",
    "is_number",
    "judge",
    "krum_order",
    "learning",
    "like",
    "lognormal",
    "mean",
    "mean_around_median",
    "min_separation",
    "onto_simplex",
    "patterns",
    "plain",
    "poisson",
    "polynomial",
    "proximal",
    "require",
    "round_robin",
    "selection",
    "serial",
    "sgd",
    "squared_distances",
    "stacked",
    "staleness_weight",
    "start",
    "trace",
    "training_loss",
    "trimmed_mean",
    "uniform",
    "unweighted",
    "value",
    "values_of",
    "vector",
    "weighted",
    "withstood",
    "zeros",
]
