"""Use undocumented names of Hydra. No other module uses them.

Hydra documents ``hydra.main``, ``hydra.compose``, ``hydra.utils``, ``hydra.errors`` and ``hydra.types``. Each function
below checks the installed version first, and imports an undocumented name only then.
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
HYDRA_PLUGINS = "hydra._internal.core_plugins."  # modules of the launcher and the sweeper that Hydra installs

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
            "hydra.core.hydra_config:HydraConfig.instance",
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
            "hydra._internal.grammar.utils:escape_special_characters",
            "hydra.core.override_parser.types:Quote.single",
            "hydra.core.override_parser.types:QuotedString.with_quotes",
        ),
    },
)


def command_line_parser() -> CommandParser:
    """Return the parser of Hydra's own options. ``--version`` shows the version of fedlearn."""
    HYDRA.verify("command line")
    from hydra._internal.utils import get_args_parser

    return command_parser("simulations.run", "", parents=[get_args_parser()], add_help=False)


def run_command_line(args: Namespace, job: Callable[[DictConfig], float | None], *, folder: Path) -> None:
    """Run Hydra's own command line: a sweep, help, or a print of the configuration.

    Args:
        args: options that the parser of `command_line_parser` returned.
        job: function that runs one configuration.
        folder: folder with ``config.yaml`` and the groups.

    Raises:
        ValueError: two options exclude each other.
        SystemExit: Hydra ended the command.
    """
    HYDRA.verify("command line")
    from hydra import version
    from hydra._internal.utils import _run_hydra

    version.setbase(VERSION_BASE)
    _run_hydra(args, command_line_parser(), job, config_path=str(folder), config_name="config")


def run_folder() -> Path:
    """Return the folder that Hydra created for the current run of a sweep."""
    HYDRA.verify("run folder")
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def job_overrides() -> list[str]:
    """Return the overrides of the current run of a sweep."""
    HYDRA.verify("run folder")
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


class Composer:
    """Compose configurations from one folder and additional folders. `composer` creates it."""

    def __init__(self, hydra: Any) -> None:
        self._hydra = hydra

    def compose(self, name: str, overrides: list[str]) -> DictConfig:
        """Return a configuration that includes the group ``hydra``.

        Args:
            name: name of the main file, without ``.yaml``.
            overrides: overrides ``setting=value``.
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
        """Return the names of the options of a group."""
        from hydra.core.object_type import ObjectType

        return list(self._hydra.config_loader.get_group_options(group, ObjectType.CONFIG))


@contextmanager
def composer(folder: str | Path, *, extra_folder: str | Path | None = None) -> Iterator[Composer]:
    """Set Hydra up as its own command line does.

    Args:
        folder: folder with the main file and the groups.
        extra_folder: additional folder, which is searched first; None for no such folder.
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
    """Make ``${hydra:...}`` in a configuration refer to the configuration itself."""
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().set_config(cfg)


def interpolation_source() -> DictConfig:
    """Return the configuration to which ``${hydra:...}`` refers."""
    from hydra.core.hydra_config import HydraConfig

    source: DictConfig | Any = HydraConfig.instance().cfg
    return source


def is_sweep(cfg: DictConfig) -> bool:
    """Return whether a configuration, with the group ``hydra``, has the mode of a sweep."""
    from hydra.types import RunMode

    return bool(cfg.hydra.mode == RunMode.MULTIRUN)


@dataclass(frozen=True)
class ParsedOverride:
    """Override in the form in which Hydra parsed it. `parse_override` creates it.

    Args:
        override: override of Hydra.
    """

    override: Any

    @property
    def text(self) -> str:
        """Override as the user typed it."""
        return self.override.input_line or ""

    @property
    def setting(self) -> str:
        """Dotted name of the setting, or name of the group."""
        return str(self.override.key_or_group)

    @property
    def key(self) -> str:
        """Setting or group, with its package and the sign before it."""
        return str(self.override.get_key_element())

    @property
    def value(self) -> Any:
        """Value of the override, without sweeps resolved."""
        return self.override.value()

    @property
    def is_discrete_sweep(self) -> bool:
        """True for a sweep over a choice, a range or a glob."""
        return bool(self.override.is_discrete_sweep())

    @property
    def is_sweep(self) -> bool:
        """True for a sweep of any kind."""
        return bool(self.override.is_sweep_override())

    @property
    def is_interval(self) -> bool:
        """True for a sweep over an interval, which has no single values."""
        return self.is_sweep and not self.is_discrete_sweep

    def choices(self) -> Iterator[str]:
        """Yield one override for each value of a discrete sweep."""
        for value in self.override.sweep_string_iterator():
            yield f"{self.key}={value}"


def parse_override(override: str) -> list[ParsedOverride]:
    """Parse one override of a command line with the grammar of Hydra.

    Raises:
        hydra.errors.OverrideParseException: the text is not an override.
    """
    HYDRA.verify("overrides")
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [ParsedOverride(parsed) for parsed in OverridesParser.create().parse_overrides([override])]


def quote(text: str) -> str:
    """Return a text in quotes, which the grammar of Hydra reads as the same text."""
    HYDRA.verify("overrides")
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def quote_key(text: str) -> str:
    """Return a key of a mapping, which the grammar of Hydra reads as the same key. A key cannot contain quotes."""
    HYDRA.verify("overrides")
    from hydra._internal.grammar.utils import escape_special_characters

    return escape_special_characters(text)
