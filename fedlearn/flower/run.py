"""Run a Flower app in this process, without Ray: ``python -m fedlearn.flower.run path/to/app num_nodes=100``.

The settings after the path are:

- ``num_nodes``: number of nodes; default ``options.num-supernodes`` of the app's federation, or 2, as in Flower;
- ``node_config.NAME``: configuration of each node, e.g. ``node_config.dataset-path=parts/{partition}``;
- ``federation``: name of a federation of the app;
- ``workers``: number of processes that run clients; default: the number that fits ``client-resources.num-cpus`` of the
  app's federation, or 1, which is this process;
- ``max_failures``: share of messages that may end with an error, default 0;
- settings in ``[tool.flwr.app.config]``, with dots for nested names: ``num-server-rounds=3 model.width=32``.
"""

from __future__ import annotations

import os
import sys
import time
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlearn.core.command_line import DONE, FAILED, command_parser, run_command
from fedlearn.errors import FedlearnError, MissingExtra, SettingError, did_you_mean
from fedlearn.flower.app_settings import (
    DEFAULT_NUM_NODES,
    USAGE,
    Federation,
    RunSettings,
    flatten,
    parse_settings,
    read_federation,
)

try:
    from flwr.app import Context, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from fedlearn.flower.app_components import load_component
    from fedlearn.flower.client_pool import ClientPool, ClientSource
    from fedlearn.flower.in_process_grid import InProcessGrid
    from fedlearn.flower.node_waits import interruptible_main_thread
except ImportError as missing:
    raise MissingExtra("running a Flower app", "flower") from missing

PARTLY_FAILED = 4  # exit code: the app ended, and some messages ended with an error


@dataclass(frozen=True, kw_only=True)
class FlowerApp:
    """Hold a Flower app, as its pyproject.toml describes it.

    Attributes:
        server, client: components of the app.
        config: run configuration, with nested names joined by dots.
        federation: its federation.
        source: place of the ClientApp, for processes that import it; None: only this process can run it.
    """

    server: ServerApp
    client: ClientApp
    config: Mapping[str, Any]
    federation: Federation = Federation()  # noqa: RUF009 - frozen
    source: ClientSource | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: done; 2: the app or a setting cannot be used; 3: the app failed, or all messages ended with an error;
        4: the app ended, and more messages ended with an error than ``max_failures`` allows; 130: stopped by a signal.
    """
    parser = command_parser(
        "fedlearn.flower.run",
        "Run a Flower app in this process, without Ray.",
        epilog="settings: num_nodes=100, workers=2, node_config.NAME=VALUE, federation=NAME, max_failures=0.5, and "
        "settings of the app, e.g. num-server-rounds=3\n"
        "exit codes: 0 done; 2 wrong setting; 3 failed; 4 some messages failed",
    )
    parser.add_argument("folder", type=Path, metavar="APP", help="folder of the app, with its pyproject.toml")
    parser.add_argument("settings", nargs="*", default=[], metavar="setting=value", help="e.g. num_nodes=100")
    return run_command(parser, run_app, argv)


def run_app(folder: Path, settings: Sequence[str]) -> int:
    """Run the app of a folder; return the exit code."""
    chosen = parse_settings(settings)
    app = load_app(folder, chosen.app, federation=chosen.federation)
    if app.federation.unused:
        sys.stderr.write(f"federation: no effect in this process: {', '.join(app.federation.unused)}\n")
    return run(app, chosen.num_nodes or app.federation.num_nodes or DEFAULT_NUM_NODES, chosen)


def run(app: FlowerApp, num_nodes: int, settings: RunSettings | None = None) -> int:
    """Run an app, print its outcome, and return the exit code.

    Args:
        app: the app.
        num_nodes: number of nodes, >= 1.
        settings: configuration of nodes, and accepted failures; None for the defaults.

    Raises:
        SettingError: ``num_nodes`` is out of range.
        EndlessWait: the app waits for more nodes.
    """
    settings = settings or RunSettings()
    pool, start = _client_pool(app, num_nodes, settings), time.perf_counter()
    try:
        grid, code = _run_components(app, num_nodes, settings, pool)
    finally:
        if pool:
            pool.close()
    responses, errors = grid.outcomes["response"], grid.outcomes["error"]
    if code == DONE and errors > settings.max_failures * (responses + errors):
        code = PARTLY_FAILED if responses else FAILED
    if grid.first_error:
        sys.stderr.write(f"first error of a ClientApp:\n{grid.first_error}")
    outcome = {DONE: "done", PARTLY_FAILED: "done, but some messages failed"}.get(code, "failed")
    seconds = time.perf_counter() - start
    sys.stderr.write(f"{outcome} in {seconds:.2f} s: {num_nodes} nodes, {responses} responses, {errors} errors\n")
    return code


def _run_components(
    app: FlowerApp, num_nodes: int, settings: RunSettings, pool: ClientPool | None
) -> tuple[InProcessGrid, int]:
    """Run the ServerApp over a grid of the ClientApp; return the grid and the exit code."""
    with interruptible_main_thread() as interrupt:
        grid = InProcessGrid(
            app.client,
            num_nodes,
            run_config=app.config,
            node_config=settings.node_config,
            on_endless_wait=interrupt,  # the main thread may wait for another thread that looks for nodes
            pool=pool,
        )
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=dict(app.config))
        try:
            app.server(grid=grid, context=context)
            grid.handle_all()
        except (Exception, KeyboardInterrupt) as error:
            if grid.endless_wait:
                raise grid.endless_wait from None
            if isinstance(error, KeyboardInterrupt):
                raise
            traceback.print_exc()
            return grid, FAILED
    return grid, DONE


def _client_pool(app: FlowerApp, num_nodes: int, settings: RunSettings) -> ClientPool | None:
    """Return the processes that run clients; None for one process, which is this process."""
    cores, num_cpus = len(os.sched_getaffinity(0)), app.federation.num_cpus
    fitting = int(cores / num_cpus) if num_cpus else 1
    num_workers = min(num_nodes, settings.workers or max(1, fitting))
    if num_workers == 1 or app.source is None:
        return None
    return ClientPool(app.source, num_workers, num_threads=max(1, int(num_cpus or cores / num_workers)))


def load_app(folder: Path, overrides: Mapping[str, Any] | None = None, *, federation: str = "") -> FlowerApp:
    """Load the app in a folder, with some settings changed.

    Args:
        folder: folder of the app, with its pyproject.toml.
        overrides: new values of settings, by name.
        federation: name of a federation of the app; empty for its default.

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
        flwr = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["flwr"]
        description = flwr["app"]
        server, client = (description["components"][name] for name in ("serverapp", "clientapp"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedlearnError(f"{project} cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        needs = "[tool.flwr.app.components] with serverapp and clientapp"
        raise FedlearnError(f"{project} describes no Flower app: it lacks {error}\n  expected  {needs}") from error
    config = apply_overrides(flatten(description.get("config", {})), overrides or {})
    chosen = read_federation(flwr, federation)
    sys.path.insert(0, str(project.parent))
    target = str(description.get("flwr-version-target", ""))
    return FlowerApp(
        server=load_component(server, ServerApp, project, target),
        client=load_component(client, ClientApp, project, target),
        config=config,
        federation=chosen,
        source=ClientSource(project, str(client)),
    )


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
