"""Observe a run: base class and description of the run for callbacks of users."""

from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.records import Round

__all__ = ["Callback", "Round", "RunInfo"]
