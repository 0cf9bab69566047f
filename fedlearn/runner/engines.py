"""The engine of an experiment: its capabilities before it is built, and a check of the built engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hydra.utils import get_object

from fedlearn.errors import SettingError
from fedlearn.loop.base_engine import EngineCapabilities, require_engine, stated_capabilities
from fedlearn.loop.protocols import Engine


def engine_capabilities(engine: Mapping[str, Any]) -> EngineCapabilities:
    """Return the capabilities that the builder of a configuration states.

    Args:
        engine: settings of the engine; `fedlearn.runner.builders.check_targets` has accepted the ``_target_``.

    Raises:
        SettingError: a statement is not True or False.
    """
    try:
        return stated_capabilities(get_object(engine["_target_"]))
    except SettingError as error:
        raise error.with_prefix("engine") from None


def require_in_process(engine: Mapping[str, Any], setting: str, value: object, reason: str, fix: str) -> None:
    """Refuse a setting that needs an engine that trains in this process, for a builder that does not state it.

    Args:
        engine: settings of the engine.
        setting: name of the setting that needs the engine.
        value: value of the setting.
        reason: the need of the setting, a phrase.
        fix: one thing to try.

    Raises:
        SettingError: the builder does not state ``in_process``, or states ``deployed``.
    """
    stated, name = engine_capabilities(engine), engine["_target_"]
    if stated.in_process and not stated.deployed:
        return
    expected = f"a setting without it, because {name} does not state in_process=True: {reason}"
    line = "" if name.startswith("fedlearn.") else "; or @engine_builder(in_process=True) above the builder, if it does"
    raise SettingError(setting, value, expected, fix + line)


def refuse_coordinator_engine(engine: Mapping[str, Any]) -> None:
    """Refuse an engine that only a coordinator can build, before a simulation loads any data.

    Raises:
        SettingError: the builder states ``needs_coordinator``.
    """
    if engine_capabilities(engine).needs_coordinator:
        name, fix = engine["_target_"].rpartition(".")[2], "engine=vector, or python -m fedlearn.deploy.submit ..."
        raise SettingError("engine", name, "an engine for simulations: this one needs a coordinator", fix)


def build_engine(
    engine: Mapping[str, Any],
    build: Callable[..., Any],
    parts: tuple[Any, Any],
    rebuild: Callable[..., Any],
) -> Engine:
    """Build an engine and check it; an engine that is refused is closed.

    Args:
        engine: settings of the engine.
        build: builds the engine from positional arguments.
        parts: data and trainer of the scenario.
        rebuild: function that builds the scenario in another process; passed if the builder states
            ``rebuilds_scenario``.

    Raises:
        SettingError: the engine lacks a member, or does not have the capabilities that its builder states.
    """
    stated = engine_capabilities(engine)
    built: Engine = build(*parts, rebuild) if stated.rebuilds_scenario else build(*parts)
    try:
        require_engine(built, stated)
    except SettingError:
        close = getattr(built, "close", None)  # the refused object may be anything
        if callable(close):
            close()
        raise
    return built
