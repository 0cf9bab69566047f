"""Train and predict with JAX: the only home of jax and flax in the library.

Shapes: K clients in a block, D parameters laid flat, N examples, S local steps, B batch, C outputs.

A block of clients is one compiled program: clients one after another inside it (``lax.map``), each with as many steps
as it needs (``fori_loop`` with a dynamic end), on examples laid end to end, so that uneven clients cost no padding.
"""

from __future__ import annotations

import inspect
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
from jax.experimental import io_callback

from fedlearn.algorithm.local_rule import PREVIOUS_MODEL, LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.federated_data import Task
from fedlearn.core.layout import RUNNING_MEAN, RUNNING_VARIANCE, Layout, default_initial_parameters
from fedlearn.core.random import Purpose, integer_seed, secret_normals
from fedlearn.core.records import Array, ClientWork, LocalSettings, MetricSum, Request, Updates
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
)
from fedlearn.trainers.batching import (
    balance_shares,
    batch_plans,
    draw_by_round,
    poisson_plans,
    rounds_of,
    shared_base_array,
)
from fedlearn.trainers.jax.dp_sgd import clipped_gradient
from fedlearn.trainers.jax.features import with_features

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (outputs_BC, y_B) -> loss_B


def _logistic(outputs: jax.Array, y: jax.Array) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(outputs[:, 0], y)


LOSSES: Mapping[Task, Loss] = {
    "binary": _logistic,
    "ranking": _logistic,
    "multiclass": optax.softmax_cross_entropy_with_integer_labels,
    "regression": lambda outputs, y: (outputs[:, 0] - y) ** 2,
}

# shares of a block run side by side already: small products that are cut up once more wait for each other
SINGLE_THREAD_MATMUL = {"xla_cpu_multi_thread_eigen": False}

BATCH_STATS = "batch_stats"  # flax's collection of a model's buffers
LEAF_NAMES = {  # flax -> torch
    "params": {"kernel": "weight", "scale": "weight", "embedding": "weight"},
    BATCH_STATS: {"mean": RUNNING_MEAN, "var": RUNNING_VARIANCE},
}
Path = tuple[str, ...]  # of a leaf in flax
NamedShape = tuple[str, tuple[int, ...]]  # its name and shape in torch


class JaxTrainer:
    """Train a flax (linen) module. Its leaves have the names and the orientation of its torch twin.

    Args:
        module: maps ``(B, ...)`` float32 to ``(B, C)``; takes ``train: bool`` if it behaves differently in training.
            One that has a ``jit`` of its own is compiled by that: it hands values to programs besides the parameters.
        task: chooses the loss: binary cross-entropy on one logit, cross-entropy, or squared error.
        input_shape: of one example.
        initial: draws the initial parameters from ``(layout, rng)``; None is `default_initial_parameters`, unless there
            are ``variables``.
        variables: weights to keep, as ``module.init`` returns them: ``params`` and, with batch norm, ``batch_stats``.
        device: ``cpu``, ``cuda:0``, ``tpu``, ...
        loss: ``(outputs_BC, y_B) -> loss_B`` instead of the task's.
        batching: ``map`` (one client after another inside the program), ``vmap`` (all step together), or ``auto``: map
            on a CPU, whose cache holds one model, vmap elsewhere.

    Guarantees: equal initial parameters and batches to a `TorchTrainer` of the twin model; dropout draws from (seed,
    round, client), whatever the block. ``batch_stats`` are buffers, which only batches move (as in `TorchTrainer`).
    Flax's BatchNorm takes statistics of real examples only, though batches are filled up, and averages the unbiased
    variance as torch's does (flax alone: the biased one); torch's momentum of 0.1 is flax's of 0.9. Another layer that
    takes statistics of a batch would count what fills it up.

    Raises:
        FedlearnError: if the module keeps state besides ``params`` and ``batch_stats``.
    """

    framework, supports_dp_sgd, supports_process_pool = "jax", True, False  # threads of JAX do not survive a fork

    def __init__(
        self,
        module: nn.Module,
        *,
        task: Task,
        input_shape: tuple[int, ...],
        initial: Initializer | None = None,
        variables: Mapping[str, Any] | None = None,
        device: str = "cpu",
        loss: Loss | None = None,
        batching: str = "auto",
    ) -> None:
        self.module, self.task, self.device = module, task, device
        self.loss = loss or LOSSES[task]
        _ = self._jax_device  # refuse a device that is not there before anything else
        self._takes_train = "train" in inspect.signature(module.__call__).parameters
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        shapes = jax.eval_shape(module.init, keys, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
        if set(shapes) - {"params", BATCH_STATS}:
            unknown = ", ".join(sorted(set(shapes) - {"params", BATCH_STATS}))
            raise FedlearnError(f"the model keeps state that would not travel: {unknown}\n  try       one without it")
        self._turned, self._kept = (_torch_leaves(shapes, kind) for kind in ("params", BATCH_STATS))
        self.layout = Layout.from_shapes(self._turned.values(), self._kept.values())
        self._buffers: dict[str, np.ndarray] = {}
        if self._kept:
            given = variables if variables is not None else module.init(keys, jnp.zeros((1, *input_shape)))
            self._buffers = _named_arrays(given, BATCH_STATS, self._kept)
        self._set_initial(initial, variables)
        self._jit = getattr(module, "jit", jax.jit)
        self._predict = self._jit(self._outputs)
        self._block = lru_cache(maxsize=16)(self._compile)
        self._room: dict[str, int] = {}
        self._resident: tuple[np.ndarray, jax.Array] | None = None
        self.batching = batching if batching != "auto" else "map" if device == "cpu" else "vmap"
        self._num_shares = available_cores() if device == "cpu" else 1

    def _set_initial(self, initial: Initializer | None, variables: Mapping[str, Any] | None) -> None:
        if initial is None and variables is not None:
            self._initial = keep_weights(_named_arrays(variables, "params", self._turned))
            self.initialization = FROM_MODULE
        else:
            self._initial = initial or default_initial_parameters
            self.initialization = describe_initializer(self._initial)

    def with_batching(self, batching: str) -> JaxTrainer:
        """The same trainer with another way to train a block."""
        other = copy(self)
        other.batching = batching if batching != "auto" else "map" if self.device == "cpu" else "vmap"
        other._block = lru_cache(maxsize=16)(other._compile)
        return other

    def close(self) -> None:
        """See `Trainer.close`; there is nothing to release."""

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """How a block would be trained."""
        return self.batching

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``."""
        return initial_parameters(self.layout, self._initial, seed, self._buffers)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients in one compiled program; see `Trainer.fit`."""
        refuse_dp_sgd_with_buffers(self.layout, request.local)
        clients_K = np.array([one.client for one in work], np.int64)
        sizes_K = np.array([len(one.examples) for one in work], np.int64)
        plans = poisson_plans if request.local.example_dp else batch_plans
        rounds_K = rounds_of(request, work)
        plan_KSB, steps_K = plans(request, clients_K, sizes_K, rounds_K)
        memory_KD = {name: np.stack([one.client_state[name] for one in work]) for name in rule.client_state}
        start_KD = _starts(request, work)
        counts_KC = class_counts(self, self.task, request, work) if rule.adjust_logits else None
        known_K = (
            counts_KC,
            np.stack([one.client_state[PREVIOUS_MODEL] for one in work]) if rule.feature_penalty else None,
        )
        broadcast = {name: request.broadcast[name] for name in rule.receives}
        seeds_K2 = draw_by_round(rounds_K, partial(_seeds, request.seed))
        block = self._block(rule, request.local, request.deployed)
        with jax.default_device(self._jax_device):
            x, x_starts_K = self._laid_out([one.examples.x for one in work])
            y, y_starts_K = self._end_to_end([one.examples.y for one in work])
            rows_KSB = self._widened(plan_KSB, request.local, int(sizes_K.max()))
            drawn = (rows_KSB, steps_K, clients_K, sizes_K, x_starts_K, y_starts_K)
            own = (*drawn, memory_KD, start_KD, known_K, seeds_K2)
            shared = (jnp.asarray(request.params_D), broadcast, x, y)
        delta_KD, losses_K = self._in_shares(block, shared, own, steps_K)
        return Updates(
            clients_K=clients_K,
            delta_KD=delta_KD,
            num_examples_K=sizes_K,
            num_steps_K=steps_K,
            metrics={"loss": MetricSum(losses_K.astype(np.float64), (plan_KSB >= 0).sum(axis=(1, 2)))},
        )

    def _in_shares(self, block: Any, shared: Any, own: Any, steps_K: np.ndarray) -> tuple[Array, np.ndarray]:
        """Run the program on each core's share of the clients, all at the same time, in equal shapes, and in few."""
        size = -(-len(steps_K) // self._num_shares)
        if size != self._room.setdefault("clients", size):  # blocks are not all of one size
            size = 1 << (size - 1).bit_length() if size <= 16 else _round_up(size)
        shares = balance_shares(steps_K.tolist(), self._num_shares, max_size=size)

        def run(rows: np.ndarray) -> Any:
            share = jax.tree.map(lambda v_K: _filled_up(v_K[rows], size), own)
            with jax.default_device(self._jax_device):  # holds for one thread
                return jax.block_until_ready(block(*shared, *share))

        if len(shares) == 1:
            delta_KD, losses_K = run(shares[0])
            if size > len(steps_K):
                delta_KD, losses_K = delta_KD[: len(steps_K)], losses_K[: len(steps_K)]
            return (np.asarray(delta_KD) if self.device == "cpu" else delta_KD), np.asarray(losses_K)
        delta_KD = np.empty((len(steps_K), self.layout.num_parameters), np.float32)
        losses_K = np.empty(len(steps_K), np.float32)

        def put(rows: np.ndarray) -> None:
            delta, losses = run(rows)
            delta_KD[rows], losses_K[rows] = np.asarray(delta)[: len(rows)], np.asarray(losses)[: len(rows)]

        # one device runs programs one after another, unless each has a thread of its own waiting for it
        with ThreadPoolExecutor(len(shares) - 1) as threads:
            others = [threads.submit(put, rows) for rows in shares[1:]]
            put(shares[0])
            for other in others:
                other.result()
        return delta_KD, losses_K

    def _laid_out(self, arrays: Sequence[np.ndarray]) -> tuple[jax.Array, np.ndarray]:
        """The inputs of K clients on the device, and the row at which each client's begin.

        Clients whose inputs are slices of one array, as `from_arrays` makes them, find it on the device from the
        round before; otherwise they are laid end to end.
        """
        whole, starts_K = shared_base_array(arrays)
        if whole is None:
            return self._end_to_end(arrays)
        if self._resident is None or self._resident[0] is not whole:
            self._resident = whole, jnp.asarray(whole)
        return self._resident[1], starts_K

    def _end_to_end(self, arrays: Sequence[np.ndarray]) -> tuple[jax.Array, np.ndarray]:
        sizes = [len(array) for array in arrays]
        laid = np.zeros((self._room_for("rows", sum(sizes), spare=1.25), *arrays[0].shape[1:]), arrays[0].dtype)
        np.concatenate(arrays, out=laid[: sum(sizes)])
        return jnp.asarray(laid), np.cumsum([0, *sizes[:-1]])

    def _widened(self, plan_KSB: np.ndarray, local: LocalSettings, largest: int) -> np.ndarray:
        """The plan in one of few shapes: as many steps as ever needed; batches, by this block alone, full or of 2^n."""
        clients, steps, batch = plan_KSB.shape
        width = min(local.batch_size, 1 << (batch - 1).bit_length())
        if local.example_dp:  # batches are of any size, few of more than three standard deviations above the mean
            usual = min(largest, local.batch_size + round(3 * local.batch_size**0.5))
            width = _round_up(max(batch, usual))
        wide_KSB = np.full((clients, self._room_for("steps", steps, spare=2), width), -1, np.int32)
        wide_KSB[:, :steps, :batch] = plan_KSB
        return wide_KSB

    def _room_for(self, what: str, needed: int, *, spare: float) -> int:
        """A size that seldom grows, so that uneven cohorts share one compiled program; costs memory, not steps."""
        if needed > self._room.get(what, 0):
            self._room[what] = _round_up(int(spare * needed))
        return self._room[what]

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Outputs ``(N, C)`` in evaluation mode; sizes are rounded up so that few programs are compiled."""
        padded = np.zeros((_round_up(len(x)), *x.shape[1:]), x.dtype)
        padded[: len(x)] = x
        with jax.default_device(self._jax_device):
            return np.asarray(self._predict(jnp.asarray(params_D), padded))[: len(x)]

    def _compile(
        self, rule: LocalRule, local: LocalSettings, deployed: bool
    ) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """The program for a block of clients under one rule and one set of local settings."""
        optimizer = _optimizer(local)
        private_gradient = self._private_gradient(local, deployed) if local.example_dp else None

        def fit_client(params_D: Any, broadcast: Any, x: jax.Array, y: jax.Array, own: Any) -> Any:
            rows_SB, num_steps, client, size, x_start, y_start, memory, start_D, (counts_C, last_D), seeds = own
            params, start_D = self._unflatten(params_D), params_D if start_D is None else start_D
            contrast = rule.feature_penalty and partial(self._contrast, rule, (params_D, last_D))
            gradient_of = private_gradient or partial(self._gradient, partial(_seen, rule, counts_C), contrast)
            start, stats = self._unflatten(start_D), self._statistics(start_D)
            vectors = {name: self._unflatten(v_D) for name, v_D in {**memory, **broadcast}.items()}
            names = list(vectors)
            keys = [jax.random.fold_in(jax.random.key(seed), client) for seed in seeds]

            def correct(g: Any, w: Any, w_global: Any, *leaves: Any) -> Any:
                return rule.correct(g, w, w_global, **dict(zip(names, leaves, strict=True)))

            def step(s: jax.Array, carry: Any) -> Any:
                weights, stats, state, total = carry
                rows_B = rows_SB[s]
                real_B = rows_B >= 0
                batch = (_rows(x, x_start + rows_B, real_B), _rows(y, y_start + rows_B, real_B), real_B)
                draws = [jax.random.fold_in(key, s) for key in keys]
                gradient, loss_sum, stats = gradient_of((weights, stats), *batch, draws, size)
                gradient = jax.tree.map(correct, gradient, weights, params, *vectors.values())
                change, state = optimizer.update(gradient, state, weights)
                return optax.apply_updates(weights, change), stats, state, total + loss_sum

            first = (start, stats, optimizer.init(start), jnp.zeros(()))
            weights, after, _, total = lax.fori_loop(0, num_steps, step, first)
            delta, moved = jax.tree.map(jnp.subtract, (weights, after), (start, stats))
            return self._flatten(delta, moved), total

        def block(params_D: Any, broadcast: Any, x: Any, y: Any, *own: Any) -> Any:
            one = partial(fit_client, params_D, broadcast, x, y)
            in_turn = self.batching == "map" or (deployed and local.example_dp)  # a callback cannot be batched
            return lax.map(one, own) if in_turn else jax.vmap(one)(own)

        return self._jit(block, compiler_options=SINGLE_THREAD_MATMUL if self.device == "cpu" else None)

    def _gradient(
        self, seen: Any, contrast: Any, model: Any, x: Any, y: Any, real_B: Any, keys: Any, size: Any
    ) -> tuple[Any, jax.Array, Any]:
        """Of the mean loss over the real examples of a batch, the sum of their losses, of ``seen(outputs)``, and what
        the batch makes of the statistics.
        """
        weights, stats = model

        def mean_loss(weights: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            losses_B, after = self._losses(weights, stats, x, y, real_B, keys[0], seen, contrast)
            total = jnp.sum(jnp.where(real_B, losses_B, 0.0))
            return total / jnp.sum(real_B), (total, after)

        gradient, (total, after) = jax.grad(mean_loss, has_aux=True)(weights)
        return gradient, total, after

    def _private_gradient(self, local: LocalSettings, deployed: bool) -> Callable[..., tuple[Any, jax.Array, Any]]:
        """What stands for the gradient in DP-SGD: clipped, summed, noised, over the expected batch."""
        dp = local.example_dp
        assert dp is not None
        clipped = clipped_gradient(self._private_losses, clip=dp.clip)

        def gradient_of(model: Any, x: Any, y: Any, real_B: Any, keys: Any, size: Any) -> tuple[Any, jax.Array, Any]:
            total, loss_sum = clipped(model[0], x, y, real_B, keys[0])
            if dp.noise_multiplier:
                leaves, tree = jax.tree.flatten(total)
                ends = np.cumsum([leaf.size for leaf in leaves])
                noise = jnp.split(_normals(keys[1], (int(ends[-1]),), secret=deployed), ends[:-1])
                deviation = dp.clip * dp.noise_multiplier
                noised = [g + deviation * n.reshape(g.shape) for g, n in zip(leaves, noise, strict=True)]
                total = jax.tree.unflatten(tree, noised)
            return jax.tree.map(lambda g: g / jnp.minimum(local.batch_size, size), total), loss_sum, model[1]

        return gradient_of

    def _losses(
        self, params: Any, stats: Any, x: Any, y: Any, real_B: Any, key: Any, seen: Any, contrast: Any
    ) -> tuple[jax.Array, Any]:
        """Of each example, in training mode, and the statistics after it."""
        if contrast is None:
            outputs, after = self._trained_outputs(params, stats, x, real_B, key)
            return self.loss(seen(outputs), y), after
        trained = partial(self._trained_outputs, params, stats, x, real_B, key)
        outputs, features_BF = with_features(lambda: trained()[0], self._turned)
        return self.loss(seen(outputs), y) + contrast(x, features_BF), stats

    def _private_losses(self, params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        """Of each example, in training mode, of a model without statistics."""
        return self.loss(self._trained_outputs(params, {}, x, jnp.ones(len(x), bool), key)[0], y)

    def _contrast(self, rule: LocalRule, models: Any, x: jax.Array, features_BF: jax.Array) -> jax.Array:
        """What the rule adds to the losses, given models that are not trained, D each."""
        assert rule.feature_penalty is not None
        runs = [partial(self._outputs, model_D, x) for model_D in models]
        penalty_B: jax.Array = rule.feature_penalty(features_BF, *(with_features(run, self._turned)[1] for run in runs))
        return penalty_B

    def _trained_outputs(
        self, params: Any, stats: Any, x: jax.Array, real_B: jax.Array, key: jax.Array
    ) -> tuple[Any, Any]:
        """In training mode, and the statistics after it."""
        train: dict[str, Any] = {"train": True} if self._takes_train else {}
        with nn.intercept_methods(partial(_of_real_rows, real_B)):
            how: dict[str, Any] = {"rngs": {"dropout": key}, "mutable": [BATCH_STATS], **train}
            outputs, after = self.module.apply({"params": params, BATCH_STATS: stats}, x, **how)
        return outputs, after.get(BATCH_STATS, {})

    def _outputs(self, params_D: jax.Array, x: jax.Array) -> jax.Array:
        variables = {"params": self._unflatten(params_D), BATCH_STATS: self._statistics(params_D)}
        outputs: Any = self.module.apply(variables, x)
        return outputs

    def _unflatten(self, params_D: jax.Array) -> Any:
        """The vector's part that is trained, as flax parameters."""
        return self._as_flax(params_D, self._turned)

    def _statistics(self, params_D: jax.Array) -> Any:
        """The vector's buffers, as flax's ``batch_stats``."""
        return self._as_flax(params_D, self._kept)

    def _as_flax(self, params_D: jax.Array, names: Mapping[Path, NamedShape]) -> Any:
        leaves = {}
        for path, (name, shape) in names.items():
            leaves[path] = _to_flax(path, params_D[self.layout.slices[name]].reshape(shape))
        return unflatten_dict(leaves)

    def _flatten(self, params: Any, stats: Any) -> jax.Array:
        """Flax parameters and statistics as the vector."""
        leaves = {self._turned[path][0]: _to_torch(path, leaf) for path, leaf in flatten_dict(params).items()}
        leaves |= {self._kept[path][0]: _to_torch(path, leaf) for path, leaf in flatten_dict(stats).items()}
        return jnp.concatenate([leaves[leaf.name].ravel() for leaf in self.layout.leaves])

    @cached_property
    def _jax_device(self) -> Any:
        platform, _, index = self.device.partition(":")
        try:
            return jax.devices(platform)[int(index or 0)]
        except (RuntimeError, IndexError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SettingError("device", self.device, f"a device of this machine ({reason})", "device=cpu") from error


def _seeds(seed: int, round: int) -> np.ndarray:
    """Of what the model draws in training, and of noise."""
    drawn = [integer_seed(seed, purpose, round=round) & 0xFFFFFFFF for purpose in (Purpose.MODEL, Purpose.NOISE)]
    return np.array(drawn, np.uint32)


def _seen(rule: LocalRule, counts_C: Any, outputs: jax.Array) -> Any:
    """What the loss sees of a model's outputs under a rule."""
    return outputs if rule.adjust_logits is None else rule.adjust_logits(outputs, counts_C)


def _starts(order: Request, work: Sequence[ClientWork]) -> np.ndarray | None:
    """Where clients begin, if not all of them at the global model."""
    if all(one.start_D is None for one in work):
        return None
    return np.stack([as_numpy(order.params_D if one.start_D is None else one.start_D) for one in work])


def _of_real_rows(real_B: jax.Array, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """A call of some module; of a batch norm that takes statistics, over real rows, with torch's running variance."""
    norm = context.module
    if not isinstance(norm, nn.BatchNorm) or context.method_name != "__call__":
        return call(*args, **kwargs)
    x, fixed = args[0], [*args[1:], kwargs.get("use_running_average"), norm.use_running_average]
    if any(fixed):
        return call(*args, **kwargs)
    if len(x) != len(real_B):
        raise FedlearnError(f"{'.'.join(norm.path)} is a batch norm of {len(x)} rows, not of the batch's {len(real_B)}")
    before: Any = norm.get_variable(BATCH_STATS, "var")
    outputs = call(*args, **{**kwargs, "mask": real_B.reshape(-1, *(1,) * (x.ndim - 1))})
    count = real_B.sum() * (x.size // len(x) // before.size)  # of values that a channel's variance is taken of
    kept = norm.momentum * before
    change = norm.get_variable(BATCH_STATS, "var") - kept
    norm.put_variable(BATCH_STATS, "var", kept + change * count / jnp.maximum(count - 1, 1))
    return outputs


def _torch_leaves(variables: Mapping[str, Any], kind: str) -> dict[Path, NamedShape]:
    """The names and shapes that torch gives to flax leaves of one collection."""
    found = {}
    for path, leaf in flatten_dict(variables.get(kind, {})).items():
        name = ".".join([*path[:-1], LEAF_NAMES[kind].get(path[-1], path[-1])])
        found[path] = name, tuple(np.empty(leaf.shape, np.bool_).transpose(_axes_to_torch(path, leaf.ndim)).shape)
    return found


def _named_arrays(variables: Mapping[str, Any], kind: str, leaves: Mapping[Path, NamedShape]) -> dict[str, np.ndarray]:
    """Return the arrays of a flax collection by their names and axes in torch.

    Raises:
        SettingError: the collection lacks a leaf of the module, or a shape differs.
    """
    given = flatten_dict(variables.get(kind, {}))
    arrays = {}
    for path, (name, shape) in leaves.items():
        array = np.asarray(_to_torch(path, given[path]), np.float32) if path in given else None
        found = "nothing" if array is None else f"shape {array.shape}"
        expected = f"an array of shape {shape} at {'/'.join(path)}, as module.init returns it"
        if array is None or array.shape != shape:
            raise SettingError(f"variables[{kind!r}]", found, expected, "variables=module.init(key, x)")
        arrays[name] = array
    return arrays


def _axes_to_torch(path: tuple[str, ...], ndim: int) -> tuple[int, ...]:
    """Flax kernels are (..., inputs, outputs); torch weights are (outputs, inputs, ...)."""
    return (ndim - 1, ndim - 2, *range(ndim - 2)) if path[-1] == "kernel" else tuple(range(ndim))


def _to_torch(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
    return leaf.transpose(_axes_to_torch(path, leaf.ndim))


def _to_flax(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
    return leaf.transpose(tuple(np.argsort(_axes_to_torch(path, leaf.ndim)).tolist()))


def _normals(key: jax.Array, shape: tuple[int, ...], *, secret: bool) -> jax.Array:
    """Standard normal numbers: those of a key, or such as no key gives."""
    if not secret:
        return jax.random.normal(key, shape)
    return io_callback(lambda: secret_normals(shape).astype(np.float32), jax.ShapeDtypeStruct(shape, jnp.float32))


def _rows(array: jax.Array, rows_B: jax.Array, real_B: jax.Array) -> jax.Array:
    """Some rows, zero where they are not real: what lies there may be another client's."""
    real = real_B.reshape(-1, *(1,) * (array.ndim - 1))
    return jnp.where(real, array[rows_B], jnp.zeros((), array.dtype))


def _filled_up(rows_K: np.ndarray, size: int) -> np.ndarray:
    """The rows and zeros, ``size`` in all: clients of no steps."""
    if len(rows_K) == size:
        return rows_K
    return np.concatenate([rows_K, np.zeros((size - len(rows_K), *rows_K.shape[1:]), rows_K.dtype)])


def _round_up(size: int) -> int:
    """To three significant bits, so that few different sizes are compiled: at most a quarter more."""
    grain = 1 << max(0, size.bit_length() - 3)
    return -(-size // grain) * grain


def _optimizer(local: LocalSettings) -> optax.GradientTransformation:
    """The optax twins of torch.optim.SGD and torch.optim.AdamW."""
    if local.optimizer == "adamw":
        return optax.adamw(local.learning_rate, weight_decay=local.weight_decay)
    momentum = local.momentum or None
    return optax.chain(optax.add_decayed_weights(local.weight_decay), optax.sgd(local.learning_rate, momentum))
