"""Build the experiment of a run: plan, scenario and engine, with privacy, poisoning and system model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from omegaconf import DictConfig

from fedlearn.algorithm.strategy import Strategy
from fedlearn.callbacks.early_stopping import EarlyStop
from fedlearn.core.model_report import ModelReport
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId, Request
from fedlearn.core.tasks import Task
from fedlearn.engines.base import InProcessEngine
from fedlearn.engines.byzantine import ByzantineEngine
from fedlearn.errors import require
from fedlearn.loop.protocols import Engine, Trainer
from fedlearn.loop.rule_support import require_steps
from fedlearn.loop.scenario import Scenario
from fedlearn.loop.virtual_clock import VirtualClockEngine
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.robust import poisoning
from fedlearn.robust.root_dataset import with_root_dataset
from fedlearn.runner.engines import build_engine, refuse_coordinator_engine
from fedlearn.runner.instantiation import (
    allowed_modules,
    build,
    build_group,
    plain_settings,
    rebuild_scenario,
    settings_group,
)
from fedlearn.runner.parts import NO_PARTS, Parts
from fedlearn.runner.plan import Plan, build_plan
from fedlearn.runner.protection import protect_strategy
from fedlearn.runner.site_settings import refuse_site_settings
from fedlearn.runner.training_check import check_scenario, reported_warnings, with_gradient_warning
from fedlearn.runner.user_code import add_metrics
from fedlearn.trainers.class_weights import require_weight_per_class


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
    scenario: Scenario = build_group(Scenario, cfg, "scenario", allowed_modules(cfg))
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
    paths = plain_settings(cfg.get("metrics"), "metrics") or []
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
    rebuild = partial(rebuild_scenario, plain_settings(cfg.scenario, "scenario"), allow)
    return build_engine(
        cfg.engine, partial(build, cfg.engine, "engine", allow=allow), (scenario.data, scenario.trainer), rebuild
    )


def check_early_stop(cfg: DictConfig, task: Task) -> None:
    """Check ``early_stop.metric`` for the task of the scenario.

    Raises:
        SettingError: the task has no such metric.
    """
    settings = plain_settings(settings_group(cfg, "early_stop"), "early_stop")
    if settings.get("metric") is not None:
        EarlyStop(**settings, task=task)
