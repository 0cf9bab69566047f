"""Exceptions of secure aggregation, for client and server."""

from __future__ import annotations

from fedlearn.core.records import Failure
from fedlearn.errors import FedlearnError, TooManyFailures


class ProtocolError(FedlearnError):
    """A message is not acceptable; its receiver has revealed nothing, and its state is unchanged."""


class SecAggAborted(TooManyFailures):
    """A round ended without a sum. An honest server can open nothing, and the next round is possible.

    Args:
        stage: stage of the protocol, e.g. ``mask``.
        cause: reason in one line.
        failures: known failures of clients.
    """

    def __init__(self, stage: str, cause: str, failures: tuple[Failure, ...] = ()) -> None:
        super().__init__(f"secure aggregation stopped at stage {stage}: {cause}", failures)
        self.stage, self.cause = stage, cause
        self.is_before_sending = stage in ("advertise", "share")  # clients have exchanged keys only


def reject_if(condition: bool, cause: str) -> None:
    """Raise a `ProtocolError` with this cause if the condition is true."""
    if condition:
        raise ProtocolError(cause)
