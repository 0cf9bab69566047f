"""Write and read ``model/`` of a run folder, which predictions need instead of the training data.

- ``model/preprocessing.json``: see `fedlearn.data.preprocessing.Preprocessing`; absent for a scenario without it
- ``model/model.json``: network, parameter layout and clients, see `ModelDescription`
- ``model/parameters.safetensors``: parameters after the last round, by name
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from fedlearn.advice import command
from fedlearn.callbacks.checkpoints import MODEL_FOLDER
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.layout import Layout, Leaf
from fedlearn.core.plain_text import plain_line
from fedlearn.core.serialization import WireError, parse_json_object, read_fields
from fedlearn.core.tasks import Task
from fedlearn.data.input_parts import Parts, parts_from_json, parts_of, parts_to_json
from fedlearn.data.preprocessing import Preprocessing
from fedlearn.errors import SettingError
from fedlearn.loop.scenario import Network, Scenario
from fedlearn.runner.builders import find_target
from fedlearn.runner.experiment import Experiment
from fedlearn.runner.run_folder import CONFIG_FILE, RunFolderError
from fedlearn.runner.user_code import find_task

MODEL_FILE, PREPROCESSING_FILE = "model.json", "preprocessing.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Describe the model of a run, without its parameters.

    Args:
        scenario: name of the scenario.
        model: description of the model for people, e.g. ``mlp 13-32-1``.
        task: task of the model.
        num_classes: number of classes.
        metric: metric that selects the best round.
        layout: names and shapes of the parameters.
        network: builder of the model; None for a scenario without a description.
        settings: settings of the model, as plain values: ``model``, ``framework``, ``allow_targets``.
        client_names: names of clients by id.
        personal_parameters: name patterns of parameters that stay at the clients.
        has_personal_models: whether each client has a personal model beside the global model.
        input_shape: shape of one model input of a scenario without ``network``; empty if unknown.
        inputs: shape and type of each input of a model with several inputs. It is empty for one input, and for a
            model whose preprocessing makes the inputs.
    """

    scenario: str
    model: str
    task: Task
    num_classes: int
    metric: str
    layout: Layout
    network: Network | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    client_names: Mapping[int, str] = field(default_factory=dict)
    personal_parameters: tuple[str, ...] = ()
    has_personal_models: bool = False
    input_shape: tuple[int, ...] = ()
    inputs: Parts = field(default_factory=dict)

    @property
    def is_personalised(self) -> bool:
        """True if clients have different models."""
        return bool(self.personal_parameters) or self.has_personal_models


def with_declared_model(experiment: Experiment, cfg: DictConfig) -> Experiment:
    """Return the experiment with inputs and network from the settings, if its data are at the nodes.

    A coordinator has no other information about the data, so the files of the model contain the settings only.
    """
    scenario = experiment.scenario
    if scenario.data.num_train is None or scenario.preprocessing is not None:
        return experiment
    settings = OmegaConf.to_container(cfg.scenario, resolve=True)
    assert isinstance(settings, dict)
    declared = getattr(find_target(settings["_target_"], "scenario"), "declared_model", None)
    found = declared(settings) if declared is not None else None
    if found is None or not _fits(found[0], scenario):
        return experiment
    digest = {"digest": scenario.base_digest} if scenario.base_digest else {}
    network = replace(found[1], arguments={**found[1].arguments, **digest})
    return replace(experiment, scenario=replace(scenario, preprocessing=found[0], network=network))


def _fits(preprocessing: Preprocessing, scenario: Scenario) -> bool:
    target, data = preprocessing.target, scenario.data
    return target.task.name == data.task.name and (not target.classes or len(target.classes) == data.num_classes)


def write_model_folder(folder: Path, experiment: Experiment, cfg: DictConfig) -> None:
    """Write ``preprocessing.json`` and ``model.json`` into ``model/`` of a run folder, each atomically."""
    scenario, path = experiment.scenario, folder / MODEL_FOLDER
    path.mkdir(exist_ok=True)
    if scenario.preprocessing is not None:
        write_atomically(path / PREPROCESSING_FILE, scenario.preprocessing.to_json())
    write_atomically(path / MODEL_FILE, json.dumps(_to_json(_describe(experiment, cfg)), indent=1) + "\n")


def _describe(experiment: Experiment, cfg: DictConfig) -> ModelDescription:
    scenario, rule = experiment.scenario, experiment.plan.strategy.local
    settings = OmegaConf.to_container(cfg.scenario, resolve=True)
    assert isinstance(settings, dict)
    x = _example_inputs(scenario)
    metric = OmegaConf.select(cfg, "early_stop.metric") or scenario.metric or scenario.data.task.main_metric
    return ModelDescription(
        scenario=scenario.name,
        model=scenario.model,
        task=scenario.data.task,
        num_classes=scenario.data.num_classes,
        metric=metric,
        layout=experiment.engine.layout,
        network=scenario.network,
        settings={
            "model": settings.get("model"),
            "framework": settings.get("framework") or cfg.get("framework"),
            "allow_targets": list(cfg.get("allow_targets") or []),
        },
        client_names={int(client): scenario.data.name(client) for client in scenario.data.clients},
        personal_parameters=tuple(rule.personal_parameters),
        has_personal_models=rule.personal is not None,
        input_shape=() if x is None or scenario.network is not None else tuple(map(int, x.shape[1:])),
        inputs={} if x is None or scenario.preprocessing is not None else parts_of(x),
    )


def _example_inputs(scenario: Scenario) -> np.ndarray | None:
    """Return the inputs of a client with examples; None at a coordinator, which has no data."""
    data = scenario.data
    if data.num_train is not None:
        return None
    return next((x for x in (data.train(client).x for client in data.clients) if len(x)), None)


def read_model_description(folder: Path, allow_targets: Sequence[str] = ()) -> ModelDescription:
    """Return the description in ``model/model.json`` of a run folder.

    Nothing in the file is executed. The module of a task of the user is imported only if it is allowed.

    Args:
        folder: run folder.
        allow_targets: modules of the user that may be imported.

    Raises:
        SettingError: the module of the task is not allowed.
        RunFolderError: the folder is not a run folder, or the file is missing or damaged.
    """
    with _readable(folder) as content:
        return _from_json(content, allow_targets)


def read_model_settings(folder: Path) -> Mapping[str, Any]:
    """Return the settings in ``model/model.json`` of a run folder, for the check of consent before code is imported.

    Raises:
        RunFolderError: see `read_model_description`.
    """
    with _readable(folder) as content:
        settings = content["settings"]
        if not isinstance(settings, dict):
            raise TypeError("the settings are not a mapping")
        return settings


@contextmanager
def _readable(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the content of ``model/model.json``. An error of its reader names the file."""
    path = folder / MODEL_FOLDER / MODEL_FILE
    try:
        yield parse_json_object(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not (folder / CONFIG_FILE).exists():
            fix = "the folder that a run prints as saved, e.g. outputs/heart/fedavg/..."
            raise RunFolderError(f"{folder} is not a run folder: it has no {CONFIG_FILE}\n  advice    {fix}") from None
        fix = command("python -m simulations.resume", folder)
        raise RunFolderError(f"{path} does not exist\n  expected  a run that started\n  try       {fix}") from None
    except SettingError:
        raise
    except (OSError, ValueError, WireError, KeyError, TypeError, AttributeError) as error:
        fix = "the file of the run, and the version of fedlearn that wrote it"
        raise RunFolderError(f"{path} cannot be read: {error}\n  advice    {fix}") from error


def read_preprocessing(folder: Path, task: Task | None = None) -> Preprocessing | None:
    """Return the inputs and the target in ``model/preprocessing.json`` of a run folder; None without this file.

    Args:
        folder: run folder.
        task: task of the model, if it is a task of the user.

    Raises:
        DataError: the file is damaged.
    """
    path = folder / MODEL_FOLDER / PREPROCESSING_FILE
    if not path.exists():
        return None
    return Preprocessing.from_json(path.read_text(encoding="utf-8"), source=str(path), task=task)


def _to_json(description: ModelDescription) -> dict[str, Any]:
    network = description.network
    return {
        "format": FORMAT,
        "scenario": description.scenario,
        "model": description.model,
        "task": description.task.name,
        "num_classes": description.num_classes,
        "metric": description.metric,
        "network": {"builder": network.builder, "arguments": dict(network.arguments)} if network else None,
        "settings": dict(description.settings),
        "personal_parameters": list(description.personal_parameters),
        "has_personal_models": description.has_personal_models,
        "input_shape": list(description.input_shape),
        "inputs": parts_to_json(description.inputs),
        "layout": [[leaf.name, list(leaf.shape), leaf.dtype, leaf.is_buffer] for leaf in description.layout.leaves],
        "client_names": {str(client): name for client, name in description.client_names.items()},
    }


def _from_json(content: Mapping[str, Any], allow_targets: Sequence[str]) -> ModelDescription:
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')!r}, expected {FORMAT}")
    texts = read_fields(content, scenario=str, model=str, metric=str)
    others = read_fields(content, num_classes=int, has_personal_models=bool, layout=list, personal_parameters=list)
    groups = read_fields(content, settings=dict, client_names=dict)
    network, task = content["network"], find_task(str(content["task"]), allow_targets)
    return ModelDescription(
        **{name: plain_line(text) for name, text in texts.items()},
        task=task,
        num_classes=others["num_classes"],
        layout=Layout(tuple(_leaf(*item) for item in others["layout"])),
        network=network and Network(builder=str(network["builder"]), arguments=dict(network["arguments"])),
        settings=groups["settings"],
        client_names={int(client): plain_line(str(name)) for client, name in groups["client_names"].items()},
        personal_parameters=tuple(map(str, others["personal_parameters"])),
        has_personal_models=others["has_personal_models"],
        input_shape=tuple(map(int, content.get("input_shape", ()))),
        inputs=parts_from_json(content.get("inputs", {})),
    )


def _leaf(name: str, shape: list[int], dtype: str, is_buffer: bool) -> Leaf:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("a wrong shape in the layout")
    return Leaf(str(name), tuple(shape), str(dtype), is_buffer=bool(is_buffer))
