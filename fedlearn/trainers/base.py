"""Parts that all trainers share: a base class, a wrapper, initial parameters, and checks of a model.

Shapes: K clients in a block, D parameters, N examples, C outputs or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.core.arrays import as_numpy
from fedlearn.core.gradient_settings import LOSS_DEFAULTS, show_default
from fedlearn.core.layout import Layout, default_initial_parameters
from fedlearn.core.model_report import ModelReport
from fedlearn.core.named_option import describe_option
from fedlearn.core.optimizers import PORTABLE_OPTIMIZERS, STATE_PREFIX, STEPS, is_portable
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import EMPTY_STATE, Array, ClientWork, Examples, LocalSettings, MetricSum, Request, Updates
from fedlearn.core.schedules import learning_rates
from fedlearn.core.tasks import Task
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.rule_support import require_support
from fedlearn.trainers.batching import batch_plans, poisson_plans, rounds_of
from fedlearn.trainers.numpy_steps import (
    clip_gradient,
    noise_source,
    optimizer,
    private_gradient,
    require_separate_examples,
)

Initializer = Callable[[Layout, np.random.Generator], np.ndarray]
FROM_SEED = "weights drawn from the seed"  # values of `Trainer.initialization`
FROM_MODULE = "weights as given"
FROM_INITIALIZER = "weights from an initializer"


class LocalResult(NamedTuple):
    """Hold the result of local training of one client.

    Attributes:
        delta_D: final minus initial parameters.
        loss: total loss of the examples that were used.
        num_losses: number of the examples that were used; an example counts once per pass.
        num_steps: local steps.
        optimizer_state: new optimizer state by name, if the client keeps it.
    """

    delta_D: np.ndarray
    loss: float
    num_losses: int
    num_steps: int
    optimizer_state: Mapping[str, np.ndarray] = EMPTY_STATE


class BaseTrainer:
    """Base class of trainers, in NumPy, with defaults for all optional members.

    A subclass sets ``layout``, and defines `outputs` and one of `gradient` and `example_gradients`. The base class
    then trains with the portable optimizers (``sgd``, ``adam``, ``adamw``, ``adagrad`` and ``rmsprop``), under any
    local rule that corrects gradients. With `example_gradients` and ``supports_dp_sgd = True`` it also trains with
    DP-SGD. A subclass with a solver without gradients overrides `fit_client`. It applies no local rule, unless it
    states the functions of a rule that it applies in ``rule_hooks``.

    *Guarantees*: the base class raises `SettingError` for each request, rule or model that it does not support.
    """

    framework = "numpy"
    device = "cpu"
    layout: Layout
    supports_dp_sgd = False
    supports_process_pool = False
    clients_per_step = 1
    rule_hooks = frozenset({"correct", "gradient", "frozen_parameters"})
    initialization = FROM_SEED
    _is_checked = False  # True after the check of `example_gradients`
    max_predict_rows = 4096  # rows that `predict` passes to `outputs` at once

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "fit_client" in cls.__dict__ and "rule_hooks" not in cls.__dict__:
            cls.rule_hooks = frozenset()  # a solver of its own applies no function of a rule, unless it says so
        if cls.supports_dp_sgd and cls.example_gradients is BaseTrainer.example_gradients:
            raise TypeError(f"{cls.__name__} states supports_dp_sgd=True, which needs the method example_gradients")

    def outputs(self, params_D: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the raw outputs ``(N, C)`` of the model in evaluation mode."""
        raise NotImplementedError(f"{type(self).__name__} needs the method outputs(params_D, x)")

    def gradient(self, params_D: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss of each example, ``(N,)``, and the gradient of the mean loss, ``(D,)``."""
        loss_N, grad_ND = self.example_gradients(params_D, x, y)
        return loss_N, np.mean(grad_ND, axis=0)

    def example_gradients(self, params_D: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss of each example, ``(N,)``, and its gradient, ``(N, D)``. N may be 0."""
        raise NotImplementedError(f"{type(self).__name__} needs the method gradient or example_gradients")

    def init(self, seed: int) -> np.ndarray:
        """Return initial parameters in torch's default distribution."""
        return initial_parameters(self.layout, default_initial_parameters, seed)

    def with_batching(self, batching: str) -> Self:
        """Return this trainer. It always trains one client after another.

        Raises:
            SettingError: ``batching`` is neither ``auto`` nor ``map``.
        """
        fits = batching in ("auto", "map")
        expected = f"map: {type(self).__name__} trains one client after another"
        require(fits, "batching", batching, expected, "batching=map")
        return self

    def describe_batching(self, num_clients: int, num_examples: int) -> str:
        """Return ``map``, because this trainer trains one client after another."""
        return "map"

    def close(self) -> None:
        """Release nothing. A subclass with processes or memory of its own overrides this method."""

    def check_local(self, local: LocalSettings) -> None:
        """Refuse optimizers of other frameworks, and changes of the loss. See `Trainer.check_local`."""
        name = type(self).__name__
        expected = f"one of {', '.join(PORTABLE_OPTIMIZERS)}, because {name} trains in NumPy"
        shown = describe_option(local.optimizer)
        require(is_portable(local.optimizer), "local.optimizer", shown, expected, "local.optimizer=adam")
        refuse_loss_changes(local, f"because {name} computes the gradient of its own loss")

    def check_model(self, examples: Examples, *, synthetic: bool = False) -> ModelReport:
        """Return an empty report. A subclass can check its model here. See `Trainer.check_model`."""
        return ModelReport()

    def check_example_dp(self, request: Request, examples: Examples) -> None:
        """Check once that `example_gradients` keeps examples apart. See `Trainer.check_example_dp`."""
        if request.local.example_dp is None or self._is_checked or not self.supports_dp_sgd:
            return
        name, params_D = type(self).__name__, as_numpy(request.params_D)
        require_separate_examples(self.example_gradients, name, params_D, examples, synthetic=request.deployed)
        self._is_checked = True

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Return raw outputs ``(N, C)`` in evaluation mode. Inputs pass through `outputs` in batches."""
        batches = range(0, max(1, len(x)), self.max_predict_rows)
        parts = [self.outputs(as_numpy(params_D), x[i : i + self.max_predict_rows]) for i in batches]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def fit(self, request: Request, rule: LocalRule, work: Sequence[ClientWork]) -> Updates:
        """Train K clients, one after another. See `Trainer.fit`."""
        self._refuse_unsupported(request, rule)
        results = [self.fit_client(request, rule, client_work) for client_work in work]
        delta_K, losses_K, counts_K, steps_K, states_K = zip(*results, strict=True)
        return Updates(
            clients_K=np.array([client_work.client for client_work in work], np.int64),
            delta_KD=np.stack(delta_K).astype(np.float32),
            num_examples_K=np.array([len(client_work.examples) for client_work in work], np.int64),
            num_steps_K=np.array(steps_K, np.int64),
            metrics={"loss": MetricSum(np.array(losses_K, np.float64), np.array(counts_K, np.int64))},
            client_state={name: np.stack([state[name] for state in states_K]) for name in states_K[0]},
        )

    def fit_client(self, request: Request, rule: LocalRule, work: ClientWork) -> LocalResult:
        """Train one client by minibatch gradients.

        A subclass that overrides this method with another solver must call `require_plain_training` first.
        """
        w_global_D = as_numpy(request.params_D)
        start_D = w_D = w_global_D if work.start_D is None else as_numpy(work.start_D)
        vectors = {name: as_numpy(work.client_state[name]) for name in rule.client_state}
        vectors |= {name: as_numpy(request.broadcast[name]) for name in rule.receives}
        plans = poisson_plans if request.local.example_dp else batch_plans
        sizes = np.array([len(work.examples)])
        rounds, local = rounds_of(request, [work]), request.local
        (plan_SB,), steps = plans(request, np.array([work.client]), sizes, rounds)
        rates, num_steps = learning_rates(local.schedule, local.learning_rate, rounds, steps), int(steps[0])
        rates_S = np.full(num_steps, local.learning_rate) if rates is None else rates[0]
        kept = (*rule.optimizer_state, STEPS) if rule.optimizer_state else ()
        state = {name.removeprefix(STATE_PREFIX): as_numpy(work.client_state[name]) for name in kept}
        gradient, step, loss = self._gradient_of(request, rule, work), optimizer(local, state), 0.0
        frozen = self.layout.positions(rule.frozen_parameters)
        for padded, rate in zip(plan_SB[:num_steps], rates_S.tolist(), strict=True):
            rows = padded[padded >= 0]
            batch = work.examples.x[rows], work.examples.y[rows]
            loss_N, grad_D = _rule_gradient(gradient, rule, w_D, batch, w_global_D, vectors)
            loss += float(np.sum(loss_N))
            grad_D = clip_gradient(local.max_grad_norm, _with_zeros(grad_D, frozen))
            w_D = step(w_D, rule.correct(grad_D, w_D, w_global_D, **vectors), rate)
            w_D[frozen] = start_D[frozen]  # weight decay needs no gradient
        new_state = {name: np.asarray(state[name.removeprefix(STATE_PREFIX)], np.float32) for name in kept}
        return LocalResult(w_D - start_D, loss, int((plan_SB >= 0).sum()), num_steps, new_state)

    def _gradient_of(
        self, request: Request, rule: LocalRule, work: ClientWork
    ) -> Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Return `gradient`, or the gradient of DP-SGD if the request sets it."""
        dp = request.local.example_dp
        if dp is None:
            return self.gradient
        self.check_example_dp(request, work.examples)
        normals, expected = noise_source(request, work), min(request.local.batch_size, len(work.examples))

        def gradient(params_D: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            loss_N, grad_ND = self.example_gradients(params_D, x, y)
            grad_ND = _with_zeros(grad_ND, self.layout.positions(rule.frozen_parameters))
            return loss_N, private_gradient(grad_ND, dp, expected, normals)

        return gradient

    def _refuse_unsupported(self, request: Request, rule: LocalRule) -> None:
        self.check_local(request.local)
        name, dp = type(self).__name__, request.local.example_dp
        expected = f"null, because {name} has no DP-SGD"
        require(dp is None or self.supports_dp_sgd, "local.example_dp", dp, expected, "privacy=central")
        require_support(self, rule, request.local)
        buffers = ", ".join(self.layout.buffers[:2])
        expected = f"a model without buffers, because {name} does not train them"
        require(not buffers, "model", f"one with buffers ({buffers})", expected, "model=mlp")


def _with_zeros(gradient: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return gradients ``(..., D)`` with zeros at some positions."""
    if not len(positions):
        return gradient
    changed = np.array(gradient)
    changed[..., positions] = 0
    return changed


def _rule_gradient(
    gradient: Callable[..., tuple[np.ndarray, np.ndarray]],
    rule: LocalRule,
    w_D: np.ndarray,
    batch: tuple[np.ndarray, np.ndarray],
    w_global_D: np.ndarray,
    vectors: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses and the gradient of a batch, with the gradient of the local rule if it has one."""
    if rule.gradient is None:
        return gradient(w_D, *batch)
    losses = []

    def gradient_at(params_D: np.ndarray) -> np.ndarray:
        loss_N, grad_D = gradient(params_D, *batch)
        losses.append(loss_N)
        return grad_D

    grad_D = rule.gradient(gradient_at, w_D, w_global_D, **vectors)
    return losses[0], grad_D


def require_plain_training(rule: LocalRule, request: Request) -> None:
    """Refuse local rules and DP-SGD, for a trainer whose solver does not expose gradients.

    Raises:
        SettingError: The rule changes local training, or the request asks for DP-SGD.
    """
    plain = not rule.hooks
    expected = "a strategy with plain local training: this trainer cannot correct gradients"
    require(plain, "strategy", "one that changes local training", expected, "strategy=fedavg")
    dp = request.local.example_dp
    require(dp is None, "local.example_dp", dp, "null: this trainer has no DP-SGD", "privacy=central")
    refuse_loss_changes(request.local, "because this trainer has a solver of its own")
    bound = request.local.max_grad_norm
    expected = "null: this trainer cannot clip gradients"
    require(bound is None, "local.max_grad_norm", bound, expected, "local.max_grad_norm=null")


def refuse_loss_changes(local: LocalSettings, reason: str) -> None:
    """Refuse class weights, label smoothing, micro batches and mixed precision, for a trainer without them.

    Raises:
        SettingError: One of these settings differs from its default.
    """
    for name, default in LOSS_DEFAULTS.items():
        value, shown = getattr(local, name), show_default(default)
        require(value == default, f"local.{name}", value, f"{shown}, {reason}", f"local.{name}={shown}")


def require_class_loss(local: LocalSettings, task: Task, *, is_cross_entropy: bool) -> None:
    """Check that class weights and label smoothing fit the task and the loss.

    Args:
        local: settings of local training.
        task: task of the trainer.
        is_cross_entropy: whether the trainer uses the loss of a shipped task.

    Raises:
        SettingError: The task has no class per example, or label smoothing meets a loss of the user.
    """
    weights, share = local.class_weights, local.label_smoothing
    expected = f"null, because the task {task.name} has no class per example"
    fits = weights is None or task.is_classification
    require(fits, "local.class_weights", weights, expected, "local.class_weights=null")
    expected = "0, because label smoothing changes the cross-entropy of a classification"
    is_possible = not share or (task.is_classification and is_cross_entropy)
    require(is_possible, "local.label_smoothing", share, expected, "local.label_smoothing=0")


def class_counts(trainer: Trainer, task: Task, request: Request, work: Sequence[ClientWork]) -> np.ndarray:
    """Count the training examples of each class at K clients, for `LocalRule.adjust_logits`.

    Returns:
        ``(K, C)`` float32, C >= 2.

    Raises:
        SettingError: The targets are not one class number per example.
    """
    has_classes = task.has_classes and work[0].examples.y.ndim == 1
    require(has_classes, "strategy", "one that adjusts logits", "a scenario with classes", "strategy=fedavg")
    num_classes = max(2, trainer.predict(request.params_D, work[0].examples.x[:1]).shape[1])
    counts = [np.bincount(client_work.examples.y.astype(np.int64), minlength=num_classes) for client_work in work]
    return np.stack(counts).astype(np.float32)


def require_features(has_features: bool) -> None:
    """Refuse a model that has no features for `Batch.features`.

    Raises:
        SettingError: ``has_features`` is False.
    """
    expected = "a model that ends in one affine map (torch.nn.Linear, flax.linen.Dense) of features that it learns"
    require(has_features, "strategy", "one that reads features", expected, "strategy=fedprox")


def initial_parameters(
    layout: Layout, initial: Initializer, seed: int, buffers: Mapping[str, np.ndarray] | None = None
) -> np.ndarray:
    """Return the initial parameters and the values of the buffers, as one vector ``(D,)``.

    Args:
        layout: layout of the model.
        initial: draws the parameters from ``(layout, rng)``.
        seed: seed of the run, >= 0.
        buffers: values of the buffers, by name; None for a model without buffers.
    """
    first_D = initial(layout.trainable, generator(seed, Purpose.INIT))
    return layout.pack({**layout.trainable.unpack(first_D), **buffers}) if buffers else first_D


def keep_weights(weights: Mapping[str, np.ndarray]) -> Initializer:
    """Return an initializer that gives the parameters these values for every seed.

    Args:
        weights: value of each parameter, by its name in the layout. Other names are ignored.
    """

    def keep(layout: Layout, rng: np.random.Generator) -> np.ndarray:
        return layout.pack({leaf.name: weights[leaf.name] for leaf in layout.leaves})

    return keep


def describe_initializer(initial: Initializer) -> str:
    """Return one phrase on the source of the initial parameters, for the header of a run."""
    if initial is default_initial_parameters:
        return FROM_SEED
    return FROM_INITIALIZER


def refuse_dp_sgd_with_coupled_loss(task: Task, local: LocalSettings, *, has_task_loss: bool) -> None:
    """Refuse DP-SGD for a task whose loss compares the examples of a batch: clipping would not bound one example.

    Raises:
        SettingError: The request sets DP-SGD, and the trainer has the loss of such a task.
    """
    expected = f"another setting: the loss of task={task.name} of an example depends on the other examples of a batch"
    is_coupled = local.example_dp is not None and task.couples_examples and has_task_loss
    require(not is_coupled, "privacy", "example", expected, "privacy=central")


def refuse_micro_batches_with_coupled_loss(task: Task, local: LocalSettings, *, has_task_loss: bool) -> None:
    """Refuse micro-batches for a task whose loss compares the examples of a batch.

    Raises:
        SettingError: The local settings divide batches, and the trainer has the loss of such a task.
    """
    size, setting = local.micro_batch_size, "local.micro_batch_size"
    expected = f"null: the loss of task={task.name} compares all examples of a batch"
    is_coupled = size is not None and task.couples_examples and has_task_loss
    require(not is_coupled, setting, size, expected, f"{setting}=null")


def refuse_dp_sgd_with_buffers(layout: Layout, local: LocalSettings) -> None:
    """Refuse DP-SGD for a model with batch statistics.

    With batch statistics, the gradient of an example depends on the other examples of its batch. Clipping then does
    not bound the influence of one example. The client would also send the statistics without noise.

    Raises:
        SettingError: The request sets DP-SGD and the model has buffers.
    """
    names = ", ".join(layout.buffers[:2])
    expected = f"another setting, or a model with group norm: the statistics ({names}) mix the examples of a batch"
    ok = local.example_dp is None or not layout.buffers
    require(ok, "privacy", "example", expected, "privacy=central buffers=local")
