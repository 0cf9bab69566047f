"""Train a flax model and predict with it, in JAX.

A block of clients is one compiled program. The program trains one client after another (``lax.map``). Each client takes
its own number of steps (``fori_loop`` with a dynamic end). The examples of all clients are concatenated, so clients
with fewer examples need no padding.

Only this folder and `fedlearn.testing` import jax and flax.

Shapes: K clients in a block, D parameters, N examples, S local steps, B batch, C outputs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from fedlearn.algorithm.local_rule import PREVIOUS_MODEL, LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.layout import RUNNING_MEAN, RUNNING_VARIANCE, Layout, default_initial_parameters
from fedlearn.core.model_report import ModelReport
from fedlearn.core.optimizers import STATE_PREFIX, STEPS
from fedlearn.core.random import Purpose, integer_seed
from fedlearn.core.records import Array, ClientWork, Examples, LocalSettings, MetricSum, Request, Updates
from fedlearn.core.schedules import learning_rates
from fedlearn.core.tasks import Task, as_task
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.trainers.base import (
    FROM_MODULE,
    Initializer,
    available_cores,
    class_counts,
    describe_initializer,
    initial_parameters,
    keep_weights,
    refuse_dp_sgd_with_buffers,
    refuse_dp_sgd_with_coupled_loss,
    refuse_micro_batches_with_coupled_loss,
    require_class_loss,
)
from fedlearn.trainers.batching import (
    balance_shares,
    batch_plans,
    draw_by_round,
    poisson_plans,
    rounds_of,
    shared_base_array,
)
from fedlearn.trainers.class_weights import class_weights
from fedlearn.trainers.contract import kind_of, require_loss_function, select_output
from fedlearn.trainers.jax.contract import ModuleCheck, initial_shapes, require_module, require_types
from fedlearn.trainers.jax.dp_sgd import clipped_gradient
from fedlearn.trainers.jax.example_check import QUICK, ExampleCheck, refuse_written_state
from fedlearn.trainers.jax.features import with_features
from fedlearn.trainers.jax.loss_changes import training_loss
from fedlearn.trainers.jax.losses import LOSSES, Loss, loss_of
from fedlearn.trainers.jax.noise import add_noise
from fedlearn.trainers.jax.optimizers import build_optimizer, check_optimizer, clip_gradient, load_state, save_state

# shares of a block already run in parallel; threads within a small matrix product would wait for each other
SINGLE_THREAD_MATMUL = {"xla_cpu_multi_thread_eigen": False}

BATCH_STATS = "batch_stats"  # name of the flax collection with the buffers of a model
LEAF_NAMES = {  # flax -> torch
    "params": {"kernel": "weight", "scale": "weight", "embedding": "weight"},
    BATCH_STATS: {"mean": RUNNING_MEAN, "var": RUNNING_VARIANCE},
}
Path = tuple[str, ...]  # path of a leaf in flax
NamedShape = tuple[str, tuple[int, ...]]  # name and shape of a leaf in torch


class JaxTrainer:
    """Train a flax (linen) module, with the names and axes of the same model in torch.

    Args:
        module: maps ``(B, ...)`` float32 to ``(B, C)``. Its ``__call__`` has the argument ``train: bool`` if it
            behaves differently in training. If it has a method ``jit``, this method compiles the programs. It can
            pass values other than parameters to them. Parameters of other types become float32.
        task: a `Task` or the name of a shipped task. It determines the loss, e.g. binary cross-entropy on one logit.
        input_shape: shape of the input of one example.
        initial: draws the initial parameters from ``(layout, rng)``; default `default_initial_parameters`, or
            ``variables`` if they are set.
        variables: initial weights as ``module.init`` returns them: ``params`` and, with batch norm, ``batch_stats``.
        device: device of JAX, for example ``cpu`` (default), ``cuda:0`` or ``tpu``.
        loss: ``(outputs_BC, y_B) -> loss_B``; default the loss of the task.
        output: key, position or attribute of the outputs, for a module that returns a dict, a tuple or a dataclass.
            None for a module that returns an array.
        batching: ``map`` trains one client after another inside the program. ``vmap`` trains all clients together.
            ``auto`` (default) selects ``map`` on a CPU, whose cache can hold one model, and ``vmap`` elsewhere.

    *Guarantees*:

    - Initial parameters and batches equal the ones of a `TorchTrainer` of the same model.
    - Dropout draws from (seed, round, client), in every block. In DP-SGD a draw also follows from its example, and at
      real clients from secret entropy.
    - ``batch_stats`` are buffers. Only forward passes change them, as in `TorchTrainer`.
    - ``nn.BatchNorm`` computes statistics of real examples only, not of the padding of a batch. It averages the
      unbiased variance as torch does, although flax itself averages the biased variance. The momentum 0.1 in torch
      equals 0.9 in flax. Other layers with batch statistics would include the padding.

    Raises:
        SettingError: The module is no linen module, or has state other than ``params`` and ``batch_stats``.
    """

    framework, supports_dp_sgd, supports_process_pool = "jax", True, False  # a forked process has no JAX threads

    def __init__(
        self,
        module: nn.Module,
        *,
        task: Task | str,
        input_shape: tuple[int, ...],
        initial: Initializer | None = None,
        variables: Mapping[str, Any] | None = None,
        device: str = "cpu",
        loss: Loss | None = None,
        output: str | int | None = None,
        batching: str = "auto",
    ) -> None:
        require_loss_function(loss)
        require_module(module)
        self.module, self.task, self.device = module, as_task(task), device
        self._has_task_loss = loss is None
        self.loss, self._output = loss or loss_of(self.task), output
        _ = self._jax_device  # raise an error for an absent device first
        self._takes_train = "train" in inspect.signature(module.__call__).parameters
        self._eval: dict[str, Any] = {"train": False} if self._takes_train else {}
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        shapes = initial_shapes(module, keys, input_shape, **self._eval)
        if set(shapes) - {"params", BATCH_STATS}:
            unknown = ", ".join(sorted(set(shapes) - {"params", BATCH_STATS}))
            expected = f"no state other than params and {BATCH_STATS}, because updates do not include it"
            raise SettingError("module", f"a model with the state {unknown}", expected, "a model without this state")
        require_types(shapes)
        self._parameters, self._statistics = (_torch_leaves(shapes, kind) for kind in ("params", BATCH_STATS))
        self.layout = Layout.from_shapes(self._parameters.values(), self._statistics.values())
        self._buffers: dict[str, np.ndarray] = {}
        if self._statistics:
            initial_variables = (
                variables if variables is not None else module.init(keys, jnp.zeros((1, *input_shape)), **self._eval)
            )
            self._buffers = _named_arrays(initial_variables, BATCH_STATS, self._statistics)
        self._set_initial(initial, variables)
        self._jit = getattr(module, "jit", jax.jit)
        self._predict = self._jit(self._outputs)
        self._block = lru_cache(maxsize=16)(self._compile)
        self._sizes: dict[str, int] = {}  # sizes of compiled programs, by dimension
        self._resident: tuple[np.ndarray, jax.Array] | None = None
        self._check = ModuleCheck(
            module=module,
            task=self.task,
            loss=self.loss,
            has_custom_loss=loss is not None,
            input_shape=tuple(input_shape),
            names={path: name for path, (name, _) in self._parameters.items()},
            train=self._traced_outputs,
            predict=self._eval_outputs,
            jit=partial(self._jit, compiler_options=QUICK if device == "cpu" else None),
        )
        self._reports: dict[tuple[Any, ...], ModelReport] = {}  # results of the check, by kind of examples
        self._has_finite_losses = False
        self._layerwise: dict[Any, bool] = {}  # results of the check for DP-SGD, by shape and type of an input
        self.batching = batching if batching != "auto" else "map" if device == "cpu" else "vmap"
        self._num_shares = available_cores() if device == "cpu" else 1

    def _set_initial(self, initial: Initializer | None, variables: Mapping[str, Any] | None) -> None:
        if initial is None and variables is not None:
            self._initial = keep_weights(_named_arrays(variables, "params", self._parameters))
            self.initialization = FROM_MODULE
        else:
            self._initial = initial or default_initial_parameters
            self.initialization = describe_initializer(self._initial)

    def with_batching(self, batching: str) -> JaxTrainer:
        """Return this trainer with another way to train a block: ``map``, ``vmap`` or ``auto``."""
        other = copy(self)
        other.batching = batching if batching != "auto" else "map" if self.device == "cpu" else "vmap"
        other._block = lru_cache(maxsize=16)(other._compile)
        return other

    def close(self) -> None:
        """Release nothing: the trainer has no processes."""

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """Return ``map`` or ``vmap``, for blocks of all sizes."""
        return self.batching

    def init(self, seed: int) -> np.ndarray:
        """Return the initial parameters and buffers, ``params_D``."""
        return initial_parameters(self.layout, self._initial, seed, self._buffers)

    def check_local(self, local: LocalSettings) -> None:
        """Check that optax has the optimizer, and that the settings fit the task. See `Trainer.check_local`."""
        check_optimizer(local)
        refuse_micro_batches_with_coupled_loss(self.task, local, has_task_loss=self._has_task_loss)
        require_class_loss(local, self.task, is_cross_entropy=self.loss is LOSSES.get(self.task.name))

    def check_model(self, examples: Examples, *, synthetic: bool = False) -> ModelReport:
        """Check module and loss on a few examples, once for each kind of examples. See `Trainer.check_model`.

        Values are checked after the first block, because a forward pass without a compiled program takes seconds.
        """
        kind = kind_of(examples)
        if kind not in self._reports:
            with jax.default_device(self._jax_device):
                params = self._unflatten(self.init(0))
                self._reports[kind] = self._check.check(params, examples, synthetic=synthetic)
        return self._reports[kind]

    def _check_values(self, examples: Examples, *, synthetic: bool) -> None:
        """Refuse a model whose outputs or losses are not finite for the initial parameters."""
        with jax.default_device(self._jax_device):
            self._check.check_values(self._unflatten(self.init(0)), examples, synthetic=synthetic)
        self._has_finite_losses = True

    def _traced_outputs(self, params: Any, x: jax.Array) -> Any:
        stats = self._unflatten_statistics(self.init(0)) if self._statistics else {}
        return self._training_outputs(params, stats, x, jnp.ones(len(x), bool), jax.random.key(0))[0]

    def _eval_outputs(self, params: Any, x: jax.Array) -> Any:
        stats = self._unflatten_statistics(self.init(0)) if self._statistics else {}
        return self._select(self.module.apply({"params": params, BATCH_STATS: stats}, x, **self._eval))

    def check_example_dp(self, request: Request, examples: Examples) -> None:
        """Check that DP-SGD protects single examples with this model. See `Trainer.check_example_dp`."""
        if request.local.example_dp:
            self.check_model(examples, synthetic=request.deployed)
            self._check_examples(request, examples)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients in one compiled program. See `Trainer.fit`."""
        self.check_model(work[0].examples, synthetic=request.deployed)
        layerwise = request.local.example_dp is None or self._check_examples(request, work[0].examples)
        clients_K = np.array([client_work.client for client_work in work], np.int64)
        sizes_K = np.array([len(client_work.examples) for client_work in work], np.int64)
        plans = poisson_plans if request.local.example_dp else batch_plans
        rounds_K = rounds_of(request, work)
        plan_KSB, steps_K = plans(request, clients_K, sizes_K, rounds_K)
        states_KD = {
            name: np.stack([client_work.client_state[name] for client_work in work]) for name in rule.client_state
        }
        start_KD = _start_parameters(request, work)
        needs_counts = rule.adjust_logits is not None or request.local.class_weights is not None
        counts_KC = class_counts(self, self.task, request, work) if needs_counts else None
        weights_KC = None if counts_KC is None else class_weights(request.local, counts_KC)
        previous = [client_work.client_state[PREVIOUS_MODEL] for client_work in work] if rule.feature_penalty else None
        rule_inputs_K = (counts_KC, weights_KC, None if previous is None else np.stack(previous))
        broadcast = {name: request.broadcast[name] for name in rule.receives}
        is_secret = request.deployed and request.local.example_dp is not None
        seeds_K22 = _secret_seeds(len(work)) if is_secret else draw_by_round(rounds_K, partial(_seeds, request.seed))
        block = self._block(rule, request.local, request.deployed, layerwise)
        with jax.default_device(self._jax_device):
            x, x_starts_K = self._inputs([client_work.examples.x for client_work in work])
            y, y_starts_K = self._concatenate([client_work.examples.y for client_work in work])
            rows_KSB = self._pad_plan(plan_KSB, request.local, int(sizes_K.max()))
            batches = (rows_KSB, steps_K, clients_K, sizes_K, x_starts_K, y_starts_K)
            rates_KS = self._rates(request.local, rounds_K, steps_K, rows_KSB.shape[1])
            kept = (*rule.optimizer_state, STEPS) if rule.optimizer_state else ()
            kept_KD = {name: np.stack([as_numpy(item.client_state[name]) for item in work]) for name in kept}
            per_client = (*batches, states_KD, start_KD, rule_inputs_K, seeds_K22, rates_KS, kept_KD)
            shared = (jnp.asarray(request.params_D), broadcast, x, y)
        delta_KD, losses_K, state_KD = self._run_shares(block, shared, per_client, steps_K)
        if not self._has_finite_losses and not np.isfinite(losses_K).all():
            self._check_values(work[0].examples, synthetic=request.deployed)
        self._has_finite_losses = True
        return Updates(
            clients_K=clients_K,
            delta_KD=delta_KD,
            num_examples_K=sizes_K,
            num_steps_K=steps_K,
            metrics={"loss": MetricSum(losses_K.astype(np.float64), (plan_KSB >= 0).sum(axis=(1, 2)))},
            client_state=state_KD,
        )

    def _rates(
        self, local: LocalSettings, rounds_K: np.ndarray, steps_K: np.ndarray, num_steps: int
    ) -> np.ndarray | None:
        """Return the learning rates of all steps, padded with 0, ``(K, S)`` float32; None if they are constant."""
        rates_KS = learning_rates(local.schedule, local.learning_rate, rounds_K, steps_K)
        if rates_KS is None:
            return None
        return np.pad(rates_KS.astype(np.float32), ((0, 0), (0, num_steps - rates_KS.shape[1])))

    def _run_shares(
        self, block: Any, shared: Any, per_client: Any, steps_K: np.ndarray
    ) -> tuple[Array, np.ndarray, dict[str, np.ndarray]]:
        """Run the program on one share of the clients per core, in parallel.

        All shares have one size, and few sizes occur in a run. So few programs are compiled.
        """
        size = -(-len(steps_K) // self._num_shares)
        if size != self._sizes.setdefault("clients", size):  # blocks have different sizes
            size = 1 << (size - 1).bit_length() if size <= 16 else _round_up(size)
        shares = balance_shares(steps_K.tolist(), self._num_shares, max_size=size)

        def run(rows: np.ndarray) -> Any:
            share = jax.tree.map(lambda v_K: _pad_rows(v_K[rows], size), per_client)
            with jax.default_device(self._jax_device):  # the default device of this thread only
                return jax.block_until_ready(block(*shared, *share))

        if len(shares) == 1:
            delta_KD, losses_K, states = run(shares[0])
            state_KD = {name: np.asarray(rows_KD)[: len(steps_K)] for name, rows_KD in states.items()}
            if size > len(steps_K):
                delta_KD, losses_K = delta_KD[: len(steps_K)], losses_K[: len(steps_K)]
            return (np.asarray(delta_KD) if self.device == "cpu" else delta_KD), np.asarray(losses_K), state_KD
        delta_KD = np.empty((len(steps_K), self.layout.num_parameters), np.float32)
        losses_K = np.empty(len(steps_K), np.float32)
        parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

        def put(rows: np.ndarray) -> None:
            delta, losses, states = run(rows)
            parts.append((rows, {name: np.asarray(v_KD)[: len(rows)] for name, v_KD in states.items()}))
            delta_KD[rows], losses_K[rows] = np.asarray(delta)[: len(rows)], np.asarray(losses)[: len(rows)]

        # a device runs programs in parallel only if a different thread waits for each
        with ThreadPoolExecutor(len(shares) - 1) as threads:
            futures = [threads.submit(put, rows) for rows in shares[1:]]
            put(shares[0])
            for future in futures:
                future.result()
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        names = parts[0][1]
        return delta_KD, losses_K, {name: np.concatenate([part[name] for _, part in parts])[order] for name in names}

    def _inputs(self, arrays: Sequence[np.ndarray]) -> tuple[jax.Array, np.ndarray]:
        """Return the inputs of K clients on the device, and the first row of each client, ``(K,)``.

        If all inputs are slices of one array, as from `from_arrays`, this array stays on the device between rounds.
        Other inputs are concatenated in each round.
        """
        whole, starts_K = shared_base_array(arrays)
        if whole is None:
            return self._concatenate(arrays)
        if self._resident is None or self._resident[0] is not whole:
            self._resident = whole, jnp.asarray(whole)
        return self._resident[1], starts_K

    def _concatenate(self, arrays: Sequence[np.ndarray]) -> tuple[jax.Array, np.ndarray]:
        sizes = [len(array) for array in arrays]
        num_rows = self._compiled_size("rows", sum(sizes), spare=1.25)
        padded = np.zeros((num_rows, *arrays[0].shape[1:]), arrays[0].dtype)
        np.concatenate(arrays, out=padded[: sum(sizes)])
        return jnp.asarray(padded), np.cumsum([0, *sizes[:-1]])

    def _pad_plan(self, plan_KSB: np.ndarray, local: LocalSettings, largest: int) -> np.ndarray:
        """Return the plan, padded with -1 to one of few shapes.

        The number of steps is the largest of the run so far, with a reserve. The batch size is ``local.batch_size``, or
        the next power of two if all batches of this block are smaller.
        """
        clients, steps, batch = plan_KSB.shape
        width = min(local.batch_size, 1 << (batch - 1).bit_length())
        if local.example_dp:  # batches have random sizes, rarely above the mean plus three standard deviations
            usual = min(largest, local.batch_size + round(3 * local.batch_size**0.5))
            width = _round_up(max(batch, usual))
        padded_KSB = np.full((clients, self._compiled_size("steps", steps, spare=2), width), -1, np.int32)
        padded_KSB[:, :steps, :batch] = plan_KSB
        return padded_KSB

    def _compiled_size(self, dimension: str, needed: int, *, spare: float) -> int:
        """Return a size that seldom grows, so that different cohorts share one compiled program.

        The reserve costs memory, but no steps.
        """
        if needed > self._sizes.get(dimension, 0):
            self._sizes[dimension] = _round_up(int(spare * needed))
        return self._sizes[dimension]

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Return raw outputs ``(N, C)`` in evaluation mode. N is rounded up, so that few programs are compiled."""
        padded = np.zeros((_round_up(len(x)), *x.shape[1:]), x.dtype)
        padded[: len(x)] = x
        with jax.default_device(self._jax_device):
            return np.asarray(self._predict(jnp.asarray(params_D), padded))[: len(x)]

    def network(self, params_D: Array) -> tuple[nn.Module, Any]:
        """Return the module, and its variables with these parameters."""
        params_D = jnp.asarray(params_D)
        statistics = self._unflatten_statistics(params_D)
        variables = {"params": self._unflatten(params_D)} | ({BATCH_STATS: statistics} if statistics else {})
        return self.module, variables

    def _compile(
        self, rule: LocalRule, local: LocalSettings, deployed: bool, layerwise: bool
    ) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """Return the compiled program that trains a block of clients, for one rule and one set of local settings."""
        private_gradient = self._private_gradient(local, deployed, layerwise) if local.example_dp else None

        def fit_client(params_D: Any, broadcast: Any, x: jax.Array, y: jax.Array, client_inputs: Any) -> Any:
            (rows_SB, num_steps, client, size, x_start, y_start, *rest) = client_inputs
            client_state, start_D, (counts_C, weights_C, previous_D), seeds, rates_S, kept = rest
            optimizer = build_optimizer(local, rates_S)
            loss = training_loss(self.loss, self.task.name, local, weights_C) if local.changes_loss else self.loss
            params, start_D = self._unflatten(params_D), params_D if start_D is None else start_D
            penalty = rule.feature_penalty and partial(self._penalty, rule, (params_D, previous_D))
            adjust = partial(_adjust, rule, counts_C)
            gradient_of = private_gradient or partial(self._gradient, local.micro_batch_size, loss, adjust, penalty)
            start, stats = self._unflatten(start_D), self._unflatten_statistics(start_D)
            vectors = {name: self._unflatten(v_D) for name, v_D in {**client_state, **broadcast}.items()}
            names = list(vectors)
            roots = [jax.random.wrap_key_data(seed, impl="threefry2x32") for seed in seeds]
            keys = [jax.random.fold_in(root, client) for root in roots]

            def correct(g: Any, w: Any, w_global: Any, *leaves: Any) -> Any:
                return rule.correct(g, w, w_global, **dict(zip(names, leaves, strict=True)))

            def step(s: jax.Array, carry: Any) -> Any:
                weights, stats, state, total = carry
                rows_B = rows_SB[s]
                real_B = rows_B >= 0
                batch = (_rows(x, x_start + rows_B, real_B), _rows(y, y_start + rows_B, real_B), real_B)
                draws = [jax.random.fold_in(key, s) for key in keys]
                gradient, loss_sum, stats = gradient_of((weights, stats), *batch, draws, size)
                if local.max_grad_norm is not None:
                    gradient = clip_gradient(local.max_grad_norm, gradient)
                gradient = jax.tree.map(correct, gradient, weights, params, *vectors.values())
                change, state = optimizer.update(gradient, state, weights)
                return optax.apply_updates(weights, change), stats, state, total + loss_sum

            first = (start, stats, self._optimizer_state(rule, optimizer.init(start), kept), jnp.zeros(()))
            weights, new_stats, state, total = lax.fori_loop(0, num_steps, step, first)
            delta, stats_delta = jax.tree.map(jnp.subtract, (weights, new_stats), (start, stats))
            return self._flatten(delta, stats_delta), total, self._kept_vectors(rule, state, stats)

        def block(params_D: Any, broadcast: Any, x: Any, y: Any, *per_client: Any) -> Any:
            fit = partial(fit_client, params_D, broadcast, x, y)
            in_turn = self.batching == "map" or (deployed and local.example_dp)  # vmap does not support the callback
            return lax.map(fit, per_client) if in_turn else jax.vmap(fit)(per_client)

        return self._jit(block, compiler_options=SINGLE_THREAD_MATMUL if self.device == "cpu" else None)

    def _optimizer_state(self, rule: LocalRule, state: Any, kept: Mapping[str, jax.Array]) -> Any:
        """Return the optimizer state in which a client starts: a new one, or the one that it has kept."""
        if not rule.optimizer_state:
            return state
        vectors = {name.removeprefix(STATE_PREFIX): self._unflatten(kept[name]) for name in rule.optimizer_state}
        return load_state(state, vectors, kept[STEPS][0])

    def _kept_vectors(self, rule: LocalRule, state: Any, stats: Any) -> dict[str, jax.Array]:
        """Return the optimizer state that a client keeps, as flat vectors; empty if it keeps none."""
        if not rule.optimizer_state:
            return {}
        (vectors, steps), zeros = save_state(state), jax.tree.map(jnp.zeros_like, stats)
        flat = {f"{STATE_PREFIX}{name}": self._flatten(vector, zeros) for name, vector in vectors.items()}
        return {**flat, STEPS: steps.reshape(1)}

    def _gradient(
        self,
        micro_size: int | None,
        loss: Loss,
        adjust: Any,
        penalty: Any,
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
            loss: ``(outputs_BC, y_B) -> loss_B``.
            adjust: changes the outputs before the loss.
            penalty: ``(x_B, features_BF) -> penalty_B`` to add to the losses, or None.
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
            losses_B, new_stats = self._losses(weights, stats, x, y, real_B, key, loss, adjust, penalty)
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
        clipped = clipped_gradient(self._private_losses, clip=dp.clip, layerwise=layerwise)

        def gradient_of(model: Any, x: Any, y: Any, real_B: Any, keys: Any, size: Any) -> tuple[Any, jax.Array, Any]:
            total, loss_sum = clipped(model[0], x, y, real_B, keys[0])
            if dp.noise_multiplier:
                total = add_noise(total, dp.clip * dp.noise_multiplier, keys[1], secret=deployed)
            return jax.tree.map(lambda g: g / jnp.minimum(local.batch_size, size), total), loss_sum, model[1]

        return gradient_of

    def _losses(
        self, params: Any, stats: Any, x: Any, y: Any, real_B: Any, key: Any, loss: Loss, adjust: Any, penalty: Any
    ) -> tuple[jax.Array, Any]:
        """Return the loss of each example in training mode, and the statistics after the batch."""
        if penalty is None:
            outputs, new_stats = self._training_outputs(params, stats, x, real_B, key)
            return loss(adjust(outputs), y), new_stats
        run = partial(self._training_outputs, params, stats, x, real_B, key)
        outputs, features_BF = with_features(lambda: run()[0], self._parameters)
        return loss(adjust(outputs), y) + penalty(x, features_BF), stats

    def _private_losses(self, params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        """Return the loss of each example in training mode, for a model without statistics."""
        return self.loss(self._private_outputs(params, x, key), y)

    def _private_outputs(self, params: Any, x: jax.Array, key: jax.Array) -> Any:
        return self._training_outputs(params, {}, x, jnp.ones(len(x), bool), key)[0]

    def _check_examples(self, request: Request, examples: Examples) -> bool:
        """Return whether DP-SGD may use layer-wise gradients. Check the model once for each kind of inputs.

        Raises:
            SettingError: The model writes state in a forward pass, or examples depend on others. See `ExampleCheck`.
        """
        kind = examples.x.shape[1:], examples.x.dtype.str
        if kind not in self._layerwise:
            self._check_values(examples, synthetic=request.deployed)  # DP-SGD skips examples that are not finite
            options = QUICK if self.device == "cpu" else None
            check = ExampleCheck(apply=self._private_outputs, loss=self.loss, jit=self._jit, options=options)
            params_D = as_numpy(request.params_D)  # operations of JAX would compile a program each
            with jax.default_device(self._jax_device):
                refuse_written_state(partial(self._training_variables, params_D, examples.x[:2]))
                refuse_dp_sgd_with_buffers(self.layout, request.local)
                refuse_dp_sgd_with_coupled_loss(self.task, request.local, has_task_loss=self._has_task_loss)
                params = self._unflatten(params_D)
                self._layerwise[kind] = check.is_layerwise(params, examples, synthetic=request.deployed)
        return self._layerwise[kind]

    def _training_variables(self, params_D: Array, x: np.ndarray) -> Any:
        """Return all variables after a forward pass in training mode."""
        variables = {"params": self._unflatten(params_D), BATCH_STATS: self._unflatten_statistics(params_D)}
        train: dict[str, Any] = {"train": True} if self._takes_train else {}
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        return self.module.apply(variables, jnp.asarray(x), rngs=rngs, mutable=True, **train)[1]

    def _penalty(self, rule: LocalRule, models: Any, x: jax.Array, features_BF: jax.Array) -> jax.Array:
        """Return the values that the rule adds to the losses. ``models`` are vectors ``(D,)`` that are not trained."""
        assert rule.feature_penalty is not None
        runs = [partial(self._outputs, model_D, x) for model_D in models]
        features = (with_features(run, self._parameters)[1] for run in runs)
        penalty_B: jax.Array = rule.feature_penalty(features_BF, *features)
        return penalty_B

    def _training_outputs(
        self, params: Any, stats: Any, x: jax.Array, real_B: jax.Array, key: jax.Array
    ) -> tuple[Any, Any]:
        """Return the outputs in training mode, and the statistics after the batch."""
        train: dict[str, Any] = {"train": True} if self._takes_train else {}
        with nn.intercept_methods(partial(_call_with_real_rows, real_B)):
            rngs = {"dropout": key, "params": jax.random.fold_in(key, 1)}  # flax draws other streams from "params"
            options: dict[str, Any] = {"rngs": rngs, "mutable": [BATCH_STATS], **train}
            outputs, changed = self.module.apply({"params": params, BATCH_STATS: stats}, x, **options)
        return self._select(outputs), changed.get(BATCH_STATS, {})

    def _select(self, outputs: Any) -> Any:
        """Return the part of the result of the module that holds the outputs."""
        return outputs if self._output is None else select_output(outputs, self._output)

    def _outputs(self, params_D: jax.Array, x: jax.Array) -> jax.Array:
        variables = {"params": self._unflatten(params_D), BATCH_STATS: self._unflatten_statistics(params_D)}
        outputs: Any = self._select(self.module.apply(variables, x, **self._eval))
        return outputs

    def _unflatten(self, params_D: Array) -> Any:
        """Return the trainable part of the vector, as flax parameters."""
        return self._as_flax(params_D, self._parameters)

    def _unflatten_statistics(self, params_D: Array) -> Any:
        """Return the buffers of the vector, as flax ``batch_stats``."""
        return self._as_flax(params_D, self._statistics)

    def _as_flax(self, params_D: Array, names: Mapping[Path, NamedShape]) -> Any:
        leaves = {}
        for path, (name, shape) in names.items():
            leaves[path] = _to_flax(path, params_D[self.layout.slices[name]].reshape(shape))
        return unflatten_dict(leaves)

    def _flatten(self, params: Any, stats: Any) -> jax.Array:
        """Return flax parameters and statistics as one vector ``(D,)``."""
        leaves = {self._parameters[path][0]: _to_torch(path, leaf) for path, leaf in flatten_dict(params).items()}
        leaves |= {self._statistics[path][0]: _to_torch(path, leaf) for path, leaf in flatten_dict(stats).items()}
        return jnp.concatenate([leaves[leaf.name].ravel() for leaf in self.layout.leaves])

    @cached_property
    def _jax_device(self) -> Any:
        platform, _, index = self.device.partition(":")
        try:
            return jax.devices(platform)[int(index or 0)]
        except (RuntimeError, IndexError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SettingError("device", self.device, f"a device of this machine ({reason})", "device=cpu") from error


def _split_gradient(
    gradient_of: Any, size: int, model: Any, key: jax.Array, batch: tuple[jax.Array, ...]
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
    num_parts = -(-len(batch[0]) // size)
    pad = num_parts * size - len(batch[0])
    padded = [jnp.pad(array, ((0, pad), *((0, 0),) * (array.ndim - 1))) for array in batch]
    parts = tuple(array.reshape(num_parts, size, *array.shape[1:]) for array in padded)

    def add(carry: Any, part: Any) -> Any:
        gradient, total, stats = carry
        number, *arrays = part
        new, (loss_sum, new_stats) = gradient_of(weights, stats, jax.random.fold_in(key, number), *arrays)
        return (jax.tree.map(jnp.add, gradient, new), total + loss_sum, new_stats), None

    first = (jax.tree.map(jnp.zeros_like, weights), jnp.zeros(()), stats)
    (gradient, total, stats), _ = lax.scan(add, first, (jnp.arange(num_parts), *parts))
    return gradient, total, stats


def _seeds(seed: int, round: int) -> np.ndarray:
    """Return the key data of the model's random numbers in training, and of the noise, ``(2, 2)``."""
    seeds = [integer_seed(seed, purpose, round=round) & 0xFFFFFFFF for purpose in (Purpose.MODEL, Purpose.NOISE)]
    return np.array([[0, seed] for seed in seeds], np.uint32)


def _secret_seeds(num_clients: int) -> np.ndarray:
    """Return key data from the operating system, ``(K, 2, 2)``, so that no other party can repeat the draws."""
    return np.frombuffer(os.urandom(16 * num_clients), np.uint32).reshape(num_clients, 2, 2)


def _adjust(rule: LocalRule, counts_C: Any, outputs: jax.Array) -> Any:
    """Return the outputs for the loss, with the change that the rule makes to logits."""
    return outputs if rule.adjust_logits is None else rule.adjust_logits(outputs, counts_C)


def _start_parameters(request: Request, work: Sequence[ClientWork]) -> np.ndarray | None:
    """Return the parameters from which each client starts, ``(K, D)``; None if all start from the global model."""
    if all(client_work.start_D is None for client_work in work):
        return None
    starts = [request.params_D if client_work.start_D is None else client_work.start_D for client_work in work]
    return np.stack([as_numpy(start_D) for start_D in starts])


def _call_with_real_rows(real_B: jax.Array, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Call a module. A batch norm computes statistics of real rows only, and the running variance of torch.

    Raises:
        FedlearnError: A batch norm has another number of rows than the batch.
    """
    norm = context.module
    if not isinstance(norm, nn.BatchNorm) or context.method_name != "__call__":
        return call(*args, **kwargs)
    x, fixed = args[0], [*args[1:], kwargs.get("use_running_average"), norm.use_running_average]
    if any(fixed):
        return call(*args, **kwargs)
    if len(x) != len(real_B):
        raise FedlearnError(
            f"the batch norm {'.'.join(norm.path)} has {len(x)} rows\n"
            f"  expected  {len(real_B)} rows, one per example\n"
            "  advice    group norm"
        )
    before: Any = norm.get_variable(BATCH_STATS, "var")
    outputs = call(*args, **{**kwargs, "mask": real_B.reshape(-1, *(1,) * (x.ndim - 1))})
    count = real_B.sum() * (x.size // len(x) // before.size)  # number of values per channel
    decayed = norm.momentum * before
    change = norm.get_variable(BATCH_STATS, "var") - decayed
    norm.put_variable(BATCH_STATS, "var", decayed + change * count / jnp.maximum(count - 1, 1))
    return outputs


def _torch_leaves(variables: Mapping[str, Any], kind: str) -> dict[Path, NamedShape]:
    """Return the torch names and shapes of the leaves of one flax collection, by their paths."""
    leaves = {}
    for path, leaf in flatten_dict(variables.get(kind, {})).items():
        name = ".".join([*path[:-1], LEAF_NAMES[kind].get(path[-1], path[-1])])
        leaves[path] = name, tuple(np.empty(leaf.shape, np.bool_).transpose(_axes_to_torch(path, leaf.ndim)).shape)
    return leaves


def _named_arrays(variables: Mapping[str, Any], kind: str, leaves: Mapping[Path, NamedShape]) -> dict[str, np.ndarray]:
    """Return the arrays of a flax collection by their names and axes in torch.

    Raises:
        SettingError: The collection lacks a leaf of the module, or a shape differs.
    """
    values = flatten_dict(variables.get(kind, {}))
    arrays = {}
    for path, (name, shape) in leaves.items():
        array = np.asarray(_to_torch(path, values[path]), np.float32) if path in values else None
        actual = "nothing" if array is None else f"shape {array.shape}"
        expected = f"an array of shape {shape} at {'/'.join(path)}, as module.init returns it"
        if array is None or array.shape != shape:
            raise SettingError(f"variables[{kind!r}]", actual, expected, "variables=module.init(key, x)")
        arrays[name] = array
    return arrays


def _axes_to_torch(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Return the order of axes that turns a flax leaf into a torch leaf.

    Flax kernels are (..., inputs, outputs). Torch weights are (outputs, inputs, ...).
    """
    return (ndim - 1, ndim - 2, *range(ndim - 2)) if path[-1] == "kernel" else tuple(range(ndim))


def _to_torch(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
    return leaf.transpose(_axes_to_torch(path, leaf.ndim))


def _to_flax(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
    return leaf.transpose(tuple(np.argsort(_axes_to_torch(path, leaf.ndim)).tolist()))


def _rows(array: jax.Array, rows_B: jax.Array, real_B: jax.Array) -> jax.Array:
    """Return rows of an array, and zeros for rows that are not real: their index can be a row of another client."""
    real = real_B.reshape(-1, *(1,) * (array.ndim - 1))
    return jnp.where(real, array[rows_B], jnp.zeros((), array.dtype))


def _pad_rows(rows_K: np.ndarray, size: int) -> np.ndarray:
    """Return ``size`` rows, padded with zeros. A zero row is a client that takes no steps."""
    if len(rows_K) == size:
        return rows_K
    return np.concatenate([rows_K, np.zeros((size - len(rows_K), *rows_K.shape[1:]), rows_K.dtype)])


def _round_up(size: int) -> int:
    """Round up to three significant bits, by at most a quarter, so that few programs are compiled."""
    unit = 1 << max(0, size.bit_length() - 3)
    return -(-size // unit) * unit
