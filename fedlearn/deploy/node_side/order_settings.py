"""Resolve the settings of a request with the registry of the node, if its policy accepts them.

A request has names of options and plain values. Names, values and bounds are checked before the node builds anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.data.partition import PARTITIONS
from fedlearn.deploy.node_side.bounds import require_default_bounds, require_within
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.errors import SettingError
from fedlearn.runner.builders import setting_path
from fedlearn.runner.plain_values import require_plain, shortened
from fedlearn.runner.registry import NAME, PARTS, Registry, default_values, parameter_types

SETTING_GROUPS = ("scenario", "strategy", "privacy", "compress", "buffers", "population", "metrics")
MAX_METRICS = 20  # metrics of the user in a request
DEFAULT_PARTITIONS = ("natural",)  # these do not move rows between clients; other partitions need a bound in the policy
MAX_CLIENTS = 1_000_000  # clients of a population

Accepted = Mapping[str, Mapping[str, Any]]  # name of an option -> bounds of its settings


class OrderSettings:
    """Check and resolve the settings of requests.

    Args:
        registry: options that this node knows.
        scenarios: accepted scenarios, and bounds of their settings, of the model and of the partition.
        strategies: accepted strategies, and bounds of their settings.
        max_rounds: largest number of rounds of a run.
        models: name of a pretrained model in requests -> folder of this node.
    """

    def __init__(
        self,
        registry: Registry,
        scenarios: Accepted,
        strategies: Accepted,
        *,
        max_rounds: int,
        models: Mapping[str, str] | None = None,
    ) -> None:
        self.registry, self.scenarios, self.strategies = registry, scenarios, strategies
        self.max_rounds, self.models = max_rounds, models or {}

    def resolve(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a request with the builder of each option as ``_target_``.

        Raises:
            PolicyViolation: A name or a value is unknown, or the policy does not accept it. The error quotes only the
                first characters of a value in the request.
        """
        try:
            require_plain(order, "")
            return self._resolve(order)
        except SettingError as error:
            raise PolicyViolation(f"{error.setting} is {error.value}; this node accepts {error.expected}") from error

    def _resolve(self, order: Mapping[str, Any]) -> dict[str, Any]:
        for group, value in order.items():
            if group not in SETTING_GROUPS:
                raise PolicyViolation(f"{shortened(group)} is not a setting of a request")
            if group not in ("buffers", "metrics") and value is not None and not isinstance(value, str | dict):
                raise PolicyViolation(f"{group} is {shortened(value)}; this node accepts a name and values")
        resolved: dict[str, Any] = {
            "scenario": self._scenario(order.get("scenario")),
            "strategy": self._strategy(order.get("strategy"), "strategy"),
            "buffers": _buffers(order.get("buffers")),
            "metrics": self._metrics(order.get("metrics")),
        }
        for group in ("privacy", "compress"):
            if order.get(group):
                resolved[group] = self._option(group, order[group], {}, group)
        if "privacy" in resolved:
            _require_calibrated(resolved["privacy"])
            resolved["population"] = self._population(order.get("population"))
        return resolved

    def _metrics(self, names: Any) -> list[str]:
        """Return the dotted names of metrics that the operator has registered."""
        if names is not None and (not isinstance(names, list) or len(names) > MAX_METRICS):
            raise PolicyViolation(f"metrics is {shortened(names)}; this node accepts at most {MAX_METRICS} names")
        return [self.registry.target("metric", name, "metrics") for name in names or ()]

    def _scenario(self, chosen: Any) -> dict[str, Any]:
        bounds = self._accepted("scenario", chosen, self.scenarios, "scenario")
        bounds_of_scenario = {
            name: bound for name, bound in bounds.items() if name.partition(".")[0] not in ("model", "partition")
        }
        resolved = self._option("scenario", chosen, bounds_of_scenario, "scenario")
        parts = chosen if isinstance(chosen, dict) else {}
        partition = option_name(parts.get("partition"))
        if "partition" not in bounds and partition not in (None, *DEFAULT_PARTITIONS):
            accepted = ", ".join(DEFAULT_PARTITIONS)
            raise PolicyViolation(f"partition is {shortened(partition)}; this node accepts one of {accepted}")
        for part in ("model", "partition"):
            prefix = f"{part}."
            of_part = {name[len(prefix) :]: bound for name, bound in bounds.items() if name.startswith(prefix)}
            if part in bounds:
                require_within({part: option_name(parts.get(part))}, {part: bounds[part]}, "scenario")
            node = resolved.get(part)
            if isinstance(node, dict):
                _require_bounds(node, _applying(part, node, of_part), part)
                resolved[part] = self._with_folder(node) if part == "model" else node
            elif node is None:
                require_within({}, of_part, part)
        return resolved

    def _with_folder(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a model with the folder of the operator instead of the name in a request.

        Raises:
            PolicyViolation: The policy has no model with this name.
        """
        if "path" not in default_values(model["_target_"]):
            return dict(model)
        name = str(model.get("path"))
        if name not in self.models:
            known = ", ".join(self.models) or "no pretrained model"
            raise PolicyViolation(f"model.path is {shortened(name)}; this node accepts {known}")
        return {**model, "path": self.models[name], "revision": None}

    def _strategy(self, chosen: Any, setting: str) -> dict[str, Any]:
        """Return a strategy and the strategies inside it; the policy must accept each of them."""
        bounds = self._accepted("strategy", chosen, self.strategies, setting)
        if isinstance(chosen, dict) and chosen.get("rule") is not None:
            self._strategy(chosen["rule"], f"{setting}.rule")
        return self._option("strategy", chosen, bounds, setting)

    def _option(self, group: str, chosen: Any, bounds: Mapping[str, Any], setting: str) -> Any:
        resolved = self.registry.resolve(group, chosen, setting)
        named = {key: option_name(value) for key, value in (chosen.items() if isinstance(chosen, dict) else ())}
        parts = {key: named.get(key) for key in bounds if (group, key) in PARTS}
        _require_bounds(resolved, bounds, setting, parts)
        for (owner, key), part in PARTS.items():
            if owner == group and part not in ("model", "partition") and isinstance(resolved.get(key), dict):
                _require_bounds(resolved[key], {}, f"{setting}.{key}")
        return resolved

    def _accepted(self, group: str, chosen: Any, accepted: Accepted, setting: str) -> Mapping[str, Any]:
        name = option_name(chosen)
        if not isinstance(name, str) or name not in accepted:
            known = ", ".join(accepted) or "none"
            raise PolicyViolation(f"{setting} {shortened(name)} is not accepted; this node accepts {known}")
        return accepted[name]

    def _population(self, population: Any) -> dict[str, int]:
        limits = {"num_clients": MAX_CLIENTS, "rounds": self.max_rounds, "num_parties": MAX_CLIENTS}
        given = population if isinstance(population, dict) else {}
        named = {name: value for name, value in given.items() if value is not None}
        if not {"num_clients", "rounds"} <= named.keys() <= limits.keys():
            raise PolicyViolation(f"population is {shortened(population)}; this node accepts num_clients and rounds")
        for name, value in named.items():
            if type(value) is not int or not 1 <= value <= limits[name]:
                raise PolicyViolation(f"population.{name} is {shortened(value)}; this node accepts 1 to {limits[name]}")
        return named


def option_name(chosen: Any) -> Any:
    """Return the name of an option in a request: the value itself, or its ``name``.

    >>> option_name({"name": "dirichlet", "alpha": 0.1}), option_name("mlp")
    ('dirichlet', 'mlp')
    """
    return chosen.get(NAME) if isinstance(chosen, dict) else chosen


def _require_bounds(
    resolved: Mapping[str, Any], bounds: Mapping[str, Any], setting: str, parts: Mapping[str, Any] | None = None
) -> None:
    """Check the values of an option; its defaults count for the settings that the request leaves out."""
    values = {**default_values(resolved["_target_"]), **resolved, **(parts or {})}
    require_within(values, bounds, setting)
    require_default_bounds({key: value for key, value in resolved.items() if key != "_target_"}, bounds, setting)


def _applying(part: str, node: Mapping[str, Any], bounds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bounds of the settings that this kind of partition has; the others do not apply."""
    is_installed = any(node["_target_"].endswith(f".{kind.__name__}") for kind in PARTITIONS.values())
    if part != "partition" or not is_installed:
        return dict(bounds)
    return {name: bound for name, bound in bounds.items() if name in parameter_types(node["_target_"])}


def _buffers(buffers: Any) -> str:
    if buffers is not None and not isinstance(buffers, str):
        raise PolicyViolation(f"buffers is {shortened(buffers)}; this node accepts refuse, average or local")
    return buffers or "refuse"


def _require_calibrated(privacy: Mapping[str, Any]) -> None:
    """Refuse a mechanism that the node would have to calibrate, which takes long."""
    parameters = parameter_types(privacy["_target_"])
    if "epsilon" in parameters and privacy.get("epsilon") is not None:
        setting = setting_path("privacy", "epsilon")
        raise PolicyViolation(f"{setting} is {privacy['epsilon']}; this node accepts a calibrated noise_multiplier")
