"""Build the network of a trained model, without data if the run describes its network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fedlearn.advice import assignment
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.records import ClientId
from fedlearn.errors import DataError, FedlearnError, require
from fedlearn.loop.protocols import Trainer
from fedlearn.runner.base_model import find_base, has_base
from fedlearn.runner.builders import find_target
from fedlearn.runner.experiment import build_scenario
from fedlearn.runner.instantiation import build
from fedlearn.runner.model_folder import ModelDescription
from fedlearn.runner.parts import OBJECT_TARGET
from fedlearn.runner.run_config import read_run_config

NETWORK_BUILDERS = frozenset(  # functions of the library that the file of a model may name
    {
        "fedlearn.trainers.pretrained.build_pretrained",
        "simulations.models.build_trainer",
        "simulations.models.recommendation.build_recommender",
        "simulations.models.recommendation.next_film.build_next_film",
        "simulations.models.text.build_language_model",
        "simulations.models.text.build_tagger",
        "simulations.models.text.build_text_classifier",
    }
)


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
    require_same_layout(built.trainer, description, folder)
    return built


def require_same_layout(trainer: Trainer, description: ModelDescription, folder: Path) -> None:
    """Refuse a trainer whose network has other parameters than the trained model.

    Raises:
        FedlearnError: names or shapes of the parameters differ.
    """
    if trainer.layout.digest != description.layout.digest:
        fix = "the version of fedlearn that trained it, or the earlier code of the model"
        raise FedlearnError(f"the network of {folder} has other parameters than the trained model\n  advice    {fix}")


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
    if has_base(description):
        find_base(description)
    builder = _find_builder(network.builder, allow_targets)
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in network.arguments.items()}
    chosen = framework or description.settings.get("framework") or "torch"
    try:
        trainer: Trainer = builder(model, data, framework=chosen, device=device, **arguments)[0]
    except (TypeError, ValueError) as error:
        if isinstance(error, FedlearnError):
            raise
        fix = "the version of fedlearn that wrote model/model.json"
        raise FedlearnError(f"the network cannot be built: {error}\n  advice    {fix}") from error
    return trainer


def _find_builder(name: str, allow_targets: Sequence[str]) -> Callable[..., Any]:
    """Return a builder of networks. A model file is untrusted, so it may name no other function.

    Raises:
        SettingError: the name is neither in `NETWORK_BUILDERS` nor in an allowed module.
    """

    def is_allowed(place: str) -> bool:
        return any(place == module or place.startswith(f"{module}.") for module in allow_targets)

    expected = "a builder of networks of the library, or one in an allowed module, which you trust"
    fix = assignment("allow_targets", [name.partition(".")[0]])
    is_library = name in NETWORK_BUILDERS
    require(is_library or is_allowed(name), "network.builder", name, expected, fix)
    builder: Callable[..., Any] = find_target(name, "network")
    require(is_library or is_allowed(builder.__module__), "network.builder", name, expected, fix)
    return builder


def _from_scenario(folder: Path, framework: str | None, allow_targets: Sequence[str]) -> BuiltNetwork:
    cfg = read_run_config(folder)
    if cfg.scenario.get("_target_") == OBJECT_TARGET:
        problem = f"the scenario of {folder} was an object of a Python program, so its network is unknown"
        fix = f"fedlearn.load({str(folder)!r}, trainer=...)   (in Python)"
        raise FedlearnError(f"{problem}\n  expected  a trainer with this network\n  advice    {fix}")
    cfg.allow_targets = list(allow_targets)
    if framework and "framework" in cfg.scenario:
        cfg.framework = cfg.scenario.framework = framework
    try:
        scenario = build_scenario(cfg)
    except DataError as error:
        fix = "the machine with the data, or Scenario(network=..., preprocessing=...) in the scenario"
        problem = f"the scenario of {folder} does not describe its network, so its data are needed"
        raise FedlearnError(f"{problem}: {str(error).splitlines()[0]}\n  advice    {fix}") from error
    data = scenario.data
    x = next(x for x in (data.train(client).x for client in data.clients) if len(x))
    return BuiltNetwork(trainer=scenario.trainer, input_shape=x.shape[1:])


def _refuse_access(client: ClientId) -> NoReturn:
    raise DataError("a trained model has no examples")
