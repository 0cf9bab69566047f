"""Write and read ``config.yaml`` of a run folder, which has all settings and repeats the run from any folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from fedlearn.core.checkpoint import write_atomically
from fedlearn.runner.conf_files import CONF_DIR
from fedlearn.runner.consent import listed_modules, require_consent
from fedlearn.runner.run_folder import CONFIG_FILE, RunFolderError

REFERENCE = re.compile(r"\$\{([\w.]+)\}")  # reference to another setting; the name of a resolver has a colon


def write_run_config(folder: Path, cfg: DictConfig) -> None:
    """Write ``config.yaml``, including the settings of Hydra that a run from this file needs."""
    installed = OmegaConf.to_container(OmegaConf.load(CONF_DIR / CONFIG_FILE), resolve=False)
    assert isinstance(installed, dict)
    hydra = {name: node for name, node in installed["hydra"].items() if name != "help"}
    no_logging = [entry for entry in installed["defaults"] if any("hydra/" in str(key) for key in entry)]
    text = OmegaConf.to_yaml({"defaults": ["_self_", *no_logging], **config_to_dict(cfg), "hydra": hydra})
    command = f"# python -m simulations.run --config-path {folder.resolve()} --config-name config\n"
    write_atomically(folder / CONFIG_FILE, command + text)


def config_to_dict(cfg: DictConfig, *, resolve_callbacks: bool = False) -> dict[str, Any]:
    """Return all settings as plain values.

    Args:
        cfg: all settings.
        resolve_callbacks: True resolves references from callbacks to other settings, such as ``${early_stop.metric}``.
            False, the default, keeps them, so that callbacks receive settings that a resume changes.
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
    """Return the configuration of plain settings that `config_to_dict` returned."""
    return OmegaConf.create(dict(settings))


def read_run_config(folder: Path) -> DictConfig:
    """Return the settings in ``config.yaml`` of a run folder.

    Raises:
        RunFolderError: the folder is not a run folder, or its ``config.yaml`` cannot be read.
        SettingError: its ``allow_targets`` lists modules that the person who starts the command has not allowed.
    """
    try:
        settings: Any = OmegaConf.load(folder / CONFIG_FILE)
    except FileNotFoundError:
        fix = "the folder that a run prints as saved, e.g. outputs/heart/fedavg/..."
        raise RunFolderError(f"{folder} is not a run folder: it has no {CONFIG_FILE}\n  advice    {fix}") from None
    except (OSError, YAMLError) as error:
        raise RunFolderError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    if not isinstance(settings, DictConfig) or "strategy" not in settings:
        raise RunFolderError(f"{folder / CONFIG_FILE} does not have the settings of a run")
    require_consent(listed_modules(settings))
    return OmegaConf.masked_copy(settings, [str(key) for key in settings if key not in ("defaults", "hydra")])
