"""Callbacks observe a run: console, run files, checkpoints, early stopping, report, and callbacks of users."""

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Round

__all__ = ["Callback", "Round", "RunInfo"]
