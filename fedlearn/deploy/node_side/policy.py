"""Read and enforce the policy of a node, a file of its operator that no request can change.

``python -m fedlearn.deploy.node_side.policy`` prints an example.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fedlearn.core.command_line import DONE, command_parser, run_command
from fedlearn.core.records import LocalSettings, Request
from fedlearn.deploy.node_side.bounds import check_bounds, require_local_within
from fedlearn.deploy.node_side.order_settings import OrderSettings, option_name
from fedlearn.deploy.node_side.policy_violation import PolicyViolation
from fedlearn.deploy.node_side.query_log import EvaluationLimits
from fedlearn.deploy.node_side.required_privacy import RequiredPrivacy
from fedlearn.deploy.node_side.reveal import Reveal
from fedlearn.errors import FedlearnError, SettingError, did_you_mean, is_count, require
from fedlearn.runner.registry import FILE_NAME, Registry, installed_registry
from fedlearn.runner.renames import new_name

RENAMED_KEYS = {  # names in policies of earlier versions -> present names
    "allow_targets": "builders",
    "protection": "required_privacy",
    "max_rounds_in_all": "max_rounds_total",
    "required_privacy.min_sum": "min_nodes_in_sum",
    "required_privacy.min_clients_in_sum": "min_nodes_in_sum",
}

EVALUATIONS_PER_ROUND = 10  # evaluations of all runs per round of max_rounds, if the policy has no other limit

EXAMPLE_POLICY = """\
# Policy of this node. The node refuses all other requests; node and coordinator both log the reason.
# Bounds of settings: {name: [low, high]} is a range, {name: {one_of: [...]}} a choice. {} keeps the default bounds.
scenarios: # names of installed options, or of builders below
  heart: {model: {one_of: [mlp, linear]}, partition: {one_of: [natural]}}
strategies:
  fedavg: {}
  fedprox: {mu: [0, 10]}
  fedadam: {}
models: {} # folders of pretrained models, by the names that requests use in model.path, e.g. {bert: /srv/models/bert}
builders: {} # your own code, by the names that requests use, e.g. {strategy: {median: my_code.median}}
local: # settings of local training; a setting without a bound has a default bound
  epochs: [1, 5]
  batch_size: [8, 512] # small batches reveal more about single examples
max_rounds: 200 # training requests of one run, repeated requests included
max_rounds_total: null # training requests of all runs; this node counts them on its disk
max_evaluations_total: null # evaluated models of all runs; null: max_rounds_total, or 10 times max_rounds
max_scenarios: 200 # different scenario settings for which this node answers, over all runs
required_privacy:
  minimum: none # or example: DP-SGD; local: clipping and noise at this node; secagg: updates leave with a mask
  max_clip: null # largest clip norm of the mechanism in minimum, e.g. 1.0
  min_noise_multiplier: null # smallest noise multiplier of this mechanism, e.g. 0.8
  min_nodes_in_sum: 2 # smallest number of nodes in a masked sum; several clients of a node count once
  max_colluding_nodes: 1 # number of other nodes in a sum that may help a cheating coordinator
  max_epsilon: null # largest privacy loss of a client over all runs, e.g. 5; the ledger is on this node's disk
  delta: 1.0e-5 # delta of max_epsilon
reveal:
  num_examples: exact # or rounded (to one digit), or none (only for strategies that weight clients equally)
  metrics: null # true: exact evaluation metrics; noised: with noise; false: none; null: none if privacy is required
  metrics_epsilon: 0.1 # privacy loss of one evaluation with noised, which the ledger of this node pays for
  min_test_examples: 10 # smallest number of held-out examples of a client whose exact metrics leave
"""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The policy of a node. `EXAMPLE_POLICY` describes the attributes, which are the keys of the file.

    Raises:
        SettingError: A key is unknown, or a value is out of range.
        FedlearnError: A bound has an old name.
    """

    scenarios: Mapping[str, Mapping[str, Any]]
    strategies: Mapping[str, Mapping[str, Any]]
    local: Mapping[str, Any] = field(default_factory=dict)
    max_rounds: int = 200
    max_rounds_total: int | None = None
    max_evaluations_total: int | None = None
    max_scenarios: int = 200
    required_privacy: RequiredPrivacy = field(default_factory=RequiredPrivacy)
    reveal: Reveal = field(default_factory=Reveal)
    builders: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        registry = self.registry  # refuses builders with invalid names
        for key, group in (("scenarios", "scenario"), ("strategies", "strategy")):
            accepted = getattr(self, key)
            is_valid = isinstance(accepted, Mapping) and all(isinstance(b, Mapping) for b in accepted.values())
            fix = f"{key}: {{{next(iter(registry.builders[group]))}: {{}}}}"
            require(is_valid, key, accepted, "a mapping of options to the bounds of their settings", fix)
            for name, bounds in accepted.items():
                _require_option(registry, group, name, f"{key}.{name}")
                check_bounds(bounds, f"{key}.{name}")
        for name, bounds in self.scenarios.items():
            _refuse_old_bounds(name, bounds)
        _require_models(self.models)
        check_bounds(self.local, "local")
        _refuse_unknown(self.local, [*asdict(LocalSettings())], "local")
        require(is_count(self.max_rounds), "max_rounds", self.max_rounds, "a whole number >= 1", "max_rounds: 200")
        total = self.max_rounds_total
        is_valid = total is None or is_count(total)
        require(is_valid, "max_rounds_total", total, "null, or a whole number >= 1", "max_rounds_total: 1000")
        total = self.max_evaluations_total
        is_valid = total is None or is_count(total)
        require(is_valid, "max_evaluations_total", total, "null, or a whole number >= 1", "max_evaluations_total: 1000")
        number = self.max_scenarios
        require(is_count(number), "max_scenarios", number, "a whole number >= 1", "max_scenarios: 200")

    @property
    def metrics(self) -> bool | str:
        """Evaluation metrics that may leave: True for exact metrics, ``noised``, or False for none."""
        if self.reveal.metrics is None:
            return self.required_privacy.minimum == "none"
        return self.reveal.metrics

    @property
    def evaluation_limits(self) -> EvaluationLimits:
        """Largest numbers of evaluations of one run, and of all runs."""
        total = self.max_evaluations_total or self.max_rounds_total or EVALUATIONS_PER_ROUND * self.max_rounds
        return EvaluationLimits(of_run=self.max_rounds, total=total)

    @cached_property
    def registry(self) -> Registry:
        """The options that requests may name: the installed options and the builders of the operator."""
        return installed_registry().with_builders(self.builders)

    def check_settings(self, request_settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a request with the builders of their options, if the policy accepts all of them.

        Args:
            request_settings: ``scenario`` and ``strategy`` of the request, and optionally ``privacy``, ``compress``,
                ``buffers`` and ``population``. Options have names and values.

        Raises:
            PolicyViolation: A name or a value is unknown, the policy does not list an option, or a setting is outside
                its bounds.
        """
        order = OrderSettings(
            self.registry, self.scenarios, self.strategies, max_rounds=self.max_rounds, models=self.models
        )
        resolved = order.resolve(request_settings)
        kind = option_name(request_settings.get("privacy"))
        if kind == "example" and self.reveal.num_examples != "exact":
            raise PolicyViolation(
                "privacy=example needs the exact number of examples, but this node has reveal.num_examples="
                f"{self.reveal.num_examples}; try another privacy mechanism"
            )
        if self.reveal.num_examples == "none" and resolved["strategy"].get("weighting", "examples") != "equal":
            raise PolicyViolation(
                "the strategy weights clients by their number of examples, but this node has "
                "reveal.num_examples=none; try strategy.weighting=equal"
            )
        return resolved

    def check_request(
        self,
        request: Request,
        request_settings: Mapping[str, Any],
        *,
        num_requests_of_run: int,
        num_requests_total: int,
    ) -> None:
        """Refuse a training request that the policy does not accept.

        Args:
            request: the training request.
            request_settings: its settings.
            num_requests_of_run: number of accepted training requests of this run so far, >= 0.
            num_requests_total: number of accepted training requests of all runs so far, >= 0.

        Raises:
            PolicyViolation: A local setting is outside its bounds, the privacy is less than required, or the number of
                training requests has reached its limit.
        """
        require_local_within(asdict(request.local), self.local)
        self.required_privacy.check(request.local, request_settings.get("privacy") or {})
        if num_requests_of_run >= self.max_rounds:
            limit = f"max_rounds={self.max_rounds}"
            raise PolicyViolation(
                f"this node has trained {num_requests_of_run} rounds of this run; its limit is {limit}"
            )
        if self.max_rounds_total is not None and num_requests_total >= self.max_rounds_total:
            limit = f"max_rounds_total={self.max_rounds_total}"
            raise PolicyViolation(
                f"this node has trained {num_requests_total} rounds of all runs; its limit is {limit}"
            )


def _require_models(models: Any) -> None:
    """Refuse models that are no mapping of names to absolute paths of folders."""
    fix, expected = "models: {bert: /srv/models/bert}", "a mapping of names to absolute paths of folders"
    is_mapping = isinstance(models, Mapping) and all(isinstance(folder, str) for folder in models.values())
    require(is_mapping, "models", models, expected, fix)
    for name, folder in models.items():
        is_name = isinstance(name, str) and FILE_NAME.fullmatch(name) is not None
        require(is_name, f"models.{name}", folder, "a name of letters, digits, -, _ and .", fix)
        require(Path(folder).is_absolute(), f"models.{name}", folder, "an absolute path of a folder", fix)


def read_policy(path: Path) -> Policy:
    """Read a policy from a YAML file.

    Raises:
        FedlearnError: The file cannot be read, or is not a policy.
    """
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        fix = "python -m fedlearn.deploy.node_side.policy > policy.yaml"
        raise FedlearnError(f"the policy {path} cannot be read: {error}\n  try       {fix}") from error
    example = "python -m fedlearn.deploy.node_side.policy > policy.yaml"
    if not isinstance(content, dict):
        raise FedlearnError(f"the policy {path} has no settings\n  try       {example}")
    _refuse_unknown(content, list(Policy.__dataclass_fields__), "")
    missing = [name for name in ("scenarios", "strategies") if name not in content]
    if missing:
        raise FedlearnError(f"the policy {path} has no {' and no '.join(missing)}\n  try       {example}")
    for name, kind in (("required_privacy", RequiredPrivacy), ("reveal", Reveal)):
        settings = content.get(name) or {}
        _refuse_unknown(settings, list(kind.__dataclass_fields__), name)
        content[name] = kind(**settings)
    return Policy(**content)


def _require_option(registry: Registry, group: str, name: Any, setting: str) -> None:
    """Refuse a name that no option has; name the option if it is the dotted name of its builder."""
    if name in registry.builders[group]:
        return
    known = list(registry.builders[group])
    near = registry.name_of(group, name) or did_you_mean(str(name), known)
    fix = f"{near}: {{}}" if near else f"builders: {{{group}: {{mine: {name}}}}}"
    raise SettingError(setting, "not the name of an option", f"one of {', '.join(known)}", fix)


def _refuse_old_bounds(scenario: str, bounds: Mapping[str, Any]) -> None:
    for name in bounds:
        new = new_name(f"scenario.{name}")
        if new and new != name:
            raise FedlearnError(
                f"scenarios.{scenario}.{name} has the new name {new}\n  advice    write {new} in its place"
            )


def _refuse_unknown(settings: Mapping[str, Any], known: Sequence[str], group: str) -> None:
    for key, value in settings.items():
        if key not in known:
            name = f"{group}.{key}" if group else str(key)
            if name in RENAMED_KEYS:
                raise FedlearnError(
                    f"{name} has the new name {RENAMED_KEYS[name]}\n  advice    write {RENAMED_KEYS[name]} in its place"
                )
            near = did_you_mean(str(key), known) or known[0]
            raise SettingError(name, value, f"one of {', '.join(known)}", f"write {near} in place of {key}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print an example of a policy, and return the exit code."""
    parser = command_parser("fedlearn.deploy.node_side.policy", "Print an example of a policy, to edit for a node.")
    return run_command(parser, _print_example, argv)


def _print_example() -> int:
    sys.stdout.write(EXAMPLE_POLICY)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
