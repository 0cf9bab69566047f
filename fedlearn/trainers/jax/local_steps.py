"""Take the local steps of clients in one compiled JAX program.

Shapes: K clients in a block, D parameters, S local steps, B batch, F features, C outputs or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fedlearn.algorithm.batch import Batch, ModelOutputs
from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.optimizers import STATE_PREFIX, STEPS
from fedlearn.core.records import LocalSettings
from fedlearn.trainers.jax.block_arrays import num_examples
from fedlearn.trainers.jax.dp_sgd import clipped_gradient
from fedlearn.trainers.jax.features import record_features
from fedlearn.trainers.jax.flat_model import FlatModel
from fedlearn.trainers.jax.loss_changes import training_loss
from fedlearn.trainers.jax.losses import Loss
from fedlearn.trainers.jax.noise import add_noise
from fedlearn.trainers.jax.optimizers import build_optimizer, clip_gradient, load_state, save_state

# shares of a block already run in parallel; threads within a small matrix product would wait for each other
SINGLE_THREAD_MATMUL = {"xla_cpu_multi_thread_eigen": False}
LARGE_MODEL = 2**20  # parameters; below this size, a further program costs more than it saves


class Objective(NamedTuple):
    """Hold the functions that give the loss of a batch in training.

    Attributes:
        loss: ``(outputs_BC, y_B) -> loss_B``.
        adjust: changes the outputs before the loss.
        penalty: ``(batch) -> penalty`` to add to the losses, or None.
        low_precision: whether the forward pass is in bfloat16.
    """

    loss: Loss
    adjust: Any
    penalty: Any
    low_precision: bool


class LocalSteps:
    """Build the program that trains a block of clients.

    Args:
        model: the model.
        loss: ``(outputs_BC, y_B) -> loss_B``.
        task: name of the task.
        device: device of JAX.
    """

    def __init__(self, model: FlatModel, loss: Loss, task: str, device: str) -> None:
        self.model, self.loss, self.task, self.device = model, loss, task, device
        self._jit = getattr(model.network.module, "jit", jax.jit)

    def compile(
        self, batching: str, rule: LocalRule, local: LocalSettings, deployed: bool, layerwise: bool
    ) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Return the compiled program that trains a block of clients, for one rule and one set of local settings."""
        private_gradient = self._private_gradient(local, deployed, layerwise) if local.example_dp else None

        def fit_client(
            received: Any, params_D: Any, broadcast: Any, x: jax.Array, y: jax.Array, client_inputs: Any
        ) -> Any:
            (rows_SB, num_steps, client, size, x_start, y_start, *rest) = client_inputs
            client_state, start_D, (counts_C, weights_C, previous_D), seeds, rates_S, kept = rest
            optimizer = build_optimizer(local, rates_S)
            loss = training_loss(self.loss, self.task, local, weights_C) if local.changes_loss else self.loss
            flat = {**client_state, **broadcast}
            previous = {"w_previous": previous_D} if rule.previous_model else {}
            penalty = rule.penalty and partial(_penalty, rule.penalty, params_D, {**flat, **previous})
            params = self.model.unflatten(params_D) if received is None else received
            adjust = partial(_adjust, rule, counts_C)
            objective = Objective(loss, adjust, penalty, low_precision=local.precision == "bfloat16")
            gradient_of = private_gradient or partial(self._gradient, local.micro_batch_size, objective)
            if rule.gradient is not None:
                gradient_of = partial(self._rule_gradient, rule, gradient_of, params_D, flat)
            start = params if start_D is None else self.model.unflatten(start_D)
            stats = self.model.unflatten_statistics(params_D if start_D is None else start_D)
            moves = self.model.unflatten(self._moves(rule)) if rule.frozen_parameters else None
            vectors = {name: self.model.unflatten(v_D) for name, v_D in flat.items()}
            names = list(vectors)
            roots = [jax.random.wrap_key_data(seed, impl="threefry2x32") for seed in seeds]
            keys = [jax.random.fold_in(root, client) for root in roots]

            def correct(g: Any, w: Any, w_global: Any, *leaves: Any) -> Any:
                return rule.correct(g, w, w_global, **dict(zip(names, leaves, strict=True)))

            def step(s: jax.Array, carry: Any) -> Any:
                weights, stats, state, total = carry
                rows_B = rows_SB[s]
                real_B = rows_B >= 0
                batch = (_rows(x, x_start, rows_B), _targets(y, y_start, rows_B), real_B)
                draws = [jax.random.fold_in(key, s) for key in keys]
                gradient, loss_sum, stats = gradient_of((weights, stats), *batch, draws, size)
                gradient = gradient if moves is None else jax.tree.map(jnp.multiply, gradient, moves)
                if local.max_grad_norm is not None:
                    gradient = clip_gradient(local.max_grad_norm, gradient)
                gradient = jax.tree.map(correct, gradient, weights, params, *vectors.values())
                change, state = optimizer.update(gradient, state, weights)
                change = change if moves is None else jax.tree.map(jnp.multiply, change, moves)  # no weight decay
                return optax.apply_updates(weights, change), stats, state, total + loss_sum

            first = (start, stats, self._optimizer_state(rule, optimizer.init(start), kept), jnp.zeros(()))
            weights, new_stats, state, total = lax.fori_loop(0, num_steps, step, first)
            change = jax.tree.map(jnp.subtract, (weights, new_stats), (start, stats))
            delta = self.model.flatten(*change) if received is None else change
            return delta, total, self._kept_vectors(rule, state, stats)

        def block(received: Any, params_D: Any, broadcast: Any, x: Any, y: Any, *per_client: Any) -> Any:
            fit = partial(fit_client, received, params_D, broadcast, x, y)
            in_turn = batching == "map" or (deployed and local.example_dp)  # vmap does not support the callback
            return lax.map(fit, per_client) if in_turn else jax.vmap(fit)(per_client)

        options = SINGLE_THREAD_MATMUL if self.device == "cpu" else None
        is_large = self.device == "cpu" and self.model.layout.num_parameters >= LARGE_MODEL
        if not (is_large and batching == "map"):
            return self._jit(partial(block, None), compiler_options=options)
        return self._in_several_programs(self._jit(block, compiler_options=options), options)

    def _in_several_programs(self, program: Callable[..., Any], options: Any) -> Callable[..., Any]:
        """Return a program for large models, which changes the axes of leaves in programs of their own.

        In one program, XLA changes the axes again for each use of the received model, number by number. That takes
        half of a round.
        """
        unflatten = jax.jit(self.model.unflatten, compiler_options=options)

        def block(params_D: Any, *rest: Any) -> Any:
            change, losses_K, kept = program(unflatten(params_D), params_D, *rest)
            rows_KD = np.empty((len(losses_K), self.model.layout.num_parameters), np.float32)
            self.model.write_rows(rows_KD, *change)
            return rows_KD, losses_K, kept

        return block

    def _moves(self, rule: LocalRule) -> np.ndarray:
        """Return 0 for frozen parameters and 1 for all others, ``(D,)``."""
        moves_D = np.ones(self.model.layout.num_parameters, np.float32)
        moves_D[self.model.layout.positions(rule.frozen_parameters)] = 0
        return moves_D

    def _optimizer_state(self, rule: LocalRule, state: Any, kept: Mapping[str, jax.Array]) -> Any:
        """Return the optimizer state of a client at the start of a round: a new state, or the kept state."""
        if not rule.optimizer_state:
            return state
        vectors = {name.removeprefix(STATE_PREFIX): self.model.unflatten(kept[name]) for name in rule.optimizer_state}
        return load_state(state, vectors, kept[STEPS][0])

    def _kept_vectors(self, rule: LocalRule, state: Any, stats: Any) -> dict[str, jax.Array]:
        """Return the optimizer state that a client keeps, as flat vectors; empty if it keeps none."""
        if not rule.optimizer_state:
            return {}
        (vectors, steps), zeros = save_state(state), jax.tree.map(jnp.zeros_like, stats)
        flat = {f"{STATE_PREFIX}{name}": self.model.flatten(vector, zeros) for name, vector in vectors.items()}
        return {**flat, STEPS: steps.reshape(1)}

    def _gradient(
        self,
        micro_size: int | None,
        objective: Objective,
        model: Any,
        x: Any,
        y: Any,
        real_B: Any,
        keys: Any,
        size: Any,
    ) -> tuple[Any, jax.Array, Any]:
        """Return the gradient of the mean loss, the total loss, and the statistics after the batch.

        Args:
            micro_size: examples per forward pass; None for the whole batch.
            objective: loss of the batch.
            model: weights and statistics.
            x: inputs of the batch.
            y: targets of the batch.
            real_B: True for examples, False for padding.
            keys: random keys of the model and of the noise.
            size: number of examples of the client; not used here.
        """
        weights, stats = model
        count = jnp.sum(real_B)

        def mean_loss(weights: Any, stats: Any, key: Any, x: Any, y: Any, real_B: Any) -> Any:
            losses_B, new_stats = self._losses(objective, weights, stats, x, y, real_B, key)
            total = jnp.sum(jnp.where(real_B, losses_B, 0.0))
            return total / count, (total, new_stats)

        gradient_of = jax.grad(mean_loss, has_aux=True)
        if micro_size is not None and micro_size < len(real_B):
            return _split_gradient(gradient_of, micro_size, model, keys[0], (x, y, real_B))
        gradient, (total, new_stats) = gradient_of(weights, stats, keys[0], x, y, real_B)
        return gradient, total, new_stats

    def _private_gradient(
        self, local: LocalSettings, deployed: bool, layerwise: bool
    ) -> Callable[..., tuple[Any, jax.Array, Any]]:
        """Return the gradient function of DP-SGD: the sum of clipped gradients plus noise, over the expected batch."""
        dp = local.example_dp
        assert dp is not None
        clipped = clipped_gradient(self.private_losses, clip=dp.clip, layerwise=layerwise)

        def gradient_of(model: Any, x: Any, y: Any, real_B: Any, keys: Any, size: Any) -> tuple[Any, jax.Array, Any]:
            total, loss_sum = clipped(model[0], x, y, real_B, keys[0])
            if dp.noise_multiplier:
                total = add_noise(total, dp.clip * dp.noise_multiplier, keys[1], secret=deployed)
            return jax.tree.map(lambda g: g / jnp.minimum(local.batch_size, size), total), loss_sum, model[1]

        return gradient_of

    def _losses(
        self, objective: Objective, params: Any, stats: Any, x: Any, y: Any, real_B: Any, key: Any
    ) -> tuple[jax.Array, Any]:
        """Return the loss of each example in training mode, and the statistics after the batch."""
        new: list[Any] = []

        def run() -> Any:
            inputs = _to_bfloat16((params, x)) if objective.low_precision else (params, x)
            outputs, new_stats = self.model.training_outputs(inputs[0], stats, inputs[1], real_B, key)
            new.append(jax.tree.map(lambda value, old: value.astype(old.dtype), new_stats, stats))
            return outputs

        loss, penalty = objective.loss, objective.penalty
        if penalty is None:
            return loss(objective.adjust(_as_float32(run())), y), new[0]
        raw, features = record_features(run, self.model.parameters)
        outputs, fixed = _as_float32(raw), partial(self._run_fixed, x)
        read = lambda: _as_float32(features())  # noqa: E731
        batch = Batch(outputs=outputs, read_features=read, targets=y, mask=real_B, run=fixed)
        return loss(objective.adjust(outputs), y) + penalty(batch), new[0]

    def _run_fixed(self, x: jax.Array, params_D: jax.Array) -> ModelOutputs:
        """Return the outputs of a model that is not trained, in evaluation mode and without gradients."""
        run = partial(self.model.outputs, lax.stop_gradient(params_D), x)
        outputs, features = record_features(run, self.model.parameters)
        return ModelOutputs(outputs=outputs, read_features=features)

    def _rule_gradient(
        self,
        rule: LocalRule,
        gradient_of: Any,
        global_D: jax.Array,
        vectors: Mapping[str, jax.Array],
        model: Any,
        *batch: Any,
    ) -> tuple[Any, jax.Array, Any]:
        """Return the gradient of the local rule; the total loss and the statistics of its first gradient."""
        assert rule.gradient is not None
        weights, stats = model
        zeros, results = jax.tree.map(jnp.zeros_like, stats), []

        def gradient_at(params_D: jax.Array) -> jax.Array:
            gradient, total, new_stats = gradient_of((self.model.unflatten(params_D), stats), *batch)
            results.append((total, new_stats))
            return self.model.flatten(gradient, zeros)

        grad_D = rule.gradient(gradient_at, self.model.flatten(weights, stats), global_D, **vectors)
        return self.model.unflatten(grad_D), *results[0]

    def private_losses(self, params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        """Return the loss of each example in training mode, for a model without statistics."""
        return self.loss(self.private_outputs(params, x, key), y)

    def private_outputs(self, params: Any, x: jax.Array, key: jax.Array) -> Any:
        """Return the outputs in training mode, for a model without statistics."""
        return self.model.training_outputs(params, {}, x, jnp.ones(num_examples(x), bool), key)[0]


def _split_gradient(
    gradient_of: Any, size: int, model: Any, key: jax.Array, batch: tuple[Any, ...]
) -> tuple[Any, jax.Array, Any]:
    """Return the gradient of the mean loss, with at most ``size`` examples per forward pass.

    Args:
        gradient_of: gradient of the loss of a part over the examples of the whole batch.
        size: number of examples per pass.
        model: weights and statistics.
        key: random key of the step.
        batch: inputs, targets, and whether an example is real.
    """
    weights, stats = model
    num_parts = -(-len(batch[-1]) // size)
    pad = num_parts * size - len(batch[-1])

    def divide(array: jax.Array, mode: str = "edge") -> jax.Array:
        padded = jnp.pad(array, ((0, pad), *((0, 0),) * (array.ndim - 1)), mode)
        return padded.reshape(num_parts, size, *array.shape[1:])

    parts = (*jax.tree.map(divide, batch[:-1]), divide(batch[-1], "constant"))

    def add(carry: Any, part: Any) -> Any:
        gradient, total, stats = carry
        number, *arrays = part
        new, (loss_sum, new_stats) = gradient_of(weights, stats, jax.random.fold_in(key, number), *arrays)
        return (jax.tree.map(jnp.add, gradient, new), total + loss_sum, new_stats), None

    first = (jax.tree.map(jnp.zeros_like, weights), jnp.zeros(()), stats)
    (gradient, total, stats), _ = lax.scan(add, first, (jnp.arange(num_parts), *parts))
    return gradient, total, stats


def _penalty(penalty: Any, global_D: jax.Array, vectors: Mapping[str, jax.Array], batch: Batch) -> Any:
    """Return the penalty of a rule for a batch."""
    return penalty(batch, global_D, **vectors)


def _to_bfloat16(tree: Any) -> Any:
    """Return parameters or inputs with floating-point numbers in bfloat16."""
    return jax.tree.map(lambda v: v.astype(jnp.bfloat16) if jnp.issubdtype(v.dtype, jnp.floating) else v, tree)


def _as_float32(values: jax.Array) -> jax.Array:
    """Return outputs or features of a forward pass in low precision as float32, and others unchanged."""
    return values.astype(jnp.float32) if values.dtype == jnp.bfloat16 else values


def _adjust(rule: LocalRule, counts_C: Any, outputs: jax.Array) -> Any:
    """Return the outputs for the loss, with the change that the rule makes to logits."""
    return outputs if rule.adjust_logits is None else rule.adjust_logits(outputs, counts_C)


def _rows(arrays: Any, start: jax.Array, rows_B: jax.Array) -> Any:
    """Return rows of a client. Padding repeats its first example, because zeros can be no valid inputs of a model.

    Args:
        arrays: arrays of all clients.
        start: first row of the client.
        rows_B: rows, counted from the first; -1 is padding.
    """
    places_B = start + jnp.maximum(rows_B, 0)
    return jax.tree.map(lambda array: array[places_B], arrays)


def _targets(y: jax.Array, start: jax.Array, rows_B: jax.Array) -> jax.Array:
    """Return targets of a client. Padding is 0: a loss over the batch, as for survival, must not see its event."""
    real_B = (rows_B >= 0).reshape(-1, *(1,) * (y.ndim - 1))
    return jnp.where(real_B, _rows(y, start, rows_B), jnp.zeros((), y.dtype))
