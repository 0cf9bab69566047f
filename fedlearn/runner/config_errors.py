"""Explain errors in the composition of a configuration, and suggest the closest names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlearn.advice import shell_word
from fedlearn.errors import did_you_mean
from fedlearn.runner.compat import Composer
from fedlearn.runner.renames import new_name

ComposeFunction = Callable[[list[str]], DictConfig]  # from overrides to a configuration
PARTITION_WITH = {  # setting -> name of a partition with this setting
    "alpha": "dirichlet",
    "classes_per_client": "pathological",
    "num_clients": "dirichlet",
    "strictness": "feature",
    "test_share": "dirichlet",
}
SYNONYMS = {  # name that other libraries use -> setting
    "batch_size": "local.batch_size",
    "clients": "partition.num_clients",
    "epochs": "local.epochs",
    "fraction": "strategy.clients_per_round",
    "gpu": "device",
    "local.bs": "local.batch_size",
    "local.lr": "local.learning_rate",
    "local_epochs": "local.epochs",
    "log": "callbacks",
    "logger": "callbacks",
    "lr": "local.learning_rate",
    "num_rounds": "rounds",
    "output_dir": "hydra.run.dir",
}
HIDDEN_KEYS = ("hydra", "run_name")


def explain_config_error(error: Exception, hydra: Composer, overrides: Sequence[str], compose: ComposeFunction) -> str:
    """Return the message for an exception of Hydra.

    Args:
        error: exception of the composition.
        hydra: composer that raised the exception.
        overrides: overrides as the user typed them.
        compose: function that composes other overrides, to find the existing settings.
    """
    if isinstance(error, MissingConfigException):
        return _no_such_option(str(error.missing_cfg_file or ""), hydra, overrides)
    unknown = re.search(r"Could not override '([^']+)'|config group '([^']+)' does not exist", str(error))
    if unknown:
        return no_such_setting(unknown[1] or unknown[2], hydra, overrides, compose)
    several = re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^'=]+)=([^']+)'", str(error))
    if several:
        key, value = several.groups()
        expected = "one value; a list in brackets; or -m for a sweep over these values"
        return (
            f"{key}={value} names several values\n  expected  {expected}\n  try       -m {shell_word(f'{key}={value}')}"
        )
    if "callbacks=null" in overrides:
        expected = "a list of option files, which are added to the default callbacks; null removes one callback"
        fix = "callbacks.console=null"
        return f"callbacks is null\n  expected  {expected}\n  try       {fix}"
    first = next((line for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()), repr(error))
    return f"the configuration cannot be composed\n  because   {first.strip()}{_place(error)}"


def _place(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"\n  in        {mark.name}, line {mark.line + 1}" if mark else ""


def _no_such_option(missing: str, hydra: Composer, overrides: Sequence[str]) -> str:
    """Return the message for an option without a file. The option may be an element of a list."""
    group, _, option = missing.rpartition("/")
    if not group:
        expected = "--config-name with the name of a file, without .yaml"
        problem = f"there is no configuration called {option or 'config'}"
        return f"{problem}\n  expected  {expected}\n  try       --config-name config"
    known = sorted(set(hydra.options(group)) - ({"default"} if group == "callbacks" else set()))
    typed = next((override for override in overrides if _names_option(override, group, option)), None)
    lines = [f"{typed or f'{group}={option}'} is not known" + ("" if typed else "   (it is selected in a file)")]
    near = did_you_mean(option, known)
    if near:
        fix = re.sub(rf"\b{re.escape(option)}\b(?!=)", near, typed) if typed else f"{group}={near}"
        lines.append(f"  did you mean {fix}?")
    expected = f"one of {', '.join(known)}" if known else f"a file {group}/{option}.yaml in the folder of --config-dir"
    lines.append(f"  expected  {expected}")
    return "\n".join([*lines, f"  try       {group}={known[0]}"] if known and not near else lines)


def _names_option(override: str, group: str, option: str) -> bool:
    key, _, value = override.lstrip("+").partition("=")
    return key.endswith(group) and option in re.split(r"[\[\],\s]+", value)


def no_such_setting(key: str, hydra: Composer, overrides: Sequence[str], load: ComposeFunction) -> str:
    """Return the message for an unknown setting, with the closest known setting.

    Args:
        key: dotted name of the setting.
        hydra: composer, which knows the groups.
        overrides: overrides as the user typed them.
        load: function that composes other overrides.
    """
    typed = next((override for override in overrides if re.split("[=@]", override.lstrip("+~"))[0] == key), key)
    groups = [group for group in hydra.groups() if not group.startswith("hydra")]
    settings = _settings(overrides, groups, load)
    prefix, wrong, siblings = _first_unknown(settings, key.replace("/", "."))
    known = [prefix + name for name in siblings if not name.startswith("_") and name not in HIDDEN_KEYS]
    known = sorted({*known, *groups}) if not prefix else known
    elsewhere = [path for path in _paths(settings) if path.endswith(f".{wrong}")] if not prefix else []
    names = {
        path.removeprefix(prefix): path for path in known
    }  # without the common prefix, which would make all names similar
    closest = elsewhere[0] if elsewhere else names.get(did_you_mean(wrong, names, cutoff=0.6) or "")
    if not closest or not settings.get("partition"):
        closest = _partition_with(key) or closest
    near, value = new_name(key.replace("/", ".")) or SYNONYMS.get(key) or closest, typed.partition("=")[2]
    value = f"[{value}]" if near == "callbacks" and value and value[0] != "[" else value
    lines = [f"{typed} is not a setting"]
    lines += [f"  did you mean {_typed_setting(near, value)}?"] if near else []
    lines += [f"  expected  one of {', '.join(known)}"] if known else []
    lines += [] if near else [f"  advice    remove {key}"]
    return "\n".join(lines)


def _typed_setting(name: str, value: str) -> str:
    """Return a name, which may follow the option that has it, and a value as words for the command line."""
    *option, setting = name.split(" ")
    return " ".join([*option, shell_word(f"{setting}={value}") if value else setting])


def _partition_with(key: str) -> str | None:
    """Return the overrides that choose a partition with this setting, or None for other settings."""
    group, _, setting = key.partition(".")
    kind = PARTITION_WITH.get(setting) if group == "partition" else None
    return kind and f"partition={kind} {key}"


def _settings(overrides: Sequence[str], groups: Sequence[str], load: ComposeFunction) -> dict[str, Any]:
    """Return the settings of the chosen options, or of the default options if the chosen options do not compose."""
    chosen = [override for override in overrides if re.split("[=@]", override.lstrip("+"))[0] in groups]
    for choices in (chosen, []):
        try:
            return OmegaConf.to_container(load(choices), resolve=False)  # type: ignore[return-value]
        except (HydraException, OmegaConfBaseException):
            continue
    return {}


def _first_unknown(settings: Mapping[str, Any], key: str) -> tuple[str, str, list[str]]:
    """Follow a dotted path to its first unknown part. Return the known prefix, this part and the existing names."""
    prefix, here = "", settings
    for part in key.split("."):
        child = here.get(part)
        if not isinstance(child, Mapping):
            return prefix, part, list(here)
        prefix, here = f"{prefix}{part}.", child
    return prefix, "", list(here)


def _paths(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if name in HIDDEN_KEYS or name.startswith("_"):
            continue
        yield prefix + name
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")
