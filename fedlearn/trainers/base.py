"""Parts that all trainers share: a wrapper, initial parameters, and checks of what a model supports.

Shapes: K clients in a block, D parameters, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Array, ClientWork, LocalSettings, Request
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer

Initializer = Callable[[Layout, np.random.Generator], np.ndarray]
FROM_SEED = "weights drawn from the seed"  # values of `Trainer.initialization`
FROM_MODULE = "weights as given"
FROM_INITIALIZER = "weights from an initializer"


class TrainerWrapper:
    """A trainer around another one: it forwards every member that a subclass does not define.

    Args:
        trainer: the inner trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    @property
    def framework(self) -> str:
        """The framework of the inner trainer."""
        return self.trainer.framework

    @property
    def device(self) -> str:
        """The device of the inner trainer."""
        return self.trainer.device

    @property
    def layout(self) -> Layout:
        """The layout of the model."""
        return self.trainer.layout

    @property
    def initialization(self) -> str:
        """The source of the initial parameters."""
        return self.trainer.initialization

    @property
    def supports_dp_sgd(self) -> bool:
        """Whether the inner trainer has DP-SGD."""
        return self.trainer.supports_dp_sgd

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """See `Trainer.describe_batching`."""
        return self.trainer.describe_batching(num_clients, num_examples)

    def init(self, seed: int) -> np.ndarray:
        """See `Trainer.init`."""
        return self.trainer.init(seed)

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """See `Trainer.predict`."""
        return self.trainer.predict(params_D, x)


def class_counts(trainer: Trainer, task: str, request: Request, work: Sequence[ClientWork]) -> np.ndarray:
    """Count the training examples of each class at K clients, for `LocalRule.adjust_logits`.

    Returns:
        ``(K, C)`` float32, C >= 2.

    Raises:
        SettingError: the task is regression.
    """
    require(task != "regression", "strategy", "one that adjusts logits", "a scenario with classes", "strategy=fedavg")
    num_classes = max(2, trainer.predict(request.params_D, work[0].examples.x[:1]).shape[1])
    return np.stack([np.bincount(one.examples.y.astype(np.int64), minlength=num_classes) for one in work]).astype(
        np.float32
    )


def require_features(has_features: bool) -> None:
    """Refuse a model that has no features for `LocalRule.feature_penalty`.

    Raises:
        SettingError: the model has none.
    """
    expected = "a model that ends in one affine map (torch.nn.Linear, flax.linen.Dense) of features that it learns"
    require(has_features, "strategy", "one that compares features", expected, "model=mlp, or strategy=fedprox")


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def initial_parameters(
    layout: Layout, initial: Initializer, seed: int, buffers: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """Return initial parameters beside the given buffers.

    Args:
        layout: layout of the model.
        initial: draws the parameters from ``(layout, rng)``.
        seed: seed of the run.
        buffers: values of the buffers, by name.
    """
    first_D = initial(layout.trainable, generator(seed, Purpose.INIT))
    return layout.pack({**layout.trainable.unpack(first_D), **buffers}) if buffers else first_D


def keep_weights(weights: Mapping[str, np.ndarray]) -> Initializer:
    """Return an initializer that gives the parameters these values, whatever the seed.

    Args:
        weights: value of each parameter, by its name in the layout. Other names are ignored.
    """

    def keep(layout: Layout, rng: np.random.Generator) -> np.ndarray:
        return layout.pack({leaf.name: weights[leaf.name] for leaf in layout.leaves})

    return keep


def describe_initializer(initial: Initializer) -> str:
    """Return one phrase on the source of the initial parameters, for the header of a run."""
    if initial is default_initial_parameters:
        return FROM_SEED
    return FROM_INITIALIZER


def refuse_dp_sgd_with_buffers(layout: Layout, local: LocalSettings) -> None:
    """Refuse DP-SGD for a model with batch statistics.

    Batch statistics make the gradient of an example depend on the other examples of its batch. Clipping then does not
    bound the influence of one example, and the statistics themselves would be sent without noise.

    Raises:
        SettingError: DP-SGD is set and the model has buffers.
    """
    some = ", ".join(layout.buffers[:2])
    expected = f"another, or a model with group norm: statistics of this one ({some}) mix the examples of a batch"
    ok = local.example_dp is None or not layout.buffers
    require(ok, "privacy", "example", expected, "privacy=central with buffers=local, or model=gn_cnn")
