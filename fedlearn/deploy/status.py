"""Show the nodes and runs of a federation: ``python -m fedlearn.deploy.status``."""

from __future__ import annotations

import queue
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlearn.core.command_line import DONE, FAILED, CommandParser, run_command
from fedlearn.core.plain_text import plain_line
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.control_options import add_json_option, control_parser
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient, NodeState, RunState
from fedlearn.deploy.history import print_json
from fedlearn.deploy.remote_runs import RunClient, read_progress

MAX_RUNS = 10  # finished runs in the table
LOG_TIMEOUT_S = 5.0  # seconds to wait for the output of a run in progress
ROUND_LINE = re.compile(r"^round (\d+)/(\d+)\b.*$", re.MULTILINE)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = control_parser(
        "fedlearn.deploy.status",
        "Show the nodes and the runs of a federation.",
        epilog="exit codes: 0; with --check 3 if a node is offline; 2 if the coordinator cannot be reached",
    )
    parser.add_argument("--all", action="store_true", help=f"show all finished runs instead of the last {MAX_RUNS}")
    add_json_option(parser)
    parser.add_argument("--check", action="store_true", help="exit with 3 if a node is offline, for monitoring")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 without a connection, or 3 with ``--check``."""
    return run_command(build_parser(), show_status, argv)


def show_status(*, coordinator: str, keys: Path, all: bool, json: bool, check: bool) -> int:
    """Print the status and return the exit code.

    Raises:
        ConnectionProblem: the coordinator cannot be reached, or refuses the token.
    """
    status = read_status(coordinator, keys, max_finished=None if all else MAX_RUNS)
    if json:
        print_json(status)
    else:
        _print_tables(status)
    offline = [node["name"] for node in status["nodes"] if node["state"] != "online"]
    return FAILED if check and offline else DONE


def read_status(address: str, keys: Path, *, max_finished: int | None = MAX_RUNS) -> dict[str, Any]:
    """Return nodes and runs as plain values.

    Args:
        address: address of the coordinator, ``host:port``.
        keys: folder with the operator's keys.
        max_finished: number of finished runs, the newest first; None returns all.

    Returns:
        - ``coordinator``: the address; ``time``: the present time, UTC, in ISO 8601.
        - ``nodes``: see `NodeState` and `describe_node`.
        - ``runs``: see `RunState` and `describe_run`. ``last_line`` is the newest line of a round; empty for other
          runs.

    Raises:
        ConnectionProblem: the coordinator cannot be reached, or refuses the token.
    """
    control, client = CoordinatorClient(address, keys), RunClient(address, keys)
    try:
        nodes, runs = control.node_states(), control.run_states()
        active = [run for run in runs if run.status != "finished"]
        finished = [run for run in runs if run.status == "finished"][:max_finished]
        members, progress = client.get("nodes"), read_progress(client, [*active, *finished])
        return {
            "coordinator": address,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "nodes": [describe_node(node, members) for node in nodes],
            "runs": [
                {**describe_run(run, progress), "last_line": _last_line(control, run)} for run in (*active, *finished)
            ],
        }
    finally:
        control.close()
        client.close()


def describe_node(node: NodeState, members: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a node, with version, framework, device, clients and time of its last run."""
    member = members.get(node.name, {})
    fields = ("version", "framework", "device", "clients", "joined")
    return {**asdict(node), **{name: member.get(name) for name in fields}, "last_run": member.get("run")}


def describe_run(run: RunState, progress: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of a run, with its round, planned rounds, epsilon and predicted end."""
    values = progress.get(run.folder, {})
    left, end = values.get("seconds_left"), None
    if run.status == "running" and isinstance(left, int | float):
        end = (datetime.now(UTC) + timedelta(seconds=left)).isoformat(timespec="seconds")
    return {**asdict(run), **{name: values.get(name) for name in ("round", "rounds", "epsilon")}, "predicted_end": end}


def _last_line(control: CoordinatorClient, run: RunState) -> str:
    """Return the newest line of a round of a run in progress. Its log never ends, so a thread reads it."""
    if run.status not in ("running", "starting"):
        return ""
    pieces = queue.Queue[str]()

    def read() -> None:
        with suppress(ConnectionProblem):
            pieces.put(next(control.log(run.id), ("", 0.0))[0])

    threading.Thread(target=read, daemon=True).start()
    with suppress(queue.Empty):
        text = ESCAPES.sub("", pieces.get(timeout=LOG_TIMEOUT_S))
        lines = [match[0] for match in ROUND_LINE.finditer(text)]
        return plain_line(lines[-1], max_length=200) if lines else ""
    return ""


def _print_tables(status: dict[str, Any]) -> None:
    out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    nodes = Table("node", "state", "since", "last seen", "version", "framework", "last run", box=None, pad_edge=False)
    for node in status["nodes"]:
        framework = " on ".join(filter(None, (node["framework"], node["device"])))
        times = (_short_time(node["since"]), _short_time(node["last_heartbeat"]))
        last = (*times, node["version"] or "-", framework or "-", node["last_run"] or "-")
        nodes.add_row(node["name"], node["state"], *last)
    out.print(f"coordinator  {status['coordinator']}   {_short_time(status['time'])} UTC\n")
    out.print(nodes if status["nodes"] else "no node is admitted: fedlearn deploy keys add")
    out.print()
    out.print(run_table(status["runs"]) if status["runs"] else "no run yet: fedlearn deploy submit")


def run_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with one line per run."""
    names = ("run", "person", "state", "started", "folder", "experiment", "round", "epsilon", "ends")
    table = Table(*names, box=None, pad_edge=False)
    for run in runs:
        rounds = f"{run['round'] or 0}/{run['rounds'] or '?'}"
        epsilon = "-" if run["epsilon"] is None else f"{run['epsilon']:.3g}"
        place = (_short_time(run["started"]), run["folder"], run["experiment"])
        state, end = run["outcome"] or run["status"], _short_time(run["predicted_end"] or "")[11:]
        table.add_row(run["name"] or str(run["id"]), run["person"], state, *place, rounds, epsilon, end or "-")
    return table


def _short_time(text: str) -> str:
    return text[:19].replace("T", " ")


if __name__ == "__main__":
    sys.exit(main())
