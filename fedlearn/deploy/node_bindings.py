"""Read and write the client ids and the weights that the coordinator accepts from each node.

The file ``nodes.yaml`` in the coordinator's folder of keys has a line per node, for example::

    north: {"clients": "0-2", "max_examples": 5000}

A node in this file may describe these clients only, each with at most ``max_examples`` training examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.records import ClientId
from fedlearn.deploy.client_ids import format_client_ids, parse_client_ids
from fedlearn.errors import FedlearnError, is_count, require

BINDINGS = "nodes.yaml"
DEFAULT_MAX_EXAMPLES = 1_000_000  # training examples of a client, without another number in the file


class BindingError(FedlearnError):
    """Report client ids of nodes that are malformed or overlap."""


@dataclass(frozen=True, kw_only=True)
class NodeBinding:
    """The clients of a node that the coordinator accepts.

    Args:
        clients: ids, ascending.
        max_examples: largest number of training examples of a client, >= 1.
    """

    clients: tuple[ClientId, ...]
    max_examples: int = DEFAULT_MAX_EXAMPLES

    def __str__(self) -> str:
        return f"clients {format_client_ids(self.clients)}, at most {self.max_examples} examples each"


def parse_node(text: str) -> tuple[str, NodeBinding | None]:
    """Return name and binding of a node from the command line.

    >>> parse_node("north=0-2:5000")
    ('north', NodeBinding(clients=(0, 1, 2), max_examples=5000))
    >>> parse_node("south")
    ('south', None)

    Raises:
        SettingError: The name, the ids or the number of examples are malformed.
    """
    name, equals, rest = text.partition("=")
    is_valid = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None
    require(is_valid, "--nodes", text, "letters, digits, - _ and .", "--nodes cleveland budapest")
    if not equals:
        return name, None
    ids, _, limit = rest.partition(":")
    try:
        binding = _binding({"clients": ids, "max_examples": int(limit or DEFAULT_MAX_EXAMPLES)})
    except ValueError as error:
        expected = f"NAME=IDS or NAME=IDS:MAX_EXAMPLES ({error})"
        require(False, "--nodes", text, expected, f"--nodes {name}=0-2")
    return name, binding


def read_bindings(path: Path) -> dict[str, NodeBinding]:
    """Return the binding of each node in a file; no binding if there is no file.

    Raises:
        BindingError: The file is malformed, or two nodes have the same client.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        bindings = {str(name): _binding(values) for name, values in (content or {}).items()}
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        expected = 'lines such as north: {"clients": "0-2", "max_examples": 5000}'
        raise BindingError(f"{path} cannot be read: {error}\n  expected  {expected}") from error
    check_distinct(bindings)
    return bindings


def write_bindings(path: Path, bindings: Mapping[str, NodeBinding]) -> None:
    """Write the bindings of nodes to a file that `read_bindings` reads."""
    values = {
        name: {"clients": format_client_ids(binding.clients), "max_examples": binding.max_examples}
        for name, binding in bindings.items()
    }
    write_atomically(path, "".join(f"{name}: {json.dumps(value)}\n" for name, value in sorted(values.items())))


def check_distinct(bindings: Mapping[str, NodeBinding]) -> None:
    """Refuse two nodes with the same client.

    Raises:
        BindingError: Two nodes have the same client.
    """
    node_of: dict[ClientId, str] = {}
    for name, binding in bindings.items():
        for client in binding.clients:
            if node_of.setdefault(client, name) != name:
                raise BindingError(f"nodes {node_of[client]} and {name} both have client {client}")


def _binding(values: Any) -> NodeBinding:
    unknown = set(values) - {"clients", "max_examples"}
    limit = values.get("max_examples", DEFAULT_MAX_EXAMPLES)
    if unknown or not is_count(limit):
        raise ValueError(f"unknown keys {sorted(unknown)}" if unknown else f"max_examples is {limit!r}")
    return NodeBinding(clients=parse_client_ids(str(values.get("clients", ""))), max_examples=limit)
