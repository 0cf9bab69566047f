"""Build the objects that a composed configuration names, from allowed modules only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlearn.advice import assignment
from fedlearn.errors import FedlearnError, SettingError, require
from fedlearn.loop.scenario import Scenario
from fedlearn.runner.builders import (
    BuildError,
    check_targets,
    setting_path,
)
from fedlearn.runner.consent import allowed_by_environment, refuse_packages
from fedlearn.runner.environment import set_environment
from fedlearn.runner.parts import NO_PARTS, Parts
from fedlearn.trainers.contract import ARGUMENTS


def build(node: Any, setting: str, *args: Any, allow: Sequence[str] = ()) -> Any:
    """Call the ``_target_`` of a mapping with its other keys, after nested targets, and return the result.

    Args:
        node: mapping with ``_target_``.
        setting: name of the mapping in the configuration, for error texts.
        args: positional arguments of the outermost target.
        allow: allowed modules besides the library.

    *Guarantees*: only builders of installed options, parts of a strategy and objects of the allowed modules are
    imported or called. Names that an allowed module has imported are refused.

    Raises:
        SettingError: a target is not allowed or does not exist, a key is not one of its parameters, or the target
            refuses a value.
        BuildError: a target raised another exception.
    """
    plain = plain_settings(node, setting)
    check_targets(plain, setting, allow=allow, num_args=len(args))
    try:
        with _seeded_modules(plain):
            return instantiate(plain, *args, _convert_="all")
    except InstantiationException as error:
        nested = re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)
        where = setting_path(setting, nested[1]) if nested else setting
        raise _explained(error.__cause__ or error, where, node) from error.__cause__


def _seeded_modules(settings: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Seed torch during the construction of a user's module, so that its weights are equal in every run and process."""
    model = settings.get("model")
    if not isinstance(model, Mapping) or settings.get("framework", "torch") != "torch":
        return nullcontext()
    from fedlearn.trainers.torch.random import seeded

    return seeded(int(settings.get("seed") or 0))


def _explained(error: BaseException, setting: str, node: Any) -> FedlearnError:
    if isinstance(error, SettingError):
        is_top_level = setting_path(setting, error.setting) == error.setting or _is_shared(node, error.setting)
        prefixed = error.setting.startswith(f"{setting}.") or is_top_level or error.setting in ARGUMENTS
        return error if prefixed else error.with_prefix(setting, _names_in_group(node))
    if isinstance(error, FedlearnError):
        return error
    return BuildError(f"{setting} cannot be built: {type(error).__name__}: {error}")


def _is_shared(node: Any, key: str) -> bool:
    """Return whether the group takes this setting from the top level, e.g. ``seed: ${seed}``."""
    raw = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    return isinstance(raw, dict) and raw.get(key) == f"${{{key}}}"


def _names_in_group(node: Any) -> list[str]:
    """Return the names of the settings that the group does not take from the top level."""
    keys = node if isinstance(node, Mapping | DictConfig) else ()
    return [str(key) for key in keys if not _is_shared(node, str(key))]


def build_group(kind: type[Any], cfg: DictConfig, group: str, allow: Sequence[str], parts: Parts = NO_PARTS) -> Any:
    """Build the object of a group of settings, or return the object of a Python program that replaces the group.

    Args:
        kind: expected class of the object.
        cfg: all settings.
        group: name of the group.
        allow: allowed modules besides the library.
        parts: objects of a Python program; default none.

    Raises:
        SettingError: the errors of `build`, or the builder returned an object of another class.
        BuildError: the builder raised another exception.
    """
    node = settings_group(cfg, group)
    built = parts.find(group, node) or build(node, group, allow=allow)
    if not isinstance(built, kind):
        expected = f"a builder that returns a {kind.__name__}; it returned {type(built).__name__}"
        raise SettingError(f"{group}._target_", cfg[group]["_target_"], expected, f"return {kind.__name__}(...)")
    return built


def rebuild_scenario(node: Mapping[str, Any], allow: Sequence[str], **changes: Any) -> Scenario:
    """Return a scenario in another process, such as a Ray worker.

    Args:
        node: settings of the scenario, as plain values.
        allow: allowed modules besides the library.
        changes: values that replace settings of ``node``.
    """
    set_environment({**node, **changes}.get("framework"))
    scenario: Scenario = build({**node, **changes}, "scenario", allow=allow)
    return scenario


def allowed_modules(cfg: Mapping[str, Any] | DictConfig) -> tuple[str, ...]:
    """Return the modules of the user that ``allow_targets`` or ``FEDLEARN_ALLOW_TARGETS`` allows in settings.

    Raises:
        SettingError: ``allow_targets`` is not a list of modules, or lists a package of fedlearn.
    """
    plain = plain_settings(cfg, "the configuration")
    modules = plain.get("allow_targets") or []
    ok = isinstance(modules, list) and all(isinstance(m, str) and re.fullmatch(r"\w+(\.\w+)*\.?", m) for m in modules)
    example = modules if isinstance(modules, str) and re.fullmatch(r"\w+(\.\w+)*", modules) else "my_strategies"
    require(ok, "allow_targets", modules, "a list of modules", assignment("allow_targets", [example]))
    refuse_packages(modules)
    return tuple(dict.fromkeys([*(module.rstrip(".") for module in modules), *allowed_by_environment()]))


def settings_group(cfg: Mapping[str, Any] | DictConfig, name: str) -> Any:
    """Return a group of settings.

    Raises:
        SettingError: the configuration has no such group.
    """
    group = cfg.get(name)
    if not isinstance(group, Mapping | DictConfig):
        raise SettingError(
            name, group, f"a group of settings with the name {name}", "use the groups of conf/config.yaml"
        )
    return group


def plain_settings(node: Any, setting: str) -> Any:
    """Return settings as plain values, with all interpolations resolved.

    Args:
        node: settings, or plain values, which are returned unchanged.
        setting: name of the settings, for error texts.

    Raises:
        FedlearnError: an interpolation cannot be resolved, or a required value is missing.
    """
    if not OmegaConf.is_config(node):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise FedlearnError(f"{setting} cannot be resolved: {first} (at {error.full_key or setting})") from error
