"""Show and verify the audit log of a coordinator or a node: ``python -m fedlearn.deploy.history``."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedlearn.core.command_line import DONE, FAILED, CommandParser, run_command
from fedlearn.deploy.audit_log import AUDIT_FILE, plain_value, read_events, verify
from fedlearn.deploy.control_options import add_json_option, control_parser
from fedlearn.deploy.remote_runs import RunClient
from fedlearn.errors import FedlearnError

PLACES = ("", "client_states")  # folders of the log in a state folder: of the coordinator, of a node
COLUMNS = (
    *("run", "person", "folder", "started", "ended", "outcome", "strategy", "privacy", "rounds", "num_requests"),
    *("num_refused", "bytes_sent", "epsilon", "policy_sha256", "data_digest"),
)
TABLE_COLUMNS = ("run", "person", "started", "outcome", "strategy", "privacy", "rounds", "bytes_sent", "epsilon")


def build_parser() -> CommandParser:
    """Return the parser of the command."""
    parser = control_parser(
        "fedlearn.deploy.history",
        "Show which runs used the data of a site or a coordinator: who ordered them, and what left.",
        epilog="exit codes: 0; with --verify 3 if the log was changed; 2 without a log",
    )
    place = "state folder of a coordinator or of a node, or its client states; without it, ask the coordinator"
    parser.add_argument("state", type=Path, nargs="?", help=place)
    parser.add_argument("--run", default="", help="only this run: its name, its number, or its folder")
    parser.add_argument("--events", action="store_true", help="show each line of the log instead of one line per run")
    add_json_option(parser)
    parser.add_argument("--csv", action="store_true", help="print CSV")
    parser.add_argument(
        "--verify", action="store_true", help="check the chain of hashes, and exit with 3 if it is broken"
    )
    parser.add_argument("--head", default="", metavar="NUMBER:HASH", help="with --verify: a head noted earlier")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 without a log, or 3 with ``--verify`` for a changed log."""
    return run_command(build_parser(), show_history, argv)


def show_history(
    *,
    state: Path | None,
    coordinator: str,
    keys: Path,
    run: str,
    events: bool,
    json: bool,
    csv: bool,
    verify: bool,
    head: str,
) -> int:
    """Print the history and return the exit code.

    Raises:
        FedlearnError: The folder has no audit log, or the coordinator cannot be reached.
    """
    if verify:
        if state is None:
            expected, fix = "the state folder, because a log is verified at its place", "add the folder before --verify"
            raise FedlearnError(f"STATE is missing\n  expected  {expected}\n  advice    {fix}")
        return _print_verification(find_log(state), head, as_json=json)
    lines = select_run(read_events(find_log(state)) if state else _fetch_events(coordinator, keys), run)
    rows = lines if events else summarize_runs(lines)
    if json:
        print_json(rows)
    elif csv:
        sys.stdout.write(to_csv(rows, None if events else COLUMNS))
    elif events:
        for line in lines:
            sys.stdout.write(f"{format_event(line)}\n")
    else:
        print_table(rows)
    return DONE


def _fetch_events(coordinator: str, keys: Path) -> list[dict[str, Any]]:
    client = RunClient(coordinator, keys)
    try:
        events = client.get("history")
    finally:
        client.close()
    return [plain_value(line) for line in events if isinstance(line, dict) and {"time", "event"} <= line.keys()]


def find_log(state: Path) -> Path:
    """Return the folder of the audit log in a state folder.

    Raises:
        FedlearnError: The folder has no audit log.
    """
    for place in PLACES:
        if (state / place / AUDIT_FILE).is_file():
            return state / place
    expected = "the folder --state of a coordinator or a node, or --client-states of a trainer"
    raise FedlearnError(f"{state} has no {AUDIT_FILE}\n  expected  {expected}\n  advice    choose another folder")


def select_run(lines: Sequence[dict[str, Any]], run: str) -> list[dict[str, Any]]:
    """Return the lines of a run by its name, number or folder; all lines for an empty name."""
    if not run:
        return [*lines]
    names = {line["run"] for line in lines if run in (line.get("number"), line.get("folder")) and line.get("run")}
    return [line for line in lines if line.get("run") in {run, *names} or line.get("number") == run]


def summarize_runs(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per run, in the order of the first line of each run."""
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line.get("run"):
            _add_line(rows.setdefault(line["run"], dict.fromkeys(COLUMNS) | {"run": line["run"]}), line)
    return [*rows.values()]


def _add_line(row: dict[str, Any], line: Mapping[str, Any]) -> None:
    row["started"], row["ended"] = row["started"] or line["time"], line["time"]
    for name in ("person", "folder", "epsilon", "policy_sha256", "data_digest", "rounds"):
        row[name] = line.get(name) or row[name]
    options, privacy = _options(line.get("settings"))
    row["strategy"] = options or row["strategy"]
    row["privacy"] = line.get("privacy") or privacy or row["privacy"]
    if line["event"] == "run.ended":  # a line of the coordinator
        row["outcome"] = line.get("status") or f"exit {line.get('exit_code')}"
        row["bytes_sent"] = line.get("bytes_up", row["bytes_sent"])
    elif line["event"].startswith("request") and "kind" in line:  # a line of a node
        row["num_requests"] = (row["num_requests"] or 0) + 1
        row["bytes_sent"] = (row["bytes_sent"] or 0) + line.get("num_bytes", 0)
        row["rounds"] = max(row["rounds"] or 0, line.get("round", 0))
        if line["event"] == "request.refused":
            row["num_refused"] = (row["num_refused"] or 0) + 1
            row["outcome"] = f"refused: {line.get('code')}"


def _options(settings: Any) -> tuple[str, str]:
    """Return the names of scenario and strategy in settings, and the name and epsilon of the privacy mechanism."""
    if not isinstance(settings, Mapping):
        return "", ""
    options = settings.get("options")  # a node has names only
    if not isinstance(options, Mapping):
        options = {group: value.get("name") for group, value in settings.items() if isinstance(value, Mapping)}
    names = [str(options[group]) for group in ("scenario", "strategy") if options.get(group)]
    return " · ".join(names), str(options.get("privacy") or "")


def to_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None) -> str:
    """Return rows as CSV. Nested values are JSON; a text that a spreadsheet would execute starts with a quote."""
    names = [*(columns or dict.fromkeys(name for row in rows for name in row))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def format_event(line: Mapping[str, Any]) -> str:
    """Return a line of the log as text: time, event, person, run, and all further fields."""
    first = ("time", "event", "person", "run")
    rest = {name: value for name, value in line.items() if name not in (*first, "n", "prev", "hash")}
    parts = [f"{line['time'][:19]}Z", line["event"], str(line.get("person", "")), str(line.get("run", ""))]
    return "  ".join([*filter(None, parts), *(f"{name}={json.dumps(value)}" for name, value in rest.items())])


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per run."""
    table = Table(*TABLE_COLUMNS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_text(name, row.get(name)) for name in TABLE_COLUMNS))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    console.print(table if rows else "no run yet")


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("started", "ended"):
        return str(value)[:19].replace("T", " ")
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _print_verification(folder: Path, head: str, *, as_json: bool) -> int:
    result = verify(folder, head)
    if as_json:
        print_json({"head": str(result.head), "num_lines": result.head.count, "problems": [*result.problems]})
    else:
        for problem in result.problems[:100]:
            sys.stdout.write(f"{problem}\n")
        state = f"{len(result.problems)} problems" if result.problems else "intact"
        sys.stdout.write(f"{folder / AUDIT_FILE}: {state}, head {result.head}\n")
    return FAILED if result.problems else DONE


if __name__ == "__main__":
    sys.exit(main())
