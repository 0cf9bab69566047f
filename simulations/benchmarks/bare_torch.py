"""The best hand-written torch program for each workload, without a framework.

Shapes: D parameters, K clients of a chunk, N examples of one client, B batch, F features.

It has no data loader, no optimizer object and no flattening of parameters. Gradients of small models are written by
hand, for several clients at once. Those of other models come from autograd. The program adds the models to a running
sum. Each core has one process with one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from fedlearn import Layout
from simulations.benchmarks.models_torch import module
from simulations.benchmarks.processes import Fit, Processes, Share, num_cores
from simulations.benchmarks.synthetic import first_rows, poisson_batches, pool_of
from simulations.benchmarks.workloads import Workload

CHUNKS = {"linear": 25, "mlp": 5}  # clients that train together: their weights and batches fit into the cache
MLP_LAYERS = ("hidden_0", "hidden_1", "out")


class Bare:
    """Federated averaging in processes of one thread.

    Args:
        workload: workload to run.
        workers: number of processes, >= 1; None uses one per core.
    """

    def __init__(self, workload: Workload, *, workers: int | None = None) -> None:
        torch.set_num_threads(1)
        count = workers or num_cores()
        pool_of(workload)  # before the fork, so that all processes share it
        self.layout = layout_of(workload)
        chunk = CHUNKS.get(workload.model, 0)
        method = f"gradients by hand, {chunk} clients at once (bmm)" if chunk else "a lean loop"
        method = "ghost norms by hand" if workload.example_dp else method
        by_hand = chunk and not workload.example_dp
        self.variant = f"{method}, {count} {'processes' if count > 1 else 'process'} of 1 thread"
        prepare = partial(batched if by_hand else loop, workload)
        self._processes = Processes(prepare, num_parameters=self.layout.num_parameters, count=count)

    def fit(self, params_D: np.ndarray, share: Share) -> np.ndarray:
        """Return the global model after a round, (D,)."""
        return self._processes.fit(params_D, share)

    def close(self) -> None:
        """Stop the other processes and wait for them."""
        self._processes.close()


def layout_of(workload: Workload) -> Layout:
    """Return the layout of the workload's model."""
    return Layout.from_shapes((name, tuple(p.shape)) for name, p in module(workload).named_parameters())


def loop(workload: Workload) -> Fit:
    """Return a function that trains the clients of a share one after another."""
    local = PrivateLoop(workload) if workload.example_dp else ClientLoop(workload)

    def fit(params_D: np.ndarray, share: Share) -> np.ndarray:
        start = local.leaves(params_D)
        totals = [torch.zeros_like(v) for v in start]
        for client, order_N in share:
            local.fit(start, client, order_N)
            with torch.no_grad():
                torch._foreach_add_(totals, local.weights, alpha=len(order_N))
        return torch.cat([v.ravel() for v in totals]).numpy()

    return fit


def build_client_fit(workload: Workload) -> Callable[[np.ndarray, int, np.ndarray], np.ndarray]:
    """Return a function ``(params_D, client, order_N) -> new params_D`` for a framework with its own processes."""
    torch.set_num_threads(1)
    local = ClientLoop(workload)

    def fit(params_D: np.ndarray, client: int, order_N: np.ndarray) -> np.ndarray:
        local.fit(local.leaves(params_D), client, order_N)
        return torch.cat([v.detach().ravel() for v in local.weights]).numpy()

    return fit


class ClientLoop:
    """Train one client at a time. The result is in ``weights``, in the order of the layout.

    Args:
        workload: workload to run.
    """

    def __init__(self, workload: Workload) -> None:
        self.workload, self.model, self._layout = workload, module(workload).train(), layout_of(workload)
        named = dict(self.model.named_parameters())
        self.weights: list[torch.Tensor] = [named[leaf.name] for leaf in self._layout.leaves]
        pool, self._first_row = pool_of(workload), first_rows(workload)
        self.x, self.y = torch.from_numpy(pool.x), torch.from_numpy(pool.y)
        self.loss = _binary if workload.task == "binary" else F.cross_entropy

    def leaves(self, params_D: np.ndarray) -> list[torch.Tensor]:
        """Split a vector (D,) into tensors, in the order of ``weights``."""
        return [torch.from_numpy(v) for v in self._layout.unpack(params_D).values()]

    def fit(self, start: list[torch.Tensor], client: int, order_N: np.ndarray) -> None:
        """Train one epoch, starting from the global model."""
        with torch.no_grad():
            torch._foreach_copy_(self.weights, start)
        for x_B, y_B in self._batches(client, order_N):
            gradients = torch.autograd.grad(self.loss(self.model(x_B), y_B), self.weights)
            with torch.no_grad():
                torch._foreach_add_(self.weights, gradients, alpha=-self.workload.local.learning_rate)

    def _batches(self, client: int, order_N: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rows_N = torch.from_numpy(order_N + self._first_row(client))
        size = self.workload.batch_size
        return zip(self.x.index_select(0, rows_N).split(size), self.y.index_select(0, rows_N).split(size), strict=True)


class PrivateLoop(ClientLoop):
    """Train one client at a time with DP-SGD on a multilayer perceptron. Gradients and ghost norms are hand-written.

    Args:
        workload: workload to run.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._noise_D = torch.empty(self._layout.num_parameters)
        self._noises = [self._noise_D[part].view(w.shape) for part, w in zip(self._slices(), self.weights, strict=True)]

    def _slices(self) -> list[slice]:
        return [self._layout.slices[leaf.name] for leaf in self._layout.leaves]

    @torch.no_grad()
    def fit(self, start: list[torch.Tensor], client: int, order_N: np.ndarray) -> None:
        """Train one epoch, starting from the global model."""
        torch._foreach_copy_(self.weights, start)
        dp, first = self.workload.example_dp, self._first_row(client)
        assert dp is not None
        for batch in poisson_batches(self.workload, client, order_N):
            rows_B = torch.from_numpy(batch + first)
            sums = self._sum_clipped_gradients(self.x.index_select(0, rows_B), self.y[rows_B], dp.clip)
            self._noise_D.normal_()
            torch._foreach_add_(sums, self._noises, alpha=dp.clip * dp.noise_multiplier)
            torch._foreach_add_(self.weights, sums, alpha=-self.workload.local.learning_rate / self.workload.batch_size)

    def _sum_clipped_gradients(self, x_BF: torch.Tensor, y_B: torch.Tensor, clip: float) -> list[torch.Tensor]:
        """Return the sums of the clipped gradients, in the order of the layout."""
        named = {leaf.name: w for leaf, w in zip(self._layout.leaves, self.weights, strict=True)}
        layers = [(named[f"{name}.weight"], named[f"{name}.bias"]) for name in MLP_LAYERS]
        inputs = [x_BF]
        for weight, bias in layers[:-1]:
            inputs.append(torch.addmm(bias, inputs[-1], weight.t()).relu_())
        weight, bias = layers[-1]
        delta = torch.softmax(torch.addmm(bias, inputs[-1], weight.t()), 1)
        delta[torch.arange(len(y_B)), y_B] -= 1
        deltas = [delta]
        for (weight, _), below in zip(layers[:0:-1], inputs[:0:-1], strict=True):
            deltas.insert(0, (deltas[0] @ weight).mul_(below > 0))
        squares = [d.square().sum(1) * (a.square().sum(1) + 1) for d, a in zip(deltas, inputs, strict=True)]
        factor_B1 = (clip / torch.stack(squares).sum(0).sqrt_().clamp_(min=clip))[:, None]
        sums = {}
        for name, d, a in zip(MLP_LAYERS, deltas, inputs, strict=True):
            d.mul_(factor_B1)
            sums[f"{name}.weight"], sums[f"{name}.bias"] = d.t() @ a, d.sum(0)
        return [sums[leaf.name] for leaf in self._layout.leaves]


def batched(workload: Workload) -> Fit:
    """Return a function that trains a small model for many clients of equal size together.

    The gradients are hand-written.
    """
    pool, first_row = pool_of(workload), first_rows(workload)
    x, y, size = torch.from_numpy(pool.x), torch.from_numpy(pool.y), CHUNKS[workload.model]
    fit_chunk = _fit_linear if workload.model == "linear" else _fit_mlp

    def fit(params_D: np.ndarray, share: Share) -> np.ndarray:
        start_D = torch.from_numpy(params_D)
        total_D = torch.zeros_like(start_D)
        for chunk in (share[i : i + size] for i in range(0, len(share), size)):
            rows_KN = torch.from_numpy(np.stack([order_N + first_row(client) for client, order_N in chunk]))
            total_D += fit_chunk(workload, start_D, x, y, rows_KN)
        return (total_D * workload.examples_per_client).numpy()

    return fit


def _fit_mlp(
    workload: Workload, start_D: torch.Tensor, x: torch.Tensor, y: torch.Tensor, rows_KN: torch.Tensor
) -> torch.Tensor:
    """Return the sum of the models of K clients, (D,)."""
    layout, clients = layout_of(workload), len(rows_KN)
    start = {name: torch.from_numpy(v) for name, v in layout.unpack(start_D.numpy()).items()}
    weights = [start[f"{name}.weight"].repeat(clients, 1, 1) for name in MLP_LAYERS]
    biases = [start[f"{name}.bias"].repeat(clients, 1, 1) for name in MLP_LAYERS]
    for rows_KB in rows_KN.split(workload.batch_size, dim=1):
        rows, size = rows_KB.reshape(-1), rows_KB.shape[1]
        inputs = [x.index_select(0, rows).view(clients, size, -1)]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            inputs.append(torch.baddbmm(bias, inputs[-1], weight.transpose(1, 2)).relu_())
        outputs = torch.baddbmm(biases[-1], inputs[-1], weights[-1].transpose(1, 2))
        delta = torch.softmax(outputs, 2)
        delta.view(len(rows), -1)[torch.arange(len(rows)), y[rows]] -= 1
        deltas = [delta.mul_(-workload.local.learning_rate / size)]
        for weight, below in zip(weights[:0:-1], inputs[:0:-1], strict=True):
            deltas.insert(0, torch.bmm(deltas[0], weight).mul_(below > 0))
        for weight, bias, delta, below in zip(weights, biases, deltas, inputs, strict=True):
            weight.baddbmm_(delta.transpose(1, 2), below)
            bias += delta.sum(1, keepdim=True)
    parts = {f"{name}.weight": v.sum(0) for name, v in zip(MLP_LAYERS, weights, strict=True)}
    parts |= {f"{name}.bias": v.sum(0) for name, v in zip(MLP_LAYERS, biases, strict=True)}
    return torch.cat([parts[leaf.name].reshape(-1) for leaf in layout.leaves])


def _fit_linear(
    workload: Workload, start_D: torch.Tensor, x: torch.Tensor, y: torch.Tensor, rows_KN: torch.Tensor
) -> torch.Tensor:
    """Return the sum of the models of K clients, (D,), in the order of the layout: the bias, then the weights."""
    bias_K = start_D[0].expand(len(rows_KN)).clone()
    weight_KF = start_D[1:].expand(len(rows_KN), -1).contiguous()
    for rows_KB in rows_KN.split(workload.batch_size, dim=1):
        x_KBF = x.index_select(0, rows_KB.reshape(-1)).view(*rows_KB.shape, -1)  # twice as fast as indexing
        logits_KB = torch.bmm(x_KBF, weight_KF[:, :, None])[:, :, 0] + bias_K[:, None]
        rate = workload.local.learning_rate / rows_KB.shape[1]
        step_KB = (torch.sigmoid(logits_KB) - y[rows_KB].float()).mul_(-rate)
        weight_KF[:, None].baddbmm_(step_KB[:, None], x_KBF)
        bias_K += step_KB.sum(1)
    return torch.cat([bias_K.sum()[None], weight_KF.sum(0)])


def _binary(logits_B1: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits_B1[:, 0], y_B.float())
