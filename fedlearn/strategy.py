"""An algorithm is data: five small pure parts, checked when they are put together."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedlearn.aggregate import Aggregator, mean
from fedlearn.errors import FedlearnError
from fedlearn.local import LocalRule, plain
from fedlearn.optim import sgd
from fedlearn.privacy.protection import Protection
from fedlearn.select import Selector
from fedlearn.transform import Stage, Transform


class CompositionError(FedlearnError, ValueError):
    """Parts of a strategy that do not fit: which one to change, and how."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A federated algorithm; nothing to inherit.

    Args:
        select: who takes part in a round.
        local: how local training departs from plain SGD.
        stages: what happens to an update on its way, client half and server half together.
        aggregate: from many updates to one.
        server: from the aggregated update to the step of the global model.
        protection: what is promised to clients and what it costs, set by `fedlearn.privacy`; None promises nothing.

    Raises:
        CompositionError: if a privacy claim could not hold, or a part could not work, in this combination.
    """

    select: Selector
    local: LocalRule = plain
    stages: tuple[Stage, ...] = ()
    aggregate: Aggregator = field(default_factory=mean)
    server: Transform = field(default_factory=sgd)
    protection: Protection | None = None

    def __post_init__(self) -> None:
        _refuse_if(
            any(stage.event is not None for stage in self.stages) and self.aggregate.sensitivity is None,
            "a stage makes a privacy claim, but the aggregator's sensitivity is unknown",
            "aggregate=mean(weighting='equal')",
        )
        _refuse_if(
            any(stage.event is not None for stage in self.stages) and self.aggregate.denominator is None,
            "a stage makes a privacy claim, but the aggregator divides by whoever delivers: where clients drop out, "
            "each of the others would count for more than the noise was made for",
            "aggregate=expected_mean(clients_per_round)",
        )
        _refuse_if(
            any(stage.event is not None for stage in self.stages) and self.select.law is None,
            "a stage makes a privacy claim, but the selector's sampling law is unknown",
            "select=uniform(clients_per_round)",
        )
        _refuse_if(
            any(stage.needs_sum for stage in self.stages) and not self.aggregate.sums,
            "a stage masks updates, which only a sum removes, but the aggregator is no sum",
            "aggregate=mean(weighting='equal')",
        )
        written = [stage.codec is not None for stage in self.stages]
        _refuse_if(
            any(written[:-1]),
            "a stage writes updates as bytes, but another one would change them after that",
            "one compression, as the last stage",
        )
        _refuse_if(
            any(written) and any(stage.needs_sum for stage in self.stages),
            "a stage masks updates, and masked numbers cannot be compressed one client at a time",
            "compress=none",
        )
        clipped = False
        for stage in self.stages:
            _refuse_if(
                clipped and not stage.contracts,
                "a stage after the clip may lengthen an update again, so the clip would bound nothing",
                "put the clip after it",
            )
            clipped = clipped or stage.clips
            _refuse_if(
                stage.event is not None and not clipped,
                "a stage makes a privacy claim, but nothing before it bounds an update",
                "stages=(..., clip(1.0), noise)",
            )


def compressed(strategy: Strategy, compression: Stage) -> Strategy:
    """The strategy, whose updates are written as bytes after all else that happens to them at a client."""
    return strategy if compression.codec is None else replace(strategy, stages=(*strategy.stages, compression))


def _refuse_if(unsound: bool, reason: str, fix: str) -> None:
    if unsound:
        raise CompositionError(f"{reason}\n  try       {fix}")
