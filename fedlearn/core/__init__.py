"""Vocabulary of the library: records, model layout, random streams, metrics and the privacy ledger."""

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout, Leaf, default_initial_parameters, random_parameters
from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import Epsilon, Event, Ledger
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
    "Evaluation",
    "Event",
    "ExampleDP",
    "Examples",
    "Failure",
    "FailureStage",
    "FederatedData",
    "InFlight",
    "Layout",
    "Leaf",
    "Ledger",
    "LocalSettings",
    "MetricSum",
    "Predictions",
    "PrivacyGuarantee",
    "Purpose",
    "Release",
    "Request",
    "Round",
    "ServerState",
    "State",
    "Updates",
    "default_initial_parameters",
    "generator",
    "random_parameters",
]
