"""Compose the configuration of a command line, and check it before a run builds or writes anything."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fedlearn.advice import assignment, label, shell_word
from fedlearn.core.command_line import UsageError
from fedlearn.errors import FedlearnError
from fedlearn.runner.builders import SCENARIO_GROUPS
from fedlearn.runner.compat import (
    Composer,
    ParsedOverride,
    composer,
    is_sweep,
    parse_override,
    use_for_interpolation,
)
from fedlearn.runner.conf_files import CONF_DIR
from fedlearn.runner.config_errors import explain_config_error, no_such_setting
from fedlearn.runner.consent import listed_modules, refuse_code_for_hydra, require_consent
from fedlearn.runner.unread_settings import refuse_unknown_hydra_settings, refuse_unread_settings

BASIC = "basic"  # Hydra's name of the launcher that runs one job after another, and of its sweeper
OPTIONS_WITHOUT_SETTINGS = {  # a custom builder replaces these
    "partition": ("partition=custom",),
    "engine": ("engine=serial", "~engine.raise_failures"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Composed configuration of one run, and its folders.

    Args:
        cfg: all settings, without the group ``hydra``.
        folder: run folder.
        chosen: True if the user chose the run folder, or the folder of the sweep.
        sweep_folder: folder of the sweep; default ``multirun``.
        is_sweep: True if the run belongs to a sweep.
        choices: group -> name of the chosen option.
        is_plain_sweep: True if Hydra's basic sweeper and launcher run the sweep, without settings of these.
    """

    cfg: DictConfig
    folder: Path
    chosen: bool
    sweep_folder: Path = Path("multirun")
    is_sweep: bool = False
    choices: Mapping[str, str] = field(default_factory=dict)
    is_plain_sweep: bool = False


def with_custom_targets(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which ``_target_`` of a model, a partition or an engine replaces the chosen option.

    Without this change, Hydra adds such a setting to the settings of the option, or refuses it.

    >>> with_custom_targets(["partition._target_=my_code.Mine", "model.hidden=3", "seed=2"])
    ['partition=custom', '++partition._target_=my_code.Mine', '++model.hidden=3', 'seed=2']
    """
    keys = {setting_of(override) for override in overrides}
    custom = [group for group in OPTIONS_WITHOUT_SETTINGS if f"{group}._target_" in keys]
    groups = ("model.", *(f"{group}." for group in custom))
    chosen = []
    for group in custom:
        option, *removals = OPTIONS_WITHOUT_SETTINGS[group]
        chosen += [option] if group not in keys else []
        chosen += removals if group not in keys or option in overrides else []
    return [*chosen, *(f"++{text.lstrip('+')}" if setting_of(text).startswith(groups) else text for text in overrides)]


def setting_of(override: str) -> str:
    """Return the setting or group that an override names."""
    return override.lstrip("+").partition("=")[0]


def compose(args: Namespace) -> list[Job]:
    """Return the jobs of `compose_each` as a list."""
    return list(compose_each(args))


def compose_each(args: Namespace) -> Iterator[Job]:
    """Yield the configuration of a command line: one job, or for a sweep one job per value.

    The jobs of a sweep change one setting at a time, and have the first value of all other settings. The cost of a
    check is therefore the sum of the numbers of values, and not their product.

    Raises:
        UsageError: an override, group, option or file does not exist or cannot be read.
    """
    with _composer(args) as hydra:
        parsed = parse_overrides(args.overrides)
        for overrides in _each_value(parsed, multirun=args.multirun):
            yield _job(hydra, args, overrides)


def compose_sweep(args: Namespace) -> Iterator[tuple[list[str], Callable[[], Job]]]:
    """Yield the overrides of each job of a plain sweep, and a function that composes the job.

    The folder of a job is in the folder of the sweep.
    """
    with _composer(args) as hydra:
        for number, overrides in enumerate(_combinations(parse_overrides(args.overrides))):
            yield overrides, partial(_job, hydra, args, overrides, number=number)


def count_jobs(overrides: Sequence[str]) -> int:
    """Return the number of jobs of a sweep: the number of combinations of all values."""
    return sum(1 for _ in _combinations(parse_overrides(overrides)))


def _job(hydra: Composer, args: Namespace, overrides: list[str], *, number: int | None = None) -> Job:
    numbered = [] if number is None else [f"hydra.job.num={number}", f"hydra.job.id={number}"]

    def load(overrides: list[str]) -> DictConfig:
        name = args.config_name or "config"
        without = [f"~{group}" for group in getattr(args, "without", ())]  # groups that an object replaces
        return hydra.compose(name, [*without, *overrides, *numbered])

    try:
        cfg = load(overrides)
        use_for_interpolation(cfg)  # for ${hydra:...} in run_name and in the name of the run folder
        sweep_folder = Path(cfg.hydra.sweep.dir)
        folder = Path(cfg.hydra.run.dir) if number is None else sweep_folder / str(cfg.hydra.sweep.subdir)
        in_sweep = args.multirun or is_sweep(cfg)
        hydra_settings = OmegaConf.to_container(cfg.hydra, resolve=False)
        refuse_unknown_hydra_settings(cfg.hydra)
        choices = {str(group): str(name) for group, name in cfg.hydra.runtime.choices.items() if name}
        with open_dict(cfg):
            del cfg["hydra"]
    except FedlearnError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError, AssertionError) as error:
        raise UsageError(explain_config_error(error, hydra, overrides, load)) from error
    refuse_code_for_hydra(hydra_settings)
    refuse_unread_settings(cfg, overrides, partial(no_such_setting, hydra=hydra, overrides=overrides, load=load))
    key = "hydra.sweep.dir=" if in_sweep else "hydra.run.dir="
    chosen = any(override.startswith(key) for override in overrides)
    if not any(setting_of(override) == "allow_targets" for override in overrides):
        require_consent(listed_modules(cfg))
    return Job(
        cfg=cfg,
        folder=folder,
        sweep_folder=sweep_folder,
        chosen=chosen,
        is_sweep=in_sweep,
        choices=choices,
        is_plain_sweep=_is_plain(choices, hydra_settings),
    )


def _is_plain(choices: Mapping[str, str], hydra_settings: Any) -> bool:
    settings = hydra_settings["sweeper"]
    names = [choices.get(group, BASIC) for group in ("hydra/launcher", "hydra/sweeper")]
    return names == [BASIC, BASIC] and not any(value for key, value in settings.items() if key != "_target_")


@contextmanager
def _composer(args: Namespace) -> Iterator[Composer]:
    """Set Hydra up as its own command line does: ``--config-path`` replaces ``conf/``, ``--config-dir`` extends it."""
    main, extra = args.config_path or str(CONF_DIR), args.config_dir
    for option, folder in (("--config-path", main), ("--config-dir", extra)):
        if folder and not Path(folder).is_dir():
            expected = f"a path relative to {os.getcwd()}"
            raise UsageError(
                f"{option} {folder} is not a folder\n  expected  {expected}\n  advice    check the spelling"
            )
    with composer(main, extra_folder=extra) as hydra:
        yield hydra


def parse_overrides(overrides: Sequence[str]) -> list[ParsedOverride]:
    """Parse the settings of a command line.

    Raises:
        UsageError: a word is not a setting, or has an old name.
    """
    parsed: list[ParsedOverride] = []
    for text in overrides:
        try:
            parsed += parse_override(text)
        except OverrideParseException as error:
            detail = str(error).splitlines()[0]
            key, _, value = text.lstrip("-").partition("=")
            is_name = re.fullmatch(r"[+~]{0,2}[A-Za-z_][\w./@-]*", key.strip(), re.ASCII)
            fix = assignment(key.strip(), _as_text(value)) if value and is_name else "write a name, = and a value"
            reason = "" if detail.startswith("Error parsing") else f"   ({detail})"
            expected = f"setting=value, with quotes around text{reason}"
            raise UsageError(f"{text} cannot be read\n  expected  {expected}\n{label(fix)}") from error
    for override in parsed:
        # a scenario receives these groups by interpolation, so Hydra accepts their old names
        if override.setting in {f"scenario.{group}" for group in SCENARIO_GROUPS}:
            near = shell_word(override.text.removeprefix("scenario."))
            raise UsageError(f"{override.text} is not a setting\n  did you mean {near}?")
    return parsed


def _as_text(value: str) -> str | list[str]:
    """Return a value that Hydra cannot read as text, or as a list of texts if it has outer brackets.

    >>> _as_text("[Cost [EUR], age]"), _as_text("50 % (a")
    (['Cost [EUR]', 'age'], '50 % (a')
    """
    if value[:1] != "[":
        return value.strip("'\"")
    inner = value[1:-1] if value[-1:] == "]" else value[1:]
    return [item.strip().strip("'\"") for item in inner.split(",")]


def _each_value(overrides: Sequence[ParsedOverride], *, multirun: bool) -> Iterator[list[str]]:
    """Yield the overrides; in a sweep once for each value of each setting, with the first value of the others."""
    if not multirun:
        yield [override.text for override in overrides]
        return
    values = [list(_values(override)) for override in overrides]
    first = [choices[0] for choices in values]
    yield first
    for i, choices in enumerate(values):
        for value in choices[1:]:
            yield [*first[:i], value, *first[i + 1 :]]


def _combinations(overrides: Sequence[ParsedOverride]) -> Iterator[list[str]]:
    """Yield the overrides of each job of a sweep. The last override of a setting counts."""
    by_key = {override.key: list(_values(override)) for override in overrides}
    return map(list, product(*by_key.values()))


def _values(override: ParsedOverride) -> Iterator[str]:
    if override.is_discrete_sweep:
        yield from override.choices()
    elif override.is_interval:
        fix = f"-m {override.setting}=1,2,3"
        raise UsageError(f"{override.text} is an interval, but a sweep needs single values\n  try       {fix}")
    else:
        yield override.text
