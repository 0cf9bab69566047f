"""Run a Flower app in this process, without Ray: ``python -m fedlearn.flower.run path/to/app num_nodes=100``.

The settings after the path are ``num_nodes`` (default 2, as in Flower) and the settings of the app in
``[tool.flwr.app.config]``, with dots for nested names: ``num-server-rounds=3 model.width=32``.
"""

from __future__ import annotations

import sys
import time
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fedlearn.core.command_line import DONE, FAILED, command_parser, run_command, take_settings
from fedlearn.errors import FedlearnError, MissingExtra, SettingError, did_you_mean, is_count, require

try:
    from flwr.app import Context, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from fedlearn.flower.in_process_grid import InProcessGrid
except ImportError as missing:
    raise MissingExtra("running a Flower app", "flower") from missing

DEFAULT_NUM_NODES = 2  # as in Flower
USAGE = "python -m fedlearn.flower.run path/to/app num_nodes=100"


@dataclass(frozen=True, kw_only=True)
class FlowerApp:
    """Hold a Flower app, as its pyproject.toml describes it.

    Attributes:
        server, client: components of the app.
        config: run configuration, with nested names joined by dots.
    """

    server: ServerApp
    client: ClientApp
    config: Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: done; 2: the app or a setting cannot be used; 3: the app failed; 130: stopped by a signal.
    """
    parser = command_parser(
        "fedlearn.flower.run",
        "Run a Flower app in this process, without Ray.",
        epilog="settings: num_nodes=100, and the settings of the app, e.g. num-server-rounds=3",
    )
    parser.add_argument("folder", type=Path, metavar="APP", help="folder of the app, with its pyproject.toml")
    parser.add_argument("settings", nargs="*", default=[], metavar="setting=value", help="e.g. num_nodes=100")
    return run_command(parser, run_app, argv)


def run_app(folder: Path, settings: Sequence[str]) -> int:
    """Run the app of a folder; return the exit code."""
    num_nodes, changes = parse_settings(settings)
    return run(load_app(folder, changes), num_nodes)


def run(app: FlowerApp, num_nodes: int) -> int:
    """Run an app, print its outcome, and return the exit code.

    Args:
        app: the app.
        num_nodes: number of nodes, >= 1.

    Raises:
        SettingError: ``num_nodes`` is out of range.
    """
    grid = InProcessGrid(app.client, num_nodes, run_config=app.config)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(app.config))
    start = time.perf_counter()
    try:
        app.server(grid=grid, context=context)
        code = DONE
    except Exception:
        traceback.print_exc()
        code = FAILED
    responses, errors = grid.outcomes["response"], grid.outcomes["error"]
    if errors and not responses:
        code = FAILED
    if grid.first_error:
        sys.stderr.write(f"first error of a ClientApp:\n{grid.first_error}")
    outcome = "done" if code == DONE else "failed"
    seconds = time.perf_counter() - start
    sys.stderr.write(f"{outcome} in {seconds:.2f} s: {num_nodes} nodes, {responses} responses, {errors} errors\n")
    return code


def load_app(folder: Path, overrides: Mapping[str, Any] | None = None) -> FlowerApp:
    """Load the app in a folder, with some settings changed.

    Args:
        folder: folder of the app, with its pyproject.toml.
        overrides: new values of settings, by name.

    Raises:
        FedlearnError: the folder has no app, its pyproject.toml lacks a required entry, or a component cannot be
            imported.
        SettingError: the app has no such setting.
    """
    project = folder.expanduser().resolve() / "pyproject.toml"
    if not project.is_file():
        reason = "the folder has no pyproject.toml" if folder.is_dir() else "there is no such folder"
        raise FedlearnError(f"{folder} is not a Flower app: {reason}\n  try       {USAGE}")
    try:
        description = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
        server, client = (description["components"][name] for name in ("serverapp", "clientapp"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedlearnError(f"{project} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        needs = "[tool.flwr.app.components] with serverapp and clientapp"
        raise FedlearnError(f"{project} describes no Flower app: it lacks {error}\n  expected  {needs}") from error
    config = apply_overrides(flatten(description.get("config", {})), overrides or {})
    sys.path.insert(0, str(project.parent))
    return FlowerApp(
        server=load_component(server, ServerApp, project),
        client=load_component(client, ClientApp, project),
        config=config,
    )


def load_component(reference: str, kind: type[Any], project: Path) -> Any:
    """Import the component at ``module:attribute``.

    Args:
        reference: ``module:attribute``.
        kind: expected class.
        project: pyproject.toml of the app, for messages.

    Raises:
        FedlearnError: the component cannot be imported, or is of another class.
    """
    module, _, attribute = str(reference).partition(":")
    try:
        component = import_module(module)
        for name in attribute.split("."):
            component = getattr(component, name)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}\n  in        {place.filename}, line {place.lineno}"
        raise FedlearnError(f"{reference} of {project} cannot be imported: {reason}") from error
    if not isinstance(component, kind):
        raise FedlearnError(f"{reference} of {project} is a {type(component).__name__}, expected a {kind.__name__}")
    return component


def parse_settings(overrides: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Parse settings into ``num_nodes`` and the settings of the app. Values are TOML or plain text.

    Args:
        overrides: settings as typed, ``key=value``.

    Raises:
        SettingError: a setting has no ``=``, or ``num_nodes`` is out of range.
    """
    command_settings, app_overrides = take_settings(overrides, {"num_nodes": DEFAULT_NUM_NODES})
    num_nodes = command_settings.get("num_nodes", DEFAULT_NUM_NODES)
    require(is_count(num_nodes), "num_nodes", num_nodes, "a whole number >= 1", "num_nodes=10")
    app_settings: dict[str, Any] = {}
    for override in app_overrides:
        key, equals, text = override.partition("=")
        require(bool(key and equals), override, "not a setting", "key=value", USAGE)
        try:
            app_settings[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            app_settings[key] = text
    return num_nodes, app_settings


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables into one, with names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with some values changed.

    Raises:
        SettingError: the configuration has no such setting.
    """
    for name, value in overrides.items():
        closest = did_you_mean(name, config)
        expected = f"a setting of the app: {', '.join(config) or 'the app has none'}"
        fix = f"{closest}={value}" if closest else f"[tool.flwr.app.config] of its pyproject.toml: {name} = ..."
        if name not in config:
            raise SettingError(name, value, expected, fix)
    return {**config, **overrides}


if __name__ == "__main__":
    sys.exit(main())
