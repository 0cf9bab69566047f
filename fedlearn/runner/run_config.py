"""The config.yaml of a run folder: every setting resolved, so that it repeats the run from anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from fedlearn.core.checkpoint import write_atomically
from fedlearn.runner.compose import CONF_DIR
from fedlearn.runner.run_folder import CONFIG_FILE, RunFolderError

REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # to another setting; a resolver has a colon


def write_run_config(folder: Path, cfg: DictConfig) -> None:
    """Write the settings, with the settings of Hydra that a run from this file alone needs."""
    ours = OmegaConf.to_container(OmegaConf.load(CONF_DIR / CONFIG_FILE), resolve=False)
    assert isinstance(ours, dict)
    hydra = {name: node for name, node in ours["hydra"].items() if name != "help"}
    quiet = [entry for entry in ours["defaults"] if any("hydra/" in str(key) for key in entry)]
    text = OmegaConf.to_yaml({"defaults": ["_self_", *quiet], **config_to_dict(cfg), "hydra": hydra})
    again = f"# python -m simulations.run --config-path {folder.resolve()} --config-name config\n"
    write_atomically(folder / CONFIG_FILE, again + text)


def config_to_dict(cfg: DictConfig, *, resolve_callbacks: bool = False) -> dict[str, Any]:
    """Return all settings as plain values.

    Args:
        cfg: all settings.
        resolve_callbacks: False keeps references from callbacks to other settings, such as ``${early_stop.metric}``,
            so that a callback follows a setting which a resume changes.
    """
    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    if "callbacks" in settings and not resolve_callbacks:
        raw = OmegaConf.to_container(cfg.callbacks, resolve=False)
        settings["callbacks"] = _keep_references(raw, settings["callbacks"])
    return {str(key): value for key, value in settings.items()}


def _keep_references(raw: Any, resolved: Any) -> Any:
    if isinstance(raw, str) and REFERENCE.fullmatch(raw):
        return raw
    if isinstance(raw, dict) and isinstance(resolved, dict):
        return {key: _keep_references(raw[key], value) for key, value in resolved.items()}
    return resolved


def config_from_dict(settings: Mapping[str, Any]) -> DictConfig:
    """Return settings that `config_to_dict` made plain."""
    return OmegaConf.create(dict(settings))


def read_run_config(folder: Path) -> DictConfig:
    """Return the settings of a run.

    Raises:
        RunFolderError: the folder holds no run.
    """
    try:
        settings: Any = OmegaConf.load(folder / CONFIG_FILE)
    except FileNotFoundError:
        fix = "the folder that a run named as saved, e.g. outputs/heart/fedavg/..."
        raise RunFolderError(f"{folder} is not a run folder: it has no {CONFIG_FILE}\n  try       {fix}") from None
    except (OSError, YAMLError) as error:
        raise RunFolderError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(settings, DictConfig) or "strategy" not in settings:
        raise RunFolderError(f"{folder / CONFIG_FILE} holds no run's settings")
    return OmegaConf.masked_copy(settings, [str(key) for key in settings if key not in ("defaults", "hydra")])
