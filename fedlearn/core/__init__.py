"""Shared definitions of the library: records, model layout, random streams, metrics and the privacy ledger."""

from fedlearn.core.adapters import find_adapters
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout, Leaf, default_initial_parameters, random_parameters
from fedlearn.core.privacy_guarantee import Neighbors, PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import (
    Epsilon,
    EpsilonDeltaEvent,
    Event,
    LaplaceEvent,
    Ledger,
    RenyiEvent,
    event_history,
)
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import (
    Array,
    ClientEvaluation,
    ClientWork,
    Evaluation,
    ExampleDP,
    Examples,
    Failure,
    FailureStage,
    InFlight,
    LocalSettings,
    MetricSum,
    Predictions,
    Request,
    Round,
    ServerState,
    State,
    Updates,
)

__all__ = [
    "Array",
    "ClientEvaluation",
    "ClientWork",
    "Epsilon",
    "EpsilonDeltaEvent",
    "Evaluation",
    "Event",
    "ExampleDP",
    "Examples",
    "Failure",
    "FailureStage",
    "FederatedData",
    "InFlight",
    "LaplaceEvent",
    "Layout",
    "Leaf",
    "Ledger",
    "LocalSettings",
    "MetricSum",
    "Neighbors",
    "Predictions",
    "PrivacyGuarantee",
    "Purpose",
    "Release",
    "RenyiEvent",
    "Request",
    "Round",
    "ServerState",
    "State",
    "Updates",
    "default_initial_parameters",
    "event_history",
    "find_adapters",
    "generator",
    "random_parameters",
]
