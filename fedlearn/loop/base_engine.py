"""Define a base class for engines, and the capabilities that a builder states before it builds an engine.

A configuration names a builder: a function or a class that returns an engine. The builder states the capabilities of
its engine as attributes. So a run can refuse unsupported settings before it loads any data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fedlearn.algorithm.aggregation import PartialAggregate
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientId, Failure, State, Updates
from fedlearn.errors import SettingError, require
from fedlearn.loop.protocols import Engine

Builder = TypeVar("Builder", bound=Callable[..., Any])
ENGINE_MEMBERS = {  # member -> line that adds it to an engine of a user
    "clients": "self.clients = data.clients",
    "layout": "self.layout = trainer.layout",
    "client_states": "self.client_states = {}",
    "in_process": "in_process = False",
    "deployed": "deployed = False",
    "elapsed_s": "elapsed_s = None",
    "mixed_block_size": "mixed_block_size = 1",
    "fit": "def fit(self, request, strategy, cohort): ...",
    "evaluate": "def evaluate(self, params_D, cohort, personal_strategy=None): ...",
    "describe": 'def describe(self, cohort_size): return "..."',
    "close": "def close(self): ...",
}


class BaseEngine:
    """Base class of engines, with defaults for all optional members.

    A subclass adds `Engine.fit` and `Engine.evaluate`.

    Args:
        clients: ids of all clients.
        layout: layout of the model.
    """

    in_process = False
    deployed = False
    rebuilds_scenario = False
    needs_coordinator = False
    elapsed_s: float | None = None
    mixed_block_size = 1

    def __init__(self, clients: Sequence[ClientId], layout: Layout) -> None:
        self.clients, self.layout = clients, layout
        self.client_states: dict[ClientId, State] = {}

    def describe(self, cohort_size: int) -> str:
        """Return how a cohort of this size is trained, for the header."""
        return f"a cohort of {cohort_size}"

    def close(self) -> None:
        """Release nothing. A subclass with workers or connections overrides this method."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCapabilities:
    """State the capabilities of an engine builder. A builder that states nothing has none of them.

    Attributes:
        in_process: see `fedlearn.loop.protocols.Engine`.
        deployed: see `fedlearn.loop.protocols.Engine`.
        rebuilds_scenario: whether the builder takes a third argument: a function that builds the same `Scenario` in
            another process. It can be pickled, and accepts changed settings, for example ``device="cuda:0"``.
        needs_coordinator: whether only a coordinator can build the engine, so that a simulation refuses it at once.
    """

    in_process: bool = False
    deployed: bool = False
    rebuilds_scenario: bool = False
    needs_coordinator: bool = False


def engine_builder(
    *,
    in_process: bool = False,
    deployed: bool = False,
    rebuilds_scenario: bool = False,
    needs_coordinator: bool = False,
) -> Callable[[Builder], Builder]:
    """Return a decorator that states the capabilities of an engine on its builder.

    A class that builds itself states them as class attributes instead. See `EngineCapabilities` for the arguments.

    >>> @engine_builder(in_process=True)
    ... def my_engine(data, trainer): ...
    >>> stated_capabilities(my_engine).in_process
    True
    """

    def state(builder: Builder) -> Builder:
        vars(builder).update(in_process=in_process, deployed=deployed)
        vars(builder).update(rebuilds_scenario=rebuilds_scenario, needs_coordinator=needs_coordinator)
        return builder

    return state


def stated_capabilities(builder: Any) -> EngineCapabilities:
    """Return the capabilities that a builder states as attributes.

    Raises:
        SettingError: An attribute is not True or False.
    """
    stated = {name: getattr(builder, name, False) for name in EngineCapabilities.__dataclass_fields__}
    for name, value in stated.items():
        require(isinstance(value, bool), name, value, "True or False", f"{name}=False")
    return EngineCapabilities(**stated)


def require_engine(engine: Engine, stated: EngineCapabilities | None = None) -> None:
    """Check that an engine has all members of the protocol, and the capabilities that its builder states.

    Args:
        engine: the engine.
        stated: capabilities that the builder stated; None skips this check.

    Raises:
        SettingError: A member is missing, or a capability differs. The message has the line to add.
    """
    kind = type(engine).__name__
    for name, line in ENGINE_MEMBERS.items():
        if not hasattr(engine, name):
            fix = f"inherit fedlearn.loop.base_engine.BaseEngine, or add the line: {line}"
            raise SettingError(f"{kind}.{name}", "missing", "a member of the protocol Engine", fix)
    if stated is None:
        return
    for name in ("in_process", "deployed"):
        expected, value = getattr(stated, name), getattr(engine, name)
        fits = value is expected or (name == "in_process" and not expected)
        require(fits, f"{kind}.{name}", value, f"{expected}, as its builder states", f"{name}={value} at the builder")


def require_single_updates(result: Updates | PartialAggregate | Failure) -> Updates | Failure:
    """Return the result if it contains single updates. Poisoning and audits need them.

    Raises:
        SettingError: The result is a partial aggregate, although the engine states ``in_process``.
    """
    if isinstance(result, PartialAggregate):
        fix = "yield Updates from fit, or state in_process=False"
        raise SettingError("engine", "partial aggregates", "the update of each client: in_process is True", fix)
    return result
