"""Train a model of JAX and predict with it.

A block of clients is one compiled program. The program trains one client after another (``lax.map``). Each client takes
its own number of steps (``fori_loop`` with a dynamic end). The examples of all clients are concatenated, so clients
with fewer examples need no padding.

Only this folder and `fedlearn.testing` import jax and flax.

Shapes: K clients in a block, D parameters, N examples, S local steps, B batch, C outputs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlearn.algorithm.local_rule import HOOKS, PREVIOUS_MODEL, LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.inputs import join_inputs, split_inputs
from fedlearn.core.layout import default_initial_parameters
from fedlearn.core.model_report import ModelReport
from fedlearn.core.optimizers import STEPS
from fedlearn.core.random import Purpose, integer_seed
from fedlearn.core.records import Array, ClientWork, Examples, LocalSettings, MetricSum, Request, Updates
from fedlearn.core.schedules import learning_rates
from fedlearn.core.tasks import Task, as_task
from fedlearn.errors import SettingError, require
from fedlearn.trainers.base import (
    FROM_MODULE,
    FROM_SEED,
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
    draw_by_round,
    poisson_plans,
    prediction_parts,
    rounds_of,
)
from fedlearn.trainers.class_weights import class_weights
from fedlearn.trainers.contract import kind_of, require_loss_function
from fedlearn.trainers.jax.block_arrays import BlockArrays, num_examples, round_up, to_device
from fedlearn.trainers.jax.contract import ModuleCheck
from fedlearn.trainers.jax.example_check import QUICK, ExampleCheck, refuse_written_state
from fedlearn.trainers.jax.flat_model import FlatModel
from fedlearn.trainers.jax.leaves import PARAMS, named_arrays
from fedlearn.trainers.jax.local_steps import LocalSteps
from fedlearn.trainers.jax.losses import LOSSES, Loss, loss_of
from fedlearn.trainers.jax.networks import Forward, adapt
from fedlearn.trainers.jax.optimizers import check_optimizer
from fedlearn.trainers.jax.shares import Shares

MAX_ROWS = 512  # rows that `predict` passes to a model at once


class JaxTrainer:
    """Train a model of flax.linen, flax.nnx or equinox, or a pair of functions ``(init, apply)``.

    Models of flax have the names and axes of the same model in torch.

    Args:
        module: maps ``(B, ...)`` to ``(B, C)``. A module of equinox maps one example to ``(C,)``. A function
            ``init(key, x)`` returns parameters, and ``apply(params, x)`` returns outputs. The module or ``apply`` has
            the argument ``train: bool`` if it behaves differently in training. If it has a method ``jit``, this method
            compiles the programs. Parameters of other types become float32.
        task: a `Task` or the name of a shipped task. It determines the loss, e.g. binary cross-entropy on one logit.
        input_shape: shape of the input of one example. Several inputs have a mapping from names to shapes, or to
            ``jax.ShapeDtypeStruct`` for another type than float32. Modules of nnx and equinox need none.
        initial: draws the initial parameters from ``(layout, rng)``; default: the weights of the module, of
            ``variables`` or of ``init``. For flax.linen without ``variables``: `default_initial_parameters`.
        variables: initial weights as ``module.init`` returns them: ``params`` and, with batch norm, ``batch_stats``.
        forward: runs the module on a batch, ``(module, inputs) -> outputs``. It may have the arguments ``train`` and
            ``key``. None calls the module: a mapping of inputs gives its arguments by name, a tuple by position.
        device: device of JAX, for example ``cpu`` (default), ``cuda:0`` or ``tpu``. ``cuda:all`` divides each block of
            clients among all devices of this kind.
        loss: ``(outputs_BC, y_B) -> loss_B``; default the loss of the task.
        output: key, position or attribute of the outputs, for a module that returns a dict, a tuple or a dataclass.
            None selects ``logits``, unless the module returns an array.
        batching: ``map`` trains one client after another inside the program. ``vmap`` trains all clients together.
            ``auto`` (default) selects ``map`` on a CPU, whose cache can hold one model, and ``vmap`` elsewhere.

    *Guarantees*:

    - Initial parameters and batches equal the ones of a `TorchTrainer` of the same model.
    - Dropout draws from (seed, round, client), in every block. In DP-SGD a draw also follows from its example, and at
      real clients from secret entropy.
    - ``batch_stats`` are buffers. Only forward passes change them, as in `TorchTrainer`.
    - Batch norms of flax compute statistics of real examples only, not of the padding of a batch. It averages the
      unbiased variance as torch does, although flax itself averages the biased variance. The momentum 0.1 in torch
      equals 0.9 in flax. Other layers with batch statistics would include the padding.

    Raises:
        SettingError: The module is no model of JAX, or has state other than ``params`` and ``batch_stats``.
    """

    framework, supports_dp_sgd, supports_process_pool = "jax", True, False  # a forked process has no JAX threads
    clients_per_step = 1
    rule_hooks = frozenset(HOOKS)

    def __init__(
        self,
        module: Any,
        *,
        task: Task | str,
        input_shape: Any = None,
        initial: Initializer | None = None,
        variables: Mapping[str, Any] | None = None,
        device: str = "cpu",
        loss: Loss | None = None,
        forward: Forward | None = None,
        output: str | int | None = None,
        batching: str = "auto",
    ) -> None:
        require_loss_function(loss)
        network = adapt(module, forward=forward)
        self.module, self.task, self.device = module, as_task(task), device
        self._has_task_loss = loss is None
        self.loss = loss or loss_of(self.task)
        _ = self._jax_device  # raise an error for an absent device first
        self._model = FlatModel(network, input_shape, output)
        self.layout = self._model.layout
        variables = network.weights if variables is None else variables
        self._buffers = self._model.initial_statistics(variables)
        self._set_initial(initial, variables)
        self._jit = getattr(module, "jit", jax.jit)
        self._predict = self._jit(self._model.outputs)
        self._steps = LocalSteps(self._model, self.loss, self.task.name, device)
        self._block = lru_cache(maxsize=16)(self._steps.compile)
        self._arrays = BlockArrays()
        self._check = ModuleCheck(
            module=module,
            task=self.task,
            loss=self.loss,
            has_custom_loss=loss is not None,
            form=self._model.form,
            names={path: leaf.name for path, leaf in self._model.parameters.items()},
            train=self._traced_outputs,
            predict=self._eval_outputs,
            jit=partial(self._jit, compiler_options=QUICK if device == "cpu" else None),
        )
        self._reports: dict[tuple[Any, ...], ModelReport] = {}  # results of the check, by kind of examples
        self._has_finite_losses = False
        self._layerwise: dict[Any, bool] = {}  # results of the check for DP-SGD, by shape and type of an input
        self.batching = batching if batching != "auto" else "map" if device == "cpu" else "vmap"
        self._shares = Shares(device, self._jax_devices, self._arrays)

    def _set_initial(self, initial: Initializer | None, variables: Mapping[str, Any] | None) -> None:
        if initial is None and variables is not None:
            self._initial = keep_weights(named_arrays(variables, PARAMS, self._model.parameters))
            self.initialization = FROM_MODULE
        elif initial is None and self._model.network.draws_weights:
            self._initial, self.initialization = self._model.draw, FROM_SEED
        else:
            self._initial = initial or default_initial_parameters
            self.initialization = describe_initializer(self._initial)

    def with_batching(self, batching: str) -> JaxTrainer:
        """Return this trainer with another way to train a block: ``map``, ``vmap`` or ``auto``.

        Raises:
            SettingError: ``batching`` is ``joint``.
        """
        expected = "auto, map or vmap: joint passes need framework=torch"
        require(batching != "joint", "batching", batching, expected, "batching=auto")
        other = copy(self)
        other.batching = batching if batching != "auto" else "map" if self.device == "cpu" else "vmap"
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
                params = self._model.unflatten(self.init(0))
                self._reports[kind] = self._check.check(params, examples, synthetic=synthetic)
        return self._reports[kind]

    def _check_values(self, examples: Examples, *, synthetic: bool) -> None:
        """Refuse a model whose outputs or losses are not finite for the initial parameters."""
        with jax.default_device(self._jax_device):
            self._check.check_values(self._model.unflatten(self.init(0)), examples, synthetic=synthetic)
        self._has_finite_losses = True

    def _traced_outputs(self, params: Any, x: jax.Array) -> Any:
        stats = self._model.unflatten_statistics(self.init(0)) if self._model.statistics else {}
        return self._model.training_outputs(params, stats, x, jnp.ones(num_examples(x), bool), jax.random.key(0))[0]

    def _eval_outputs(self, params: Any, x: jax.Array) -> Any:
        stats = self._model.unflatten_statistics(self.init(0)) if self._model.statistics else {}
        return self._model.eval_outputs(params, stats, x)

    def check_example_dp(self, request: Request, examples: Examples) -> None:
        """Check that DP-SGD protects single examples with this model. See `Trainer.check_example_dp`."""
        if request.local.example_dp:
            self.check_model(examples, synthetic=request.deployed)
            self._check_examples(request, examples)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients in one compiled program. See `Trainer.fit`."""
        self.check_model(work[0].examples, synthetic=request.deployed)
        expected = "null, because DP-SGD in JAX clips the gradients of all parameters, and the strategy freezes some"
        is_possible = request.local.example_dp is None or not rule.frozen_parameters
        require(is_possible, "local.example_dp", request.local.example_dp, expected, "framework=torch")
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
        previous = [client_work.client_state[PREVIOUS_MODEL] for client_work in work] if rule.previous_model else None
        rule_inputs_K = (counts_KC, weights_KC, None if previous is None else np.stack(previous))
        broadcast = {name: request.broadcast[name] for name in rule.receives}
        is_secret = request.deployed and request.local.example_dp is not None
        seeds_K22 = _secret_seeds(len(work)) if is_secret else draw_by_round(rounds_K, partial(_seeds, request.seed))
        program_settings = replace(request.local, epochs=1, steps=None)  # programs do not depend on the number of steps
        block = self._block(self.batching, rule, program_settings, request.deployed, layerwise)
        with jax.default_device(self._jax_device):
            x, x_starts_K = self._arrays.inputs([client_work.examples.x for client_work in work])
            y, y_starts_K = self._arrays.concatenate([client_work.examples.y for client_work in work])
            rows_KSB = self._arrays.pad_plan(plan_KSB, request.local, int(sizes_K.max()))
            batches = (rows_KSB, steps_K, clients_K, sizes_K, x_starts_K, y_starts_K)
            rates_KS = self._rates(request.local, rounds_K, steps_K, rows_KSB.shape[1])
            kept = (*rule.optimizer_state, STEPS) if rule.optimizer_state else ()
            kept_KD = {name: np.stack([as_numpy(item.client_state[name]) for item in work]) for name in kept}
            per_client = (*batches, states_KD, start_KD, rule_inputs_K, seeds_K22, rates_KS, kept_KD)
            shared = (jnp.asarray(request.params_D), broadcast, x, y)
        delta_KD, losses_K, state_KD = self._shares.run(block, shared, per_client, steps_K)
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

    def predict(self, params_D: Array, x: Any) -> np.ndarray:
        """Return raw outputs ``(N, C)`` in evaluation mode.

        The model gets at most `MAX_ROWS` rows at once, because convolutions need a lot of memory for each row. This
        number is rounded up, so that few programs are compiled.
        """
        with jax.default_device(self._jax_device):
            params_D = jnp.asarray(params_D)
            parts = prediction_parts(join_inputs(x), max_rows=MAX_ROWS)
            return np.concatenate([self._outputs(params_D, part) for part in parts])

    def _outputs(self, params_D: Any, x: np.ndarray) -> np.ndarray:
        padded = np.zeros((round_up(len(x)), *x.shape[1:]), x.dtype)
        padded[: len(x)] = x
        return np.asarray(self._predict(params_D, split_inputs(padded)))[: len(x)]

    def network(self, params_D: Array) -> Any:
        """Return the model with these parameters, in the form of its library.

        Returns:
            The module and its variables for flax.linen, a module for flax.nnx and equinox, or the function ``apply``
            and its parameters.
        """
        variables = {name: leaves for name, leaves in self._model.variables(jnp.asarray(params_D)).items() if leaves}
        return self._model.network.built(variables)

    def _check_examples(self, request: Request, examples: Examples) -> bool:
        """Return whether DP-SGD may use layer-wise gradients. Check the model once for each kind of inputs.

        Raises:
            SettingError: The model writes state in a forward pass, or examples depend on others. See `ExampleCheck`.
        """
        kind = examples.x.shape[1:], str(examples.x.dtype)
        if kind not in self._layerwise:
            self._check_values(examples, synthetic=request.deployed)  # DP-SGD skips examples that are not finite
            options = QUICK if self.device == "cpu" else None
            check = ExampleCheck(apply=self._steps.private_outputs, loss=self.loss, jit=self._jit, options=options)
            params_D = as_numpy(request.params_D)  # operations of JAX would compile a program each
            with jax.default_device(self._jax_device):
                refuse_written_state(partial(self._model.training_variables, params_D, to_device(examples.x[:2])))
                refuse_dp_sgd_with_buffers(self.layout, request.local)
                refuse_dp_sgd_with_coupled_loss(self.task, request.local, has_task_loss=self._has_task_loss)
                params = self._model.unflatten(params_D)
                self._layerwise[kind] = check.is_layerwise(params, examples, synthetic=request.deployed)
        return self._layerwise[kind]

    @property
    def device_memory(self) -> int | None:
        """Return the memory of a device in bytes; None if it is not known."""
        return (self._jax_device.memory_stats() or {}).get("bytes_limit")

    @property
    def _jax_device(self) -> Any:
        return self._jax_devices[0]

    @cached_property
    def _jax_devices(self) -> Sequence[Any]:
        platform, _, index = self.device.partition(":")
        try:
            devices = jax.devices(platform)
            return devices if index == "all" else [devices[int(index or 0)]]
        except (RuntimeError, IndexError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SettingError("device", self.device, f"a device of this machine ({reason})", "device=cpu") from error


def _seeds(seed: int, round: int) -> np.ndarray:
    """Return the key data of the model's random numbers in training, and of the noise, ``(2, 2)``."""
    seeds = [integer_seed(seed, purpose, round=round) & 0xFFFFFFFF for purpose in (Purpose.MODEL, Purpose.NOISE)]
    return np.array([[0, seed] for seed in seeds], np.uint32)


def _secret_seeds(num_clients: int) -> np.ndarray:
    """Return key data from the operating system, ``(K, 2, 2)``, so that no other party can repeat the draws."""
    return np.frombuffer(os.urandom(16 * num_clients), np.uint32).reshape(num_clients, 2, 2)


def _start_parameters(request: Request, work: Sequence[ClientWork]) -> np.ndarray | None:
    """Return the parameters from which each client starts, ``(K, D)``; None if all start from the global model."""
    if all(client_work.start_D is None for client_work in work):
        return None
    starts = [request.params_D if client_work.start_D is None else client_work.start_D for client_work in work]
    return np.stack([as_numpy(start_D) for start_D in starts])
