"""Build the network of a trained model, without data if the run describes its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import ClientId
from fedlearn.errors import DataError, FedlearnError
from fedlearn.loop.protocols import Trainer
from fedlearn.runner.config import build, build_scenario
from fedlearn.runner.model_folder import ModelDescription
from fedlearn.runner.run_config import read_run_config


@dataclass(frozen=True, kw_only=True)
class BuiltNetwork:
    """Hold the trainer of a network, and the shape of one model input."""

    trainer: Trainer
    input_shape: tuple[int, ...] = ()


def build_network(
    folder: Path,
    description: ModelDescription,
    framework: str | None,
    *,
    allow_targets: Sequence[str],
    device: str = "cpu",
) -> BuiltNetwork:
    """Build the network of a model.

    Args:
        folder: run folder.
        description: description of the model.
        framework: framework of the network; None is the framework of the run.
        allow_targets: modules of the user that may be imported.
        device: device of the network.

    Raises:
        SettingError: a module is not allowed.
        FedlearnError: the network differs from the parameters, or its scenario describes no network and its data are
            missing.
    """
    if description.network is None:
        built = _from_scenario(folder, framework, allow_targets)
    else:
        shape = tuple(description.network.arguments.get("input_shape", ()))
        built = BuiltNetwork(
            trainer=_from_description(description, framework, allow_targets, device), input_shape=shape
        )
    if built.trainer.layout.digest != description.layout.digest:
        fix = "the version of fedlearn that trained it, or the earlier code of the model"
        raise FedlearnError(f"the network of {folder} has other parameters than the trained model\n  try       {fix}")
    return built


def _from_description(
    description: ModelDescription, framework: str | None, allow_targets: Sequence[str], device: str
) -> Trainer:
    network, model = description.network, description.settings.get("model")
    assert network is not None
    if isinstance(model, Mapping):
        model = build(model, "model", allow=allow_targets)
    data = FederatedData(
        task=description.task,
        clients=(),
        train=_refuse_access,
        test=_refuse_access,
        num_classes=description.num_classes,
    )
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in network.arguments.items()}
    chosen = framework or description.settings.get("framework") or "torch"
    node = {"_target_": network.builder, **arguments, "framework": chosen, "device": device}
    trainer: Trainer = build(node, "model", model, data, allow=allow_targets)[0]
    return trainer


def _from_scenario(folder: Path, framework: str | None, allow_targets: Sequence[str]) -> BuiltNetwork:
    cfg = read_run_config(folder)
    cfg.allow_targets = list(allow_targets)
    if framework and "framework" in cfg.scenario:
        cfg.framework = cfg.scenario.framework = framework
    try:
        scenario = build_scenario(cfg)
    except DataError as error:
        fix = "the machine with the data, or Scenario(network=..., preprocessing=...) in the scenario"
        problem = f"the scenario of {folder} does not describe its network, so its data are needed"
        raise FedlearnError(f"{problem}: {str(error).splitlines()[0]}\n  try       {fix}") from error
    data = scenario.data
    x = next(x for x in (data.train(client).x for client in data.clients) if len(x))
    return BuiltNetwork(trainer=scenario.trainer, input_shape=x.shape[1:])


def _refuse_access(client: ClientId) -> NoReturn:
    raise DataError("a trained model has no examples")
