"""Build the description of a run for its header and its callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlearn.algorithm.transforms import estimate_bytes
from fedlearn.callbacks.run_files import partition_summary
from fedlearn.callbacks.run_history import History
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.threads import available_cores
from fedlearn.loop.scenario import Scenario
from fedlearn.runner.experiment import Experiment
from fedlearn.runner.run_config import config_to_dict
from fedlearn.runner.run_mode import RunMode

MAX_CLIENTS_COUNTED = 10_000
MAX_CLIENTS_NAMED = 20
HIDDEN_SETTINGS = ("_target_", "clients_per_round")
OMITTED_DEFAULTS = {"weighting": "examples", "select": "uniform"}


def build_run_info(
    experiment: Experiment,
    cfg: DictConfig,
    folder: Path,
    *,
    run_mode: RunMode,
    start_round: int = 0,
    history: History = (),
) -> RunInfo:
    """Return the description of a run before its first round.

    Args:
        experiment: experiment that runs.
        cfg: all settings.
        folder: run folder.
        run_mode: simulation or deployment.
        start_round: number of completed rounds, >= 0; default 0.
        history: lines of the completed rounds; default none.
    """
    scenario, trainer = experiment.scenario, experiment.scenario.trainer
    data = scenario.data
    settings = OmegaConf.to_container(cfg.strategy, resolve=True)
    assert isinstance(settings, dict)
    return RunInfo(
        scenario=scenario.name,
        task=data.task,
        metric=scenario.metric or "",
        source=" · ".join(part for part in (_partition(scenario.partition), data.source) if part),
        num_clients=len(data.clients),
        client_names=data.names,
        examples_per_client=_examples(data),
        model=scenario.model + f" · statistics {experiment.plan.buffers}" * bool(trainer.layout.buffers),
        num_parameters=trainer.layout.num_parameters,
        strategy=_name(cfg, settings),
        strategy_settings=_short_form(settings),
        cohort=_cohort(experiment),
        training=experiment.plan.training,
        privacy=_guarantee(experiment),
        poisoning=_poisoning(experiment, cfg),
        compress=_compress(experiment, cfg),
        bytes_per_update=_bytes_per_update(experiment),
        engine=_last(cfg.engine._target_),
        system=_system(cfg, experiment),
        machine=" · ".join(
            [trainer.framework, _device(trainer.device), experiment.engine.describe(_cohort_size(experiment))]
        ),
        framework=trainer.framework,
        initialization=f"weights from {cfg.init}" if cfg.get("init") else trainer.initialization,
        seed=experiment.plan.seed,
        rounds=experiment.plan.schedule.rounds,
        folder=folder,
        start_round=start_round,
        history=history,
        rerun_command=run_mode.rerun_command(folder),
        resume_command=run_mode.resume_command(folder),
        config=config_to_dict(cfg, resolve_callbacks=True),
        layout=experiment.engine.layout,
        target=_target(scenario),
        partition=partition_summary(data, target_classes(scenario)) if data.num_train is None else None,
        data_check=None if start_round else scenario.data_check,
        deployed=experiment.engine.deployed,
        client_states=lambda: experiment.engine.client_states,
    )


def target_classes(scenario: Scenario) -> tuple[str, ...]:
    """Return the names of the classes; empty if the scenario has no names."""
    return scenario.preprocessing.target.classes if scenario.preprocessing else ()


def _target(scenario: Scenario) -> dict[str, Any]:
    if scenario.preprocessing is None:
        return {}
    target = scenario.preprocessing.target
    return {"name": target.name, "unit": target.unit, "classes": list(target.classes)}


def _guarantee(experiment: Experiment) -> Mapping[str, Any]:
    guarantee = experiment.plan.strategy.privacy_guarantee
    if guarantee is None:
        return {}
    source = "from the operating system's generator" if experiment.engine.deployed else "from the seed: a simulation"
    return {**guarantee.to_json(), "noise": source}


def _poisoning(experiment: Experiment, cfg: DictConfig) -> str:
    """Return kind and settings of the poisoning, and the malicious clients; empty without malicious clients."""
    malicious, num_clients = sorted(experiment.malicious_clients), len(experiment.engine.clients)
    if not malicious:
        return ""
    names = [experiment.scenario.data.name(client) for client in malicious[:MAX_CLIENTS_NAMED]]
    names += ["..."] if len(malicious) > MAX_CLIENTS_NAMED else []
    settings = OmegaConf.to_container(cfg.poisoning, resolve=True)
    assert isinstance(settings, dict)
    shown = _short_form({key: value for key, value in settings.items() if key not in ("fraction", "trusted")})
    clients = f"{len(malicious):,} of {num_clients:,} clients: {', '.join(names)}"
    return " · ".join(part for part in (experiment.plan.poisoning.kind.replace("_", " "), shown, clients) if part)


def _compress(experiment: Experiment, cfg: DictConfig) -> str:
    """Return name and settings of the codec; empty without compression."""
    if experiment.plan.compress.codec is None:
        return ""
    settings = OmegaConf.to_container(cfg.compress, resolve=True)
    assert isinstance(settings, dict)
    return " · ".join(part for part in (_last(settings["_target_"]), _short_form(settings)) if part)


def _bytes_per_update(experiment: Experiment) -> int:
    """Return the size of an update in bytes. With a codec, it is an estimate; each round reports the exact size."""
    strategy = experiment.plan.strategy
    layout, codec = strategy.shared_layout(experiment.scenario.trainer.layout), strategy.codec
    return 4 * layout.num_parameters if codec is None else estimate_bytes(codec, layout)


def _system(cfg: DictConfig, experiment: Experiment) -> str:
    name = experiment.plan.system.name
    settings = OmegaConf.to_container(cfg.system, resolve=True) if name != "none" else {}
    assert isinstance(settings, dict)
    return " · ".join(part for part in (name, _short_form(settings)) if part) if settings else ""


def _partition(partition: str) -> str:
    return "" if partition == "natural" else partition


def _name(cfg: DictConfig, settings: Mapping[Any, Any]) -> str:
    """Return the option name of the strategy (a file in ``conf/strategy``), or the name of its builder."""
    return str(cfg.get("run_name") or settings["_target_"].replace(".", "/")).rpartition("/")[2]


def _last(dotted: str) -> str:
    return dotted.rpartition(".")[2]


def _short_form(settings: Mapping[Any, Any]) -> str:
    shown = {key: value for key, value in settings.items() if key not in HIDDEN_SETTINGS and value is not None}
    shown = {key: value for key, value in shown.items() if OMITTED_DEFAULTS.get(key) != value}
    return " · ".join(f"{str(key).replace('_', ' ')} {_value(value)}" for key, value in shown.items())


def _value(value: Any) -> str:
    if isinstance(value, dict) and "_target_" in value:
        return _last(str(value["_target_"]))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cohort(experiment: Experiment) -> str:
    num_clients, size = len(experiment.engine.clients), _expected_size(experiment)
    law = experiment.plan.strategy.select.law
    rule = experiment.plan.strategy.asynchrony
    if rule is not None:
        in_flight = min(rule.concurrency, num_clients)
        return f"{in_flight:,} of {num_clients:,} clients in flight, {rule.buffer_size:,} updates per step"
    if law is None:
        return f"chosen from {num_clients:,} clients each round"
    average = " on average" if law.kind == "poisson" else ""
    return f"{'all ' * (size == num_clients)}{size:,.10g} of {num_clients:,} clients per round{average}"


def _expected_size(experiment: Experiment) -> float:
    num_clients, law = len(experiment.engine.clients), experiment.plan.strategy.select.law
    if law is not None and law.rate is not None:
        return law.rate * num_clients
    return num_clients if law is None or law.size is None else law.size


def _cohort_size(experiment: Experiment) -> int:
    rule, engine = experiment.plan.strategy.asynchrony, experiment.engine
    if rule is not None:
        return min(rule.concurrency, len(engine.clients), engine.mixed_block_size)
    return ceil(round(_expected_size(experiment), 6))


def _examples(data: FederatedData) -> tuple[int, int] | None:
    if data.num_train is not None:
        return (min(data.num_train.values()), max(data.num_train.values())) if data.num_train else None
    if len(data.clients) > MAX_CLIENTS_COUNTED:
        return None
    counts = [len(data.train(client)) for client in data.clients]
    return min(counts), max(counts)


def _device(device: str) -> str:
    cores = available_cores()
    return f"{device}, {cores} core{'s' * (cores != 1)}" if device == "cpu" else device
