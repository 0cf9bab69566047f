"""Train a PyTorch model and predict with it.

Only this folder and `fedlearn.testing` import torch.

Shapes: K clients in a block, D parameters, N examples, S local steps, B batch, C outputs.
"""

from __future__ import annotations

from bdb import BdbQuit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlearn.algorithm.local_rule import PREVIOUS_MODEL, LocalRule, plain_training
from fedlearn.core.layout import Layout
from fedlearn.core.model_report import ModelReport
from fedlearn.core.optimizers import STATE_PREFIX, STEPS
from fedlearn.core.random import Purpose, integer_seed
from fedlearn.core.records import Array, ClientWork, Examples, LocalSettings, MetricSum, Request, Updates
from fedlearn.core.schedules import learning_rates, shares_rates
from fedlearn.core.tasks import Task, as_task
from fedlearn.errors import FedlearnError, SettingError, require
from fedlearn.trainers.base import (
    FROM_MODULE,
    Initializer,
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
    batch_plans,
    poisson_plans,
    prediction_parts,
    round_of,
    rounds_of,
    shared_base_array,
)
from fedlearn.trainers.class_weights import class_weights
from fedlearn.trainers.contract import cause_of, kind_of, refuse_training, require_loss_function
from fedlearn.trainers.example_keys import example_keys
from fedlearn.trainers.torch.contract import ModuleCheck, prepare_module
from fedlearn.trainers.torch.dp_sgd import ClippedGradient
from fedlearn.trainers.torch.features import with_features
from fedlearn.trainers.torch.loss_changes import training_loss
from fedlearn.trainers.torch.losses import LOSSES, Loss, loss_of
from fedlearn.trainers.torch.noise import GridNoise
from fedlearn.trainers.torch.optimizers import (
    Gradients,
    KeptState,
    check_optimizer,
    clip_gradients,
    clip_rows,
    is_elementwise,
    optimizer_step,
)

Forward = Callable[[torch.Tensor], torch.Tensor]  # a model: x_B -> outputs_BC
Losses = Callable[[Forward, torch.Tensor, torch.Tensor], torch.Tensor]  # (model, x_B, y_B) -> loss_B
RuleInputs = Mapping[str, torch.Tensor]  # values of one client for a rule that changes the loss
# (x_B, y_B, rows_B) -> gradients, loss_B
GradientOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[Gradients, torch.Tensor]]


STOCHASTIC_MODULES = (nn.modules.dropout._DropoutNd, nn.RNNBase)  # modules that draw random numbers in training
VMAP_MAX_PARAMETERS = 20_000  # on a CPU, vmap is faster up to this model size
VMAP_MIN_CLIENTS = 32  # on a CPU, vmap is faster from this block size on
MAX_PER_EXAMPLE_GRADIENT_BYTES = 2**28  # maximum size of the per-example gradients in memory
STEP_BITS = 40  # each local step has 2^40 numbers of the stream of an example
VMAP_GROUP_SIZE = 256  # number of clients that step together on a CPU


@dataclass(frozen=True, kw_only=True)
class _Job:
    """The training of one block of clients, and the tensors that the clients share."""

    request: Request
    rule: LocalRule
    work: Sequence[ClientWork]
    plan_KSB: np.ndarray
    steps_K: np.ndarray
    global_D: torch.Tensor
    broadcast: Mapping[str, torch.Tensor]
    counts_KC: torch.Tensor | None
    weights_KC: torch.Tensor | None  # class weights
    rates_KS: np.ndarray | None  # learning rates of all steps; None if they are constant

    @property
    def local(self) -> LocalSettings:
        """Return the settings of local training of the request."""
        return self.request.local

    @property
    def changes_loss(self) -> bool:
        """True if the rule or the settings change the loss of the task."""
        return self.rule.has_custom_loss or self.local.changes_loss

    def rates(self, k: int) -> Sequence[float]:
        """Return the learning rates of the steps of a client."""
        num_steps = int(self.steps_K[k])
        return [self.local.learning_rate] * num_steps if self.rates_KS is None else self.rates_KS[k].tolist()

    def block_rates(self, group: slice) -> Sequence[float]:
        """Return the learning rates of the steps of a group of clients that step together."""
        num_steps = int(self.steps_K[group].max())
        if self.rates_KS is None:
            return [self.local.learning_rate] * num_steps
        return self.rates_KS[group, :num_steps].max(axis=0).tolist()

    @property
    def can_step_together(self) -> bool:
        """True if one optimizer can take the steps of all clients of a block."""
        return (
            is_elementwise(self.local)
            and not self.rule.optimizer_state
            and (self.rates_KS is None or shares_rates(self.rates_KS, self.steps_K))
        )


class TorchTrainer:
    """Train an ``nn.Module`` in a loop without a data loader.

    The parameters and the floating-point buffers of the module become views of one flat vector. So one copy loads the
    global model, and one copy reads the local model.

    Args:
        module: maps ``(B, ...)`` float32 to ``(B, C)``. Parameters with ``requires_grad=False`` do not change. Other
            types of parameters become float32. ``torch.compile`` and ``DataParallel`` are removed.
        task: a `Task` or the name of a shipped task. It determines the loss, e.g. binary cross-entropy on one logit.
        initial: draws the initial parameters from ``(layout, rng)``, for example
            `fedlearn.core.layout.default_initial_parameters`. None keeps the weights of the module.
        device: device of torch, for example ``cpu`` (default) or ``cuda:0``.
        loss: ``(outputs_BC, y_B) -> loss_B``; default the loss of the task.
        output: key, position or attribute of the outputs, for a module that returns a dict, a tuple or a dataclass.
            None for a module that returns an array.
        input_shape: shape of one example. Only lazy layers need it, to create their parameters.
        batching: ``map`` trains one client after another. ``vmap`` trains all clients of a block together, as one
            batch of models. ``auto`` (default) selects ``vmap`` on a GPU. On a CPU it selects ``vmap`` for large
            blocks of a small model, because the overhead of a step exceeds its arithmetic. Models with buffers or
            random modules need ``map``.

    *Guarantees*:

    - Equal requests give bit-identical updates. With ``map``, an update does not depend on the other clients.
    - Training does not change torch's global generator. Dropout draws from (seed, round, client).
    - Gradients, optimizer, weight decay and local rule do not change buffers. The update of a client contains the
      changes of its buffers by the forward passes.
    - Integer buffers (the number of batches) and buffers with ``persistent=False`` are not in the vector. They have
      their initial values when a client starts. So a batch norm with ``momentum=None`` averages over the batches of
      one round.
    """

    framework, supports_dp_sgd = "torch", True

    def __init__(
        self,
        module: nn.Module,
        *,
        task: Task | str,
        initial: Initializer | None = None,
        device: str = "cpu",
        loss: Loss | None = None,
        output: str | int | None = None,
        input_shape: tuple[int, ...] | None = None,
        batching: str = "auto",
    ) -> None:
        _require_device(device)
        require_loss_function(loss)
        module = prepare_module(module, input_shape=input_shape, output=output)
        self.module, self.task, self.device, self.batching = module.to(device), as_task(task), device, batching
        buffers = {name: b for name, b in module.named_buffers() if b.is_floating_point()}
        for name in _constants(module):
            buffers.pop(name, None)
        kept = set(map(id, buffers.values()))
        self._counters = [(b, b.clone()) for b in module.buffers() if id(b) not in kept]
        draws = any(isinstance(part, STOCHASTIC_MODULES) for part in module.modules())
        # the reason why clients of this model cannot step together, or an empty string
        self._needs_map = "draws random numbers" if draws else "keeps buffers" if [*module.buffers()] else ""
        self._has_task_loss = loss is None
        self.loss = loss or loss_of(self.task)
        self._runs_in_vmap = False  # True after a successful step
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        shapes, buffer_shapes = ([(name, tuple(t.shape)) for name, t in ts.items()] for ts in (trainable, buffers))
        self.layout = Layout.from_shapes(shapes, buffer_shapes)
        values = {name: t.detach().cpu().float().numpy().copy() for name, t in {**trainable, **buffers}.items()}
        self._check = ModuleCheck(
            module=module,
            task=self.task,
            loss=self.loss,
            has_custom_loss=loss is not None,
            leaves=trainable,
            frozen=tuple(name for name, p in module.named_parameters() if not p.requires_grad),
            device=device,
        )
        self._reports: dict[tuple[Any, ...], ModelReport] = {}  # results of the check, by kind of examples
        self._initial = initial or keep_weights(values)
        self.initialization = describe_initializer(initial) if initial else FROM_MODULE
        self._buffers = {name: values[name] for name in buffers}
        self._flat_D = torch.from_numpy(self.layout.pack(values)).to(device)
        self._leaves = [trainable[leaf.name] for leaf in self.layout.trainable.leaves]
        for parameter, view in zip(self._leaves, self._split(self._flat_D), strict=True):
            parameter.data = view
        self._resident: tuple[np.ndarray, torch.Tensor] | None = None
        for name in buffers:
            _set_buffer(module, name, self._flat_D[self.layout.slices[name]].view(buffers[name].shape).data)
        self._clipped = lru_cache(maxsize=1)(partial(ClippedGradient, module, self.loss, self._leaves))

    @property
    def supports_process_pool(self) -> bool:
        """True on a CPU: forked processes may train with this trainer."""
        return self.device == "cpu"

    def close(self) -> None:
        """Release nothing: the trainer has no processes."""

    def _split(self, vector_D: torch.Tensor) -> list[torch.Tensor]:
        """Return views of a flat vector, one per parameter."""
        return [vector_D[self.layout.slices[leaf.name]].view(leaf.shape) for leaf in self.layout.trainable.leaves]

    def with_batching(self, batching: str) -> TorchTrainer:
        """Return this trainer with another way to train a block. Both trainers share the module.

        Raises:
            SettingError: The model has buffers or draws random numbers, and ``batching`` is ``vmap``.
        """
        possible = batching != "vmap" or not self._needs_map
        expected = f"map or process_pool, because the model {self._needs_map}"
        require(possible, "batching", batching, expected, "batching=map")
        other = copy(self)
        other.batching = batching
        return other

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """Return ``map`` or ``vmap`` for a block of this size."""
        if self.batching != "auto":
            return self.batching
        small = num_clients >= VMAP_MIN_CLIENTS and self.layout.num_parameters <= VMAP_MAX_PARAMETERS
        return "vmap" if (small or self.device != "cpu") and not self._needs_map else "map"

    def init(self, seed: int) -> np.ndarray:
        """Return the initial parameters and buffers, ``params_D``."""
        return initial_parameters(self.layout, self._initial, seed, self._buffers)

    def check_model(self, examples: Examples, *, synthetic: bool = False) -> ModelReport:
        """Check module and loss on a few examples, once for each kind of examples. See `Trainer.check_model`."""
        kind = kind_of(examples)
        if kind not in self._reports:
            self._flat_D.copy_(self._to_device(self.init(0)))
            with _one_thread(self.device):
                self._reports[kind] = self._check.check(examples, synthetic=synthetic)
        return self._reports[kind]

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients, in turn or together. See `Trainer.fit`."""
        self.check_model(work[0].examples, synthetic=request.deployed)
        try:
            with _one_thread(self.device):
                return self._fit(request, rule, work)
        except (FedlearnError, torch.OutOfMemoryError, BdbQuit):
            raise
        except Exception as error:
            sizes = [len(client_work.examples) % request.local.batch_size for client_work in work]
            single = self._check.needs_two_examples and 1 in [*sizes, request.local.batch_size]
            raise refuse_training(error, has_single_example=single) from error

    def _fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        self.check_example_dp(request, work[0].examples)
        clients_K = np.array([client_work.client for client_work in work], np.int64)
        sizes_K = np.array([len(client_work.examples) for client_work in work], np.int64)
        plans = poisson_plans if request.local.example_dp else batch_plans
        rounds_K, local = rounds_of(request, work), request.local
        plan_KSB, steps_K = plans(request, clients_K, sizes_K, rounds_K)
        needs_counts = rule.adjust_logits is not None or local.class_weights is not None
        counts_KC = class_counts(self, self.task, request, work) if needs_counts else None
        weights_KC = None if counts_KC is None else class_weights(local, counts_KC)
        self.module.train()
        job = _Job(
            request=request,
            rule=rule,
            work=work,
            plan_KSB=plan_KSB,
            steps_K=steps_K,
            global_D=self._to_device(request.params_D),
            broadcast={name: self._to_device(request.broadcast[name]) for name in rule.receives},
            counts_KC=None if counts_KC is None else self._to_device(counts_KC),
            weights_KC=None if weights_KC is None else self._to_device(weights_KC),
            rates_KS=learning_rates(local.schedule, local.learning_rate, rounds_K, steps_K),
        )
        together = self.describe_batching(len(work), int(sizes_K.sum())) == "vmap" and job.can_step_together
        if request.local.example_dp:
            together = together and not self._clipped(clip=request.local.example_dp.clip).needs_keys
        together = together and self._can_fit_together(job)
        states: list[dict[str, np.ndarray]] = []
        delta_KD, losses_K = self._fit_together(job) if together else self._fit_in_turn(job, states)
        return Updates(
            clients_K=clients_K,
            delta_KD=delta_KD.numpy() if self.device == "cpu" else delta_KD,
            num_examples_K=sizes_K,
            num_steps_K=steps_K,
            metrics={"loss": MetricSum(losses_K, (plan_KSB >= 0).sum(axis=(1, 2)))},
            client_state={name: np.stack([state[name] for state in states]) for name in (states or [{}])[0]},
        )

    def _can_fit_together(self, job: _Job) -> bool:
        """Return whether vmap supports the code of the model. One step of one client decides.

        Raises:
            SettingError: It does not, and ``batching`` is ``vmap``.
        """
        if self._runs_in_vmap:
            return True
        try:
            one = slice(0, 1)
            first = replace(
                job, work=job.work[one], plan_KSB=job.plan_KSB[one, :1], steps_K=np.minimum(job.steps_K[one], 1)
            )
            self._fit_together(first)
            self._runs_in_vmap = True
        except (FedlearnError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            expected = f"map, because vmap does not support the code of the model ({cause_of(error)})"
            require(self.batching == "auto", "batching", self.batching, expected, "batching=map")
            self._needs_map = "has code that vmap does not support"
        return self._runs_in_vmap

    def _fit_in_turn(self, job: _Job, states: list[dict[str, np.ndarray]]) -> tuple[torch.Tensor, np.ndarray]:
        """Train one client after another. Return the updates and the total losses, and append optimizer states."""
        delta_KD = torch.empty((len(job.work), self.layout.num_parameters), device=self.device)
        losses_K, request = np.zeros(len(job.work)), job.request
        # torch.manual_seed records a traceback for each absent kind of device, which takes longer than a small step
        set_seed = torch.default_generator.manual_seed if self.device == "cpu" else torch.manual_seed
        for k, work in enumerate(job.work):
            with torch.random.fork_rng(devices=[] if self.device == "cpu" else [self.device]):
                set_seed(integer_seed(request.seed, Purpose.MODEL, round=round_of(request, work), client=work.client))
                losses_K[k] = self._fit_client(job, k, states)
            torch.sub(self._flat_D, self._start(job, work), out=delta_KD[k])
        return delta_KD, losses_K

    def _fit_client(self, job: _Job, k: int, states: list[dict[str, np.ndarray]]) -> float:
        """Train one client. Leave the result in the flat vector, and return the total loss."""
        work, weights = job.work[k], [leaf.detach() for leaf in self._leaves]
        vectors = {name: self._split(v_D) for name, v_D in self._vectors(job, work).items()}
        self._flat_D.copy_(self._start(job, work))
        self._reset_counters()
        flat, kept = self._kept_state(job.rule, work)
        step, max_norm = optimizer_step(self._leaves, job.local, kept), job.local.max_grad_norm
        gradient_of = self._client_gradient(job, k)
        x, y = self._to_device(work.examples.x), self._to_device(work.examples.y)
        total = torch.zeros((), device=self.device)
        for rows_B, rate in zip(job.plan_KSB[k, : job.steps_K[k]], job.rates(k), strict=False):
            batch = torch.from_numpy(rows_B[rows_B >= 0]).to(self.device)
            gradients, loss_B = gradient_of(x.index_select(0, batch), y.index_select(0, batch), batch)
            total += loss_B.sum()
            if max_norm is not None:
                gradients = clip_gradients(max_norm, gradients)
            if job.rule.correct is not plain_training.correct:
                gradients = _correct(job.rule, gradients, weights, vectors)
            step(gradients, rate)
        if kept is not None:
            vectors_D = {name: v_D.cpu().numpy() for name, v_D in flat.items()}
            states.append({**vectors_D, STEPS: kept.counts[0].reshape(1).cpu().numpy()})
        return float(total)

    def _kept_state(self, rule: LocalRule, work: ClientWork) -> tuple[dict[str, torch.Tensor], KeptState | None]:
        """Return a copy of the optimizer state that a client has kept, as flat vectors and as parts of them."""
        if not rule.optimizer_state:
            return {}, None
        flat = {name: self._to_device(work.client_state[name]).clone() for name in rule.optimizer_state}
        steps = float(np.asarray(work.client_state[STEPS])[0])
        vectors = {name.removeprefix(STATE_PREFIX): self._split(v_D) for name, v_D in flat.items()}
        return flat, KeptState(vectors=vectors, counts=[torch.tensor(steps) for _ in self._leaves])

    def _client_gradient(self, job: _Job, k: int) -> GradientOf:
        """Return the gradient function of a client."""
        if job.local.example_dp:
            return self._private_gradient(job, job.work[k])
        losses = partial(self._rule_losses, job, self._rule_inputs(job, k)) if job.changes_loss else self._plain_losses
        size = job.local.micro_batch_size
        return partial(self._gradient, losses=losses) if size is None else partial(self._split_gradient, losses, size)

    def _start(self, job: _Job, work: ClientWork) -> torch.Tensor:
        """Return the parameters from which a client starts."""
        return job.global_D if work.start_D is None else self._to_device(work.start_D)

    def _plain_losses(self, run: Forward, x_B: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        """Return the loss of each example, without changes by a rule."""
        return self.loss(run(x_B), y_B)

    def _rule_inputs(self, job: _Job, k: int) -> RuleInputs:
        """Return the inputs of a rule that changes the loss: class counts, and models whose features it compares."""
        vectors_KC = {"counts": job.counts_KC, "weights": job.weights_KC}
        inputs = {name: rows_KC[k] for name, rows_KC in vectors_KC.items() if rows_KC is not None}
        if job.rule.feature_penalty:  # torch allocates this memory, because its alignment can change the last bit
            inputs["models"] = torch.stack([job.global_D, self._to_device(job.work[k].client_state[PREVIOUS_MODEL])])
        return inputs

    def _rule_losses(
        self, job: _Job, inputs: RuleInputs, run: Forward, x_B: torch.Tensor, y_B: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of each example, with the changes of the local rule and of the settings."""
        rule = job.rule
        if rule.feature_penalty is None:
            outputs_BC, penalty_B = run(x_B), 0
        else:
            outputs_BC, features_BF = with_features(self.module, partial(run, x_B))
            features = (self._features(model_D, x_B) for model_D in inputs["models"])
            penalty_B = rule.feature_penalty(features_BF, *features)
        logits_BC = rule.adjust_logits(outputs_BC, inputs["counts"]) if rule.adjust_logits else outputs_BC
        loss = training_loss(self.loss, self.task.name, job.local, inputs.get("weights"))
        return loss(logits_BC, y_B) + penalty_B

    def _features(self, params_D: torch.Tensor, x_B: torch.Tensor) -> torch.Tensor:
        """Return the features of a model that is not trained, in evaluation mode and without gradients."""
        self.module.eval()
        with torch.no_grad():
            _, features_BF = with_features(self.module, partial(self._apply, params_D, x_B))
        self.module.train()
        return features_BF

    def _gradient(
        self, x_B: torch.Tensor, y_B: torch.Tensor, rows_B: torch.Tensor, *, losses: Losses
    ) -> tuple[Gradients, torch.Tensor]:
        """Return the gradient of the mean loss, and the loss of each example."""
        loss_B = losses(self.module, x_B, y_B)
        mean_B = loss_B.new_full(loss_B.shape, 1 / len(loss_B))
        return torch.autograd.grad(loss_B, self._leaves, mean_B, materialize_grads=True), loss_B.detach()

    def _split_gradient(
        self, losses: Losses, size: int, x_B: torch.Tensor, y_B: torch.Tensor, rows_B: torch.Tensor
    ) -> tuple[Gradients, torch.Tensor]:
        """Return the gradient of the mean loss, with at most ``size`` examples per forward pass."""
        sums, parts = None, []
        for x_M, y_M, rows_M in zip(x_B.split(size), y_B.split(size), rows_B.split(size), strict=True):
            gradients, loss_M = self._gradient(x_M, y_M, rows_M, losses=losses)
            weighted = torch._foreach_mul(gradients, len(x_M) / len(x_B))
            sums = weighted if sums is None else torch._foreach_add(sums, weighted)
            parts.append(loss_M)
        assert sums is not None
        return tuple(sums), torch.cat(parts)

    def _private_gradient(self, job: _Job, work: ClientWork) -> GradientOf:
        """Return the gradient function of DP-SGD: the sum of clipped gradients plus noise, over the expected batch."""
        dp = job.request.local.example_dp
        assert dp is not None
        clipped, steps, std = self._clipped(clip=dp.clip), count(), dp.clip * dp.noise_multiplier
        keys_N = self._example_keys(job.request, work) if clipped.needs_keys else None
        expected = min(job.request.local.batch_size, len(work.examples))
        noise = GridNoise(job.request, work, std, self.device) if std else None
        noisy_D = torch.empty_like(self._flat_D, dtype=noise.dtype if noise else torch.float32)
        parts = self._split(noisy_D)

        def gradient_of(x_B: torch.Tensor, y_B: torch.Tensor, rows_B: torch.Tensor) -> tuple[Gradients, torch.Tensor]:
            keys_B = None if keys_N is None else keys_N[rows_B]
            sums, loss_B = clipped(x_B, y_B, keys_B=keys_B, start=next(steps) << STEP_BITS)
            if noise is None:
                return torch._foreach_div(sums, expected), loss_B
            noise.draw_(noisy_D)
            torch._foreach_add_(parts, sums, alpha=1 / noise.step)  # in grid steps
            noisy_D.round_().mul_(noise.step / expected)
            return tuple(parts if noisy_D.dtype == torch.float32 else self._split(noisy_D.float())), loss_B

        return gradient_of

    def _example_keys(self, request: Request, work: ClientWork) -> torch.Tensor:
        """Return the key of each example of a client for its random draws, int64."""
        return self._to_device(example_keys(request, work, Purpose.MODEL).view(np.int64))

    def _vectors(self, job: _Job, work: ClientWork) -> dict[str, torch.Tensor]:
        """Return the vectors ``(D,)`` of the local rule: global model, client state, broadcast values."""
        client_state = {name: self._to_device(work.client_state[name]) for name in job.rule.client_state}
        return {"w_global": job.global_D, **client_state, **job.broadcast}

    def _fit_together(self, job: _Job) -> tuple[torch.Tensor, np.ndarray]:
        """Train all clients together, in groups that fit the processor cache.

        A client with fewer steps than the others does not change after its last step.
        """
        size = VMAP_GROUP_SIZE if self.device == "cpu" else len(job.work)
        if job.request.local.example_dp:  # a step of DP-SGD holds the gradients of all its examples in memory
            bytes_per_client = 4 * job.plan_KSB.shape[2] * self.layout.num_parameters
            size = min(size, max(1, MAX_PER_EXAMPLE_GRADIENT_BYTES // bytes_per_client))
        groups = [slice(start, start + size) for start in range(0, len(job.work), size)]
        parts = [self._fit_group(job, group) for group in groups]
        return torch.cat([delta for delta, _ in parts]), np.concatenate([losses for _, losses in parts])

    def _fit_group(self, job: _Job, group: slice) -> tuple[torch.Tensor, np.ndarray]:
        """Train a group of clients together. Return the updates and the total losses."""
        work, steps_K = job.work[group], torch.from_numpy(job.steps_K[group]).to(self.device)
        x, x_starts_K = self._inputs([client_work.examples.x for client_work in work])
        y, y_starts_K = self._concatenate([client_work.examples.y for client_work in work])
        client_states = {
            name: torch.stack([self._to_device(client_work.client_state[name]) for client_work in work])
            for name in job.rule.client_state
        }
        start_KD = job.global_D.expand(len(work), -1)
        if any(client_work.start_D is not None for client_work in work):
            start_KD = torch.stack([self._start(job, client_work) for client_work in work])
        flat = nn.Parameter(start_KD.clone())
        step, total_K = optimizer_step([flat], job.local), torch.zeros(len(work), device=self.device)
        gradients, rates = self._block_gradients(job, group), job.block_rates(group)
        for s in range(int(steps_K.max())):
            rows_KB = torch.from_numpy(job.plan_KSB[group, s]).to(self.device).long()
            real_KB = rows_KB >= 0
            batch = (_rows(x, x_starts_K + rows_KB, real_KB), _rows(y, y_starts_K + rows_KB, real_KB), real_KB)
            gradient_KD, sum_K = gradients(flat.detach(), *batch)
            if job.local.max_grad_norm is not None:
                gradient_KD = clip_rows(job.local.max_grad_norm, gradient_KD)
            gradient_KD = job.rule.correct(gradient_KD, flat.detach(), job.global_D, **client_states, **job.broadcast)
            done_K = steps_K <= s
            before_KD = flat.detach()[done_K]
            step((gradient_KD,), rates[s])
            flat.data[done_K] = before_KD
            total_K += sum_K
        return flat.detach() - start_KD, total_K.double().cpu().numpy()

    def _block_gradients(self, job: _Job, group: slice) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """Return the gradient function of clients that step together."""
        if job.local.example_dp:
            return self._private_gradients(job, job.work[group])
        gradients: Callable[..., tuple[torch.Tensor, torch.Tensor]] = self._gradients
        if job.changes_loss:
            inputs = [self._rule_inputs(job, k) for k in range(len(job.work))[group]]
            inputs_K = {name: torch.stack([client_inputs[name] for client_inputs in inputs]) for name in inputs[0]}
            gradients = partial(self._rule_gradients, job, inputs_K)
        size = job.local.micro_batch_size
        return gradients if size is None else partial(_split_gradients, gradients, size)

    def _gradients(self, params_KD: torch.Tensor, *batch_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of the mean loss of each client, and the total losses."""
        gradient_of = torch.func.grad(partial(self._mean_loss, self._plain_losses), has_aux=True)
        return torch.func.vmap(gradient_of)(params_KD, *batch_KB)

    def _rule_gradients(
        self, job: _Job, inputs_K: RuleInputs, params_KD: torch.Tensor, *batch_KB: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients and total losses under a rule or settings that change the loss."""

        def mean_loss(params_D: torch.Tensor, inputs: RuleInputs, *batch_B: torch.Tensor) -> Any:
            return self._mean_loss(partial(self._rule_losses, job, inputs), params_D, *batch_B)

        return torch.func.vmap(torch.func.grad(mean_loss, has_aux=True))(params_KD, inputs_K, *batch_KB)

    def _private_gradients(
        self, job: _Job, work: Sequence[ClientWork]
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """Return the gradient function of DP-SGD for clients that step together."""
        dp = job.request.local.example_dp
        assert dp is not None
        std = dp.clip * dp.noise_multiplier
        noises = [GridNoise(job.request, client_work, std, self.device) for client_work in work] if std else []
        expected_K = [min(job.request.local.batch_size, len(client_work.examples)) for client_work in work]
        expected_K1 = torch.tensor(expected_K, device=self.device)[:, None]

        def gradients(params_KD: torch.Tensor, *batch_KB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            sum_KD, loss_K = torch.func.vmap(partial(self._clipped_sum, dp.clip))(params_KD, *batch_KB)
            if noises:
                noisy_KD = torch.empty_like(sum_KD, dtype=noises[0].dtype)
                for noise, row_D in zip(noises, noisy_KD, strict=True):
                    noise.draw_(row_D)
                step = noises[0].step
                sum_KD = noisy_KD.add_(sum_KD, alpha=1 / step).round_().mul_(step).float()
            return sum_KD / expected_K1, loss_K

        return gradients

    def _clipped_sum(
        self, clip: float, params_D: torch.Tensor, x_B: torch.Tensor, y_B: torch.Tensor, real_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the clipped gradients of the real examples of a batch, and the sum of their losses."""

        def loss_of(params_D: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.loss(self._apply(params_D, x[None]), y[None])[0]

        per_example = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0))
        gradient_BD, loss_B = per_example(params_D, x_B, y_B)
        norm_B = torch.linalg.vector_norm(gradient_BD, dim=1)
        counts_B = real_B & torch.isfinite(norm_B)
        factor_B = torch.where(counts_B, clip / norm_B.clamp(min=clip), 0.0)
        finite_BD = torch.where(counts_B[:, None], gradient_BD, 0.0)
        return factor_B @ finite_BD, torch.where(counts_B, loss_B, 0.0).detach().sum()

    def _apply(self, params_D: torch.Tensor, x_B: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the module with these parameters."""
        leaves = {leaf.name: params_D[self.layout.slices[leaf.name]].view(leaf.shape) for leaf in self.layout.leaves}
        outputs: torch.Tensor = torch.func.functional_call(self.module, leaves, (x_B,))
        return outputs

    def _mean_loss(
        self, losses: Losses, params_D: torch.Tensor, x_B: torch.Tensor, y_B: torch.Tensor, real_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and sum of the loss over the real examples of a batch."""
        loss_B = torch.where(real_B, losses(partial(self._apply, params_D), x_B, y_B), 0.0)
        return loss_B.sum() / real_B.sum().clamp(min=1), loss_B.detach().sum()

    def _inputs(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs of K clients in one tensor, and the first row of each client, ``(K, 1)``.

        Slices of one array stay on the device between rounds. Other inputs are concatenated in each round.
        """
        whole, starts_K = shared_base_array(arrays)
        if whole is None:
            return self._concatenate(arrays)
        if self._resident is None or self._resident[0] is not whole:
            self._resident = whole, self._to_device(whole)
        return self._resident[1], torch.from_numpy(starts_K).to(self.device)[:, None]

    def _concatenate(self, arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        starts_K = np.cumsum([0, *map(len, arrays[:-1])])
        return self._to_device(np.concatenate(arrays)), torch.from_numpy(starts_K).to(self.device)[:, None]

    def check_local(self, local: LocalSettings) -> None:
        """Check that torch has the optimizer, and that the settings fit the task. See `Trainer.check_local`."""
        check_optimizer(local)
        refuse_micro_batches_with_coupled_loss(self.task, local, has_task_loss=self._has_task_loss)
        require_class_loss(local, self.task, is_cross_entropy=self.loss is LOSSES.get(self.task.name))

    def check_example_dp(self, request: Request, examples: Examples) -> None:
        """Check that DP-SGD protects single examples with this model. See `Trainer.check_example_dp`.

        The first call also selects the method of `ClippedGradient`. Later calls are free.
        """
        dp = request.local.example_dp
        if dp is None:
            return
        self.check_model(examples, synthetic=request.deployed)
        refuse_dp_sgd_with_buffers(self.layout, request.local)
        refuse_dp_sgd_with_coupled_loss(self.task, request.local, has_task_loss=self._has_task_loss)
        is_python = not any(isinstance(part, torch.jit.ScriptModule) for part in self.module.modules())
        expected = "a model of Python code, because DP-SGD cannot read a scripted module"
        require(is_python, "module", "a scripted module", expected, "the module before torch.jit.script")
        clipped = self._clipped(clip=dp.clip)
        if not clipped.method:
            self._flat_D.copy_(self._to_device(request.params_D))
            self.module.train()
            with _one_thread(self.device):
                clipped.prepare(self._to_device(examples.x), self._to_device(examples.y), synthetic=request.deployed)

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Return raw outputs ``(N, C)`` in evaluation mode."""
        self._flat_D.copy_(self._to_device(params_D))
        self.module.eval()
        with torch.inference_mode(), _one_thread(self.device):
            outputs = [self.module(self._to_device(part)) for part in prediction_parts(x)]
        return torch.cat(outputs).cpu().numpy()

    def network(self, params_D: Array) -> nn.Module:
        """Return a copy of the module with these parameters, in evaluation mode."""
        self._flat_D.copy_(self._to_device(params_D))
        self._reset_counters()
        network = deepcopy(self.module).eval()
        for name in self._buffers:  # torch.save would store the whole base of a view
            _set_buffer(network, name, network.get_buffer(name).clone())
        return network

    def _reset_counters(self) -> None:
        """Set the buffers that are not in the vector to their initial values."""
        for counter, initial in self._counters:
            counter.copy_(initial)

    def _to_device(self, array: Array) -> torch.Tensor:
        return torch.as_tensor(array, device=self.device)


def _constants(module: nn.Module) -> list[str]:
    """Return the names of the buffers with ``persistent=False``."""
    parts = module.named_modules()
    return [f"{path}.{name}".lstrip(".") for path, part in parts for name in part._non_persistent_buffers_set]


def _set_buffer(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, buffer_name = name.rpartition(".")
    setattr(module.get_submodule(parent), buffer_name, tensor)


def _require_device(device: str) -> None:
    """Check that torch can use this device.

    Raises:
        SettingError: The device does not exist.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError("device", device, f"a device of this machine ({reason})", "device=cpu") from error


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    """Compute on one thread of this process, then restore the number of threads.

    Models on a CPU are small, and several processes train clients in parallel. A second thread costs more time than it
    saves. Sums would also depend on the number of threads.
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
    """Return rows of an array, and zeros for rows that are not real: their index can be a row of another client."""
    rows = array.index_select(0, rows_KB.clamp(min=0).view(-1)).view(*rows_KB.shape, *array.shape[1:])
    if real_KB.all():
        return rows
    return torch.where(real_KB.view(*real_KB.shape, *(1,) * (array.ndim - 1)), rows, rows.new_zeros(()))


def _split_gradients(
    gradients: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    size: int,
    params_KD: torch.Tensor,
    x_KB: torch.Tensor,
    y_KB: torch.Tensor,
    real_KB: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients of mean losses and total losses, with at most ``size`` examples of each client per pass."""
    count_K1, sum_KD, total_K = real_KB.sum(dim=1, keepdim=True).clamp(min=1), None, None
    parts = zip(x_KB.split(size, dim=1), y_KB.split(size, dim=1), real_KB.split(size, dim=1), strict=True)
    for x_KM, y_KM, real_KM in parts:
        gradient_KD, loss_K = gradients(params_KD, x_KM, y_KM, real_KM)
        weighted_KD = gradient_KD * (real_KM.sum(dim=1, keepdim=True) / count_K1)
        sum_KD = weighted_KD if sum_KD is None else sum_KD + weighted_KD
        total_K = loss_K if total_K is None else total_K + loss_K
    assert sum_KD is not None
    assert total_K is not None
    return sum_KD, total_K


def _correct(
    rule: LocalRule,
    gradients: Gradients,
    weights: Sequence[torch.Tensor],
    vectors: Mapping[str, Sequence[torch.Tensor]],
) -> Gradients:
    """Apply the local rule to the gradient of each parameter."""
    names, leaves = list(vectors), zip(*vectors.values(), strict=True)
    return tuple(
        rule.correct(gradient, weight, **dict(zip(names, parts, strict=True)))
        for gradient, weight, parts in zip(gradients, weights, leaves, strict=True)
    )
