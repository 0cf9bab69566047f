"""Federated, privacy-preserving learning: strategies are data, engines carry orders, the loop is a generator."""

from array_api_compat import array_namespace

from fedlearn.aggregate import Aggregator, after, expected_mean, kept, mean, stacked, updates_of
from fedlearn.arrays import like
from fedlearn.clip import clip, clip_norm
from fedlearn.compress import signs
from fedlearn.data.federated import FederatedData
from fedlearn.engines.serial import serial
from fedlearn.engines.vector import vector
from fedlearn.errors import FedlearnError, SettingError, is_count, is_number, require
from fedlearn.layout import Layout
from fedlearn.local import LocalRule, plain, proximal
from fedlearn.loop import Schedule, federate, start
from fedlearn.optim import adaptive, from_optax, sgd, zeros
from fedlearn.premix import premixed, shuffled
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
    buckets,
    chosen_by_krum,
    coordinate_median,
    distances_to,
    equal_mean,
    inner_products,
    krum_order,
    mean_around_median,
    nearest_neighbours,
    squared_distances,
    trimmed_mean,
    weighted_mean,
    withstood,
)
from fedlearn.scenario import Scenario, judge
from fedlearn.select import SamplingLaw, Selector, everyone, min_separation, poisson, uniform
from fedlearn.strategy import CompositionError, Strategy
from fedlearn.transform import Codec, Context, Stage, Transform, chain, identity

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Array",
    "Codec",
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
    "after",
    "array_namespace",
    "buckets",
    "chain",
    "chosen_by_krum",
    "clip",
    "clip_norm",
    "coordinate_median",
    "distances_to",
    "equal_mean",
    "everyone",
    "expected_mean",
    "federate",
    "from_optax",
    "identity",
    "inner_products",
    "is_count",
    "is_number",
    "judge",
    "kept",
    "krum_order",
    "like",
    "mean",
    "mean_around_median",
    "min_separation",
    "nearest_neighbours",
    "plain",
    "poisson",
    "premixed",
    "proximal",
    "require",
    "serial",
    "sgd",
    "shuffled",
    "signs",
    "squared_distances",
    "stacked",
    "start",
    "trimmed_mean",
    "uniform",
    "updates_of",
    "vector",
    "weighted_mean",
    "withstood",
    "zeros",
]
