"""The best hand-written JAX program for each workload, without a framework: one compiled program per round.

Shapes: D parameters, K clients of a cohort, N examples of one client, P examples of the pool, S local steps,
B batch, F features.

The pool of examples stays on the device. A device trains its clients one after another (``lax.scan``) and adds their
models to a running sum. Clients may have different numbers of steps. The cohort is divided among the CPU devices, one
per core.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedlearn import Layout
from simulations.benchmarks.models_jax import module
from simulations.benchmarks.processes import Share, balanced, num_cores
from simulations.benchmarks.synthetic import first_rows, poisson_batches, pool_of
from simulations.benchmarks.workloads import Workload

WIDEST = 56  # maximum size of a Poisson batch of w4: the mean is 32, and this is four standard deviations more


def set_num_devices(count: int) -> None:
    """Set the number of CPU devices of XLA in this process. It has no effect after the first computation."""
    flag = f"--xla_force_host_platform_device_count={count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


class Bare:
    """Federated averaging, one compiled program per round.

    Args:
        workload: workload to run.
        workers: number of CPU devices, >= 1; None uses one per core.
    """

    def __init__(self, workload: Workload, *, workers: int | None = None) -> None:
        count = workers or num_cores()
        if count > 1:
            set_num_devices(count)
        mesh = Mesh(np.array(jax.devices()[:count]), ("device",))
        self.workload, self.num_devices = workload, mesh.size
        self.variant = f"one compiled program, {mesh.size} device{'s' * (mesh.size > 1)}"
        self.layout = layout_of(workload)
        whole, split = PartitionSpec(), PartitionSpec("device")
        program = partial(_round, workload, self.layout)
        in_specs = (whole, whole, whole, split, split, split)
        self._program = jax.jit(
            jax.shard_map(program, mesh=mesh, in_specs=in_specs, out_specs=whole, check_vma=False),
        )
        pool = pool_of(workload)
        self._pool = jax.device_put((pool.x, pool.y.astype(np.int32)), NamedSharding(mesh, whole))

    def fit(self, params_D: np.ndarray, share: Share) -> np.ndarray:
        """Return the global model after a round, (D,)."""
        rows_KSB, steps_K, seeds_K = _plan(self.workload, share, self.num_devices)
        return np.asarray(self._program(jnp.asarray(params_D), *self._pool, rows_KSB, steps_K, seeds_K))

    def close(self) -> None:
        """Do nothing: this program has no processes to stop."""


def layout_of(workload: Workload) -> Layout:
    """Return the layout of the torch model. This program has the same vector of parameters."""
    x = jax.ShapeDtypeStruct((1, *workload.input_shape), jnp.float32)
    shapes = flatten_dict(jax.eval_shape(module(workload).init, jax.random.key(0), x)["params"])
    turned = {path: (leaf.shape[::-1][:2] + leaf.shape[:-2]) for path, leaf in shapes.items()}
    return Layout.from_shapes((_torch_name(path), turned[path]) for path in shapes)


def _torch_name(path: tuple[str, ...]) -> str:
    return ".".join(path).replace("kernel", "weight")


def as_tree(layout: Layout, params_D: jax.Array) -> Any:
    """Convert a vector (D,) to flax parameters."""
    leaves = {}
    for leaf in layout.leaves:
        value = params_D[layout.slices[leaf.name]].reshape(leaf.shape)
        turned = value.transpose((*range(2, value.ndim), 1, 0)) if value.ndim > 1 else value
        leaves[tuple(leaf.name.replace("weight", "kernel").split("."))] = turned
    return unflatten_dict(leaves)


def as_vector(layout: Layout, tree: Any) -> jax.Array:
    """Convert flax parameters to a vector (D,)."""
    leaves = {_torch_name(path): leaf for path, leaf in flatten_dict(tree).items()}
    turned = [leaves[leaf.name] for leaf in layout.leaves]
    turned = [v.transpose((v.ndim - 1, v.ndim - 2, *range(v.ndim - 2))) if v.ndim > 1 else v for v in turned]
    return jnp.concatenate([value.ravel() for value in turned])


def fit_client(workload: Workload, model: nn.Module, start: Any, batches: Any) -> Any:
    """Train a client for one epoch and return its parameters.

    Args:
        workload: workload to run.
        model: flax module of the workload.
        start: flax parameters of the global model.
        batches: x_P and y_P of the pool, rows_SB of each step (-1 is padding), number of steps, and seed.
    """
    x, y, rows_SB, num_steps, seed = batches
    private = workload.example_dp is not None
    # for dropout or noise; the generator "rbg" is cheaper for dropout, the default one for noise
    key = jax.random.key(seed, impl=None if private else "rbg")
    gradient_of = partial(_private_gradient, workload) if private else jax.grad(partial(_loss, workload, model))

    def step(s: jax.Array, weights: Any) -> Any:
        rows_B = rows_SB[s]
        gradient = gradient_of(weights, x[rows_B], y[rows_B], rows_B >= 0, jax.random.fold_in(key, s))
        return jax.tree.map(lambda w, g: w - workload.local.learning_rate * g, weights, gradient)

    return lax.fori_loop(0, num_steps, step, start)


def _loss(workload: Workload, model: nn.Module, weights: Any, x: Any, y: Any, real_B: Any, key: Any) -> jax.Array:
    outputs: Any = model.apply({"params": weights}, x, train=True, rngs={"dropout": key})
    if workload.task == "binary":
        loss_B = optax.sigmoid_binary_cross_entropy(outputs[:, 0], y)
    else:
        loss_B = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
    return jnp.sum(loss_B * real_B) / jnp.sum(real_B)


def _private_gradient(workload: Workload, weights: Any, x_BF: Any, y_B: Any, real_B: Any, key: Any) -> Any:
    """Return the noisy mean of clipped gradients (DP-SGD) of the multilayer perceptron, with ghost norms by hand."""
    dp, names, inputs = workload.example_dp, ("hidden_0", "hidden_1", "out"), [x_BF]
    assert dp is not None
    for name in names[:-1]:
        inputs.append(jax.nn.relu(inputs[-1] @ weights[name]["kernel"] + weights[name]["bias"]))
    logits = inputs[-1] @ weights["out"]["kernel"] + weights["out"]["bias"]
    deltas = [(jax.nn.softmax(logits) - jax.nn.one_hot(y_B, logits.shape[1])) * real_B[:, None]]
    for name, below in zip(names[:0:-1], inputs[:0:-1], strict=True):
        deltas.insert(0, deltas[0] @ weights[name]["kernel"].T * (below > 0))
    squares = [jnp.sum(d**2, 1) * (jnp.sum(a**2, 1) + 1) for d, a in zip(deltas, inputs, strict=True)]
    factor_B1 = (dp.clip / jnp.maximum(jnp.sqrt(sum(squares)), dp.clip))[:, None]
    scaled = [d * factor_B1 for d in deltas]
    sums = {name: {"bias": d.sum(0), "kernel": a.T @ d} for name, d, a in zip(names, scaled, inputs, strict=True)}
    leaves, tree = jax.tree.flatten(sums)
    cuts = np.cumsum([leaf.size for leaf in leaves])
    noise = jnp.split(dp.clip * dp.noise_multiplier * jax.random.normal(key, (int(cuts[-1]),)), cuts[:-1])
    noised = [(g + n.reshape(g.shape)) / workload.batch_size for g, n in zip(leaves, noise, strict=True)]
    return jax.tree.unflatten(tree, noised)


def build_client_fit(workload: Workload) -> Callable[[np.ndarray, int, np.ndarray], np.ndarray]:
    """Return a function ``(params_D, client, order_N) -> new params_D`` for a framework with its own processes."""
    model, layout, pool = module(workload), layout_of(workload), pool_of(workload)
    x, y = jnp.asarray(pool.x), jnp.asarray(pool.y.astype(np.int32))

    @jax.jit
    def program(params_D: Any, x: Any, y: Any, rows_KSB: Any, steps_K: Any, seeds_K: Any) -> jax.Array:
        batches = (x, y, rows_KSB[0], steps_K[0], seeds_K[0])
        return as_vector(layout, fit_client(workload, model, as_tree(layout, params_D), batches))

    def fit(params_D: np.ndarray, client: int, order_N: np.ndarray) -> np.ndarray:
        return np.asarray(program(params_D, x, y, *_plan(workload, [(client, order_N)], 1)))

    return fit


def _round(workload: Workload, layout: Layout, params_D: Any, x: Any, y: Any, *plan: Any) -> jax.Array:
    """Train the clients of one device, and return the mean over all devices."""
    model, start = module(workload), as_tree(layout, params_D)

    def add(sums: Any, client_plan: Any) -> Any:
        total, count = sums
        rows_SB, num_steps, seed = client_plan
        weights = fit_client(workload, model, start, (x, y, rows_SB, num_steps, seed))
        num_examples = jnp.sum(rows_SB >= 0)
        if workload.example_dp:  # the weight of a client does not depend on the sizes of its Poisson batches
            num_examples = jnp.where(num_steps > 0, workload.examples_per_client, 0)
        return (jax.tree.map(lambda t, w: t + num_examples * w, total, weights), count + num_examples), None

    zeros = (jax.tree.map(jnp.zeros_like, start), jnp.zeros((), jnp.int32))
    (total, count), _ = lax.scan(add, zeros, plan)
    total, count = lax.psum((total, count), "device")
    return as_vector(layout, jax.tree.map(lambda t: t / count, total))


def _plan(workload: Workload, share: Share, num_parts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide the clients among the devices in equal parts of work.

    Returns:
        Rows of the pool for each client and step, padded with -1; numbers of steps (K,); seeds (K,).
    """
    parts, first_row = balanced(share, num_parts), first_rows(workload)
    longest, size = max(map(len, parts)), workload.batch_size
    num_steps, width = -(-workload.largest // size), WIDEST if workload.example_dp else size
    rows = np.full((num_parts * longest, num_steps, width), -1, np.int32)
    steps_K, seeds_K = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.uint32)
    for number, part in enumerate(parts):
        for k, (client, order_N) in enumerate(part, number * longest):
            if workload.example_dp:
                for step, batch in enumerate(poisson_batches(workload, client, order_N)):
                    rows[k, step, : len(batch)] = batch[:width] + first_row(client)
            else:
                rows[k].reshape(-1)[: len(order_N)] = order_N + first_row(client)
            steps_K[k], seeds_K[k] = -(-len(order_N) // size), client + (int(order_N[0]) << 12)
    return rows, steps_K, seeds_K
