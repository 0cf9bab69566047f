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

from fedlearn.arrays import as_numpy
from fedlearn.data.federated import Task
from fedlearn.entropy import secret_normals
from fedlearn.errors import FedlearnError, SettingError
from fedlearn.layout import Layout
from fedlearn.local import LocalRule
from fedlearn.records import Array, LocalSettings, Order, Sum, Updates, Work
from fedlearn.seeds import Purpose, integer_seed
from fedlearn.trainers.base import (
    Initial,
    available_cores,
    balanced,
    batch_plans,
    counts_of_classes,
    initial_parameters,
    poisson_plans,
    slices_of_one,
)  # fmt: skip
from fedlearn.trainers.dp_jax import clipped_gradient

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
ONE_THREAD_A_PRODUCT = {"xla_cpu_multi_thread_eigen": False}

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}  # flax -> torch


class JaxTrainer:
    """Trains any flax (linen) module whose leaves are named and turned as its torch twin's.

    Args:
        module: maps ``(B, ...)`` float32 to ``(B, C)``; takes ``train: bool`` if it behaves differently in training.
            One that has a ``jit`` of its own is compiled by that: it hands values to programs besides the parameters.
        task: chooses the loss: binary cross-entropy on one logit, cross-entropy, or squared error.
        input_shape: of one example.
        initial: law of the initial parameters; None is `default_initial`.
        device: ``cpu``, ``cuda:0``, ``tpu``, ...
        loss: ``(outputs_BC, y_B) -> loss_B`` instead of the task's.
        batching: ``map`` (one client after another inside the program), ``vmap`` (all step together), or ``auto``: map
            on a CPU, whose cache holds one model, vmap elsewhere.

    Guarantees: equal initial parameters and batches to a `TorchTrainer` of the twin model; dropout draws from (seed,
    round, client), whatever the block.

    Raises:
        FedlearnError: if the module keeps state besides its parameters (batch-norm statistics).
    """

    framework, private = "jax", True

    def __init__(
        self,
        module: nn.Module,
        *,
        task: Task,
        input_shape: tuple[int, ...],
        initial: Initial | None = None,
        device: str = "cpu",
        loss: Loss | None = None,
        batching: str = "auto",
    ) -> None:
        self.module, self.task, self.device = module, task, device
        self.loss = loss or LOSSES[task]
        self._initial = initial
        _ = self._jax_device  # refuse a device that is not there before anything else
        self._takes_train = "train" in inspect.signature(module.__call__).parameters
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        variables = jax.eval_shape(module.init, keys, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
        if set(variables) != {"params"}:
            raise FedlearnError(
                f"the model keeps state that would not travel: {', '.join(sorted(set(variables) - {'params'}))}\n"
                "  try       GroupNorm or LayerNorm instead of BatchNorm"
            )
        self._turned = {path: _torch_leaf(path, leaf.shape) for path, leaf in flatten_dict(variables["params"]).items()}
        self.layout = Layout.of(self._turned.values())
        self._jit = getattr(module, "jit", jax.jit)
        self._predict = self._jit(self._outputs)
        self._block = lru_cache(maxsize=16)(self._compile)
        self._room: dict[str, int] = {}
        self._resident: dict[str, tuple[np.ndarray, jax.Array]] = {}
        self.batching = batching if batching != "auto" else "map" if device == "cpu" else "vmap"
        self._num_shares = available_cores() if device == "cpu" else 1

    def batched(self, batching: str) -> JaxTrainer:
        """The same trainer with another way to train a block."""
        other = copy(self)
        other.batching = batching if batching != "auto" else "map" if self.device == "cpu" else "vmap"
        other._block = lru_cache(maxsize=16)(other._compile)
        return other

    def batching_of(self, num_clients: int, num_examples: int) -> str:
        """How a block would be trained."""
        return self.batching

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``."""
        return initial_parameters(self.layout, self._initial, seed)

    def fit(self, order: Order, rule: LocalRule, work: Sequence[Work]) -> Updates:
        """Train K clients in one compiled program; see `Trainer.fit`."""
        clients_K = np.array([one.client for one in work], np.int64)
        sizes_K = np.array([len(one.examples) for one in work], np.int64)
        plans = poisson_plans if order.local.example_dp else batch_plans
        plan_KSB, steps_K = plans(order, clients_K, sizes_K)
        memory_KD = {name: np.stack([one.memory[name] for one in work]) for name in rule.memory}
        start_KD = _starts(order, work)
        counts_KC = counts_of_classes(self, self.task, order, work) if rule.logits else None
        broadcast = {name: order.broadcast[name] for name in rule.receives}
        seeds = [integer_seed(order.seed, p, round=order.round) & 0xFFFFFFFF for p in (Purpose.MODEL, Purpose.NOISE)]
        block = self._block(rule, order.local, order.deployed)
        with jax.default_device(self._jax_device):
            x, x_starts_K = self._laid_out("x", [one.examples.x for one in work])
            y, y_starts_K = self._laid_out("y", [one.examples.y for one in work])
            rows_KSB = self._widened(plan_KSB, order.local, int(sizes_K.max()))
            own = (rows_KSB, steps_K, clients_K, sizes_K, x_starts_K, y_starts_K, memory_KD, start_KD, counts_KC)
            shared = (jnp.asarray(order.params_D), broadcast, x, y, np.array(seeds, np.uint32))
        delta_KD, losses_K = self._in_shares(block, shared, own, steps_K)
        return Updates(
            clients_K=clients_K,
            delta_KD=delta_KD,
            num_examples_K=sizes_K,
            num_steps_K=steps_K,
            metrics={"loss": Sum(losses_K.astype(np.float64), (plan_KSB >= 0).sum(axis=(1, 2)))},
        )

    def _in_shares(self, block: Any, shared: Any, own: Any, steps_K: np.ndarray) -> tuple[Array, np.ndarray]:
        """Run the program on each core's share of the clients, all at the same time, in equal shapes."""
        size = -(-len(steps_K) // self._num_shares)
        shares = balanced(steps_K.tolist(), -(-len(steps_K) // size), most=size)

        def run(rows: np.ndarray) -> Any:
            share = jax.tree.map(lambda v_K: _filled_up(v_K[rows], size), own)
            with jax.default_device(self._jax_device):  # holds for one thread
                return jax.block_until_ready(block(*shared, *share))

        if len(shares) == 1:
            delta_KD, losses_K = run(shares[0])
            return (np.asarray(delta_KD) if self.device == "cpu" else delta_KD), np.asarray(losses_K)
        # one device runs programs one after another, unless each has a thread of its own waiting for it
        with ThreadPoolExecutor(self._num_shares) as threads:
            parts = list(threads.map(run, shares))
        delta_KD = np.empty((len(steps_K), self.layout.num_parameters), np.float32)
        losses_K = np.empty(len(steps_K), np.float32)
        for rows, (delta, losses) in zip(shares, parts, strict=True):
            delta_KD[rows], losses_K[rows] = np.asarray(delta)[: len(rows)], np.asarray(losses)[: len(rows)]
        return delta_KD, losses_K

    def _laid_out(self, name: str, arrays: Sequence[np.ndarray]) -> tuple[jax.Array, np.ndarray]:
        """The examples of K clients on the device, and the row at which each client's begin.

        Clients whose examples are slices of one array, as `from_arrays` makes them, find that array on the device from
        the round before; otherwise their examples are laid end to end.
        """
        whole, starts_K = slices_of_one(arrays)
        if whole is not None:
            if self._resident.get(name, (None, None))[0] is not whole:
                self._resident[name] = (whole, jnp.asarray(whole))
            return self._resident[name][1], starts_K
        sizes = [len(array) for array in arrays]
        laid = np.zeros((self._room_for("rows", sum(sizes)), *arrays[0].shape[1:]), arrays[0].dtype)
        np.concatenate(arrays, out=laid[: sum(sizes)])
        return jnp.asarray(laid), np.cumsum([0, *sizes[:-1]])

    def _widened(self, plan_KSB: np.ndarray, local: LocalSettings, largest: int) -> np.ndarray:
        """The plan in one of few shapes: as many steps as ever needed; batches, by this block alone, full or of 2^n."""
        clients, steps, batch = plan_KSB.shape
        width = min(local.batch_size, 1 << (batch - 1).bit_length())
        if local.example_dp:  # batches are of any size, few of more than three standard deviations above the mean
            usual = min(largest, local.batch_size + round(3 * local.batch_size**0.5))
            width = _round_up(max(batch, usual))
        wide_KSB = np.full((clients, self._room_for("steps", steps), width), -1, np.int32)
        wide_KSB[:, :steps, :batch] = plan_KSB
        return wide_KSB

    def _room_for(self, what: str, needed: int) -> int:
        """A size that only grows, so that cohorts of many sizes share one compiled program; costs memory, not steps."""
        self._room[what] = max(_round_up(needed), self._room.get(what, 0))
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

        def fit_client(params: Any, broadcast: Any, x: jax.Array, y: jax.Array, seeds: Any, own: Any) -> Any:
            rows_SB, num_steps, client, size, x_start, y_start, memory, start_D, counts_C = own
            gradient_of = private_gradient or partial(self._gradient, partial(_seen, rule, counts_C))
            start = params if start_D is None else self._unflatten(start_D)
            vectors = {name: self._unflatten(v_D) for name, v_D in {**memory, **broadcast}.items()}
            names = list(vectors)
            keys = [jax.random.fold_in(jax.random.key(seed), client) for seed in seeds]

            def correct(g: Any, w: Any, w_global: Any, *leaves: Any) -> Any:
                return rule.correct(g, w, w_global, **dict(zip(names, leaves, strict=True)))

            def step(s: jax.Array, carry: Any) -> Any:
                weights, state, total = carry
                rows_B = rows_SB[s]
                real_B = rows_B >= 0
                batch = (_rows(x, x_start + rows_B, real_B), _rows(y, y_start + rows_B, real_B), real_B)
                gradient, loss_sum = gradient_of(weights, *batch, [jax.random.fold_in(key, s) for key in keys], size)
                gradient = jax.tree.map(correct, gradient, weights, params, *vectors.values())
                change, state = optimizer.update(gradient, state, weights)
                return optax.apply_updates(weights, change), state, total + loss_sum

            weights, _, total = lax.fori_loop(0, num_steps, step, (start, optimizer.init(start), jnp.zeros(())))
            return self._flatten(jax.tree.map(jnp.subtract, weights, start)), total

        def block(params_D: Any, broadcast: Any, x: Any, y: Any, seeds: Any, *own: Any) -> Any:
            one = partial(fit_client, self._unflatten(params_D), broadcast, x, y, seeds)
            in_turn = self.batching == "map" or (deployed and local.example_dp)  # a callback cannot be batched
            return lax.map(one, own) if in_turn else jax.vmap(one)(own)

        return self._jit(block, compiler_options=ONE_THREAD_A_PRODUCT if self.device == "cpu" else None)

    def _gradient(
        self, seen: Any, weights: Any, x: Any, y: Any, real_B: Any, keys: Any, size: Any
    ) -> tuple[Any, jax.Array]:
        """Of the mean loss over the real examples of a batch, and the sum of their losses, of ``seen(outputs)``."""

        def mean_loss(weights: Any) -> tuple[jax.Array, jax.Array]:
            total = jnp.sum(jnp.where(real_B, self._losses(weights, x, y, keys[0], seen), 0.0))
            return total / jnp.sum(real_B), total

        return jax.grad(mean_loss, has_aux=True)(weights)

    def _private_gradient(self, local: LocalSettings, deployed: bool) -> Callable[..., tuple[Any, jax.Array]]:
        """What stands for the gradient in DP-SGD: clipped, summed, noised, over the expected batch."""
        dp = local.example_dp
        assert dp is not None
        clipped = clipped_gradient(self._losses, clip=dp.clip)

        def gradient_of(weights: Any, x: Any, y: Any, real_B: Any, keys: Any, size: Any) -> tuple[Any, jax.Array]:
            total, loss_sum = clipped(weights, x, y, real_B, keys[0])
            if dp.noise_multiplier:
                leaves, tree = jax.tree.flatten(total)
                ends = np.cumsum([leaf.size for leaf in leaves])
                noise = jnp.split(_normals(keys[1], (int(ends[-1]),), secret=deployed), ends[:-1])
                deviation = dp.clip * dp.noise_multiplier
                noised = [g + deviation * n.reshape(g.shape) for g, n in zip(leaves, noise, strict=True)]
                total = jax.tree.unflatten(tree, noised)
            return jax.tree.map(lambda g: g / jnp.minimum(local.batch_size, size), total), loss_sum

        return gradient_of

    def _losses(
        self, params: Any, x: jax.Array, y: jax.Array, key: jax.Array, seen: Any = lambda outputs: outputs
    ) -> jax.Array:
        """Of each example, in training mode."""
        train: dict[str, Any] = {"train": True} if self._takes_train else {}
        outputs: Any = self.module.apply({"params": params}, x, rngs={"dropout": key}, **train)
        return self.loss(seen(outputs), y)

    def _outputs(self, params_D: jax.Array, x: jax.Array) -> jax.Array:
        outputs: Any = self.module.apply({"params": self._unflatten(params_D)}, x)
        return outputs

    def _unflatten(self, params_D: jax.Array) -> Any:
        """The vector as flax parameters."""
        leaves = {}
        for path, (name, shape) in self._turned.items():
            leaves[path] = _to_flax(path, params_D[self.layout.slices[name]].reshape(shape))
        return unflatten_dict(leaves)

    def _flatten(self, params: Any) -> jax.Array:
        """Flax parameters as the vector."""
        leaves = {self._turned[path][0]: _to_torch(path, leaf) for path, leaf in flatten_dict(params).items()}
        return jnp.concatenate([leaves[leaf.name].ravel() for leaf in self.layout.leaves])

    @cached_property
    def _jax_device(self) -> Any:
        platform, _, index = self.device.partition(":")
        try:
            return jax.devices(platform)[int(index or 0)]
        except (RuntimeError, IndexError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SettingError("device", self.device, f"a device of this machine ({reason})", "device=cpu") from error


def _seen(rule: LocalRule, counts_C: Any, outputs: jax.Array) -> Any:
    """What the loss sees of a model's outputs under a rule."""
    return outputs if rule.logits is None else rule.logits(outputs, counts_C)


def _starts(order: Order, work: Sequence[Work]) -> np.ndarray | None:
    """Where clients begin, if not all of them at the global model."""
    if all(one.start_D is None for one in work):
        return None
    return np.stack([as_numpy(order.params_D if one.start_D is None else one.start_D) for one in work])


def _torch_leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The name and shape that torch gives to a flax leaf."""
    name = ".".join([*path[:-1], LEAF_NAMES.get(path[-1], path[-1])])
    return name, tuple(np.empty(shape, np.bool_).transpose(_axes_to_torch(path, len(shape))).shape)


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
