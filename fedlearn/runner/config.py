"""Build an experiment from a composed configuration."""

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

from fedlearn.advice import assignment
from fedlearn.algorithm.strategy import RootDataset, Strategy, with_buffer_policy, with_compression
from fedlearn.algorithm.transforms import Stage
from fedlearn.callbacks.early_stopping import EarlyStop
from fedlearn.core.layout import Layout
from fedlearn.core.model_report import ModelReport
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId, LocalSettings, Request
from fedlearn.core.tasks import Task
from fedlearn.engines.base import InProcessEngine
from fedlearn.engines.byzantine import ByzantineEngine
from fedlearn.errors import FedlearnError, SettingError, did_you_mean, is_count, require
from fedlearn.loop.local_defaults import LocalDefaults, local_defaults
from fedlearn.loop.protocols import Engine, Trainer
from fedlearn.loop.rule_support import require_steps
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
    find_target,
    refuse_unknown_keys,
    setting_path,
)
from fedlearn.runner.consent import allowed_by_environment, refuse_packages
from fedlearn.runner.engines import build_engine, refuse_coordinator_engine, require_in_process
from fedlearn.runner.environment import set_environment
from fedlearn.runner.local_defaults import automatic_settings, describe_training, resolve_auto
from fedlearn.runner.local_training import build_local
from fedlearn.runner.parts import NO_PARTS, OBJECT_TARGET, Parts
from fedlearn.runner.protection import protect_strategy
from fedlearn.runner.renames import new_name
from fedlearn.runner.site_settings import read_site_settings, refuse_site_settings
from fedlearn.runner.training_check import check_scenario, reported_warnings, with_gradient_warning
from fedlearn.runner.user_code import add_metrics
from fedlearn.trainers.class_weights import require_weight_per_class
from fedlearn.trainers.contract import ARGUMENTS

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


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Plan, scenario and engine of a run, the clients that the poisoning controls, and the check of the model.

    ``evaluation_trainer`` predicts a pooled test set: the trainer of an engine in this process, which can have several
    processes. None is the trainer of the scenario.
    """

    plan: Plan
    scenario: Scenario
    engine: Engine
    malicious_clients: frozenset[ClientId] = frozenset()
    model_report: ModelReport = field(default_factory=ModelReport)
    evaluation_trainer: Trainer | None = None


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
    plain = _plain(cfg, "the configuration")
    _refuse_old_names(plain)
    _refuse_hidden_groups(plain)
    read_site_settings(plain)
    allow = allowed_modules(plain)
    if parts.find("scenario", _group(plain, "scenario")) is None:
        check_targets(plain["scenario"], "scenario", allow=allow, num_args=0)
    check_targets(_group(plain, "engine"), "engine", allow=allow)
    refuse_unknown_keys(_group(plain, "early_stop"), ("metric", "patience", "min_delta"), "early_stop")
    seed = plain.get("seed")
    require(is_count(seed, at_least=0), "seed", seed, "a whole number >= 0", "seed=1")
    schedule = ("rounds", "evaluate_every", "evaluate_clients", "max_failures")
    strategy = _of_kind(Strategy, cfg, "strategy", allow, parts)
    privacy = _of_kind(Mechanism, cfg, "privacy", allow, parts) if "privacy" in plain else none()
    typed, defaults = _group(plain, "local"), _local_defaults(plain["scenario"])
    clips = privacy.kind == "example"
    local = build_local(resolve_auto(typed, defaults, rule=strategy.local, clips_examples=clips), allow=allow)
    system = _of_kind(SystemModel, cfg, "system", allow) if "system" in plain else SystemModel()
    _refuse_without_rounds(system, strategy, privacy)
    privacy.validate(strategy, local)
    attack = _of_kind(Poisoning, cfg, "poisoning", allow) if "poisoning" in plain else poisoning.HONEST
    attack = _trust_root_client(strategy.root, attack, plain["engine"])
    _refuse_impossible_poisoning(attack, plain["engine"], privacy)
    expected = "poisoning of data: poisoning of updates needs all updates of a round, but the strategy is asynchronous"
    forges = attack.forge is not None and strategy.asynchrony is not None
    require(not forges, "poisoning", attack.kind, expected, "poisoning=label_flip")
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
        subgroups=_subgroups(plain.get("subgroups")),
        system=system,
        buffers=buffers,
        training=describe_training(local, automatic_settings(typed), defaults),
    )


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
    scenario = _group(plain, "scenario")
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


def build_experiment(
    cfg: DictConfig,
    plan: Plan | None = None,
    *,
    transform_scenario: Callable[[Scenario], Scenario] = lambda scenario: scenario,
    parts: Parts = NO_PARTS,
) -> Experiment:
    """Build data, trainer and engine, and apply privacy, poisoning and system model.

    Args:
        cfg: all settings.
        plan: return value of `build_plan`; None builds the plan.
        transform_scenario: function from scenario to scenario, applied before the privacy mechanism and the engine. An
            audit adds its canaries with it. Default: no change.
        parts: objects of a Python program that replace groups of settings; default none.

    Raises:
        FedlearnError: the errors of `build_plan`, the model does not fit the data, or data or an optional dependency
            are missing.
    """
    plan = plan or build_plan(cfg, parts)
    refuse_coordinator_engine(cfg.engine)
    refuse_site_settings(cfg)
    with reported_warnings():
        return _build_experiment(cfg, plan, parts, transform_scenario)


def _build_experiment(
    cfg: DictConfig, plan: Plan, parts: Parts, transform_scenario: Callable[[Scenario], Scenario]
) -> Experiment:
    scenario = transform_scenario(with_metrics(parts.scenario, cfg) if parts.scenario else build_scenario(cfg))
    if plan.strategy.root is not None:
        scenario = replace(scenario, data=with_root_dataset(scenario.data, plan.strategy.root, seed=plan.seed))
    attack = plan.poisoning
    malicious = poisoning.draw_malicious_clients(attack, scenario.data.clients, seed=plan.seed)
    data = poisoning.poison_data(scenario.data, attack, malicious)
    scenario = replace(scenario, data=data, backdoor_examples=attack.backdoor_examples)
    model_report = check_scenario(scenario)
    plan = apply_privacy(plan, scenario)
    plan = _check_example_dp(plan, scenario)
    # a trial selection refuses a cohort larger than the population before the first round
    select, rng = plan.strategy.select, generator(plan.seed, Purpose.SELECT, round=1)
    select.choose(1, scenario.data.clients, rng, **select.initial_state)
    if plan.strategy.asynchrony is not None:
        plan.strategy.asynchrony.validate(len(scenario.data.clients))
    check_early_stop(cfg, scenario.data.task)
    require_weight_per_class(plan.local, max(2, scenario.data.num_classes))
    # the engine comes last: it may start processes, which a later error would not stop
    engine = build_scenario_engine(cfg, scenario)
    evaluation_trainer = engine.trainer if isinstance(engine, InProcessEngine) else None
    if attack.forge is not None and malicious:
        engine = ByzantineEngine(engine, attack, malicious)
    engine = with_virtual_clock(engine, plan, scenario)
    return Experiment(
        plan=plan,
        scenario=scenario,
        engine=engine,
        malicious_clients=malicious,
        model_report=model_report,
        evaluation_trainer=evaluation_trainer,
    )


def build_scenario(cfg: DictConfig) -> Scenario:
    """Return the scenario of a configuration, without strategy and engine, for use with a trained model.

    Raises:
        FedlearnError: a setting is refused, or data or an optional dependency are missing.
    """
    scenario: Scenario = _of_kind(Scenario, cfg, "scenario", allowed_modules(cfg))
    _require_framework(scenario, cfg.get("framework"))
    return with_metrics(scenario, cfg)


def _require_framework(scenario: Scenario, framework: str | None) -> None:
    """Refuse a scenario that ignores ``framework=jax`` or ``framework=mixed`` and trains in another framework."""
    actual = getattr(scenario.trainer, "framework", framework)
    expected = f"{actual}, because the scenario {scenario.name} trains a model of {actual}"
    is_default = framework in (None, "torch")  # the setting of a run that names no framework
    fix = f"framework={actual if actual in ('torch', 'jax', 'mixed') else 'torch'}"
    require(is_default or actual == framework, "framework", framework, expected, fix)


def with_metrics(scenario: Scenario, cfg: Mapping[str, Any] | DictConfig) -> Scenario:
    """Return the scenario with the settings ``metrics`` and ``metric``.

    Raises:
        SettingError: a metric cannot be imported, its module is not allowed, or the main metric is unknown.
    """
    paths = _plain(cfg.get("metrics"), "metrics") or []
    return add_metrics(scenario, paths, cfg.get("metric"), allow=allowed_modules(cfg) if paths else ())


def apply_privacy(plan: Plan, scenario: Scenario, *, num_parties: int | None = None) -> Plan:
    """Return the plan with its privacy mechanism applied to the population of the scenario.

    The returned plan also has the compression and the policy for normalization statistics.

    Args:
        plan: plan of the settings.
        scenario: scenario with the clients of the population.
        num_parties: number of nodes with these clients; None: each client is a party of its own.

    Raises:
        FedlearnError: the guarantee does not hold for this population or with this trainer.
    """
    population = Population(
        clients=scenario.data.clients,
        rounds=plan.schedule.rounds,
        num_examples_of=_count_examples(scenario),
        num_parties=num_parties,
    )
    strategy, local = protect_strategy(
        plan.privacy,
        plan.strategy,
        plan.local,
        population,
        trainer=scenario.trainer,
        buffers=plan.buffers,
        compress=plan.compress,
    )
    require_steps(strategy, local)
    return replace(plan, strategy=_with_disclosure(strategy, scenario), local=local)


def _check_example_dp(plan: Plan, scenario: Scenario) -> Plan:
    """Check with examples of the first client that the model works with DP-SGD.

    Returns:
        The plan, with a warning about parameters that do not train.

    Raises:
        SettingError: the model or the loss mixes examples, or no parameter trains.
    """
    if plan.local.example_dp is None:
        return plan
    trainer = scenario.trainer
    request = Request(round=1, seed=plan.seed, params_D=trainer.init(plan.seed), local=plan.local)
    examples = (scenario.data.train(client) for client in scenario.data.clients)
    first = next((part for part in examples if len(part)), None)
    if first is None:
        return plan
    trainer.check_example_dp(request, first)
    return replace(plan, strategy=with_gradient_warning(plan.strategy, trainer, first))


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


def _with_disclosure(strategy: Strategy, scenario: Scenario) -> Strategy:
    """Add the releases of the data preparation, such as federated statistics, to the privacy guarantee.

    A guarantee for single examples accounts for noisy releases in its ledger. Any other guarantee lists them as not
    covered.
    """
    guarantee = strategy.privacy_guarantee
    if guarantee is None or not scenario.disclosure:
        return strategy
    if guarantee.unit == "example" and scenario.ledger != Ledger():
        return replace(strategy, privacy_guarantee=replace(guarantee, initial_ledger=scenario.ledger))
    not_covered = (*guarantee.not_covered, scenario.disclosure)
    return replace(strategy, privacy_guarantee=replace(guarantee, not_covered=not_covered))


def with_virtual_clock(engine: Engine, plan: Plan, scenario: Scenario) -> Engine:
    """Return the engine on the virtual clock of the system model, or unchanged without a system model."""
    if plan.system.device is None:
        return engine
    return VirtualClockEngine(engine, plan.system, _count_examples(scenario))


def _count_examples(scenario: Scenario) -> Callable[[ClientId], int]:
    """Return a function from client to its number of training examples. A coordinator has the numbers only."""
    data, num_train = scenario.data, scenario.data.num_train
    if num_train is None:
        return lambda client: len(data.train(client))
    return lambda client: num_train.get(client, 0)


def build_scenario_engine(cfg: DictConfig, scenario: Scenario) -> Engine:
    """Build the engine of a configuration for the data and the trainer of the scenario."""
    allow = allowed_modules(cfg)
    rebuild = partial(rebuild_scenario, _plain(cfg.scenario, "scenario"), allow)
    return build_engine(
        cfg.engine, partial(build, cfg.engine, "engine", allow=allow), (scenario.data, scenario.trainer), rebuild
    )


def rebuild_scenario(node: Mapping[str, Any], allow: Sequence[str], **changes: Any) -> Scenario:
    """Return a scenario in another process, such as a Ray worker.

    Args:
        node: settings of the scenario, as plain values.
        allow: allowed modules besides the library.
        changes: values that replace settings of ``node``.
    """
    set_environment({**node, **changes}.get("framework"))
    scenario: Scenario = build({**node, **changes}, "scenario", allow=allow)
    return scenario


def build(node: Any, setting: str, *args: Any, allow: Sequence[str] = ()) -> Any:
    """Call the ``_target_`` of a mapping with its other keys, after nested targets, and return the result.

    Args:
        node: mapping with ``_target_``.
        setting: name of the mapping in the configuration, for error texts.
        args: positional arguments of the outermost target.
        allow: allowed modules besides the library.

    *Guarantees*: only builders of installed options, parts of a strategy and objects of the allowed modules are
    imported or called. Names that an allowed module has imported are refused.

    Raises:
        SettingError: a target is not allowed or does not exist, a key is not one of its parameters, or the target
            refuses a value.
        BuildError: a target raised another exception.
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
    """Seed torch during the construction of a user's module, so that its weights are equal in every run and process."""
    model = settings.get("model")
    if not isinstance(model, Mapping) or settings.get("framework", "torch") != "torch":
        return nullcontext()
    from fedlearn.trainers.torch.random import seeded

    return seeded(int(settings.get("seed") or 0))


def _explained(error: BaseException, setting: str, node: Any) -> FedlearnError:
    if isinstance(error, SettingError):
        is_top_level = setting_path(setting, error.setting) == error.setting or _is_shared(node, error.setting)
        prefixed = error.setting.startswith(f"{setting}.") or is_top_level or error.setting in ARGUMENTS
        return error if prefixed else error.with_prefix(setting, _names_in_group(node))
    if isinstance(error, FedlearnError):
        return error
    return BuildError(f"{setting} cannot be built: {type(error).__name__}: {error}")


def _is_shared(node: Any, key: str) -> bool:
    """Return whether the group takes this setting from the top level, e.g. ``seed: ${seed}``."""
    raw = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    return isinstance(raw, dict) and raw.get(key) == f"${{{key}}}"


def _names_in_group(node: Any) -> list[str]:
    """Return the names of the settings that the group does not take from the top level."""
    keys = node if isinstance(node, Mapping | DictConfig) else ()
    return [str(key) for key in keys if not _is_shared(node, str(key))]


def _of_kind(kind: type[Any], cfg: DictConfig, group: str, allow: Sequence[str], parts: Parts = NO_PARTS) -> Any:
    node = _group(cfg, group)
    built = parts.find(group, node) or build(node, group, allow=allow)
    if not isinstance(built, kind):
        expected = f"a builder that returns a {kind.__name__}; it returned {type(built).__name__}"
        raise SettingError(f"{group}._target_", cfg[group]["_target_"], expected, f"return {kind.__name__}(...)")
    return built


def _record(kind: type[Any], settings: Mapping[str, Any], group: str) -> Any:
    refuse_unknown_keys(settings, list(inspect.signature(kind).parameters), group)
    try:
        return kind(**settings)
    except SettingError as error:
        raise (error.with_prefix(group, settings) if group else error) from None


def check_early_stop(cfg: DictConfig, task: Task) -> None:
    """Check ``early_stop.metric`` for the task of the scenario.

    Raises:
        SettingError: the task has no such metric.
    """
    settings = _plain(_group(cfg, "early_stop"), "early_stop")
    if settings.get("metric") is not None:
        EarlyStop(**settings, task=task)


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


def allowed_modules(cfg: Mapping[str, Any] | DictConfig) -> tuple[str, ...]:
    """Return the modules of the user that ``allow_targets`` or ``FEDLEARN_ALLOW_TARGETS`` allows in settings.

    Raises:
        SettingError: ``allow_targets`` is not a list of modules, or lists a package of fedlearn.
    """
    plain = _plain(cfg, "the configuration")
    modules = plain.get("allow_targets") or []
    ok = isinstance(modules, list) and all(isinstance(m, str) and re.fullmatch(r"\w+(\.\w+)*\.?", m) for m in modules)
    example = modules if isinstance(modules, str) and re.fullmatch(r"\w+(\.\w+)*", modules) else "my_strategies"
    require(ok, "allow_targets", modules, "a list of modules", assignment("allow_targets", [example]))
    refuse_packages(modules)
    return tuple(dict.fromkeys([*(module.rstrip(".") for module in modules), *allowed_by_environment()]))


def _group(cfg: Mapping[str, Any] | DictConfig, name: str) -> Any:
    group = cfg.get(name)
    if not isinstance(group, Mapping | DictConfig):
        raise SettingError(
            name, group, f"a group of settings with the name {name}", "use the groups of conf/config.yaml"
        )
    return group


def _plain(node: Any, setting: str) -> Any:
    if not OmegaConf.is_config(node):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise FedlearnError(f"{setting} cannot be resolved: {first} (at {error.full_key or setting})") from error
