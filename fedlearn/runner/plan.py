"""Build the plan of a run: its parts that need no data and no framework."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from fedlearn.advice import assignment
from fedlearn.algorithm.strategy import RootDataset, Strategy, with_buffer_policy, with_compression
from fedlearn.algorithm.transforms import Stage
from fedlearn.core.layout import Layout
from fedlearn.core.records import LocalSettings
from fedlearn.errors import SettingError, did_you_mean, is_count, require
from fedlearn.loop.local_defaults import LocalDefaults, local_defaults
from fedlearn.loop.schedule import Schedule
from fedlearn.loop.system_model import SystemModel
from fedlearn.privacy.mechanisms.base import Mechanism, none
from fedlearn.robust import poisoning
from fedlearn.robust.poisoning import Poisoning
from fedlearn.runner.builders import (
    SCENARIO_GROUPS,
    check_targets,
    find_target,
    refuse_unknown_keys,
)
from fedlearn.runner.engines import require_in_process
from fedlearn.runner.instantiation import allowed_modules, build_group, plain_settings, settings_group
from fedlearn.runner.local_defaults import automatic_settings, describe_training, resolve_auto
from fedlearn.runner.local_training import build_local
from fedlearn.runner.parts import NO_PARTS, OBJECT_TARGET, Parts
from fedlearn.runner.renames import new_name
from fedlearn.runner.site_settings import read_site_settings

BASELINES = ("central", "local")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Parts of an experiment that are built and checked without data and without a framework.

    Args:
        strategy: strategy, before the privacy mechanism changes it.
        schedule: rounds, evaluations and limit of failures.
        local: settings of local training.
        privacy: privacy mechanism.
        poisoning: poisoning by malicious clients; default honest clients.
        compress: stage that compresses updates; default no compression.
        seed: seed of the run, >= 0.
        baselines: names of the baselines, from `BASELINES`; default none.
        subgroups: columns whose values divide the held-out examples in the report; default none.
        system: system model; default no virtual clock.
        buffers: policy for normalization statistics: ``refuse`` (default), ``average`` or ``local``.
        training: settings of local training for the header; empty without a default of the scenario.
    """

    strategy: Strategy
    schedule: Schedule
    local: LocalSettings
    privacy: Mechanism
    poisoning: Poisoning = poisoning.HONEST
    compress: Stage = field(default_factory=Stage)
    seed: int
    baselines: tuple[str, ...] = ()
    subgroups: tuple[str, ...] = ()
    system: SystemModel = field(default_factory=SystemModel)
    buffers: str = "refuse"
    training: str = ""


def build_plan(cfg: DictConfig, parts: Parts = NO_PARTS) -> Plan:
    """Build the plan of a configuration, so that a wrong setting is refused before a run loads or writes anything.

    Args:
        cfg: all settings.
        parts: objects of a Python program that replace groups of settings; default none.

    Raises:
        SettingError: a value is out of range, a name is unknown, or a target is not allowed.
        CompositionError: the privacy guarantee does not hold with this strategy.
        BuildError: a builder failed.
    """
    plain = plain_settings(cfg, "the configuration")
    _refuse_old_names(plain)
    _refuse_hidden_groups(plain)
    read_site_settings(plain)
    allow = allowed_modules(plain)
    if parts.find("scenario", settings_group(plain, "scenario")) is None:
        check_targets(plain["scenario"], "scenario", allow=allow, num_args=0)
    check_targets(settings_group(plain, "engine"), "engine", allow=allow)
    refuse_unknown_keys(settings_group(plain, "early_stop"), ("metric", "patience", "min_delta"), "early_stop")
    seed = plain.get("seed")
    require(is_count(seed, at_least=0), "seed", seed, "a whole number >= 0", "seed=1")
    require_counts(plain)
    schedule = ("rounds", "evaluate_every", "evaluate_clients", "max_failures")
    strategy = build_group(Strategy, cfg, "strategy", allow, parts)
    privacy = build_group(Mechanism, cfg, "privacy", allow, parts) if "privacy" in plain else none()
    typed, defaults = settings_group(plain, "local"), _local_defaults(plain["scenario"])
    clips = privacy.kind == "example"
    local = build_local(resolve_auto(typed, defaults, rule=strategy.local, clips_examples=clips), allow=allow)
    system = build_group(SystemModel, cfg, "system", allow) if "system" in plain else SystemModel()
    _refuse_without_rounds(system, strategy, privacy)
    privacy.validate(strategy, local)
    attack = build_group(Poisoning, cfg, "poisoning", allow) if "poisoning" in plain else poisoning.HONEST
    attack = _trust_root_client(strategy.root, attack, plain["engine"])
    _refuse_impossible_poisoning(attack, plain["engine"], privacy)
    expected = "poisoning of data: poisoning of updates needs all updates of a round, but the strategy is asynchronous"
    forges = attack.forge is not None and strategy.asynchrony is not None
    require(not forges, "poisoning", attack.kind, expected, "poisoning=label_flip")
    compress = build_group(Stage, cfg, "compress", allow) if "compress" in plain else Stage()
    with_compression(strategy, compress)
    buffers = plain.get("buffers", "refuse")
    with_buffer_policy(strategy, Layout(()), buffers)
    return Plan(
        strategy=strategy,
        schedule=_record(Schedule, {name: plain[name] for name in schedule if name in plain}, ""),
        local=local,
        privacy=privacy,
        poisoning=attack,
        compress=compress,
        seed=seed,
        baselines=_baselines(plain.get("baseline")),
        subgroups=_subgroups(plain.get("subgroups")),
        system=system,
        buffers=buffers,
        training=describe_training(local, automatic_settings(typed), defaults),
    )


def require_counts(settings: Mapping[str, Any]) -> None:
    """Check the numbers of cores and of jobs.

    Raises:
        SettingError: a number is no whole number >= 1.
    """
    for name in ("num_cores", "num_jobs"):
        count = settings.get(name)
        require(count is None or is_count(count), name, count, "null (automatic), or a whole number >= 1", f"{name}=2")


def _local_defaults(scenario: Mapping[str, Any]) -> LocalDefaults:
    """Return the defaults of local training of a scenario, or of the library for an object of a Python program."""
    target = scenario.get("_target_")
    if target in (None, OBJECT_TARGET):
        return LocalDefaults()
    return local_defaults(find_target(target, "scenario._target_"), scenario)


def _refuse_old_names(plain: Mapping[str, Any]) -> None:
    """Refuse an old name, which has no effect. It can come from a file of the user or from a ``+`` override."""
    for key, value in plain.items():
        if new := new_name(key):
            raise SettingError(key, value, f"no setting with this name: its name is {new}", assignment(new, value))


def _refuse_hidden_groups(plain: Mapping[str, Any]) -> None:
    """Refuse a model or a partition that the scenario does not receive from the top level."""
    scenario = settings_group(plain, "scenario")
    for name in SCENARIO_GROUPS:
        value, received = plain.get(name), scenario.get(name)
        if isinstance(value, Mapping) and value.get("_target_") is None:
            setting, typed = next(((key, v) for key, v in value.items() if key != "_target_"), ("_target_", None))
            expected = f"{name}._target_ as well: only a {name} with _target_ has settings"
            raise SettingError(f"{name}.{setting}", typed, expected, f"{name}._target_=my_code.My{name.capitalize()}")
        if name in scenario and received != value:
            expected = f"no setting with this name: its name is {name}"
            raise SettingError(f"scenario.{name}", received, expected, assignment(name, received))
        chosen = value["_target_"] if isinstance(value, Mapping) else value
        expected = f"null: scenario {scenario.get('_target_')} has no choice of {name}"
        require(name in scenario or value is None, name, chosen, expected, f"{name}=null")


def _refuse_without_rounds(system: SystemModel, strategy: Strategy, privacy: Mechanism) -> None:
    """Refuse settings that need complete rounds.

    The privacy loss is accounted per round, and amplification assumes that all selected clients count. Both fail
    for asynchronous strategies, and amplification fails if the fastest clients close a round.
    """
    is_asynchronous, is_private = strategy.asynchrony is not None, privacy.kind != "none"
    expected = "none: the privacy loss is accounted per round, and an asynchronous strategy has no rounds"
    require(not (is_asynchronous and is_private), "privacy", privacy.kind, expected, "strategy=fedavg")
    reason = "the privacy guarantee depends on the selected clients, not on the fastest clients"
    if is_asynchronous:
        reason = "an asynchronous strategy has strategy.buffer_size instead"
    is_allowed = system.min_completed is None or not (is_asynchronous or is_private)
    setting = "system.min_completed"
    require(is_allowed, setting, system.min_completed, f"null: {reason}", f"{setting}=null")


def _trust_root_client(root: RootDataset | None, attack: Poisoning, engine: Mapping[str, Any]) -> Poisoning:
    """Return the poisoning, with the client of the root dataset among the trusted clients."""
    if root is None:
        return attack
    if root.num_examples is not None:
        name, reason = "strategy.num_root_examples", "the root dataset is drawn from the data of all clients"
        require_in_process(engine, name, root.num_examples, reason, f"{name}=null")
    return attack._replace(trusted=(*attack.trusted, root.client))


def _refuse_impossible_poisoning(attack: Poisoning, engine: Mapping[str, Any], privacy: Mechanism) -> None:
    """Refuse a poisoning that the engine or the privacy mechanism makes impossible."""
    if attack.kind == "none":
        return
    reason = "poisoning changes the data and the updates of simulated clients"
    require_in_process(engine, "poisoning", attack.kind, reason, "engine=vector")
    masked = privacy.kind in ("secagg", "distributed")
    expected = f"poisoning of data with privacy={privacy.kind}: poisoning of updates needs updates without masks"
    is_possible = not masked or attack.forge is None
    require(is_possible, "poisoning", attack.kind, expected, "poisoning=label_flip")


def _record(kind: type[Any], settings: Mapping[str, Any], group: str) -> Any:
    refuse_unknown_keys(settings, list(inspect.signature(kind).parameters), group)
    try:
        return kind(**settings)
    except SettingError as error:
        raise (error.with_prefix(group, settings) if group else error) from None


def _subgroups(value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else ([] if value is None else value)
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    require(is_list, "subgroups", value, "a list of columns, or null", "'subgroups=[sex]'")
    return tuple(dict.fromkeys(names))


def _baselines(value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        near = did_you_mean(str(name), BASELINES) or "central"
        expected = f"null, {', '.join(BASELINES)}, or both: [central,local]"
        require(name in BASELINES, "baseline", value, expected, f"baseline={near}")
    return tuple(dict.fromkeys(names))
