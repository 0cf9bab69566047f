"""Check the capabilities of an engine before it is built, then build and check it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hydra.utils import get_object

from fedlearn.errors import SettingError
from fedlearn.loop.base_engine import EngineCapabilities, require_engine, stated_capabilities
from fedlearn.loop.protocols import Engine


def engine_capabilities(engine: Mapping[str, Any]) -> EngineCapabilities:
    """Return the capabilities that the builder of an engine states.

    Args:
        engine: settings of the engine, after `fedlearn.runner.builders.check_targets` has accepted the ``_target_``.

    Raises:
        SettingError: the value of a capability is not True or False.
    """
    try:
        return stated_capabilities(get_object(engine["_target_"]))
    except SettingError as error:
        raise error.with_prefix("engine") from None


def require_in_process(engine: Mapping[str, Any], setting: str, value: object, reason: str, fix: str) -> None:
    """Refuse a setting that needs training in this process, unless the builder of the engine states ``in_process``.

    Args:
        engine: settings of the engine.
        setting: name of the setting that needs the engine.
        value: value of the setting.
        reason: reason of the need, a clause for the error text.
        fix: one thing to try.

    Raises:
        SettingError: the builder does not state ``in_process``, or states ``deployed``.
    """
    stated, name = engine_capabilities(engine), engine["_target_"]
    if stated.in_process and not stated.deployed:
        return
    expected = f"no value with this engine: {reason}, but {name} does not state in_process=True"
    is_builtin = name.startswith("fedlearn.")
    expected += "" if is_builtin else "; @engine_builder(in_process=True) states it"
    raise SettingError(setting, value, expected, fix)


def refuse_coordinator_engine(engine: Mapping[str, Any]) -> None:
    """Refuse an engine that only a coordinator can build. Call this before a simulation loads data.

    Raises:
        SettingError: the builder states ``needs_coordinator``.
    """
    if engine_capabilities(engine).needs_coordinator:
        name, fix = engine["_target_"].rpartition(".")[2], "engine=vector"
        raise SettingError("engine", name, "an engine for simulations; fedlearn.deploy.submit uses this engine", fix)


def build_engine(
    engine: Mapping[str, Any],
    build: Callable[..., Any],
    parts: tuple[Any, Any],
    rebuild: Callable[..., Any],
) -> Engine:
    """Build an engine and check it. A refused engine is closed.

    Args:
        engine: settings of the engine.
        build: function that builds the engine from positional arguments.
        parts: data and trainer of the scenario.
        rebuild: function that builds the scenario in another process. The builder receives it if it states
            ``rebuilds_scenario``.

    Raises:
        SettingError: the engine lacks a member, or its capabilities differ from the statement of its builder.
    """
    stated = engine_capabilities(engine)
    built: Engine = build(*parts, rebuild) if stated.rebuilds_scenario else build(*parts)
    try:
        require_engine(built, stated)
    except SettingError:
        close = getattr(built, "close", None)  # a refused object need not be an engine
        if callable(close):
            close()
        raise
    return built
