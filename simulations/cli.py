"""``fedlearn COMMAND ...``: the console command. Each command is a module, which ``python -m`` can start too.

The list of commands imports neither fedlearn nor a framework. It has module names as text, so that this package does
not import `fedlearn.deploy`.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping, Sequence

COMMANDS: Mapping[str, Mapping[str, tuple[str, str]]] = {  # title -> command -> module, description
    "Experiments": {
        "run": ("simulations.run", "run one experiment, or a sweep of experiments"),
        "resume": ("simulations.resume", "resume a run that was stopped"),
        "tune": ("simulations.tune", "search for good values of settings with Optuna"),
        "compare": ("simulations.compare", "compare settings over seeds, from the folders of runs"),
        "report": ("simulations.report", "write the report of a run again"),
        "watch": ("simulations.watch", "show the runs in a folder on a live page"),
        "results": ("simulations.results", "run published experiments, and write the page that compares the results"),
        "robustness": ("simulations.robustness", "train with each aggregation rule under each attack"),
        "data": ("simulations.data", "check files before training; list, download and verify data sets"),
    },
    "Models": {
        "predict": ("simulations.predict", "predict new examples with the model of a run"),
        "export": ("simulations.export", "export the model of a run, e.g. as ONNX or as an adapter of peft"),
        "generate": ("simulations.generate", "write text with the language model of a run"),
    },
    "Privacy": {
        "privacy calculator": ("fedlearn.privacy.calculator", "plan noise, rounds or epsilon without a run"),
        "audit": ("simulations.audit", "measure a lower bound on epsilon, and compare it with the claim"),
        "privacy-attack": ("simulations.privacy_attack", "measure how much the updates of clients reveal"),
        "privacy-utility": ("simulations.privacy_utility", "draw the main metric of a sweep against epsilon"),
    },
    "Deployment": {
        "deploy rehearse": ("fedlearn.deploy.rehearse", "rehearse a whole deployment on this machine"),
        "deploy keys": ("fedlearn.deploy.keys", "create and renew keys; admit and revoke nodes"),
        "deploy coordinator": ("fedlearn.deploy.coordinator", "run the coordinator"),
        "deploy node": ("fedlearn.deploy.node", "run a node with its data"),
        "deploy trainer": ("fedlearn.deploy.trainer", "run the trainer of a node apart"),
        "deploy check": ("fedlearn.deploy.check", "check that a coordinator, a node or a trainer works"),
        "deploy policy": ("fedlearn.deploy.node_side.policy", "print an example of a node's policy"),
        "deploy submit": ("fedlearn.deploy.submit", "run, resume or follow an experiment at the nodes"),
        "deploy status": ("fedlearn.deploy.status", "show the nodes and runs of a federation"),
        "deploy cancel": ("fedlearn.deploy.cancel", "stop a run after its round"),
        "deploy runs": ("fedlearn.deploy.runs", "list the runs of a federation"),
        "deploy logs": ("fedlearn.deploy.logs", "show the output of a run, and follow it"),
        "deploy fetch": ("fedlearn.deploy.fetch", "download report, model and metrics of a run"),
        "deploy history": ("fedlearn.deploy.history", "show and verify the audit log of a coordinator or a node"),
    },
    "Shell": {
        "completion": ("simulations.completion", "print a script that completes commands and settings"),
    },
    "Flower": {
        "flower run": ("fedlearn.flower.run", "run a Flower app in this process, without Ray"),
    },
}
MODULES = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Start a command. Return 0 for the list of commands, 2 for an unknown command, else its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    group = arguments[0] if arguments and any(name.startswith(f"{arguments[0]} ") for name in MODULES) else ""
    rest = arguments[1:] if group else arguments
    if not rest or rest[0] in HELP:
        sys.stdout.write(overview(group))
        return 0
    name = f"{group} {rest[0]}".strip()
    if name in MODULES:
        return _start(MODULES[name], rest[1:])
    return _show_version() if name == "--version" else _refuse(name, group)


def overview(group: str = "") -> str:
    """Return the list of all commands, or of the commands of a group such as ``deploy``."""
    lines = ["usage: fedlearn COMMAND [--option ...] [setting=value ...]"]
    width = max(map(len, MODULES))
    for title, commands in COMMANDS.items():
        chosen = {name: text for name, (_, text) in commands.items() if name.startswith(f"{group} ".lstrip())}
        lines += ["", title, *(f"  {name:<{width}}  {text}" for name, text in chosen.items())] if chosen else []
    return "\n".join([*lines, "", "fedlearn COMMAND --help shows the options and settings of a command.", ""])


def _start(module: str, arguments: Sequence[str]) -> int:
    """Run a module in this process, as ``python -m`` does, but with the working folder last on the import path."""
    from fedlearn.core.command_line import exit_code
    from fedlearn.core.import_path import search_working_folder_last

    search_working_folder_last()
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        return exit_code(lambda: _run(module))
    finally:
        sys.argv = before


def _run(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise  # Python prints the text
        return end.code or 0
    return 0


def _show_version() -> int:
    from fedlearn.core.command_line import VERSION_LINE

    sys.stdout.write(f"{VERSION_LINE}\n")
    return 0


def _refuse(typed: str, group: str) -> int:
    from fedlearn.errors import did_you_mean

    prefix = f"{group} ".lstrip()
    known = {name.removeprefix(prefix): name for name in MODULES if name.startswith(prefix)}
    kind = "an option" if typed.startswith("-") else "a command"
    near = known.get(did_you_mean(typed.removeprefix(prefix), known, cutoff=0.6) or "", f"{prefix}--help")
    near = f"run {typed}" if "=" in typed else near
    names = ", ".join(known.values())
    sys.stderr.write(f"{typed} is not {kind}\n  expected  one of {names}\n  try       fedlearn {near}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
