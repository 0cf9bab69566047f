"""The two ways in which secure aggregation ends without a sum."""

from __future__ import annotations

from fedlearn.core.records import Failure
from fedlearn.errors import FedlearnError, TooManyFailures


class ProtocolError(FedlearnError):
    """One side does not accept what the other one sent; it has given nothing away and stays where it was."""


class SecAggAborted(TooManyFailures):
    """A round ended without a sum: nothing was released, and the next round is not affected.

    Args:
        stage: of the protocol, e.g. ``mask``.
        cause: what was missing.
        failures: of clients, as far as they are known.
    """

    def __init__(self, stage: str, cause: str, failures: tuple[Failure, ...] = ()) -> None:
        super().__init__(f"secure aggregation stopped at stage {stage}: {cause}", failures)
        self.stage, self.cause = stage, cause


def reject_if(condition: bool, cause: str) -> None:
    """Raise `Refused` if ``condition``."""
    if condition:
        raise ProtocolError(cause)
