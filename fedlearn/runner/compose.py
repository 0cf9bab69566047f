"""The command line, composed and checked before anything is built or written."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fedlearn.core.command_line import UsageError
from fedlearn.runner.builders import SCENARIO_GROUPS
from fedlearn.runner.compat import (
    Composer,
    ParsedOverride,
    composer,
    is_sweep,
    parse_override,
    use_for_interpolation,
)
from fedlearn.runner.config_errors import explain_config_error

PACKAGED_CONF_DIR, CHECKOUT_CONF_DIR = Path(__file__).parents[1] / "conf", Path(__file__).parents[2] / "conf"
CONF_DIR = PACKAGED_CONF_DIR if PACKAGED_CONF_DIR.is_dir() else CHECKOUT_CONF_DIR


@dataclass(frozen=True, kw_only=True)
class Job:
    """One composed configuration, and where its run would leave its files.

    Args:
        cfg: without the part that concerns Hydra.
        folder: of the run.
        chosen: whether the user named the folder (of the sweep, if it is one).
        sweep_folder: of the sweep that the run belongs to, if it does.
        is_sweep: whether this is one of several runs.
    """

    cfg: DictConfig
    folder: Path
    chosen: bool
    sweep_folder: Path = Path("multirun")
    is_sweep: bool = False


def with_custom_targets(overrides: Sequence[str]) -> list[str]:
    """Return overrides in which ``model._target_=...`` and ``partition._target_=...`` replace the chosen option.

    Hydra alone would add such a setting to those of the option, or refuse it.

    >>> with_custom_targets(["partition._target_=my_code.Mine", "model.hidden=3", "seed=2"])
    ['partition=custom', '++partition._target_=my_code.Mine', '++model.hidden=3', 'seed=2']
    """
    keys = {_key(override) for override in overrides}
    is_custom = "partition._target_" in keys
    groups = ("model.", "partition.") if is_custom else ("model.",)
    chosen = ["partition=custom"] if is_custom and "partition" not in keys else []
    return [*chosen, *(f"++{text.lstrip('+')}" if _key(text).startswith(groups) else text for text in overrides)]


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]


def compose(args: Namespace) -> list[Job]:
    """What the command line asks for: one run, or for a sweep one for each value swept over.

    A sweep's values are tried one at a time, the other settings at their first, so that checking costs their sum and
    not their product.

    Raises:
        UsageError: an override, group, option or file does not exist or cannot be read.
    """
    with _hydra(args) as hydra:
        overrides = _parsed(args.overrides)
        return [_job(hydra, args, words) for words in _each_value(overrides, multirun=args.multirun)]


def _job(hydra: Composer, args: Namespace, words: list[str]) -> Job:
    def load(words: list[str]) -> DictConfig:
        name = args.config_name or "config"
        return hydra.compose(name, words)

    try:
        cfg = load(words)
        use_for_interpolation(cfg)  # what the folder's name and run_name are made of
        folder, sweep_folder = Path(cfg.hydra.run.dir), Path(cfg.hydra.sweep.dir)
        swept = args.multirun or is_sweep(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
        raise UsageError(explain_config_error(error, hydra, words, load)) from error
    key = "hydra.sweep.dir=" if swept else "hydra.run.dir="
    chosen = any(word.startswith(key) for word in words)
    return Job(cfg=cfg, folder=folder, sweep_folder=sweep_folder, chosen=chosen, is_sweep=swept)


@contextmanager
def _hydra(args: Namespace) -> Iterator[Composer]:
    """Hydra as its own command line sets it up: ``--config-path`` instead of our folder, ``--config-dir`` beside it."""
    main, extra = args.config_path or str(CONF_DIR), args.config_dir
    for option, folder in (("--config-path", main), ("--config-dir", extra)):
        if folder and not Path(folder).is_dir():
            raise UsageError(f"{option} {folder} is not a folder\n  try       a path from {os.getcwd()}")
    with composer(main, extra_folder=extra) as hydra:
        yield hydra


def _parsed(words: Sequence[str]) -> list[ParsedOverride]:
    parsed: list[ParsedOverride] = []
    for word in words:
        try:
            parsed += parse_override(word)
        except OverrideParseException as error:
            detail = str(error).splitlines()[0]
            key, _, value = word.lstrip("-").partition("=")
            fix = f"\"{key.strip()}='{value}'\"   (quoted, if it is text)" if value else f"{key.strip()}=..."
            because = "" if detail.startswith("Error parsing") else f"   ({detail})"
            text = f"{word} cannot be read\n  expected  setting=value{because}\n  try       {fix}"
            raise UsageError(text) from error
    for override in parsed:
        # a scenario receives these by interpolation, so Hydra would accept the old name
        if override.setting in {f"scenario.{group}" for group in SCENARIO_GROUPS}:
            meant = override.text.removeprefix("scenario.")
            raise UsageError(f"{override.text} is not a setting\n  did you mean {meant}?")
    return parsed


def _each_value(overrides: Sequence[ParsedOverride], *, multirun: bool) -> Iterator[list[str]]:
    """The overrides as they stand; in a sweep once for each value, the others at their first."""
    if not multirun:
        yield [override.text for override in overrides]
        return
    values = [list(_values(override)) for override in overrides]
    first = [own[0] for own in values]
    yield first
    for i, own in enumerate(values):
        for value in own[1:]:
            yield [*first[:i], value, *first[i + 1 :]]


def _values(override: ParsedOverride) -> Iterator[str]:
    if override.is_discrete_sweep:
        yield from override.choices()
    elif override.is_interval:
        fix = f"{override.setting}=1,2,3"
        raise UsageError(f"{override.text} is an interval, which has no steps to take\n  try       {fix}")
    else:
        yield override.text
