"""Train and predict with PyTorch: the only home of torch in the library.

Shapes: K clients in a block, D parameters laid flat, N examples, S local steps, B batch, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fedlearn.algorithm.local_rule import PREVIOUS_MODEL, LocalRule, plain_training
from fedlearn.core.federated_data import Task
from fedlearn.core.layout import Layout
from fedlearn.core.random import Purpose, integer_seed, secret_normals
from fedlearn.core.records import Array, ClientWork, LocalSettings, MetricSum, Request, Updates
from fedlearn.errors import SettingError, require
from fedlearn.trainers.base import (
    FROM_MODULE,
    Initializer,
    class_counts,
    describe_initializer,
    initial_parameters,
    keep_weights,
    refuse_dp_sgd_with_buffers,
)
from fedlearn.trainers.batching import batch_plans, poisson_plans, round_of, rounds_of, shared_base_array
from fedlearn.trainers.torch.dp_sgd import ClippedGradient
from fedlearn.trainers.torch.features import with_features

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (outputs_BC, y_B) -> loss_B
Forward = Callable[[torch.Tensor], torch.Tensor]  # a model: x_B -> outputs_BC
Losses = Callable[[Forward, torch.Tensor, torch.Tensor], torch.Tensor]  # (model, x_B, y_B) -> loss_B
RuleInputs = Mapping[str, torch.Tensor]
Gradients = tuple[torch.Tensor, ...]  # one for each parameter
GradientOf = Callable[[torch.Tensor, torch.Tensor], tuple[Gradients, torch.Tensor]]  # (x_B, y_B) -> ..., loss_B
Step = Callable[[Gradients], None]


def _logistic(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(outputs[:, 0], y.float(), reduction="none")


LOSSES: Mapping[Task, Loss] = {
    "binary": _logistic,
    "ranking": _logistic,
    "multiclass": lambda outputs, y: F.cross_entropy(outputs, y, reduction="none"),
    "regression": lambda outputs, y: (outputs[:, 0] - y) ** 2,
}


STOCHASTIC_MODULES = (nn.modules.dropout._DropoutNd, nn.RNNBase)  # modules that draw random numbers while they train
VMAP_MAX_PARAMETERS, VMAP_MIN_CLIENTS = (
    20_000,
    32,
)  # parameters, and clients in a block, where stepping together is faster on a CPU
MAX_PER_EXAMPLE_GRADIENT_BYTES = 2**28  # of per-example gradients that lie side by side
VMAP_GROUP_SIZE = 256  # clients that step together on a CPU


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One block of clients, with what they share on the device."""

    order: Request
    rule: LocalRule
    work: Sequence[ClientWork]
    plan_KSB: np.ndarray
    steps_K: np.ndarray
    global_D: torch.Tensor
    broadcast: Mapping[str, torch.Tensor]
    counts_KC: torch.Tensor | None


class TorchTrainer:
    """Train a plain ``nn.Module``, one client after another, in a loop without a data loader.

    The module's parameters, and its floating-point buffers, become views of one flat vector, so that the global model
    goes in and the local one comes out in one copy.

    Args:
        module: maps ``(B, ...)`` float32 to ``(B, C)``; parameters with ``requires_grad=False`` stay as they are.
        task: chooses the loss: binary cross-entropy on one logit, cross-entropy, or squared error.
        initial: draws the initial parameters from ``(layout, rng)``, for example
            `fedlearn.core.layout.default_initial_parameters`. None keeps the weights of the module.
        device: ``cpu``, ``cuda:0``, ...
        loss: ``(outputs_BC, y_B) -> loss_B`` instead of the task's.
        batching: ``map`` (one client after another), ``vmap`` (all clients of a block step together, as one batch of
            models), or ``auto``: vmap on a GPU, and for blocks of many clients with a small model, where a step's
            overhead outweighs its arithmetic. A model with buffers is always trained by ``map``.

    *Guarantees*: the same order gives bit-identical updates, with ``map`` also alone and in a block. Torch's global
    generator is left as it was; dropout draws from (seed, round, client). Gradients, optimiser, weight decay and local
    rule touch no buffer; what a client's batches make of it is in the client's update. Integer buffers (the number of
    batches seen) are in no vector: they are as they were given whenever a client begins, so that a batch norm with
    ``momentum=None`` averages over the batches of a round.
    """

    framework, supports_dp_sgd = "torch", True

    def __init__(
        self,
        module: nn.Module,
        *,
        task: Task,
        initial: Initializer | None = None,
        device: str = "cpu",
        loss: Loss | None = None,
        batching: str = "auto",
    ) -> None:
        _require_device(device)
        self.module, self.task, self.device, self.batching = module.to(device), task, device, batching
        self._counters = [(b, b.clone()) for b in module.buffers() if not b.is_floating_point()]
        buffers = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
        draws = any(isinstance(part, STOCHASTIC_MODULES) for part in module.modules())
        self._one_by_one = "draws random numbers" if draws else "keeps buffers" if [*module.buffers()] else ""
        self.loss = loss or LOSSES[task]
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        shapes, of_buffers = ([(name, tuple(t.shape)) for name, t in ts.items()] for ts in (trainable, buffers))
        self.layout = Layout.from_shapes(shapes, of_buffers)
        given = {name: t.detach().cpu().float().numpy().copy() for name, t in {**trainable, **buffers}.items()}
        self._initial = initial or keep_weights(given)
        self.initialization = describe_initializer(initial) if initial else FROM_MODULE
        self._buffers = {name: given[name] for name in buffers}
        self._flat_D = torch.from_numpy(self.layout.pack(given)).to(device)
        self._leaves = [trainable[leaf.name] for leaf in self.layout.trainable.leaves]
        for parameter, own in zip(self._leaves, self._split(self._flat_D), strict=True):
            parameter.data = own
        self._resident: tuple[np.ndarray, torch.Tensor] | None = None
        for name in buffers:
            _set_buffer(module, name, self._flat_D[self.layout.slices[name]].view(buffers[name].shape).data)
        self._clipped = lru_cache(maxsize=1)(partial(ClippedGradient, module, self.loss, self._leaves))

    @property
    def supports_process_pool(self) -> bool:
        """Whether forked processes may train; only on a CPU."""
        return self.device == "cpu"

    def close(self) -> None:
        """See `Trainer.close`; there is nothing to release."""

    def _split(self, vector_D: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat vector, one for each parameter."""
        return [vector_D[self.layout.slices[leaf.name]].view(leaf.shape) for leaf in self.layout.trainable.leaves]

    def with_batching(self, batching: str) -> TorchTrainer:
        """The same trainer, on the same module, with another way to train a block."""
        possible = batching != "vmap" or not self._one_by_one
        require(possible, "batching", batching, f"map or workers: the model {self._one_by_one}", "batching=map")
        other = copy(self)
        other.batching = batching
        return other

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """How a block would be trained."""
        if self.batching != "auto":
            return self.batching
        small = num_clients >= VMAP_MIN_CLIENTS and self.layout.num_parameters <= VMAP_MAX_PARAMETERS
        return "vmap" if (small or self.device != "cpu") and not self._one_by_one else "map"

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``."""
        return initial_parameters(self.layout, self._initial, seed, self._buffers)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients; see `Trainer.fit`."""
        with _one_thread(self.device):
            return self._fit(request, rule, work)

    def _fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        refuse_dp_sgd_with_buffers(self.layout, request.local)
        clients_K = np.array([one.client for one in work], np.int64)
        sizes_K = np.array([len(one.examples) for one in work], np.int64)
        plans = poisson_plans if request.local.example_dp else batch_plans
        plan_KSB, steps_K = plans(request, clients_K, sizes_K, rounds_of(request, work))
        counts_KC = class_counts(self, self.task, request, work) if rule.adjust_logits else None
        self.module.train()
        job = _Job(
            order=request,
            rule=rule,
            work=work,
            plan_KSB=plan_KSB,
            steps_K=steps_K,
            global_D=self._to_device(request.params_D),
            broadcast={name: self._to_device(request.broadcast[name]) for name in rule.receives},
            counts_KC=None if counts_KC is None else self._to_device(counts_KC),
        )
        together = self.describe_batching(len(work), int(sizes_K.sum())) == "vmap"
        delta_KD, losses_K = self._fit_together(job) if together else self._fit_in_turn(job)
        return Updates(
            clients_K=clients_K,
            delta_KD=delta_KD.numpy() if self.device == "cpu" else delta_KD,
            num_examples_K=sizes_K,
            num_steps_K=steps_K,
            metrics={"loss": MetricSum(losses_K, (plan_KSB >= 0).sum(axis=(1, 2)))},
        )

    def _fit_in_turn(self, job: _Job) -> tuple[torch.Tensor, np.ndarray]:
        """One client after another."""
        delta_KD = torch.empty((len(job.work), self.layout.num_parameters), device=self.device)
        losses_K, order = np.zeros(len(job.work)), job.order
        # torch.manual_seed notes a traceback for each kind of device that is not there: longer than a small step
        seeded = torch.default_generator.manual_seed if self.device == "cpu" else torch.manual_seed
        for k, one in enumerate(job.work):
            with torch.random.fork_rng(devices=[] if self.device == "cpu" else [self.device]):
                seeded(integer_seed(order.seed, Purpose.MODEL, round=round_of(order, one), client=one.client))
                losses_K[k] = self._fit_client(job, k)
            torch.sub(self._flat_D, self._start(job, one), out=delta_KD[k])
        return delta_KD, losses_K

    def _fit_client(self, job: _Job, k: int) -> float:
        """Local training of one client; leaves the result in the flat vector, returns the summed loss."""
        one, weights = job.work[k], [leaf.detach() for leaf in self._leaves]
        vectors = {name: self._split(v_D) for name, v_D in self._vectors(job, one).items()}
        self._flat_D.copy_(self._start(job, one))
        self._count_anew()
        step = _optimizer(self._leaves, job.order.local)
        gradient_of = self._privately(job, one) if job.order.local.example_dp else self._gradient
        if job.rule.has_custom_loss:
            gradient_of = partial(self._gradient, losses=partial(self._ruled, job.rule, self._known(job, k)))
        x, y = self._to_device(one.examples.x), self._to_device(one.examples.y)
        total = torch.zeros((), device=self.device)
        for rows_B in job.plan_KSB[k, : job.steps_K[k]]:
            batch = torch.from_numpy(rows_B[rows_B >= 0]).to(self.device)
            gradients, loss_B = gradient_of(x.index_select(0, batch), y.index_select(0, batch))
            total += loss_B.sum()
            if job.rule.correct is not plain_training.correct:
                gradients = _corrected(job.rule, gradients, weights, vectors)
            step(gradients)
        return float(total)

    def _start(self, job: _Job, one: ClientWork) -> torch.Tensor:
        return job.global_D if one.start_D is None else self._to_device(one.start_D)

    def _plain(self, run: Forward, x_B: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        """The losses of the model that ``run`` is."""
        return self.loss(run(x_B), y_B)

    def _known(self, job: _Job, k: int) -> RuleInputs:
        """What a rule that changes the loss is told of a client: counts of classes, models to compare with."""
        known = {} if job.counts_KC is None else {"counts": job.counts_KC[k]}
        if job.rule.feature_penalty:  # in memory of torch's own: how it is aligned may decide the last bit
            known["models"] = torch.stack([job.global_D, self._to_device(job.work[k].client_state[PREVIOUS_MODEL])])
        return known

    def _ruled(
        self, rule: LocalRule, known: RuleInputs, run: Forward, x_B: torch.Tensor, y_B: torch.Tensor
    ) -> torch.Tensor:
        """The same as the local rule has changed them."""
        if rule.feature_penalty is None:
            outputs_BC, penalty_B = run(x_B), 0
        else:
            outputs_BC, features_BF = with_features(self.module, partial(run, x_B))
            penalty_B = rule.feature_penalty(
                features_BF, *(self._features(model_D, x_B) for model_D in known["models"])
            )
        return (
            self.loss(rule.adjust_logits(outputs_BC, known["counts"]) if rule.adjust_logits else outputs_BC, y_B)
            + penalty_B
        )

    def _features(self, params_D: torch.Tensor, x_B: torch.Tensor) -> torch.Tensor:
        """Of a model that is not trained: in evaluation mode, without gradients."""
        self.module.eval()
        with torch.no_grad():
            _, features_BF = with_features(self.module, partial(self._applied, params_D, x_B))
        self.module.train()
        return features_BF

    def _gradient(
        self, x_B: torch.Tensor, y_B: torch.Tensor, losses: Losses | None = None
    ) -> tuple[Gradients, torch.Tensor]:
        """Of the mean loss, and the losses."""
        loss_B = (losses or self._plain)(self.module, x_B, y_B)
        mean_B = loss_B.new_full(loss_B.shape, 1 / len(loss_B))
        return torch.autograd.grad(loss_B, self._leaves, mean_B, materialize_grads=True), loss_B.detach()

    def _privately(self, job: _Job, one: ClientWork) -> GradientOf:
        """What stands for the gradient in DP-SGD: clipped, summed, noised, over the expected batch."""
        dp = job.order.local.example_dp
        assert dp is not None
        clipped = self._clipped(clip=dp.clip)
        noise, noise_D = self._noise(job.order, one), torch.zeros_like(self._flat_D)
        noises, expected = self._split(noise_D), min(job.order.local.batch_size, len(one.examples))

        def gradient_of(x_B: torch.Tensor, y_B: torch.Tensor) -> tuple[Gradients, torch.Tensor]:
            sums, loss_B = clipped(x_B, y_B, scale=1 / expected)
            if dp.noise_multiplier:
                noise(noise_D)
                torch._foreach_add_(sums, noises, alpha=dp.clip * dp.noise_multiplier / expected)
            return tuple(sums), loss_B

        return gradient_of

    def _noise(self, order: Request, one: ClientWork) -> Callable[[torch.Tensor], object]:
        """What fills a tensor with standard normal numbers: for real clients, with such as no seed gives."""
        if order.deployed:
            return lambda noise: noise.copy_(torch.from_numpy(secret_normals(tuple(noise.shape))))
        generator = torch.Generator(self.device)
        generator.manual_seed(integer_seed(order.seed, Purpose.NOISE, round=round_of(order, one), client=one.client))
        return lambda noise: noise.normal_(generator=generator)

    def _vectors(self, job: _Job, one: ClientWork) -> dict[str, torch.Tensor]:
        """What the local rule corrects with, D each: the global model, what the client remembers, what was sent."""
        memory = {name: self._to_device(one.client_state[name]) for name in job.rule.client_state}
        return {"w_global": job.global_D, **memory, **job.broadcast}

    def _fit_together(self, job: _Job) -> tuple[torch.Tensor, np.ndarray]:
        """All clients step at once, in groups that fit the cache; who is done earlier stays as it is."""
        size = VMAP_GROUP_SIZE if self.device == "cpu" else len(job.work)
        if job.order.local.example_dp:  # gradients of all examples of a step lie side by side
            size = min(
                size, max(1, MAX_PER_EXAMPLE_GRADIENT_BYTES // (4 * job.plan_KSB.shape[2] * self.layout.num_parameters))
            )
        groups = [slice(start, start + size) for start in range(0, len(job.work), size)]
        parts = [self._fit_group(job, own) for own in groups]
        return torch.cat([delta for delta, _ in parts]), np.concatenate([losses for _, losses in parts])

    def _fit_group(self, job: _Job, own: slice) -> tuple[torch.Tensor, np.ndarray]:
        work, steps_K = job.work[own], torch.from_numpy(job.steps_K[own]).to(self.device)
        x, x_starts_K = self._laid_out([one.examples.x for one in work])
        y, y_starts_K = self._end_to_end([one.examples.y for one in work])
        stacked = {
            name: torch.stack([self._to_device(one.client_state[name]) for one in work])
            for name in job.rule.client_state
        }
        start_KD = job.global_D.expand(len(work), -1)
        if any(one.start_D is not None for one in work):
            start_KD = torch.stack([self._start(job, one) for one in work])
        flat = nn.Parameter(start_KD.clone())
        step, total_K = _optimizer([flat], job.order.local), torch.zeros(len(work), device=self.device)
        gradients = self._privately_together(job, work) if job.order.local.example_dp else self._gradients
        if job.rule.has_custom_loss:
            knowns = [self._known(job, k) for k in range(len(job.work))[own]]
            known_K = {name: torch.stack([known[name] for known in knowns]) for name in knowns[0]}
            gradients = partial(self._ruled_gradients, job.rule, known_K)
        for s in range(int(steps_K.max())):
            rows_KB = torch.from_numpy(job.plan_KSB[own, s]).to(self.device).long()
            real_KB = rows_KB >= 0
            batch = (_rows(x, x_starts_K + rows_KB, real_KB), _rows(y, y_starts_K + rows_KB, real_KB), real_KB)
            gradient_KD, sum_K = gradients(flat.detach(), *batch)
            gradient_KD = job.rule.correct(gradient_KD, flat.detach(), job.global_D, **stacked, **job.broadcast)
            done_K = steps_K <= s
            before_KD = flat.detach()[done_K]
            step((gradient_KD,))
            flat.data[done_K] = before_KD
            total_K += sum_K
        return flat.detach() - start_KD, total_K.double().cpu().numpy()

    def _gradients(self, params_KD: torch.Tensor, *batch_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the mean loss of each client, and the sums of the losses."""
        one = torch.func.grad(partial(self._mean_loss, self._plain), has_aux=True)
        return torch.func.vmap(one)(params_KD, *batch_KB)

    def _ruled_gradients(
        self, rule: LocalRule, known_K: RuleInputs, params_KD: torch.Tensor, *batch_KB: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        def mean_loss(params_D: torch.Tensor, known: RuleInputs, *batch_B: torch.Tensor) -> Any:
            return self._mean_loss(partial(self._ruled, rule, known), params_D, *batch_B)

        return torch.func.vmap(torch.func.grad(mean_loss, has_aux=True))(params_KD, known_K, *batch_KB)

    def _privately_together(
        self, job: _Job, work: Sequence[ClientWork]
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """As `_privately`, for clients that step together."""
        dp = job.order.local.example_dp
        assert dp is not None
        noises = [self._noise(job.order, one) for one in work]
        noise_KD = torch.zeros((len(work), self.layout.num_parameters), device=self.device)
        expected_K = [min(job.order.local.batch_size, len(one.examples)) for one in work]
        expected_K1 = torch.tensor(expected_K, device=self.device)[:, None]

        def gradients(params_KD: torch.Tensor, *batch_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sum_KD, loss_K = torch.func.vmap(partial(self._clipped_sum, dp.clip))(params_KD, *batch_KB)
            if dp.noise_multiplier:
                for noise, row_D in zip(noises, noise_KD, strict=True):
                    noise(row_D)
                sum_KD = sum_KD.add(noise_KD, alpha=dp.clip * dp.noise_multiplier)
            return sum_KD / expected_K1, loss_K

        return gradients

    def _clipped_sum(
        self, clip: float, params_D: torch.Tensor, x_B: torch.Tensor, y_B: torch.Tensor, real_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the clipped gradients of a batch's real examples, and of their losses."""

        def loss_of(params_D: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.loss(self._applied(params_D, x[None]), y[None])[0]

        of_each = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0))
        gradient_BD, loss_B = of_each(params_D, x_B, y_B)
        norm_B = torch.linalg.vector_norm(gradient_BD, dim=1)
        counts_B = real_B & torch.isfinite(norm_B)
        factor_B = torch.where(counts_B, clip / norm_B.clamp(min=clip), 0.0)
        finite_BD = torch.where(counts_B[:, None], gradient_BD, 0.0)
        return factor_B @ finite_BD, torch.where(counts_B, loss_B, 0.0).detach().sum()

    def _applied(self, params_D: torch.Tensor, x_B: torch.Tensor) -> torch.Tensor:
        """The model's outputs with other parameters than its own."""
        leaves = {leaf.name: params_D[self.layout.slices[leaf.name]].view(leaf.shape) for leaf in self.layout.leaves}
        outputs: torch.Tensor = torch.func.functional_call(self.module, leaves, (x_B,))
        return outputs

    def _mean_loss(
        self, losses: Losses, params_D: torch.Tensor, x_B: torch.Tensor, y_B: torch.Tensor, real_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and sum of the loss over the real examples of a batch."""
        loss_B = torch.where(real_B, losses(partial(self._applied, params_D), x_B, y_B), 0.0)
        return loss_B.sum() / real_B.sum().clamp(min=1), loss_B.detach().sum()

    def _laid_out(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """The inputs of several clients in one tensor, and the row ``(K, 1)`` at which each client's begin."""
        whole, starts_K = shared_base_array(arrays)
        if whole is None:
            return self._end_to_end(arrays)
        if self._resident is None or self._resident[0] is not whole:
            self._resident = whole, self._to_device(whole)
        return self._resident[1], torch.from_numpy(starts_K).to(self.device)[:, None]

    def _end_to_end(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        starts_K = np.cumsum([0, *map(len, arrays[:-1])])
        return self._to_device(np.concatenate(arrays)), torch.from_numpy(starts_K).to(self.device)[:, None]

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Outputs ``(N, C)`` in evaluation mode."""
        self._flat_D.copy_(self._to_device(params_D))
        self.module.eval()
        with torch.inference_mode(), _one_thread(self.device):
            outputs = [self.module(self._to_device(part)) for part in np.array_split(x, max(1, len(x) // 4096))]
        return torch.cat(outputs).cpu().numpy()

    def network(self, params_D: Array) -> nn.Module:
        """The module with these parameters, in evaluation mode; a copy."""
        self._flat_D.copy_(self._to_device(params_D))
        self._count_anew()
        network = deepcopy(self.module).eval()
        for name in self._buffers:  # of its own: a view would be saved with all that it is a view of
            _set_buffer(network, name, network.get_buffer(name).clone())
        return network

    def _count_anew(self) -> None:
        for counter, given in self._counters:
            counter.copy_(given)

    def _to_device(self, array: Array) -> torch.Tensor:
        return torch.as_tensor(array, device=self.device)


def _set_buffer(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, tensor)


def _require_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError("device", device, f"a device of this machine ({reason})", "device=cpu") from error


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """Compute on one thread of this process, then restore the number of threads.

    On a CPU the models are small, and clients run side by side in processes. A second thread costs more than it saves,
    and sums would depend on the number of threads.
    """
    num_threads = torch.get_num_threads()
    if device == "cpu" and num_threads != 1:
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
    else:
        yield


def _rows(array: torch.Tensor, rows_KB: torch.Tensor, real_KB: torch.Tensor) -> torch.Tensor:
    """Some rows, zero where they are not real: what lies there may be another client's."""
    rows = array.index_select(0, rows_KB.clamp(min=0).view(-1)).view(*rows_KB.shape, *array.shape[1:])
    if real_KB.all():
        return rows
    return torch.where(real_KB.view(*real_KB.shape, *(1,) * (array.ndim - 1)), rows, rows.new_zeros(()))


def _corrected(
    rule: LocalRule,
    gradients: Gradients,
    weights: Sequence[torch.Tensor],
    vectors: Mapping[str, Sequence[torch.Tensor]],
) -> Gradients:
    """The local rule, on one parameter after another."""
    names, leaves = list(vectors), zip(*vectors.values(), strict=True)
    return tuple(
        rule.correct(gradient, weight, **dict(zip(names, own, strict=True)))
        for gradient, weight, own in zip(gradients, weights, leaves, strict=True)
    )


def _optimizer(leaves: Sequence[nn.Parameter], local: LocalSettings) -> Step:
    """What takes a step along gradients, with fresh state."""
    return _adamw(leaves, local) if local.optimizer == "adamw" else _sgd(leaves, local)


def _adamw(leaves: Sequence[nn.Parameter], local: LocalSettings) -> Step:
    optimizer = torch.optim.AdamW(leaves, lr=local.learning_rate, weight_decay=local.weight_decay)

    def step(gradients: Gradients) -> None:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()

    return step


def _sgd(leaves: Sequence[nn.Parameter], local: LocalSettings) -> Step:
    """As ``torch.optim.SGD``, whose import and bookkeeping cost more than a small model's step."""
    weights = [leaf.detach() for leaf in leaves]
    velocity = tuple(torch.zeros_like(weight) for weight in weights) if local.momentum else None

    def step(gradients: Gradients) -> None:
        if local.weight_decay:
            gradients = torch._foreach_add(gradients, weights, alpha=local.weight_decay)
        if velocity is not None:
            torch._foreach_mul_(velocity, local.momentum)
            torch._foreach_add_(velocity, gradients)
            gradients = velocity
        torch._foreach_add_(weights, gradients, alpha=-local.learning_rate)

    return step
