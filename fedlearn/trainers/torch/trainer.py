"""Train a PyTorch model and predict with it.

Only this folder and `fedlearn.testing` import torch.

Shapes: K clients in a block, D parameters, N examples, S local steps, B batch, C outputs.
"""

from __future__ import annotations

from bdb import BdbQuit
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlearn.algorithm.local_rule import HOOKS, LocalRule
from fedlearn.core.inputs import join_inputs
from fedlearn.core.model_report import ModelReport
from fedlearn.core.records import Array, ClientWork, Examples, LocalSettings, MetricSum, Request, Updates
from fedlearn.core.schedules import learning_rates
from fedlearn.core.tasks import Task, as_task
from fedlearn.errors import FedlearnError, require
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
    rounds_of,
)
from fedlearn.trainers.class_weights import class_weights
from fedlearn.trainers.contract import cause_of, kind_of, refuse_training, require_loss_function
from fedlearn.trainers.torch.block_steps import BlockSteps
from fedlearn.trainers.torch.chain import find_chain
from fedlearn.trainers.torch.chain_steps import ChainSteps
from fedlearn.trainers.torch.client_steps import ClientSteps
from fedlearn.trainers.torch.contract import ModuleCheck, prepare_module
from fedlearn.trainers.torch.device import device_memory, require_device, single_threaded
from fedlearn.trainers.torch.dp_sgd import ClippedGradient
from fedlearn.trainers.torch.flat_model import FlatModel
from fedlearn.trainers.torch.job import Job
from fedlearn.trainers.torch.joint_steps import JointSteps
from fedlearn.trainers.torch.losses import LOSSES, Loss, loss_of
from fedlearn.trainers.torch.network import Forward, Trim
from fedlearn.trainers.torch.optimizers import check_optimizer
from fedlearn.trainers.torch.rule_losses import TrainingLosses

STOCHASTIC_MODULES = (nn.modules.dropout._DropoutNd, nn.RNNBase)  # modules that draw random numbers in training
VMAP_MAX_PARAMETERS = 20_000  # on a CPU, vmap is faster up to this model size
CHAIN_CLIENTS = 5  # clients of a chain of linear layers that share most of the overhead of their steps
VMAP_MIN_CLIENTS = 32  # on a CPU, vmap is faster from this block size on


class TorchTrainer:
    """Train an ``nn.Module`` in a loop without a data loader.

    The parameters and the floating-point buffers of the module become views of one flat vector. So one copy loads the
    global model, and one copy reads the local model.

    Args:
        module: maps ``(B, ...)`` float32 to ``(B, C)``. Parameters with ``requires_grad=False`` do not change. Other
            types of parameters become float32, also in updates and in the aggregate. ``torch.compile`` and
            ``DataParallel`` are removed.
        task: a `Task` or the name of a shipped task. It determines the loss, e.g. binary cross-entropy on one logit.
        initial: draws the initial parameters from ``(layout, rng)``, for example
            `fedlearn.core.layout.default_initial_parameters`. None keeps the weights of the module.
        device: device of torch, for example ``cpu`` (default) or ``cuda:0``.
        loss: ``(outputs_BC, y_B) -> loss_B``; default the loss of the task.
        forward: runs the module on a batch, ``(module, inputs) -> outputs``. None calls the module: a mapping of inputs
            gives its arguments by name, a tuple by position.
        output: key, position or attribute of the outputs, for a module that returns a dict, a tuple or a dataclass.
            None selects ``logits``, unless the module returns a tensor.
        input_shape: shape of one example. Only lazy layers need it, to create their parameters.
        batching: ``map`` trains one client after another. ``vmap`` trains all clients of a block together, as one
            batch of models. ``auto`` (default) selects ``vmap`` on a GPU. On a CPU it selects ``vmap`` for large
            blocks of a small model, because the overhead of a step exceeds its arithmetic. Models with buffers or
            random modules need ``map``. A ``torch.nn.Sequential`` of linear layers and activations also trains
            several clients at once with ``map``, with the bits of single clients. ``joint`` trains all clients of a
            block over one frozen base, for adapters: all trained parameters must be in linear layers.
        trim: removes needless padding from the inputs of a batch; None changes nothing. Training with DP-SGD does not
            use it, because the width of a batch would depend on other examples.

    *Guarantees*:

    - Equal requests give bit-identical updates. With ``map``, an update does not depend on the other clients.
    - Training does not change torch's global generator. Dropout draws from (seed, round, client).
    - Gradients, optimizer, weight decay and local rule do not change buffers. The update of a client contains the
      changes of its buffers by the forward passes.
    - Integer buffers (the number of batches) and buffers with ``persistent=False`` are not in the vector. They have
      their initial values when a client starts. So a batch norm with ``momentum=None`` averages over the batches of
      one round.
    """

    framework, supports_dp_sgd, rule_hooks = "torch", True, frozenset(HOOKS)

    def __init__(
        self,
        module: nn.Module,
        *,
        task: Task | str,
        initial: Initializer | None = None,
        device: str = "cpu",
        loss: Loss | None = None,
        forward: Forward | None = None,
        output: str | int | None = None,
        input_shape: tuple[int, ...] | None = None,
        batching: str = "auto",
        trim: Trim | None = None,
    ) -> None:
        require_device(device)
        require_loss_function(loss)
        network = prepare_module(module, input_shape=input_shape, forward=forward, output=output, trim=trim).to(device)
        module = network.inner
        self.module, self.task, self.device, self.batching = module, as_task(task), device, batching
        # dropout with the rate 0 draws nothing
        draws = any(isinstance(part, STOCHASTIC_MODULES) and getattr(part, "p", 1) > 0 for part in module.modules())
        # the reason why clients of this model cannot step together, or an empty string
        self._needs_map = "draws random numbers" if draws else "keeps buffers" if [*module.buffers()] else ""
        self._has_task_loss = loss is None
        self.loss = loss or loss_of(self.task)
        self._runs_in_vmap = False  # True after a successful step
        self._model = FlatModel(network, device)
        self.layout = self._model.layout
        self._check = ModuleCheck(
            module=network,
            task=self.task,
            loss=self.loss,
            has_custom_loss=loss is not None,
            leaves=self._model.trainable,
            frozen=tuple(name for name, p in module.named_parameters() if not p.requires_grad),
            device=device,
        )
        self._reports: dict[tuple[Any, ...], ModelReport] = {}  # results of the check, by kind of examples
        self._initial = initial or keep_weights(self._model.values)
        if initial:
            self._model.values = self._model.buffer_values  # the weights need as much memory as the model
        self.initialization = describe_initializer(initial) if initial else FROM_MODULE
        self._add_steps()

    def _add_steps(self) -> None:
        """Add the objects that take local steps with the memory of the model."""
        model = self._model
        self._client_steps = lru_cache(maxsize=4)(self._build_client_steps)  # by frozen parameters
        self._joint_steps = lru_cache(maxsize=4)(self._build_joint_steps)
        chain = find_chain(model.module, model.leaves) if self.device == "cpu" else None
        self._chain_steps = ChainSteps(chain, self._client_steps(())) if chain else None
        self._block_steps = BlockSteps(model, TrainingLosses(model, self.loss, self.task.name))

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchTrainer:
        """Return a trainer with a copy of the module. Copies of the steps would use the memory of this trainer."""
        other = copy(self)
        memo[id(self)] = other
        vars(other).update({name: deepcopy(v, memo) for name, v in vars(self).items() if not name.endswith("_steps")})
        other._model.connect()
        other._add_steps()
        return other

    def _build_client_steps(self, frozen: tuple[str, ...]) -> ClientSteps:
        """Return the local steps of clients that do not train these parameters."""
        model = self._model.without(frozen)
        clipped = lru_cache(maxsize=1)(partial(ClippedGradient, model.module, self.loss, model.leaves))
        return ClientSteps(model, TrainingLosses(model, self.loss, self.task.name), clipped)

    def _build_joint_steps(self, frozen: tuple[str, ...]) -> JointSteps:
        """Return the local steps of clients that share the passes of one base."""
        client_steps = self._client_steps(frozen)
        return JointSteps(client_steps.model, client_steps.losses)

    @property
    def supports_process_pool(self) -> bool:
        """True on a CPU: forked processes may train with this trainer."""
        return self.device == "cpu"

    @property
    def device_memory(self) -> int | None:
        """Return the memory of the device in bytes; None if it is not known."""
        return device_memory(self.device)

    @property
    def clients_per_step(self) -> int:
        """Number of clients whose steps share work: several for a chain of linear layers."""
        return CHAIN_CLIENTS if self._chain_steps else 1

    def close(self) -> None:
        """Release nothing: the trainer has no processes."""

    def with_batching(self, batching: str) -> TorchTrainer:
        """Return this trainer with another way to train a block. Both trainers share the module.

        Raises:
            SettingError: The model has buffers or draws random numbers, and ``batching`` is ``vmap``. Or it does not
                fit ``joint``.
        """
        if batching == "joint":
            self._joint_steps(()).require_separate_layers(draws=self._needs_map.startswith("draws"), layout=self.layout)
        possible = batching != "vmap" or not self._needs_map
        expected = f"map or process_pool, because the model {self._needs_map}"
        require(possible, "batching", batching, expected, "batching=map")
        other = copy(self)
        other.batching = batching
        return other

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """Return the method for a block of this size, e.g. ``map`` or ``vmap``.

        ``map or vmap`` is a chain of linear layers that needs ``vmap`` for DP-SGD and for changes of the loss only.
        """
        if self.batching != "auto":
            return self.batching
        small = num_clients >= VMAP_MIN_CLIENTS and self.layout.num_parameters <= VMAP_MAX_PARAMETERS
        if self._needs_map or not (small or self.device != "cpu"):
            return "map"
        return "map or vmap" if self._chain_steps else "vmap"

    def init(self, seed: int) -> np.ndarray:
        """Return the initial parameters and buffers, ``params_D``."""
        return initial_parameters(self.layout, self._initial, seed, self._model.buffer_values)

    def check_model(self, examples: Examples, *, synthetic: bool = False) -> ModelReport:
        """Check module and loss on a few examples, once for each kind of examples. See `Trainer.check_model`."""
        kind = kind_of(examples)
        if kind not in self._reports:
            self._model.load(self.init(0))
            with single_threaded(self.device):
                self._reports[kind] = self._check.check(examples, synthetic=synthetic)
        return self._reports[kind]

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients, in turn or together. See `Trainer.fit`."""
        self.check_model(work[0].examples, synthetic=request.deployed)
        try:
            with single_threaded(self.device):
                return self._fit(request, rule, work)
        except (FedlearnError, torch.OutOfMemoryError, BdbQuit):
            raise
        except Exception as error:
            sizes = [len(client_work.examples) % request.local.batch_size for client_work in work]
            single = self._check.needs_two_examples and 1 in [*sizes, request.local.batch_size]
            raise refuse_training(error, has_single_example=single) from error

    def _fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        client_steps = self._client_steps(rule.frozen_parameters)
        self._check_example_dp(request, work[0].examples, client_steps)
        clients_K = np.array([client_work.client for client_work in work], np.int64)
        sizes_K = np.array([len(client_work.examples) for client_work in work], np.int64)
        plans = poisson_plans if request.local.example_dp else batch_plans
        rounds_K = rounds_of(request, work)
        plan_KSB, steps_K = plans(request, clients_K, sizes_K, rounds_K)
        self._model.renew()
        self._model.module.train()
        job = self._job(request, rule, work, plan_KSB, steps_K, rounds_K)
        chain_steps = self._chain_steps if self.batching in ("auto", "map") else None
        together = "vmap" in self.describe_batching(len(work), int(sizes_K.sum())) and job.can_step_together
        if request.local.example_dp:
            together = together and not client_steps.clipped(clip=request.local.example_dp.clip).needs_keys
        states: list[dict[str, np.ndarray]] = []
        if self.batching == "joint" and job.can_step_jointly:
            delta_KD, losses_K = self._joint_steps(rule.frozen_parameters).fit(job)
        elif chain_steps and chain_steps.fits(job):
            delta_KD, losses_K = chain_steps.fit(job)
        elif together and self._can_fit_together(job):
            delta_KD, losses_K = self._block_steps.fit(job)
        else:
            delta_KD, losses_K = client_steps.fit(job, states)
        return Updates(
            clients_K=clients_K,
            delta_KD=delta_KD.numpy() if self.device == "cpu" else delta_KD,
            num_examples_K=sizes_K,
            num_steps_K=steps_K,
            metrics={"loss": MetricSum(losses_K, (plan_KSB >= 0).sum(axis=(1, 2)))},
            client_state={name: np.stack([state[name] for state in states]) for name in (states or [{}])[0]},
        )

    def _job(
        self,
        request: Request,
        rule: LocalRule,
        work: Sequence[ClientWork],
        plan_KSB: np.ndarray,
        steps_K: np.ndarray,
        rounds_K: np.ndarray,
    ) -> Job:
        """Return the training of a block of clients, with all shared values on the device."""
        local, to_device = request.local, self._model.to_device
        # models that a rule runs are copied, because the alignment of memory can change the last bit
        to_vector = (lambda v_D: to_device(v_D).clone()) if rule.penalty or rule.gradient else to_device
        needs_counts = rule.adjust_logits is not None or local.class_weights is not None
        counts_KC = class_counts(self, self.task, request, work) if needs_counts else None
        weights_KC = None if counts_KC is None else class_weights(local, counts_KC)
        return Job(
            request=request,
            rule=rule,
            work=work,
            plan_KSB=plan_KSB,
            steps_K=steps_K,
            global_D=to_vector(request.params_D),
            broadcast={name: to_vector(request.broadcast[name]) for name in rule.receives},
            counts_KC=None if counts_KC is None else to_device(counts_KC),
            weights_KC=None if weights_KC is None else to_device(weights_KC),
            rates_KS=learning_rates(local.schedule, local.learning_rate, rounds_K, steps_K),
        )

    def _can_fit_together(self, job: Job) -> bool:
        """Return whether vmap supports the code of the model. One step of one client decides.

        Raises:
            SettingError: It does not, and ``batching`` is ``vmap``.
        """
        if self._runs_in_vmap:
            return True
        try:
            first_client = slice(0, 1)
            first = replace(
                job,
                work=job.work[first_client],
                plan_KSB=job.plan_KSB[first_client, :1],
                steps_K=np.minimum(job.steps_K[first_client], 1),
            )
            self._block_steps.fit(first)
            self._runs_in_vmap = True
        except (FedlearnError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            expected = f"map, because vmap does not support the code of the model ({cause_of(error)})"
            require(self.batching == "auto", "batching", self.batching, expected, "batching=map")
            self._needs_map = "has code that vmap does not support"
        return self._runs_in_vmap

    def check_local(self, local: LocalSettings) -> None:
        """Check that torch has the optimizer, and that the settings fit the task. See `Trainer.check_local`."""
        check_optimizer(local)
        refuse_micro_batches_with_coupled_loss(self.task, local, has_task_loss=self._has_task_loss)
        require_class_loss(local, self.task, is_cross_entropy=self.loss is LOSSES.get(self.task.name))

    def check_example_dp(self, request: Request, examples: Examples) -> None:
        """Check that DP-SGD protects single examples with this model. See `Trainer.check_example_dp`.

        The first call also selects the method of `ClippedGradient`. Later calls are free.
        """
        self._check_example_dp(request, examples, self._client_steps(()))

    def _check_example_dp(self, request: Request, examples: Examples, client_steps: ClientSteps) -> None:
        dp = request.local.example_dp
        if dp is None:
            return
        self.check_model(examples, synthetic=request.deployed)
        refuse_dp_sgd_with_buffers(self.layout, request.local)
        refuse_dp_sgd_with_coupled_loss(self.task, request.local, has_task_loss=self._has_task_loss)
        is_python = not any(isinstance(part, torch.jit.ScriptModule) for part in self.module.modules())
        expected = "a model of Python code, because DP-SGD cannot read a scripted module"
        require(is_python, "module", "a scripted module", expected, "the module before torch.jit.script")
        clipped = client_steps.clipped(clip=dp.clip)
        if not clipped.method:
            self._model.load(request.params_D)
            self._model.module.train()
            with single_threaded(self.device):
                clipped.prepare(
                    self._model.inputs(examples.x), self._model.to_device(examples.y), synthetic=request.deployed
                )

    def predict(self, params_D: Array, x: Any) -> np.ndarray:
        """Return raw outputs ``(N, C)`` in evaluation mode."""
        self._model.load(params_D)
        self._model.module.eval()
        with torch.inference_mode(), single_threaded(self.device):
            parts = prediction_parts(join_inputs(x))
            outputs = [self._model.module(self._model.inputs(part)) for part in parts]
        return torch.cat(outputs).cpu().numpy()

    def network(self, params_D: Array) -> nn.Module:
        """Return a copy of the module with these parameters, in evaluation mode."""
        return self._model.network(params_D)
