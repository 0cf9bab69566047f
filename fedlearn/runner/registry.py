"""Resolve names of options to builders. An untrusted message has names and plain values, and never names code.

The installed option files are the registry: group, name of the option, builder. The parameters of the builder are the
allowed settings. An operator adds builders of other modules under names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml  # type: ignore[import-untyped]

from fedlearn.errors import FedlearnError, SettingError, did_you_mean, require
from fedlearn.runner.builders import BuildError, find_target, setting_path
from fedlearn.runner.conf_files import OPTION_GROUPS, installed_options
from fedlearn.runner.plain_values import refusal, require_plain, require_type, shortened

NAME = "name"  # key for the name of an option, beside its values
PARTS: Mapping[tuple[str, str], str] = {  # (group, parameter) -> group of the options that this parameter takes
    ("scenario", "model"): "model",
    ("scenario", "partition"): "partition",
    ("strategy", "rule"): "strategy",
    ("strategy", "flower"): "flower",
}
CODE_GROUPS = ("task", "metric")  # code of the user without settings: objects of Task and Metric
GROUPS = (*OPTION_GROUPS, "flower", *CODE_GROUPS)
# these name files, devices and servers of the machine that builds, so its operator sets them
OPERATOR_SETTINGS = ("path", "encoder", "device", "deployed", "tracking_uri", "registered_model", "artifacts")
# a message names a pretrained model by a name that each operator maps to a folder, and never by a path
NAMED_FILES = {("model", "path")}
FILE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
# a Flower strategy needs values only; the others need functions, or wrap another strategy
FLOWER_MODULE = "flwr.serverapp.strategy"
FLOWER_STRATEGIES = (
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "MultiKrum",
    "QFedAvg",
)


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The options that a message may name, and their builders.

    Args:
        builders: group -> name of the option -> dotted name of the builder; None: the name itself is the value, as for
            the models of the library.
        added: the part of ``builders`` that an operator has added.
    """

    builders: Mapping[str, Mapping[str, str | None]]
    added: Mapping[str, Mapping[str, str]]

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of the added builders."""
        return tuple(sorted({target.rpartition(".")[0] for group in self.added.values() for target in group.values()}))

    def with_builders(self, builders: Mapping[str, Mapping[str, str]]) -> Registry:
        """Return this registry with further builders.

        Args:
            builders: group -> name of the option -> dotted name of the builder, as under ``builders`` in a policy.

        Raises:
            SettingError: A group is unknown, a name is taken, or a dotted name is none.
        """
        fix = "builders: {strategy: {mine: my_code.mine}}"
        is_valid = isinstance(builders, Mapping) and all(isinstance(group, Mapping) for group in builders.values())
        require(is_valid, "builders", shortened(builders), "a mapping of groups to names and dotted names", fix)
        for group, names in builders.items():
            require(group in GROUPS, f"builders.{group}", "a group", f"one of {', '.join(GROUPS)}", fix)
            for name, target in names.items():
                self._require_new(group, name, target)
        together = {group: {**self.builders[group], **builders.get(group, {})} for group in GROUPS}
        added = {group: {**self.added.get(group, {}), **builders.get(group, {})} for group in builders}
        return Registry(builders=together, added=added)

    def target(self, group: str, name: Any, setting: str) -> str:
        """Return the dotted name of the user's object with a name in a message. Nothing is imported.

        Args:
            group: ``task`` or ``metric``.
            name: name in a message, or the dotted name of a registered object.
            setting: name of the setting, for error texts.

        Raises:
            SettingError: no operator has registered the name.
        """
        added = self.added.get(group, {})
        if isinstance(name, str) and name in (*added, *added.values()):
            return added.get(name, name)
        known = ", ".join(added) or "none"
        expected = f"one of {known}; operators register others under builders: in their policies"
        raise SettingError(setting, shortened(name), expected, f"builders: {{{group}: {{mine: my_code.mine}}}}")

    def name_of(self, group: str, target: Any) -> str | None:
        """Return the name of the option with this builder, or None."""
        return next((name for name, known in self.builders[group].items() if known and known == target), None)

    def resolve(self, group: str, chosen: Any, setting: str | None = None) -> Any:
        """Return the settings of an option with its builder as ``_target_``, after a check of name and values.

        Only the module of a registered builder is imported. Nothing is built.

        Args:
            group: group of the option.
            chosen: name of the option, or a mapping with its ``name`` and values; null where a part may be missing.
            setting: name of the option in error texts; default: the group.

        Raises:
            SettingError: The name is unknown, or a value is unknown, not plain or of another type.
        """
        setting = setting or group
        require_plain(chosen, setting)
        return self._resolve(group, chosen, setting)

    def _resolve(self, group: str, chosen: Any, setting: str) -> Any:
        values = {NAME: chosen} if isinstance(chosen, str) else dict(chosen) if isinstance(chosen, dict) else {}
        name, known = values.pop(NAME, None), self.builders[group]
        if not isinstance(name, str) or name not in known:
            raise self._unknown(group, setting, chosen if isinstance(chosen, str) else name)
        target = known[name]
        if target is None:
            for key in values:
                raise refusal(f"{setting}.{key}", values[key], f"no setting: {group} {name} has none")
            return name
        hints = parameter_types(target)
        resolved = {}
        for key, value in values.items():
            path = setting_path(setting, key)
            is_named = (group, key) in NAMED_FILES
            if key not in hints or (key in OPERATOR_SETTINGS and not is_named):
                accepted = [hint for hint in hints if hint not in OPERATOR_SETTINGS or (group, hint) in NAMED_FILES]
                raise refusal(
                    path, value, f"one of {', '.join(accepted) or 'no settings'}; there is no {shortened(key)}"
                )
            if is_named and not (isinstance(value, str) and FILE_NAME.fullmatch(value)):
                raise refusal(path, value, "a name that the policies of the nodes map to a folder, not a path")
            if (part := PARTS.get((group, key))) and value is not None:
                resolved[key] = self._resolve(part, value, path)
            elif part:
                resolved[key] = None
            else:
                require_type(value, hints[key], path)
                resolved[key] = value
        return {"_target_": target, **resolved}

    def _unknown(self, group: str, setting: str, name: Any) -> SettingError:
        names = list(self.builders[group])
        near = did_you_mean(name, names) if isinstance(name, str) else None
        expected = f"one of {', '.join(names)}; operators register others under builders: in their policies"
        return SettingError(setting, shortened(name), expected, f"{group}={near or names[0]}")

    def _require_new(self, group: str, name: Any, target: Any) -> None:
        setting = f"builders.{group}.{shortened(name)}"
        is_name = isinstance(name, str) and re.fullmatch(r"[A-Za-z]\w{0,99}", name, re.ASCII) is not None
        require(is_name, setting, shortened(target), "a name of letters, digits and _", f"mine: {shortened(target)}")
        is_dotted = isinstance(target, str) and re.fullmatch(r"\w+(\.\w+)+", target) is not None
        require(is_dotted, setting, shortened(target), "a dotted name, module and builder", f"{name}: my_code.{name}")
        require(
            name not in self.builders[group],
            setting,
            target,
            "a name that no installed option has",
            f"my_{name}: {target}",
        )


@cache
def installed_registry() -> Registry:
    """Return the registry of the installed option files and of Flower's strategies."""
    builders: dict[str, dict[str, str | None]] = {
        group: {name: node["_target_"] if isinstance(node, dict) else None for name, node in options.items()}
        for group, options in installed_options().items()
    }
    builders |= {group: {} for group in CODE_GROUPS}
    builders["flower"] = {name: f"{FLOWER_MODULE}.{name}" for name in FLOWER_STRATEGIES}
    return Registry(builders=builders, added={})


def read_builders(path: Path) -> dict[str, dict[str, str]]:
    """Read a YAML file with builders, for `Registry.with_builders`.

    Raises:
        FedlearnError: The file cannot be read, or is not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise FedlearnError(f"the builders {path} cannot be read: {error}") from error
    require(isinstance(content, dict), "builders", shortened(content), "a mapping of groups", "strategy: {mine: a.b}")
    return dict(content)


@cache
def parameter_types(target: str) -> Mapping[str, Any]:
    """Return parameter -> type of a registered builder, without the parameters that only code can pass.

    Raises:
        BuildError: The builder cannot be imported.
    """
    try:
        builder = find_target(target, "builders")
    except SettingError as error:  # not an error of the message that names the option
        raise BuildError(f"a registered builder cannot be imported: {error}") from error
    function = getattr(builder, "__init__") if isinstance(builder, type) else builder  # noqa: B009
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # e.g. a name that is imported for type checkers only
        hints = {}
    parameters = inspect.signature(builder).parameters.values()
    by_name = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != NAME]
    return {p.name: hints.get(p.name, _type_of_default(p.default)) for p in by_name}


@cache
def default_values(target: str) -> Mapping[str, Any]:
    """Return parameter -> default value of a registered builder, for the parameters that have a default."""
    parameters = inspect.signature(find_target(target, "builders")).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _type_of_default(default: Any) -> Any:
    """Return the type of a parameter without annotation, from its default."""
    return Any if default in (None, inspect.Parameter.empty) else float if type(default) is int else type(default)
