"""Build the scenario and the strategy of a request at the node, if the node's policy accepts them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlearn.algorithm.strategy import Strategy
from fedlearn.algorithm.transforms import Stage
from fedlearn.core.records import ClientId, LocalSettings
from fedlearn.core.serialization import WireError
from fedlearn.deploy.node_side.data_files import DataFiles, recorded
from fedlearn.deploy.node_side.masking_keys import MaskingKeys
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.mechanisms.base import Mechanism, Population, none
from fedlearn.runner.instantiation import build
from fedlearn.runner.protection import protect_strategy
from fedlearn.runner.registry import parameter_types
from fedlearn.runner.user_code import add_metrics

MAX_CACHED = 8  # scenarios, strategies and other parts in the cache
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """The operator's settings of a node. No request can change them.

    Args:
        clients: ids of the clients of this node.
        data: folder with the data; None: the folders that the scenario searches.
        framework: ``torch`` or ``jax``; None: the framework of the request.
        device: device that trains, default ``cpu``.
        masking_keys: keys for secure aggregation; None: the node refuses secure aggregation.
    """

    clients: tuple[ClientId, ...]
    data: Path | None = None
    framework: str | None = None
    device: str = "cpu"
    masking_keys: MaskingKeys | None = None


class ExperimentBuilder:
    """Build scenarios and strategies from the settings of requests, and cache them.

    Args:
        config: the operator's settings.
        policy: policy that the settings of a request must satisfy.
    """

    def __init__(self, config: NodeConfig, policy: Policy) -> None:
        self.config, self.policy = config, policy
        self._built: dict[str, Any] = {}
        self._files = DataFiles(config.data)

    def scenario(self, settings: Mapping[str, Any]) -> Scenario:
        """Return the scenario of a request.

        Raises:
            PolicyViolation: The policy does not accept the settings.
            WireError: The settings do not build a scenario.
        """
        resolved = self.policy.check_settings(settings)
        scenario: Scenario = self._cached("scenario", self._with_operator_settings(resolved["scenario"]), Scenario)
        return add_metrics(scenario, resolved["metrics"], None, allow=self.policy.registry.modules)

    def forget_changed_data(self) -> None:
        """Remove all data from memory if a data file was changed, added or deleted. The next request reads them."""
        if changes := self._files.changes():
            log.warning("data files have changed: %s; the data are read again", ", ".join(changes[:10]))
            self._built.clear()
            self._files.forget()

    def data_digest(self) -> str:
        """Return a digest of the data files in use; empty without files. See `DataFiles.digest`."""
        return self._files.digest()

    def strategy(
        self, settings: Mapping[str, Any], scenario: Scenario, local: LocalSettings
    ) -> tuple[Strategy, LocalSettings]:
        """Return the strategy and the local settings of a request, with the privacy mechanism of its settings.

        The settings determine all further values. For example, the node ignores DP-SGD values in the local settings of
        the request, and uses the values of the privacy mechanism.

        Args:
            settings: settings of the request.
            scenario: scenario of the request.
            local: local settings of the request.

        Raises:
            PolicyViolation: The policy does not accept the settings.
            WireError: The settings do not build a strategy.
        """
        resolved = self.policy.check_settings(settings)
        mechanism, population = none(), Population(clients=(), rounds=1)
        if "privacy" in resolved:
            mechanism = self._cached("privacy", resolved["privacy"], Mechanism)
            numbers = dict(resolved["population"])  # `MaskedClients` counts the parties of each sum itself
            population = Population(clients=range(numbers.pop("num_clients")), **numbers)
        return protect_strategy(
            mechanism,
            self._cached("strategy", resolved["strategy"], Strategy),
            replace(local, example_dp=None),
            population,
            trainer=scenario.trainer,
            buffers=resolved["buffers"],
            compress=self._cached("compress", resolved["compress"], Stage) if "compress" in resolved else None,
        )

    def _with_operator_settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a scenario with the values that the operator chooses."""
        accepted = parameter_types(settings["_target_"])
        data = str(self.config.data) if self.config.data else None
        values: dict[str, Any] = {"path": data, "device": self.config.device, "deployed": True}
        values |= {"framework": self.config.framework} if self.config.framework else {}
        return {**settings, **{name: value for name, value in values.items() if name in accepted}}

    def _cached(self, group: str, settings: Mapping[str, Any], kind: type[Any]) -> Any:
        key = f"{group} {json.dumps(settings, sort_keys=True)}"
        if key not in self._built:
            before = self._files.versions() if group == "scenario" else {}
            with recorded() as opened:
                part = build(dict(settings), group, allow=self.policy.registry.modules)
            if not isinstance(part, kind):
                raise WireError(f"the {group} of this node is a {type(part).__name__}, expected a {kind.__name__}")
            while len(self._built) >= MAX_CACHED:
                del self._built[next(iter(self._built))]
            self._built[key] = part
            if group == "scenario":
                self._files.remember(before, opened)
        return self._built[key]
