"""Take the local steps of clients whose model is a chain of linear layers, several clients at once.

The results have the bits of `ClientSteps`, because `ChainPasses` computes each client as if it were alone. The first
use of a number of clients and a batch size compares all bits with autograd. If they differ on a machine, autograd
computes the gradients.

Shapes: K clients of a group, D parameters, S local steps, B batch, C outputs, N examples of several clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fedlearn.algorithm.local_rule import plain_training
from fedlearn.core.named_option import option_name
from fedlearn.core.optimizers import optimizer_values
from fedlearn.core.schedules import shares_rates
from fedlearn.trainers.batching import shared_base_array
from fedlearn.trainers.torch.chain import DRAWN_SCALE, Chain
from fedlearn.trainers.torch.chain_losses import write_loss_gradients
from fedlearn.trainers.torch.chain_passes import ChainPasses, LayerParameters, RowMemory
from fedlearn.trainers.torch.client_steps import ClientSteps, correct_gradients
from fedlearn.trainers.torch.flat_model import FlatModel
from fedlearn.trainers.torch.job import Job
from fedlearn.trainers.torch.losses import LOSSES
from fedlearn.trainers.torch.optimizers import clip_gradients, optimizer_step

GROUP_BYTES = 2**23  # bytes of parameters, gradients and values of the clients that step together; they fit the cache
MAX_GROUP = 128  # clients that step together
MIN_COMPARED, MAX_DRAWS = 2**13, 8  # numbers that a comparison with autograd has, unless it needs too many draws


class Run(NamedTuple):
    """Consecutive clients, from ``start`` to ``end - 1``, whose batches in a step have the same size."""

    start: int
    end: int
    size: int


class ChainSteps:
    """Train clients of a chain of linear layers together.

    Args:
        chain: the model.
        client_steps: local steps of single clients.
    """

    def __init__(self, chain: Chain, client_steps: ClientSteps) -> None:
        self.chain, self.client_steps, self.model = chain, client_steps, client_steps.model
        self.lanes = lru_cache(maxsize=4)(partial(_Lanes, chain, self.model, RowMemory()))  # by number of clients
        self.is_equal: dict[tuple[int, int], bool] = {}  # True: the bits equal autograd; by clients and batch size

    def fits(self, job: Job) -> bool:
        """Return whether all clients have the plain gradient of a loss of the library, in float32."""
        local, rule = job.local, job.rule
        changes_gradient = job.changes_loss or rule.gradient is not None or local.example_dp is not None
        keeps = rule.frozen_parameters or rule.optimizer_state
        is_known = self.client_steps.losses.loss in LOSSES.values() and option_name(local.optimizer) is not None
        if changes_gradient or keeps or not is_known or local.precision != "float32":
            return False
        if local.micro_batch_size is not None or not self._group_size(job) or not self.chain.is_intact:
            return False
        kinds = {
            (w.examples.x.dtype, w.examples.x.shape[1:], w.examples.y.dtype, w.examples.y.shape[1:]) for w in job.work
        }
        dtype, shape, *_ = next(iter(kinds))
        return len(kinds) == 1 and dtype == np.float32 and self.chain.accepts(shape)

    def _group_size(self, job: Job) -> int:
        """Return the number of clients that step together. It is 0 for large models, whose memory changes."""
        numbers = self.model.layout.num_parameters + job.plan_KSB.shape[2] * self.chain.num_values
        return min(MAX_GROUP, GROUP_BYTES // (8 * numbers))  # parameters and gradients, values and deltas

    @torch.no_grad()
    def fit(self, job: Job) -> tuple[torch.Tensor, np.ndarray]:
        """Train all clients. Return the updates and the total losses."""
        largest, num_parameters = self._group_size(job), self.model.layout.num_parameters
        order_K = np.argsort(-job.steps_K, kind="stable")  # the clients of a group then have similar numbers of steps
        delta_KD, losses_K = torch.empty(len(order_K), num_parameters, dtype=torch.float32), np.zeros(len(order_K))
        for start in range(0, len(order_K), largest):
            part = slice(start, start + largest)
            losses_K[order_K[part]] = _Group(self, job, order_K[part]).train(delta_KD[part])
        if (np.diff(order_K) < 0).any():
            delta_KD = delta_KD[torch.from_numpy(np.argsort(order_K))]
        return delta_KD, losses_K


class _Lanes:
    """Memory for the training of K clients that step together.

    Attributes:
        params_KD: parameters of the clients.
        weights: views of them, one ``(K, ...)`` per parameter of the model.
        gradients: their gradients.
    """

    def __init__(self, chain: Chain, model: FlatModel, memory: RowMemory, count: int) -> None:
        self.chain, self.memory = chain, memory
        self.params_KD = memory.rows("parameters", count, model.layout.num_parameters)
        slices = model.layout.slices
        leaves = model.trained.leaves
        self.weights = [self.params_KD[:, slices[leaf.name]].unflatten(1, leaf.shape) for leaf in leaves]
        self.gradients = [memory.rows(("gradient", leaf.name), count, *leaf.shape) for leaf in leaves]
        self._places = {id(parameter): i for i, parameter in enumerate(model.leaves)}
        self.passes = lru_cache(maxsize=256)(self._build_passes)

    def _build_passes(self, run: Run) -> ChainPasses:
        """Return the passes of a run of clients."""
        part = slice(run.start, run.end)
        parameters, gradients = (
            [
                LayerParameters(*(None if p is None else parts[self._places[id(p)]][part] for p in (m.weight, m.bias)))
                for m, _ in self.chain.links
            ]
            for parts in (self.weights, self.gradients)
        )
        return ChainPasses(self.chain, parameters, gradients, size=run.size, memory=self.memory)


class _Group:
    """The training of clients that step together.

    Args:
        steps: memory, and results of comparisons.
        job: the training of a block.
        clients_K: places of the clients in the block, with descending numbers of steps.
    """

    def __init__(self, steps: ChainSteps, job: Job, clients_K: np.ndarray) -> None:
        self.steps, self.job, self.model, self.clients = steps, job, steps.model, clients_K.tolist()
        self.work = [job.work[k] for k in self.clients]
        self.lanes, self.steps_K = steps.lanes(len(self.work)), job.steps_K[clients_K]
        starts = [job.start(work) for work in self.work]
        is_global = all(start_D is job.global_D for start_D in starts)
        self.start_KD = job.global_D.expand(len(starts), -1) if is_global else torch.stack(starts)
        plan_KSB, xs = job.plan_KSB[clients_K], [work.examples.x for work in self.work]
        self.sizes_KS = (plan_KSB >= 0).sum(axis=2)
        whole, starts_K = shared_base_array(xs)
        self._xs = [torch.as_tensor(x).reshape(len(x), -1) for x in (xs if whole is None else [whole])]
        self._y = torch.as_tensor(np.concatenate([work.examples.y for work in self.work]))
        first_K = np.cumsum([0, *(len(x) for x in xs[:-1])])
        self._rows_y = first_K[:, None, None] + plan_KSB  # rows of all clients together
        self._rows_x = plan_KSB.astype(np.int64) if whole is None else starts_K[:, None, None] + plan_KSB

    def train(self, delta_KD: torch.Tensor) -> np.ndarray:
        """Train the clients, and write their updates. Return the total losses."""
        params_KD = self.lanes.params_KD
        params_KD.copy_(self.start_KD)
        total_K, step = torch.zeros(len(self.work), dtype=torch.float32), self._optimizer_step()
        for s in range(int(self.steps_K[0])):
            for run in _runs(self.sizes_KS[:, s]):
                total_K[run.start : run.end] += self._compute_gradients(run, s)
            step(s)
            done = np.flatnonzero(self.steps_K == s + 1)  # consecutive clients
            if len(done):
                part = slice(int(done[0]), int(done[-1]) + 1)
                torch.sub(params_KD[part], self.start_KD[part], out=delta_KD[part])
        return total_K.double().numpy()

    def _optimizer_step(self) -> Callable[[int], None]:
        """Return a function that takes a step of the optimizer, by the number of the step."""
        job, local = self.job, self.job.local
        is_plain = option_name(local.optimizer) == "sgd" and not optimizer_values(local.optimizer)["nesterov"]
        shares = job.rates_KS is None or shares_rates(job.rates_KS[self.clients], self.steps_K)
        corrects = job.rule.correct is not plain_training.correct
        if not (is_plain and shares) or corrects or local.max_grad_norm is not None:
            return self._steps_alone(corrects=corrects)
        gradients, rates = tuple(self.lanes.gradients), job.rates(self.clients[0])
        step = optimizer_step([nn.Parameter(weight) for weight in self.lanes.weights], local)
        return lambda s: step(gradients, rates[s])

    def _steps_alone(self, *, corrects: bool) -> Callable[[int], None]:
        """Return a function that takes a step for one client after another, as `ClientSteps` does."""
        job, split = self.job, self.model.split
        weights, gradients = ([*zip(*parts, strict=True)] for parts in (self.lanes.weights, self.lanes.gradients))
        steps = [optimizer_step([nn.Parameter(weight) for weight in row], job.local) for row in weights]
        rates = [job.rates(k) for k in self.clients]
        vectors = [{n: split(v) for n, v in job.vectors(work).items()} if corrects else {} for work in self.work]

        def step(s: int) -> None:
            for k in range(int((self.steps_K > s).sum())):
                gradient = gradients[k]
                if job.local.max_grad_norm is not None:
                    gradient = clip_gradients(job.local.max_grad_norm, gradient)
                if corrects:
                    gradient = correct_gradients(job.rule, gradient, weights[k], vectors[k])
                steps[k](gradient, rates[k][s])

        return step

    def _compute_gradients(self, run: Run, s: int) -> torch.Tensor:
        """Compute the gradients of a run of clients in a step. Return the sums of their losses, ``(K,)``."""
        rows_KB = torch.from_numpy(self._rows_y[run.start : run.end, s, : run.size])
        y_KB = self._y.index_select(0, rows_KB.flatten()).unflatten(0, rows_KB.shape)
        key = (run.end - run.start, run.size)
        if key not in self.steps.is_equal:
            self.steps.is_equal[key] = self._compare(run, y_KB)
        self._load_inputs(run, s)
        return self._together(run, y_KB) if self.steps.is_equal[key] else self._alone(run, y_KB)

    def _load_inputs(self, run: Run, s: int) -> None:
        """Copy the inputs of a batch of each client into the memory of the passes."""
        rows_KB, x = torch.from_numpy(self._rows_x[run.start : run.end, s, : run.size]), self.lanes.passes(run).x
        if len(self._xs) == 1 and x.is_contiguous():
            torch.index_select(self._xs[0], 0, rows_KB.flatten(), out=x.view(rows_KB.numel(), -1))
            return
        for k, (x_BF, rows_B) in enumerate(zip(x, rows_KB, strict=True), start=run.start):
            torch.index_select(self._xs[k if len(self._xs) > 1 else 0], 0, rows_B, out=x_BF)

    def _together(self, run: Run, y_KB: torch.Tensor) -> torch.Tensor:
        """Compute the gradients with the passes of the chain."""
        passes, loss = self.lanes.passes(run), self.steps.client_steps.losses.loss
        loss_KB = write_loss_gradients(loss, passes.forward(), y_KB, passes.delta, share=1 / run.size)
        passes.backward()
        return loss_KB.sum(1)

    def _alone(self, run: Run, y_KB: torch.Tensor) -> torch.Tensor:
        """Compute the gradients with autograd, one client after another."""
        client_steps, shape, sums = self.steps.client_steps, self.work[0].examples.x.shape[1:], []
        for k, x_B, y_B in zip(range(run.start, run.end), self.lanes.passes(run).x, y_KB, strict=True):
            self.model.load(self.lanes.params_KD[k])
            x_B = x_B.clone().view(run.size, *shape)
            with torch.enable_grad():
                gradients, loss_B = client_steps.gradient(x_B, y_B, y_B, losses=client_steps.losses.plain)
            torch._foreach_copy_([gradient[k] for gradient in self.lanes.gradients], list(gradients))
            sums.append(loss_B.sum())
        return torch.stack(sums)

    def _compare(self, run: Run, y_KB: torch.Tensor) -> bool:
        """Return whether the gradients and losses of a run equal autograd in all bits, at random parameters."""
        part, x, generator = slice(run.start, run.end), self.lanes.passes(run).x, torch.Generator().manual_seed(1)
        params_KD, gradients = self.lanes.params_KD[part], [gradient[part] for gradient in self.lanes.gradients]
        before_KD, is_equal = params_KD.clone(), True
        for _ in range(min(MAX_DRAWS, 1 + MIN_COMPARED // params_KD.numel())):
            params_KD.copy_(DRAWN_SCALE * torch.randn(params_KD.shape, generator=generator))
            x.copy_(torch.randn(x.shape, generator=generator))
            together = [self._together(run, y_KB), *(gradient.clone() for gradient in gradients)]
            is_equal &= all(map(torch.equal, together, [self._alone(run, y_KB), *gradients]))
        params_KD.copy_(before_KD)
        return is_equal


def _runs(sizes_K: np.ndarray) -> Iterator[Run]:
    """Yield the runs of clients with batches of equal size, which is not 0."""
    start = 0
    for size, clients in groupby(sizes_K.tolist()):
        end = start + sum(1 for _ in clients)
        if size:
            yield Run(start, end, size)
        start = end
