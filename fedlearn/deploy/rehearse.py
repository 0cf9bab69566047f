"""Rehearse a deployment on this machine, for one run: ``python -m fedlearn.deploy.rehearse``.

The command creates temporary keys, starts a coordinator and nodes, and submits a run. All processes communicate over
the loopback interface, with TLS and node authentication. Only the run folder remains.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from fedlearn.core.command_line import command_parser, exit_code, take_settings, terminate_as_interrupt
from fedlearn.core.tasks import TASKS
from fedlearn.data.pretrained_files import find_pretrained
from fedlearn.deploy.client_ids import format_client_ids
from fedlearn.deploy.connectivity import free_port
from fedlearn.deploy.key_folders import create
from fedlearn.deploy.node_side.order_settings import option_name
from fedlearn.deploy.processes import GRACE_S, Child, Children, module_command, private_files
from fedlearn.deploy.proxies import LOCAL_HOSTS, exclude_from_proxies
from fedlearn.deploy.run_log import Follower
from fedlearn.deploy.submit import build_request, compose_job
from fedlearn.errors import is_count, require
from fedlearn.runner.builders import SCENARIO_GROUPS
from fedlearn.runner.compat import command_line_parser
from fedlearn.runner.compose import Job
from fedlearn.runner.conf_files import OPTION_GROUPS
from fedlearn.runner.instantiation import rebuild_scenario
from fedlearn.runner.named_settings import user_builders
from fedlearn.runner.registry import installed_registry
from fedlearn.runner.run_config import config_to_dict

DEFAULT_NUM_NODES = 2
START_TIMEOUT_S = 90.0  # seconds for each process to start
NOT_RESUMABLE = "(a rehearsal cannot be resumed, because its nodes have ended)"
SHORT_TIMEOUTS = {"engine.join_timeout": 60, "engine.deadline": 120}  # seconds; all processes are on one machine


class Rehearsal:
    """Start a coordinator and nodes on this machine, with temporary keys.

    Args:
        folder: folder for keys, logs and state; its path must be short enough for Unix sockets.
        runs: folder for run folders.
        clients: ids of the clients of each node.
        policy: policy of all nodes, as settings.
        data: folder with the data of all nodes; None: the folders that the scenario searches.

    Attributes:
        children: processes, by name.
        address: address of the coordinator, ``host:port``.
    """

    def __init__(
        self,
        folder: Path,
        runs: Path,
        clients: Sequence[Sequence[int]],
        policy: Mapping[str, Any],
        data: str | None = None,
    ) -> None:
        self.folder, self.runs, self.clients = folder.resolve(), runs.resolve(), clients
        self.keys, self.data = self.folder / "keys", data
        self.policy, self.builders = self.folder / "policy.yaml", self.folder / "builders.yaml"
        with private_files():
            self.policy.write_text(json.dumps(policy), encoding="utf-8")  # JSON is valid YAML
            self.builders.write_text(json.dumps(policy.get("builders", {})), encoding="utf-8")
        self.children: dict[str, Child] = {}
        self.address = f"localhost:{free_port()}"

    @private_files()
    def start(self, children: Children) -> None:
        """Create keys, start all processes, and wait until all of them are ready.

        Args:
            children: block that ends the processes.

        Raises:
            ChildError: A process ended, or was not ready within `START_TIMEOUT_S`.
        """
        names = node_names(len(self.clients))
        nodes = [f"{name}={format_client_ids(ids)}" for name, ids in zip(names, self.clients, strict=True)]
        create(self.keys, ["localhost", "127.0.0.1"], nodes, days=2)
        self._add(children, self._coordinator())
        for name, clients in zip(names, self.clients, strict=True):
            self._add(children, self._node(name, clients))
        for child in self.children.values():
            children.wait_for(partial(_ready, child), f"{child.name} is ready", timeout_s=START_TIMEOUT_S)

    def restart_exited(self) -> None:
        """Restart processes that ended, as an init system does.

        Raises:
            ChildError: A process ended too often within a short time.
        """
        for child in self.children.values():
            child.restart_if_ended()

    def follower(self, *, reconnect_timeout_s: float = 60.0) -> Follower:
        """Return a follower that submits runs to this coordinator and shows them."""
        return Follower(
            self.address,
            self.keys / "operator",
            reconnect_timeout_s,
            on_idle=self.restart_exited,
            resume_command=NOT_RESUMABLE,
        )

    def _add(self, children: Children, child: Child) -> None:
        self.children[child.name] = children.start(child)

    def _coordinator(self) -> Child:
        state, port = self.folder / "coordinator", self.address.rpartition(":")[2]
        command = [
            *module_command("fedlearn.deploy.coordinator"),
            *("--keys", str(self.keys / "coordinator"), "--state", str(state)),
            *("--runs", str(self.runs), "--port", port, "--builders", str(self.builders)),
        ]
        return Child("coordinator", command, self.folder / "coordinator.log", parent_death_signal=signal.SIGTERM)

    def _node(self, name: str, clients: Sequence[int]) -> Child:
        command = [
            *module_command("fedlearn.deploy.node"),
            *("--coordinator", self.address, "--keys", str(self.keys / "nodes" / name)),
            *("--state", str(self.folder / name), "--policy", str(self.policy)),
            *(argument for client in clients for argument in ("--client", str(client))),
            *(("--data", self.data) if self.data else ()),
        ]
        return Child(name, command, self.folder / f"{name}.log", parent_death_signal=signal.SIGTERM)


def _ready(child: Child) -> bool:
    return "\nready\n" in child.read_output()


def node_names(num_nodes: int) -> list[str]:
    """Return the names of the nodes of a rehearsal.

    >>> node_names(2)
    ['node0', 'node1']
    """
    return [f"node{number}" for number in range(num_nodes)]


def assign_clients(num_clients: int, num_nodes: int) -> list[list[int]]:
    """Return the clients of each node; node n gets the clients n, n + num_nodes, n + 2 * num_nodes and so on.

    >>> assign_clients(4, 3)
    [[0, 3], [1], [2]]
    """
    return [list(range(node, num_clients, num_nodes)) for node in range(num_nodes)]


def minimal_policy(settings: Mapping[str, Any], builders: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Return a policy that accepts only the options, the model and the partition of a submission.

    Args:
        settings: names of options and values.
        builders: group -> name of an option -> the user's builder.
    """
    scenario, strategy = settings["scenario"], settings["strategy"]
    bounds = {part: {"one_of": [option_name(scenario[part])]} for part in SCENARIO_GROUPS if part in scenario}
    accepted: dict[str, Any] = {}
    node = strategy
    while node is not None:
        accepted[option_name(node)] = {}
        node = node.get("rule") if isinstance(node, Mapping) else None
    policy = {"scenarios": {option_name(scenario): bounds}, "strategies": accepted, "max_rounds": 1_000_000}
    return {**policy, "builders": builders}


def name_pretrained_model(overrides: Sequence[str], settings: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Return the overrides with the name of a pretrained model in place of its path, and its folder by this name.

    Requests never name a folder of a node.
    """
    path = (settings.get("model") or {}).get("path") if isinstance(settings.get("model"), Mapping) else None
    if not isinstance(path, str):
        return list(overrides), {}
    files = find_pretrained(path, revision=settings["model"].get("revision"))
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", files.name).lstrip("_.-") or "model"
    kept = [word for word in overrides if word.partition("=")[0].lstrip("+") not in ("model.path", "model.revision")]
    return [*kept, f"model.path={name}"], {name: str(files.folder)}


def code_of_user(job: Job) -> dict[str, dict[str, str]]:
    """Return the user's own builders in the settings of a run, each under the name of its option file, or its own name.

    Args:
        job: composed settings, and the names of the chosen options.
    """
    registry, settings = installed_registry(), config_to_dict(job.cfg, resolve_callbacks=True)
    choices = dict(job.choices)
    for group in OPTION_GROUPS:
        target = (settings.get(group) or {}).get("_target_") if isinstance(settings.get(group), dict) else None
        is_named = choices.get(group) not in registry.builders[group] and choices.get(group) != "custom"
        if target and registry.name_of(group, target) is None and not is_named:
            choices[group] = f"my_{target.rpartition('.')[2]}"
    builders = user_builders(registry, settings, choices)
    if "scenario" in builders:
        task = rebuild_scenario(settings["scenario"], settings.get("allow_targets") or []).data.task.name
        builders |= {} if task in TASKS else {"task": {f"my_{task.rpartition('.')[2]}": task}}
    return builders


def rehearse(overrides: Sequence[str], *, keep: Path | None = None) -> int:
    """Run an experiment on a temporary federation of this machine, and return the exit code of the run.

    Args:
        overrides: overrides of a simulation, and ``num_nodes``, the number of nodes, default 2.
        keep: folder for keys, logs and state; None: a temporary folder.

    Raises:
        FedlearnError: An override is unknown, a setting is out of range, or a process does not start.
    """
    rehearsal_settings, overrides = take_settings(overrides, {"num_nodes": DEFAULT_NUM_NODES})
    num_nodes = rehearsal_settings.get("num_nodes", DEFAULT_NUM_NODES)
    require(is_count(num_nodes), "num_nodes", num_nodes, "a whole number >= 1", "num_nodes=4")
    overridden = {override.partition("=")[0] for override in overrides}
    defaults = {**SHORT_TIMEOUTS, "sites": f"[{','.join(node_names(num_nodes))}]"}
    job = compose_job([*overrides, *(f"{key}={value}" for key, value in defaults.items() if key not in overridden)])
    builders = code_of_user(job)
    settings = config_to_dict(job.cfg)
    named, models = name_pretrained_model(overrides, settings)
    if models:
        job = compose_job([*named, *(f"{key}={value}" for key, value in defaults.items() if key not in overridden)])
    request = build_request(job, installed_registry().with_builders(builders))
    num_clients = _num_clients(settings)
    expected = f"at most {num_clients}, because each node needs a client"
    require(num_nodes <= num_clients, "num_nodes", num_nodes, expected, f"num_nodes={num_clients}")
    rerun_command = shlex.join(["python", "-m", "fedlearn.deploy.rehearse", f"num_nodes={num_nodes}", *overrides])
    exclude_from_proxies(*LOCAL_HOSTS)
    with ExitStack() as stack:
        stack.enter_context(private_files())
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedlearn-")))
        folder.mkdir(parents=True, exist_ok=True)
        policy, path = minimal_policy(request["settings"], builders), settings["scenario"].get("path")
        policy["models"] = models
        rehearsal = Rehearsal(folder, Path("outputs"), assign_clients(num_clients, num_nodes), policy, path)
        rehearsal.start(stack.enter_context(Children(grace_s=2 * GRACE_S)))
        return rehearsal.follower().run({**request, "rerun_command": rerun_command})


def _num_clients(settings: Mapping[str, Any]) -> int:
    """Return the number of clients; the scenario is built if only its data determine this number."""
    scenario, allow = settings["scenario"], settings.get("allow_targets") or []
    num_clients = (scenario.get("partition") or {}).get("num_clients")
    return int(num_clients or len(rebuild_scenario(scenario, allow).data.clients))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code of the run."""
    parser = command_parser(
        "fedlearn.deploy.rehearse",
        "Rehearse a deployment on this machine: create keys, start coordinator and nodes, execute a run, clean up.",
        epilog="settings: num_nodes=4, and the settings of a simulation, see python -m simulations.run --help",
        passes_on=command_line_parser(),
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep keys, logs and state in this folder")

    def start() -> int:
        args, settings = parser.parse_known_args(argv)
        return rehearse(settings, keep=args.keep)

    terminate_as_interrupt()
    return exit_code(start)


if __name__ == "__main__":
    sys.exit(main())
