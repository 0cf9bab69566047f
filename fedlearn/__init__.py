"""Federated, privacy-preserving learning: strategies are data, engines carry orders, the loop is a generator."""

from array_api_compat import array_namespace

from fedlearn.aggregate import Aggregator, expected_mean, mean, stacked
from fedlearn.clip import clip, clip_norm
from fedlearn.data.federated import FederatedData
from fedlearn.engines.serial import serial
from fedlearn.engines.vector import vector
from fedlearn.errors import FedlearnError, SettingError, is_count, is_number, require
from fedlearn.layout import Layout
from fedlearn.local import LocalRule, Personal, patterns, plain, proximal
from fedlearn.loop import Schedule, federate, start
from fedlearn.optim import adaptive, from_optax, sgd, zeros
from fedlearn.records import (
    Array,
    Evaluation,
    Examples,
    Failure,
    LocalSettings,
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
from fedlearn.select import SamplingLaw, Selector, everyone, min_separation, poisson, uniform
from fedlearn.strategy import CompositionError, Strategy
from fedlearn.transform import Context, Stage, Transform, chain, identity

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Array",
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
    "Transform",
    "Updates",
    "Work",
    "adaptive",
    "array_namespace",
    "chain",
    "chosen_by_krum",
    "clip",
    "clip_norm",
    "coordinate_median",
    "equal_mean",
    "everyone",
    "expected_mean",
    "federate",
    "from_optax",
    "identity",
    "is_count",
    "is_number",
    "judge",
    "krum_order",
    "mean",
    "mean_around_median",
    "min_separation",
    "patterns",
    "plain",
    "poisson",
    "proximal",
    "require",
    "serial",
    "sgd",
    "squared_distances",
    "stacked",
    "start",
    "trimmed_mean",
    "uniform",
    "vector",
    "withstood",
    "zeros",
]
