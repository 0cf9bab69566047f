"""From a composed configuration to an experiment: the one place in the library that knows Hydra."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlearn.algorithm.strategy import RootDataset, Strategy, with_buffer_policy, with_compression
from fedlearn.algorithm.transforms import Stage
from fedlearn.callbacks.early_stopping import EarlyStop
from fedlearn.core.federated_data import Task
from fedlearn.core.layout import Layout
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId, LocalSettings
from fedlearn.engines.byzantine import ByzantineEngine
from fedlearn.errors import FedlearnError, SettingError, did_you_mean, is_count, require
from fedlearn.loop.protocols import Engine
from fedlearn.loop.scenario import Scenario
from fedlearn.loop.system_model import SystemModel
from fedlearn.loop.training_loop import Schedule
from fedlearn.loop.virtual_clock import VirtualClockEngine
from fedlearn.privacy.mechanisms.base import Mechanism, Population, none
from fedlearn.robust import poisoning
from fedlearn.robust.poisoning import Poisoning
from fedlearn.robust.root_dataset import with_root_dataset
from fedlearn.runner.builders import (
    SCENARIO_GROUPS,
    BuildError,
    check_targets,
    refuse_unknown_keys,
    setting_path,
)
from fedlearn.runner.engines import build_engine, refuse_coordinator_engine, require_in_process
from fedlearn.runner.environment import set_environment
from fedlearn.runner.renames import new_name
from fedlearn.trainers.base import refuse_dp_sgd_with_buffers

BASELINES = ("central", "local")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an experiment does, built and checked without touching data or a framework."""

    strategy: Strategy
    schedule: Schedule
    local: LocalSettings
    privacy: Mechanism
    poisoning: Poisoning = poisoning.HONEST
    compress: Stage = field(default_factory=Stage)
    seed: int
    baselines: tuple[str, ...] = ()
    system: SystemModel = field(default_factory=SystemModel)
    buffers: str = "refuse"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that a run needs."""

    plan: Plan
    scenario: Scenario
    engine: Engine
    malicious_clients: frozenset[ClientId] = frozenset()


def build_plan(cfg: DictConfig) -> Plan:
    """Build what is cheap, so that a bad setting is told before anything is loaded or written.

    Raises:
        SettingError: a value is out of range, a name is unknown, or a target is not allowed.
        CompositionError: the privacy setting could not hold with this strategy.
        BuildError: a builder failed.
    """
    plain = _plain(cfg, "the configuration")
    _refuse_old_names(plain)
    _refuse_hidden_groups(plain)
    allow = allowed_modules(plain)
    check_targets(_group(plain, "scenario"), "scenario", allow=allow, num_args=0)
    check_targets(_group(plain, "engine"), "engine", allow=allow)
    refuse_unknown_keys(_group(plain, "early_stop"), ("metric", "patience", "min_delta"), "early_stop")
    seed = plain.get("seed")
    require(is_count(seed, at_least=0), "seed", seed, "a whole number >= 0", "seed=1")
    schedule = ("rounds", "evaluate_every", "evaluate_clients", "max_failures")
    strategy, local = _of_kind(Strategy, cfg, "strategy", allow), _local(_group(plain, "local"))
    privacy = _of_kind(Mechanism, cfg, "privacy", allow) if "privacy" in plain else none()
    system = _of_kind(SystemModel, cfg, "system", allow) if "system" in plain else SystemModel()
    _refuse_what_needs_rounds(system, strategy, privacy)
    privacy.validate(strategy, local)
    attack = _of_kind(Poisoning, cfg, "poisoning", allow) if "poisoning" in plain else poisoning.HONEST
    attack = _sparing(strategy.root, attack, plain["engine"])
    _refuse_attack(attack, plain["engine"], privacy)
    expected = "an attack on clients' data: one on updates needs those of a round, which this strategy does not have"
    forges = attack.forge is not None and strategy.asynchrony is not None
    require(not forges, "poisoning", attack.kind, expected, "poisoning=label_flip, or strategy=fedavg")
    compress = _of_kind(Stage, cfg, "compress", allow) if "compress" in plain else Stage()
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
        system=system,
        buffers=buffers,
    )


def _refuse_old_names(plain: Mapping[str, Any]) -> None:
    """A file of the user's own, or ``+``, can bring an old name, which would have no effect."""
    for key, value in plain.items():
        if new := new_name(key):
            raise SettingError(key, value, f"no setting: its name is {new}", f"{new}=...")


def _refuse_hidden_groups(plain: Mapping[str, Any]) -> None:
    """Refuse a model or a partition that the scenario does not receive from the top level."""
    scenario = _group(plain, "scenario")
    for name in SCENARIO_GROUPS:
        value, received = plain.get(name), scenario.get(name)
        if isinstance(value, Mapping) and value.get("_target_") is None:
            setting, given = next(((key, v) for key, v in value.items() if key != "_target_"), ("_target_", None))
            expected = f"no setting without {name}._target_: a {name} of this name has no such setting"
            raise SettingError(f"{name}.{setting}", given, expected, f"{name}._target_=my_code.My{name.capitalize()}")
        if name in scenario and received != value:
            raise SettingError(f"scenario.{name}", received, f"no setting: its name is {name}", f"{name}=...")
        chosen = value["_target_"] if isinstance(value, Mapping) else value
        expected = f"null: scenario {scenario.get('_target_')} has no {name} to choose"
        require(name in scenario or value is None, name, chosen, expected, f"without {name}=...")


def _refuse_what_needs_rounds(system: SystemModel, strategy: Strategy, privacy: Mechanism) -> None:
    """Privacy is accounted by rounds, in which it matters who was drawn and not who was first."""
    asynchronous, claims, enough = strategy.asynchrony is not None, privacy.kind != "none", system.min_completed
    expected = "none: privacy is accounted by rounds, which an asynchronous strategy does not have"
    require(not (asynchronous and claims), "privacy", privacy.kind, expected, "strategy=fedavg, or privacy=none")
    why = "an asynchronous strategy has strategy.buffer_size" if asynchronous else "a claim rests on who was drawn"
    rounds = enough is None or not (asynchronous or claims)
    require(rounds, "system.min_completed", enough, f"null: {why}", "system.min_completed=null")


def build_experiment(
    cfg: DictConfig,
    plan: Plan | None = None,
    *,
    transform_scenario: Callable[[Scenario], Scenario] = lambda scenario: scenario,
) -> Experiment:
    """Build the rest: data, trainer, engine.

    Args:
        cfg: all settings.
        plan: from `plan`.
        transform_scenario: changes the scenario before the strategy is protected and the engine is built; an audit adds
            canaries here.

    Raises:
        FedlearnError: as `plan`; also if data or an optional dependency are missing.
    """
    plan = plan or build_plan(cfg)
    allow = allowed_modules(cfg)
    refuse_coordinator_engine(cfg.engine)
    scenario = transform_scenario(build_scenario(cfg))
    if plan.strategy.root is not None:
        scenario = replace(scenario, data=with_root_dataset(scenario.data, plan.strategy.root, seed=plan.seed))
    attack, who = (
        plan.poisoning,
        poisoning.draw_malicious_clients(plan.poisoning, scenario.data.clients, seed=plan.seed),
    )
    scenario = replace(
        scenario, data=poisoning.poison_data(scenario.data, attack, who), backdoor_examples=attack.backdoor_examples
    )
    plan = apply_privacy(plan, scenario)
    # a cohort larger than the population is told now, not in the middle of the first round
    select, rng = plan.strategy.select, generator(plan.seed, Purpose.SELECT, round=1)
    select.choose(1, scenario.data.clients, rng, **select.initial_state)
    if plan.strategy.asynchrony is not None:
        plan.strategy.asynchrony.validate(len(scenario.data.clients))
    check_early_stop(cfg, scenario.data.task)
    engine = _engine(cfg, scenario, allow)  # last: nothing may fail once it has started workers
    if attack.forge is not None and who:
        engine = ByzantineEngine(engine, attack, who)
    engine = with_virtual_clock(engine, plan, scenario)
    return Experiment(plan=plan, scenario=scenario, engine=engine, malicious_clients=who)


def build_scenario(cfg: DictConfig) -> Scenario:
    """The scenario alone, for whoever uses a model that is trained already."""
    scenario: Scenario = _of_kind(Scenario, cfg, "scenario", allowed_modules(cfg))
    return scenario


def apply_privacy(plan: Plan, scenario: Scenario) -> Plan:
    """The plan with its privacy setting applied, now that the population is known.

    Raises:
        FedlearnError: the setting cannot be kept for this population, or by this trainer.
    """
    data = scenario.data
    told = data.num_train
    population = Population(
        clients=data.clients,
        rounds=plan.schedule.rounds,
        num_examples_of=(lambda client: len(data.train(client)))
        if told is None
        else lambda client: told.get(client, 0),
    )
    strategy, local = plan.privacy.protect(plan.strategy, plan.local, population)
    able = local.example_dp is None or scenario.trainer.supports_dp_sgd
    expected = "a mechanism other than example: this scenario's trainer has no DP-SGD"
    require(able, "privacy", plan.privacy.kind, expected, "privacy=central")
    refuse_dp_sgd_with_buffers(scenario.trainer.layout, local)
    strategy = with_buffer_policy(strategy, scenario.trainer.layout, plan.buffers)
    adaptive = strategy.privacy_guarantee is not None and strategy.privacy_guarantee.clip == "adaptive"
    expected = "none with privacy.clip=adaptive, whose bit would be compressed with the update"
    fits = plan.compress.codec is None or not adaptive
    require(fits, "compress", "a codec", expected, "privacy.clip=fixed, or compress=none")
    strategy = _as_prepared(with_compression(strategy, plan.compress), scenario)
    return replace(plan, strategy=strategy, local=local)


def _sparing(root: RootDataset | None, attack: Poisoning, engine: Mapping[str, Any]) -> Poisoning:
    """Return the attack, without the client that holds the root dataset."""
    if root is None:
        return attack
    if root.num_examples is not None:
        name, reason = "strategy.num_root_examples", "the examples are drawn from the data of all clients"
        require_in_process(engine, name, root.num_examples, reason, f"{name}=null")
    return attack._replace(trusted=(*attack.trusted, root.client))


def _refuse_attack(attack: Poisoning, engine: Mapping[str, Any], privacy: Mechanism) -> None:
    """Refuse an attack that the engine or the privacy mechanism makes impossible."""
    if attack.kind == "none":
        return
    reason = "an attack changes the data and the updates of simulated clients"
    require_in_process(engine, "poisoning", attack.kind, reason, "engine=vector")
    masked = privacy.kind in ("secagg", "distributed")
    expected = f"none with privacy={privacy.kind}: nobody sees a masked update, to learn from it or to forge one"
    require(
        not masked or attack.forge is None, "poisoning", attack.kind, expected, "poisoning=label_flip, or privacy=none"
    )


def _as_prepared(strategy: Strategy, scenario: Scenario) -> Strategy:
    """With what preparing the data has told: paid for where the promise is about single examples, else not covered."""
    protection = strategy.privacy_guarantee
    if protection is None or not scenario.disclosure:
        return strategy
    if protection.unit == "example" and scenario.ledger != Ledger():
        return replace(strategy, privacy_guarantee=replace(protection, initial_ledger=scenario.ledger))
    not_covered = (*protection.not_covered, scenario.disclosure)
    return replace(strategy, privacy_guarantee=replace(protection, not_covered=not_covered))


def with_virtual_clock(engine: Engine, plan: Plan, scenario: Scenario) -> Engine:
    """The engine on the virtual clock of the planned model of clients' speed; itself where there is none."""
    if plan.system.device is None:
        return engine
    data = scenario.data
    told = data.num_train
    size_of = (lambda client: len(data.train(client))) if told is None else lambda client: told.get(client, 0)
    return VirtualClockEngine(engine, plan.system, size_of)


def _engine(cfg: DictConfig, scenario: Scenario, allow: Sequence[str]) -> Engine:
    """Build the engine for the data and the trainer of the scenario."""
    rebuild = partial(rebuild_scenario, _plain(cfg.scenario, "scenario"), allow)
    return build_engine(
        cfg.engine, partial(build, cfg.engine, "engine", allow=allow), (scenario.data, scenario.trainer), rebuild
    )


def rebuild_scenario(node: Mapping[str, Any], allow: Sequence[str], **changes: Any) -> Scenario:
    """The scenario of plain settings, some of them changed; for a process that has nothing but these."""
    set_environment({**node, **changes}.get("framework"))
    scenario: Scenario = build({**node, **changes}, "scenario", allow=allow)
    return scenario


def build(node: Any, setting: str, *args: Any, allow: Sequence[str] = ()) -> Any:
    """What a node's ``_target_`` makes of its other keys, nested targets first.

    Args:
        node: a mapping with ``_target_``.
        setting: where it stands in the configuration, for messages.
        args: positional arguments for the outermost target.
        allow: modules besides fedlearn, strategies and simulations that targets may come from.

    *Guarantees*: nothing outside the allowed modules is imported or called on behalf of the node: neither by its
    dotted name, nor by way of a module that an allowed one has imported.

    Raises:
        SettingError: a target is not allowed or not found, a key is not one of its parameters, or it refuses a value.
        BuildError: a target raised anything else.
    """
    plain = _plain(node, setting)
    check_targets(plain, setting, allow=allow, num_args=len(args))
    try:
        with _seeded_modules(plain):
            return instantiate(plain, *args, _convert_="all")
    except InstantiationException as error:
        nested = re.search(r"^full_key: (\S+)$", str(error), re.MULTILINE)
        where = setting_path(setting, nested[1]) if nested else setting
        raise _explained(error.__cause__ or error, where, node) from error.__cause__


def _seeded_modules(settings: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Seed torch while a user's module is built, so that its initial weights are equal in every run and process."""
    model = settings.get("model")
    if not isinstance(model, Mapping) or settings.get("framework", "torch") != "torch":
        return nullcontext()
    from fedlearn.trainers.torch.random import seeded

    return seeded(int(settings.get("seed") or 0))


def _explained(error: BaseException, setting: str, node: Any) -> FedlearnError:
    if isinstance(error, SettingError):
        is_top_level = setting_path(setting, error.setting) == error.setting or _is_shared(node, error.setting)
        prefixed = error.setting.startswith(f"{setting}.") or is_top_level
        return error if prefixed else error.with_prefix(setting)
    if isinstance(error, FedlearnError):
        return error
    return BuildError(f"{setting} cannot be built: {type(error).__name__}: {error}")


def _is_shared(node: Any, key: str) -> bool:
    """Whether the group takes this setting from the top level, where the user typed it: ``seed: ${seed}``."""
    raw = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    return isinstance(raw, dict) and raw.get(key) == f"${{{key}}}"


def _of_kind(kind: type[Any], cfg: DictConfig, group: str, allow: Sequence[str]) -> Any:
    built = build(_group(cfg, group), group, allow=allow)
    if not isinstance(built, kind):
        expected = f"a builder that returns a {kind.__name__}, but it returned {type(built).__name__}"
        raise SettingError(f"{group}._target_", cfg[group]["_target_"], expected, f"return {kind.__name__}(...)")
    return built


def _record(kind: type[Any], given: Mapping[str, Any], group: str) -> Any:
    refuse_unknown_keys(given, list(inspect.signature(kind).parameters), group)
    try:
        return kind(**given)
    except SettingError as error:
        raise (error.with_prefix(group) if group else error) from None


def _local(given: Mapping[str, Any]) -> LocalSettings:
    """How clients train. What makes that private is set by the privacy setting alone, which accounts for it."""
    private = given.get("example_dp")
    require(private is None, "local.example_dp", private, "null", "privacy=example privacy.clip=1.0")
    local: LocalSettings = _record(LocalSettings, given, "local")
    return local


def check_early_stop(cfg: DictConfig, task: Task) -> None:
    """Check ``early_stop.metric``, once the task is known.

    Raises:
        SettingError: the task has no such metric.
    """
    settings = _plain(_group(cfg, "early_stop"), "early_stop")
    if settings.get("metric") is not None:
        EarlyStop(**settings, task=task)


def _baselines(given: Any) -> tuple[str, ...]:
    names = given if isinstance(given, list) else [] if given is None else [given]
    for name in names:
        near = did_you_mean(str(name), BASELINES) or "central"
        expected = f"null, {', '.join(BASELINES)}, or both: [central,local]"
        require(name in BASELINES, "baseline", given, expected, f"baseline={near}")
    return tuple(dict.fromkeys(names))


def allowed_modules(cfg: Mapping[str, Any] | DictConfig) -> tuple[str, ...]:
    """Return the modules of the user that settings may name.

    Raises:
        SettingError: ``allow_targets`` is not a list of modules.
    """
    plain = _plain(cfg, "the configuration")
    modules = plain.get("allow_targets") or []
    ok = isinstance(modules, list) and all(isinstance(m, str) and re.fullmatch(r"\w+(\.\w+)*\.?", m) for m in modules)
    require(ok, "allow_targets", modules, "a list of modules", "'allow_targets=[my_strategies]'")
    return tuple(module.rstrip(".") for module in modules)


def _group(cfg: Mapping[str, Any] | DictConfig, name: str) -> Any:
    group = cfg.get(name)
    if not isinstance(group, Mapping | DictConfig):
        raise SettingError(name, group, f"a group of settings called {name}", "conf/config.yaml, which has all groups")
    return group


def _plain(node: Any, setting: str) -> Any:
    if not OmegaConf.is_config(node):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise FedlearnError(f"{setting} cannot be resolved: {first} (at {error.full_key or setting})") from error
