"""What an engine asks of a trainer, and what every trainer shares.

Shapes: K clients in a block, D parameters laid flat, N examples, S local steps, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Protocol

import numpy as np

from fedlearn.layout import Layout, default_initial
from fedlearn.local import LocalRule
from fedlearn.records import Array, LocalSettings, Order, Updates, Work
from fedlearn.seeds import Purpose, generator

Initial = Callable[[Layout, np.random.Generator], np.ndarray]


class Trainer(Protocol):
    """The only thing that knows a framework.

    Attributes:
        framework: ``torch``, ``jax`` or ``numpy``, for the header.
        device: where it computes, e.g. ``cpu``.
        layout: of the model's trainable parameters.
    """

    @property
    def framework(self) -> str: ...  # noqa: D102

    @property
    def device(self) -> str: ...  # noqa: D102

    @property
    def layout(self) -> Layout: ...  # noqa: D102

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``: equal for equal layouts and seeds, whatever the framework."""
        ...

    def fit(self, order: Order, rule: LocalRule, work: Sequence[Work]) -> Updates:
        """Train K clients from the global model. Row k of the result does not depend on the other clients.

        Returns updates with clients in the order of ``work``, ``metrics["loss"]`` (total loss and number of the
        examples seen), and without memory or extra, which `fedlearn.client.client_step` adds.
        """
        ...

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Raw outputs ``(N, C)`` float32 of the model for ``x`` ``(N, ...)``, in evaluation mode."""
        ...


def batch_plan(num_examples: int, local: LocalSettings, rng: np.random.Generator) -> np.ndarray:
    """Which examples make up each local step: ``(S, B)`` int32 row numbers, -1 where a batch is not full.

    Every pass visits each example once in a fresh random order. With ``local.steps`` passes go on until the steps
    are done; a batch never spans two passes. Torch, JAX and every engine use this plan, so they see equal batches.

    >>> batch_plan(3, LocalSettings(batch_size=2), np.random.default_rng(0)).shape
    (2, 2)
    """
    batch_size = min(local.batch_size, num_examples)
    batches_per_pass = ceil(num_examples / batch_size)
    num_passes = ceil(local.steps / batches_per_pass) if local.steps else local.epochs
    plan = np.full((num_passes, batches_per_pass * batch_size), -1, np.int32)
    for one_pass in plan:
        one_pass[:num_examples] = rng.permutation(num_examples)
    return plan.reshape(-1, batch_size)[: local.steps]


def plan_of(order: Order, one: Work) -> np.ndarray:
    """The batches of one client in one round."""
    rng = generator(order.seed, Purpose.BATCHES, round=order.round, client=one.client)
    return batch_plan(len(one.examples), order.local, rng)


def initial_parameters(layout: Layout, initial: Initial | None, seed: int) -> np.ndarray:
    """``initial(layout, rng)``, or torch's default law where it is None."""
    return (initial or default_initial)(layout, generator(seed, Purpose.INIT))
