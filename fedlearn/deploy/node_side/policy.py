"""What a node accepts: the operator's own file, which no order of a coordinator can widen.

``python -m fedlearn.deploy.node_side.policy`` prints an example to start from.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import floor, log10
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from fedlearn.core.command_line import DONE, command_parser, run_command
from fedlearn.core.records import LocalSettings, Request
from fedlearn.deploy.node_side.scenario_policy import (
    bounded_settings,
    interpolation,
    nested_code_problem,
    refuse_old_bounds,
    scenario_problem,
)
from fedlearn.errors import FedlearnError, SettingError, did_you_mean, is_count, is_number, require
from fedlearn.runner.builders import setting_path

PRIVACY_LEVELS = ("none", "example", "local", "secagg")
REQUIRED_MECHANISMS = {
    "local": (("local",), "without noise of their own"),
    "secagg": (("secagg", "distributed"), "unmasked"),
}
MECHANISM_PREFIX = "fedlearn.privacy.mechanisms."
STRATEGY_PARTS = ("fedlearn.algorithm.", "flwr.serverapp.strategy.")  # may stand below an accepted strategy
CODEC_PREFIX = "fedlearn.compression.codecs."
RENAMED_KEYS = {  # of policies of earlier versions
    "protection": "required_privacy",
    "max_rounds_in_all": "max_rounds_total",
    "required_privacy.min_sum": "min_clients_in_sum",
}
COUNT_PRECISIONS = ("exact", "rounded", "none")

EXAMPLE_POLICY = """\
# What this node accepts. An order outside is refused; node and coordinator both log the reason.
# Bounds of settings: {} accepts any value, {name: [low, high]} a range, {name: {one_of: [...]}} a choice.
scenarios:
  simulations.scenarios.heart.heart: {model: {one_of: [mlp, linear]}, partition: {one_of: [natural]}}
strategies:
  strategies.fedavg: {}
  strategies.fedprox: {mu: [0, 10]}
  strategies.fedadam: {}
local: # of training at this node; what is not named here may have any value
  epochs: [1, 5]
  batch_size: [8, 512] # small batches tell more about single examples
max_rounds: 200 # training orders of one run, repeated ones included
max_rounds_total: null # of all runs together, counted on this node's disk
required_privacy:
  minimum: none # or example: training is DP-SGD; local: updates leave with noise enough for one alone; secagg: masked
  max_clip: null # of the minimum, e.g. 1.0
  min_noise_multiplier: null # of the minimum, e.g. 0.8
  min_clients_in_sum: 2 # the fewest clients in a masked sum that this node takes part in
  max_epsilon: null # of a client of this node, in all runs together, e.g. 5; the ledger is on this node's disk
  delta: 1.0e-5 # of max_epsilon
reveal:
  num_examples: exact # or rounded (to one digit), or none (then only strategies that weight clients equally)
  metrics: true # whether evaluation metrics (sums and own values, never predictions or labels) may leave
  min_test_examples: 10 # and from how many held-out examples on
allow_targets: [] # modules besides fedlearn, strategies and simulations whose builders an order may name
"""


class PolicyViolation(FedlearnError):
    """An order that this node's policy does not accept: what was asked, and what is accepted."""


@dataclass(frozen=True, kw_only=True)
class RequiredPrivacy:
    """The least protection of the node's examples.

    Args:
        minimum: ``none``; ``example`` for DP-SGD in the trainer; ``local`` for updates that are clipped and noised at
            the node; ``secagg`` for updates that leave masked (privacy=secagg or distributed). These protect from the
            coordinator as well, so that a node need not believe what it says.
        max_clip: the largest clip bound of that mechanism, or None.
        min_noise_multiplier: its smallest noise multiplier, or None.
        min_clients_in_sum: the fewest clients in a masked sum that this node takes part in, >= 2.
        max_epsilon: what a client of this node may spend on it in all runs together, or None.
        delta: of ``max_epsilon``, in (0, 1).
    """

    minimum: str = "none"
    max_clip: float | None = None
    min_noise_multiplier: float | None = None
    min_clients_in_sum: int = 2
    max_epsilon: float | None = None
    delta: float = 1e-5

    def __post_init__(self) -> None:
        expected = f"one of {', '.join(PRIVACY_LEVELS)}"
        require(self.minimum in PRIVACY_LEVELS, "required_privacy.minimum", self.minimum, expected, "minimum: example")
        inside = is_number(self.delta, at_least=0, below=1) and self.delta > 0
        require(inside, "required_privacy.delta", self.delta, "a number in (0, 1)", "delta: 1.0e-5")
        require(
            is_count(self.min_clients_in_sum, at_least=2),
            "required_privacy.min_clients_in_sum",
            self.min_clients_in_sum,
            "a number >= 2",
            "min_clients_in_sum: 3",
        )
        for name in ("max_clip", "min_noise_multiplier", "max_epsilon"):
            value = getattr(self, name)
            ok = value is None or is_number(value, at_least=0)
            require(ok, f"required_privacy.{name}", value, "null, or a number >= 0", f"{name}: 1.0")
            pointless = value is not None and self.minimum == "none"
            expected = "null where no protection is asked for"
            require(not pointless, f"required_privacy.{name}", value, expected, "minimum: example")

    def check(self, local: LocalSettings, privacy: Mapping[str, Any]) -> None:
        """Refuse an order that protects less.

        Args:
            local: how it trains.
            privacy: its mechanism's settings.

        Raises:
            Refused: it does.
        """
        if self.minimum == "none":
            return
        clip, noise = self._of_example(local) if self.minimum == "example" else self._of_update(privacy)
        if self.max_clip is not None and not clip <= self.max_clip:
            raise PolicyViolation(f"privacy={self.minimum} clips to {clip}; this node accepts at most {self.max_clip}")
        if self.min_noise_multiplier is not None and not noise >= self.min_noise_multiplier:
            asked = f"the noise multiplier of privacy={self.minimum} is {noise}"
            raise PolicyViolation(f"{asked}; this node accepts at least {self.min_noise_multiplier}")

    def _of_example(self, local: LocalSettings) -> tuple[float, float]:
        if local.example_dp is None:
            raise PolicyViolation("the order trains without DP-SGD; this node asks for privacy=example")
        return local.example_dp.clip, local.example_dp.noise_multiplier

    def _of_update(self, privacy: Mapping[str, Any]) -> tuple[float, float]:
        kinds, what = REQUIRED_MECHANISMS[self.minimum]
        kind = str(privacy.get("_target_", "")).removeprefix(MECHANISM_PREFIX)
        if kind not in kinds:
            raise PolicyViolation(
                f"the order lets updates leave {what}; this node asks for privacy={' or '.join(kinds)}"
            )
        clip, noise = privacy.get("clip_norm"), privacy.get("noise_multiplier", 0.0)
        if clip is None or noise is None or not (is_number(clip) and is_number(noise)):
            raise PolicyViolation(f"privacy={kind} has clip_norm={clip} and noise_multiplier={noise}, expected numbers")
        return float(clip), float(noise)


@dataclass(frozen=True, kw_only=True)
class Reveal:
    """What a node tells about its examples besides the update.

    Args:
        num_examples: of training, ``exact``, ``rounded`` to one digit, or ``none``: told as 1, for strategies that
            weight equally. The number of local steps still tells it to within a batch, unless ``local.steps`` is set.
        metrics: whether evaluation metrics may leave; with them goes the number of held-out examples.
        min_test_examples: from how many held-out examples on, >= 1.
    """

    num_examples: str = "exact"
    metrics: bool = True
    min_test_examples: int = 10

    def __post_init__(self) -> None:
        expected = f"one of {', '.join(COUNT_PRECISIONS)}"
        require(
            self.num_examples in COUNT_PRECISIONS,
            "reveal.num_examples",
            self.num_examples,
            expected,
            "num_examples: exact",
        )
        require(isinstance(self.metrics, bool), "reveal.metrics", self.metrics, "true or false", "metrics: true")
        least = self.min_test_examples
        require(is_count(least), "reveal.min_test_examples", least, "a whole number >= 1", "min_test_examples: 10")

    def reported_count(self, num_examples: int) -> int:
        """What the coordinator hears of a number of examples.

        >>> [Reveal(num_examples=how).reported_count(227) for how in ("exact", "rounded", "none")]
        [227, 200, 1]
        """
        if self.num_examples == "exact" or not num_examples:
            return num_examples
        return round(num_examples, -floor(log10(num_examples))) if self.num_examples == "rounded" else 1


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a node accepts; the attributes are the file's, see `EXAMPLE_POLICY`."""

    scenarios: Mapping[str, Mapping[str, Any]]
    strategies: Mapping[str, Mapping[str, Any]]
    local: Mapping[str, Any] = field(default_factory=dict)
    max_rounds: int = 200
    max_rounds_total: int | None = None
    required_privacy: RequiredPrivacy = field(default_factory=RequiredPrivacy)
    reveal: Reveal = field(default_factory=Reveal)
    allow_targets: Sequence[str] = ()

    def __post_init__(self) -> None:
        for group in ("scenarios", "strategies"):
            accepted = getattr(self, group)
            ok = isinstance(accepted, Mapping) and all(isinstance(bounds, Mapping) for bounds in accepted.values())
            fix = f"{group}: {{strategies.fedavg: {{}}}}"
            require(ok, group, accepted, "a mapping of builders to the bounds of their settings", fix)
            for target, bounds in accepted.items():
                _check_bounds(bounds, f"{group}.{target}")
        for target, bounds in self.scenarios.items():
            refuse_old_bounds(target, bounds)
        _check_bounds(self.local, "local")
        _refuse_unknown(self.local, [*asdict(LocalSettings())], "local")
        require(is_count(self.max_rounds), "max_rounds", self.max_rounds, "a whole number >= 1", "max_rounds: 200")
        in_all = self.max_rounds_total
        ok = in_all is None or is_count(in_all)
        require(ok, "max_rounds_total", in_all, "null, or a whole number >= 1", "max_rounds_total: 1000")

    def check_settings(self, request_settings: Mapping[str, Any]) -> None:
        """Refuse a scenario, a strategy, a model or a partition that the policy does not accept.

        Args:
            request_settings: ``scenario``, ``strategy`` and, if updates are protected or compressed, ``privacy`` and
                ``compress``, each with its ``_target_``.

        Raises:
            PolicyViolation: the policy does not name the builder, or a setting is outside its bounds.
        """
        if path := interpolation(dict(request_settings)):
            raise PolicyViolation(f"{path} has an interpolation (${{...}}); this node accepts plain values")
        for group, accepted in (("scenario", self.scenarios), ("strategy", self.strategies)):
            settings: Mapping[str, Any] = given if isinstance(given := request_settings.get(group), dict) else {}
            target = str(settings.get("_target_"))
            if target not in accepted:
                known = ", ".join(accepted) or "none"
                raise PolicyViolation(f"{group} {target} is not accepted here; this node accepts {known}")
            bounds = accepted[target]
            if group == "scenario":
                if problem := scenario_problem(settings, bounds):
                    raise PolicyViolation(problem)
                settings = bounded_settings(settings, bounds)
                bounds = {name: bound for name, bound in bounds.items() if name in settings}
            _require_within(settings, bounds, group)
        below = {"strategy": (*self.strategies, *STRATEGY_PARTS), "privacy": (), "compress": ()}
        for group, names in below.items():
            if problem := nested_code_problem(group, request_settings.get(group), names):
                raise PolicyViolation(problem)
        privacy = request_settings.get("privacy") or {}
        mechanism = str(privacy.get("_target_", f"{MECHANISM_PREFIX}none")) if isinstance(privacy, dict) else ""
        if not mechanism.startswith(MECHANISM_PREFIX):
            raise PolicyViolation(
                f"privacy {mechanism} is not accepted here; this node knows those of {MECHANISM_PREFIX[:-1]}"
            )
        compress = request_settings.get("compress") or {}
        codec = str(compress.get("_target_")) if isinstance(compress, dict) else ""
        if compress and not codec.startswith(CODEC_PREFIX):
            raise PolicyViolation(
                f"compress {codec} is not accepted here; this node knows those of {CODEC_PREFIX[:-1]}"
            )
        if mechanism == f"{MECHANISM_PREFIX}example" and self.reveal.num_examples != "exact":
            raise PolicyViolation(
                "privacy=example claims an epsilon from exact numbers of examples; this node does not tell its own"
            )
        if self.reveal.num_examples == "none" and request_settings["strategy"].get("weighting", "examples") != "equal":
            raise PolicyViolation("this node does not tell its number of examples; try strategy.weighting=equal")

    def check_request(
        self,
        request: Request,
        request_settings: Mapping[str, Any],
        *,
        num_requests_of_run: int,
        num_requests_total: int,
    ) -> None:
        """Refuse an order to train.

        Args:
            request: to train.
            request_settings: of the order.
            num_requests_of_run: training orders of this run that were carried out before.
            num_requests_total: of all runs.

        Raises:
            Refused: it trains otherwise than accepted, protects too little, or there were too many.
        """
        _require_within(asdict(request.local), self.local, "local")
        self.required_privacy.check(request.local, request_settings.get("privacy") or {})
        if num_requests_of_run >= self.max_rounds:
            accepts = f"max_rounds={self.max_rounds}"
            raise PolicyViolation(
                f"this node has trained {num_requests_of_run} rounds of this run; it accepts {accepts}"
            )
        if self.max_rounds_total is not None and num_requests_total >= self.max_rounds_total:
            accepts = f"max_rounds_total={self.max_rounds_total}"
            raise PolicyViolation(f"this node has trained {num_requests_total} rounds in all; it accepts {accepts}")


def read_policy(path: Path) -> Policy:
    """The policy in a file.

    Raises:
        FedlearnError: the file cannot be read, or says something that is no policy.
    """
    try:
        given: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        fix = "python -m fedlearn.deploy.node_side.policy > policy.yaml"
        raise FedlearnError(f"the policy {path} cannot be read: {error}\n  try       {fix}") from error
    if not isinstance(given, dict):
        raise FedlearnError(
            f"the policy {path} holds no settings\n  try       python -m fedlearn.deploy.node_side.policy"
        )
    _refuse_unknown(given, list(Policy.__dataclass_fields__), "")
    missing = [name for name in ("scenarios", "strategies") if name not in given]
    if missing:
        raise FedlearnError(f"the policy {path} does not say which {' and '.join(missing)} it accepts")
    for name, kind in (("required_privacy", RequiredPrivacy), ("reveal", Reveal)):
        settings = given.get(name) or {}
        _refuse_unknown(settings, list(kind.__dataclass_fields__), name)
        given[name] = kind(**settings)
    return Policy(**given)


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key, value in given.items():
        if key not in known:
            name = f"{where}.{key}" if where else str(key)
            if name in RENAMED_KEYS:
                raise FedlearnError(f"{name} is called {RENAMED_KEYS[name]} now\n  try       {RENAMED_KEYS[name]}: ...")
            raise SettingError(name, value, f"one of {', '.join(known)}", did_you_mean(str(key), known) or known[0])


def _check_bounds(bounds: Mapping[str, Any], where: str) -> None:
    for key, bound in bounds.items():
        is_range = isinstance(bound, list) and len(bound) == 2 and all(is_number(end) for end in bound)
        is_choice = isinstance(bound, dict) and list(bound) == ["one_of"] and isinstance(bound["one_of"], list)
        expected = "[low, high] or {one_of: [...]}"
        require(is_range or is_choice, f"{where}.{key}", bound, expected, f"{key}: [1, 10]")


def _require_within(settings: Mapping[str, Any], bounds: Mapping[str, Any], group: str) -> None:
    """Refuse what lies outside; so is a setting that the order leaves to its default, which may move."""
    for key, bound in bounds.items():
        value = settings.get(key)
        if isinstance(bound, dict):
            ok, accepts = value in bound["one_of"], f"one of {', '.join(map(str, bound['one_of']))}"
        else:
            low, high = bound
            ok, accepts = is_number(value) and low <= value <= high, f"{low} to {high}"
        if not ok:
            raise PolicyViolation(f"{setting_path(group, key)} is {value}; this node accepts {accepts}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print an example of a policy; return the exit code."""
    parser = command_parser("fedlearn.deploy.node_side.policy", "Print an example of a policy, to narrow and to keep.")
    return run_command(parser, _print_example, argv)


def _print_example() -> int:
    sys.stdout.write(EXAMPLE_POLICY)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
