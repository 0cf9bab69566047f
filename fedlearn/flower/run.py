"""``python -m fedlearn.flower.run path/to/app num_nodes=100``: a Flower app in this process, without Ray.

Settings after the path are ``num_nodes`` (default 2, as in Flower) and the settings of the app in
``[tool.flwr.app.config]``, with dots for nesting: ``num-server-rounds=3 model.width=32``.
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
    """A Flower app as its pyproject.toml describes it.

    Attributes:
        server, client: its components.
        config: its run configuration, nested names joined by dots.
    """

    server: ServerApp
    client: ClientApp
    config: Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 done, 2 the app or a setting cannot be used, 3 failed, 130 stopped."""
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
    """Run an app on that many nodes and say how it went; the exit code.

    Raises:
        SettingError: ``num_nodes`` is out of range.
    """
    grid = InProcessGrid(app.client, num_nodes, run_config=app.config)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(app.config))
    began = time.perf_counter()
    try:
        app.server(grid=grid, context=context)
        code = DONE
    except Exception:
        traceback.print_exc()
        code = FAILED
    replies, errors = grid.outcomes["response"], grid.outcomes["error"]
    if errors and not replies:
        code = FAILED
    if grid.first_error:
        sys.stderr.write(f"the first error of a ClientApp:\n{grid.first_error}")
    how = "done" if code == DONE else "failed"
    seconds = time.perf_counter() - began
    sys.stderr.write(f"{how} in {seconds:.2f} s: {num_nodes} nodes, {replies} replies, {errors} errors\n")
    return code


def load_app(folder: Path, overrides: Mapping[str, Any] | None = None) -> FlowerApp:
    """The app in a folder, its configuration changed.

    Raises:
        FedlearnError: there is no app, its pyproject.toml lacks what `flwr run` needs, or a component cannot be
            imported.
        SettingError: a change names no setting of the app.
    """
    project = folder.expanduser().resolve() / "pyproject.toml"
    if not project.is_file():
        what = "there is no pyproject.toml in it" if folder.is_dir() else "there is no such folder"
        raise FedlearnError(f"{folder} holds no Flower app: {what}\n  try       {USAGE}")
    try:
        described = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
        server, client = (described["components"][name] for name in ("serverapp", "clientapp"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedlearnError(f"{project} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        needs = "[tool.flwr.app.components] with serverapp and clientapp"
        raise FedlearnError(f"{project} describes no Flower app: it lacks {error}\n  expected  {needs}") from error
    config = apply_overrides(flatten(described.get("config", {})), overrides or {})
    sys.path.insert(0, str(project.parent))
    return FlowerApp(
        server=load_component(server, ServerApp, project),
        client=load_component(client, ClientApp, project),
        config=config,
    )


def load_component(reference: str, kind: type[Any], project: Path) -> Any:
    """What ``module:attribute`` stands for.

    Raises:
        FedlearnError: it cannot be imported, or is of another kind.
    """
    module, _, attribute = str(reference).partition(":")
    try:
        found = import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {error}\n  in        {place.filename}, line {place.lineno}"
        raise FedlearnError(f"{reference} of {project} cannot be imported: {why}") from error
    if not isinstance(found, kind):
        raise FedlearnError(f"{reference} of {project} is a {type(found).__name__}, expected a {kind.__name__}")
    return found


def parse_settings(overrides: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Return ``num_nodes``, and the settings of the app; values as in TOML, or plain text.

    Raises:
        SettingError: a word is no ``key=value``, or ``num_nodes`` is out of range.
    """
    own, words = take_settings(overrides, {"num_nodes": DEFAULT_NUM_NODES})
    num_nodes = own.get("num_nodes", DEFAULT_NUM_NODES)
    require(is_count(num_nodes), "num_nodes", num_nodes, "a whole number >= 1", "num_nodes=10")
    given: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        require(bool(key and equals), word, "no setting", "key=value", USAGE)
        try:
            given[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            given[key] = text
    return num_nodes, given


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, their names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some of its values changed.

    Raises:
        SettingError: there is no such setting.
    """
    for name, value in overrides.items():
        near = did_you_mean(name, config)
        expected = f"a setting of the app: {', '.join(config) or 'it has none'}"
        fix = f"{near}={value}" if near else f"[tool.flwr.app.config] of its pyproject.toml: {name} = ..."
        if name not in config:
            raise SettingError(name, value, expected, fix)
    return {**config, **overrides}


if __name__ == "__main__":
    sys.exit(main())
