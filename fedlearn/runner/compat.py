"""Hydra's undocumented names: the only module that uses them.

Hydra documents ``hydra.main``, ``hydra.compose``, ``hydra.utils``, ``hydra.errors`` and ``hydra.types``. Each function
below checks the installed version before it uses another name, and imports that name only then.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlearn.core.command_line import CommandParser, command_parser
from fedlearn.core.private_names import PrivateNames

if TYPE_CHECKING:
    from omegaconf import DictConfig

VERSION_BASE = "1.3"

HYDRA = PrivateNames(
    library="hydra-core",
    tried=("1.3.8",),
    lowest="1.3.2",
    below="1.4",
    names={
        "command line": (
            "hydra._internal.utils:get_args_parser",
            "hydra._internal.utils:_run_hydra",
            "hydra.version:setbase",
        ),
        "composition": (
            "hydra._internal.hydra:Hydra.create_main_hydra2",
            "hydra._internal.hydra:Hydra.compose_config",
            "hydra._internal.hydra:Hydra.list_all_config_groups",
            "hydra._internal.utils:create_config_search_path",
            "hydra.core.config_search_path:SearchPathQuery",
            "hydra.core.global_hydra:GlobalHydra.clear",
            "hydra.core.global_hydra:GlobalHydra.instance",
            "hydra.core.hydra_config:HydraConfig.set_config",
            "hydra.core.object_type:ObjectType.CONFIG",
            "hydra.types:RunMode.MULTIRUN",
            "hydra.version:setbase",
        ),
        "run folder": ("hydra.core.hydra_config:HydraConfig.get",),
        "overrides": (
            "hydra.core.override_parser.overrides_parser:OverridesParser.create",
            "hydra.core.override_parser.overrides_parser:OverridesParser.parse_overrides",
            "hydra.core.override_parser.types:Override.get_key_element",
            "hydra.core.override_parser.types:Override.is_discrete_sweep",
            "hydra.core.override_parser.types:Override.is_sweep_override",
            "hydra.core.override_parser.types:Override.sweep_string_iterator",
            "hydra.core.override_parser.types:Override.value",
        ),
    },
)


def command_line_parser() -> CommandParser:
    """Return a parser of Hydra's own options; its ``--version`` shows the version of fedlearn."""
    HYDRA.verify("command line")
    from hydra._internal.utils import get_args_parser

    return command_parser("simulations.run", "", parents=[get_args_parser()], add_help=False)


def run_command_line(args: Namespace, job: Callable[[DictConfig], float | None], *, folder: Path) -> None:
    """Run Hydra's own command line: a sweep, help, or a print of the configuration.

    Args:
        args: of `command_line_parser`.
        job: runs one configuration.
        folder: has config.yaml and the groups.

    Raises:
        ValueError: flags exclude each other.
        SystemExit: Hydra ends.
    """
    HYDRA.verify("command line")
    from hydra import version
    from hydra._internal.utils import _run_hydra

    version.setbase(VERSION_BASE)
    _run_hydra(args, command_line_parser(), job, config_path=str(folder), config_name="config")


def run_folder() -> Path:
    """Return the folder that Hydra has made for the current run of a sweep."""
    HYDRA.verify("run folder")
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


class Composer:
    """Composes configurations from one folder and the folders beside it; made by `composer`."""

    def __init__(self, hydra: Any) -> None:
        self._hydra = hydra

    def compose(self, name: str, overrides: list[str]) -> DictConfig:
        """Return a configuration with the group ``hydra`` in it.

        Args:
            name: of the main file, without .yaml.
            overrides: ``setting=value`` words.
        """
        from hydra.types import RunMode

        cfg: DictConfig = self._hydra.compose_config(
            name, overrides, run_mode=RunMode.RUN, with_log_configuration=False
        )
        return cfg

    def groups(self) -> list[str]:
        """Return the names of all groups."""
        return list(self._hydra.list_all_config_groups())

    def options(self, group: str) -> list[str]:
        """Return the names of a group's options."""
        from hydra.core.object_type import ObjectType

        return list(self._hydra.config_loader.get_group_options(group, ObjectType.CONFIG))


@contextmanager
def composer(folder: str | Path, *, extra_folder: str | Path | None = None) -> Iterator[Composer]:
    """Set Hydra up as its own command line does.

    Args:
        folder: with the main file and the groups.
        extra_folder: a folder that is searched first.
    """
    HYDRA.verify("composition")
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    version.setbase(VERSION_BASE)
    paths = create_config_search_path(os.path.abspath(folder))
    if extra_folder:
        here = f"file://{os.path.abspath(extra_folder)}"
        paths.prepend(provider="command-line", path=here, anchor=SearchPathQuery(provider="schema"))
    try:
        yield Composer(Hydra.create_main_hydra2(task_name="run", config_search_path=paths))
    finally:
        GlobalHydra.instance().clear()


def use_for_interpolation(cfg: DictConfig) -> None:
    """Let ``${hydra:...}`` in a configuration refer to the configuration itself."""
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(cfg)


def is_sweep(cfg: DictConfig) -> bool:
    """Return True if a configuration with the group ``hydra`` asks for a sweep."""
    from hydra.types import RunMode

    return bool(cfg.hydra.mode == RunMode.MULTIRUN)


@dataclass(frozen=True)
class ParsedOverride:
    """One override; made by `parse_override`.

    Args:
        override: as Hydra parses it.
    """

    override: Any

    @property
    def text(self) -> str:
        """Return the override as it was typed."""
        return self.override.input_line or ""

    @property
    def setting(self) -> str:
        """Return the dotted name of the setting, or the name of the group."""
        return str(self.override.key_or_group)

    @property
    def value(self) -> Any:
        """Return the value."""
        return self.override.value()

    @property
    def is_discrete_sweep(self) -> bool:
        """Return True for a choice, a range or a glob."""
        return bool(self.override.is_discrete_sweep())

    @property
    def is_interval(self) -> bool:
        """Return True for a sweep without steps."""
        return bool(self.override.is_sweep_override()) and not self.is_discrete_sweep

    def choices(self) -> Iterator[str]:
        """Return one override for each value of a discrete sweep."""
        for value in self.override.sweep_string_iterator():
            yield f"{self.override.get_key_element()}={value}"


def parse_override(word: str) -> list[ParsedOverride]:
    """Return what Hydra reads in one word of a command line.

    Raises:
        hydra.errors.OverrideParseException: the word is no override.
    """
    HYDRA.verify("overrides")
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [ParsedOverride(override) for override in OverridesParser.create().parse_overrides([word])]
