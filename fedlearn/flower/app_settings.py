"""Read the settings of a Flower app: its configuration, its federation, and the configuration of its nodes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlearn.core.command_line import take_settings
from fedlearn.errors import is_count, is_number, require

DEFAULT_NUM_NODES = 2  # as in Flower
NUM_SUPERNODES = "num-supernodes"  # Flower's name of the number of nodes
NODE_CONFIG = "node_config."
FIXED_NODE_CONFIG = ("partition-id", "num-partitions")
USAGE = "python -m fedlearn.flower.run path/to/app num_nodes=100"
NUM_CPUS = "options.backend.client-resources.num-cpus"  # Flower's name of the cores of a client
COMMAND_SETTINGS = {
    "num_nodes": DEFAULT_NUM_NODES,
    "workers": 1,
    "max_failures": 0.0,
    "federation": "local-simulation",
}


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The settings of a run of a Flower app.

    Attributes:
        num_nodes: number of nodes; None: the number of the app's federation, or 2.
        workers: number of processes that run clients; None: the number that fits the app's federation, or 1.
        max_failures: share of the messages that may end with an error, in [0, 1].
        federation: name of a federation of the app; empty for its default.
        node_config: configuration of each node.
        app: new values of the app's configuration.
    """

    num_nodes: int | None = None
    workers: int | None = None
    max_failures: float = 0.0
    federation: str = ""
    node_config: Mapping[str, Any] = field(default_factory=dict)
    app: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Federation:
    """The federation of an app, from ``[tool.flwr.federations]``.

    Attributes:
        num_nodes: number of nodes; None if the app does not give it.
        num_cpus: cores of a client, > 0; None if the app does not give them.
        unused: names of options without effect, because all nodes are in this process.
    """

    num_nodes: int | None = None
    unused: tuple[str, ...] = ()
    num_cpus: float | None = None


def parse_settings(settings: Sequence[str]) -> RunSettings:
    """Parse settings as typed. Values are TOML or plain text.

    Args:
        settings: ``num_nodes=N``, ``workers=N``, ``max_failures=SHARE``, ``federation=NAME``,
            ``node_config.NAME=VALUE``, and settings of the app.

    Raises:
        SettingError: a setting has no ``=``, or a value is out of range.
    """
    node_words = [word for word in settings if word.startswith(NODE_CONFIG)]
    ours, others = take_settings([word for word in settings if word not in node_words], COMMAND_SETTINGS)
    num_nodes, max_failures = ours.get("num_nodes"), ours.get("max_failures", 0.0)
    require(num_nodes is None or is_count(num_nodes), "num_nodes", num_nodes, "a whole number >= 1", "num_nodes=10")
    workers = ours.get("workers")
    require(workers is None or is_count(workers), "workers", workers, "a whole number >= 1", "workers=2")
    is_share = is_number(max_failures, at_least=0) and max_failures <= 1
    require(is_share, "max_failures", max_failures, "a share of the messages, 0 to 1", "max_failures=0.5")
    node_config = {name.removeprefix(NODE_CONFIG): value for name, value in map(_parse, node_words)}
    for name in FIXED_NODE_CONFIG:
        expected = "another name, because each node has its own number"
        fix = "node_config.dataset-path=parts"
        require(name not in node_config, f"{NODE_CONFIG}{name}", node_config.get(name), expected, fix)
    return RunSettings(
        num_nodes=num_nodes,
        workers=workers,
        max_failures=max_failures,
        federation=ours.get("federation", ""),
        node_config=node_config,
        app=dict(map(_parse, others)),
    )


def read_federation(flwr: Mapping[str, Any], name: str = "") -> Federation:
    """Return the federation of an app.

    Args:
        flwr: table ``[tool.flwr]`` of its pyproject.toml.
        name: name of the federation; empty for the default.

    Raises:
        SettingError: the app has no federation of this name, or its number of nodes is invalid.
    """
    tables = flwr.get("federations")
    tables = tables if isinstance(tables, Mapping) else {}
    known = [each for each, table in tables.items() if isinstance(table, Mapping)]
    chosen = name or str(tables.get("default", ""))
    expected = f"a federation of the app: {', '.join(known) or 'the app has none'}"
    fix = f"federation={known[0]}" if known else "num_nodes=10"
    require(not name or name in known, "federation", name, expected, fix)
    table = tables.get(chosen)
    options = flatten(table) if isinstance(table, Mapping) else {}
    number = options.pop(f"options.{NUM_SUPERNODES}", None)
    if number is not None:
        setting = f"federations.{chosen}.options.{NUM_SUPERNODES}"
        require(is_count(number), setting, number, "a whole number >= 1", "num_nodes=10")
    num_cpus = options.pop(NUM_CPUS, None)
    if num_cpus is not None:
        setting, expected = f"federations.{chosen}.{NUM_CPUS}", "a number of cores > 0"
        require(is_number(num_cpus, at_least=0) and num_cpus > 0, setting, num_cpus, expected, "workers=1")
    return Federation(number, tuple(sorted(options)), num_cpus)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables into one, with names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _parse(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    require(bool(key and equals), word, "not a setting", "key=value", USAGE)
    require(key != NUM_SUPERNODES, key, text, "num_nodes, the name of this setting here", f"num_nodes={text}")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text
