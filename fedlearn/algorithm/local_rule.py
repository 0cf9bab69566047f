"""Difference of local training from plain SGD: one definition for torch and JAX.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedlearn.core.layout import Layout
from fedlearn.core.named_option import describe_option, option_name, option_values
from fedlearn.core.optimizers import state_names
from fedlearn.core.records import Array, ClientId, LocalSettings, State
from fedlearn.errors import require

GradientAt = Callable[[Array], Array]  # returns the gradient of a batch at parameters (D,), see `LocalRule.gradient`
GLOBAL_MODEL = "w_global"  # name of the model in a request, among the names of vectors
# name of the client state with the client's model after its last round, for `LocalRule.previous_model`
PREVIOUS_MODEL = "local.last"
# parts of a rule that change local steps; a trainer lists the ones that it applies in `Trainer.rule_hooks`
HOOKS = ("correct", "adjust_logits", "penalty", "gradient", "frozen_parameters")


def _gradient(grad: Any, w: Any, w_global: Any, **vectors: Any) -> Any:
    return grad


def _nothing(
    delta_KD: Array, num_steps_K: Array, learning_rate: float, **vectors: Array
) -> tuple[State, Mapping[str, Array]]:
    return {}, {}


class PersonalModel(NamedTuple):
    """Describe a personal model, which each client keeps beside the global model. It never leaves the client.

    Both models are evaluated. Before the first round of a client, its personal model is the received global model. The
    functions use array-API arithmetic: ``personal`` (the personal model) and ``delta`` are K x D, ``w_global`` is D.

    Attributes:
        correct: corrects the gradient of the personal model, ``(grad, w, w_global) -> grad``. The personal model is
            trained after the global one, on the same batches. None: it is the client's model after local training.
        start: returns the start of this training and the model for predictions, ``(personal, w_global) -> model``.
        after_training: returns the new personal model after training by ``delta``, ``(personal, delta) -> personal``.
    """

    correct: Callable[..., Any] | None = None
    start: Callable[[Array, Array], Array] = lambda personal, w_global: personal
    after_training: Callable[[Array, Array], Array] = lambda personal, delta: personal + delta


class LocalAggregation(NamedTuple):
    """Describe adaptive local aggregation: each client mixes the received model and its personal model.

    Local training starts at ``v + W (w - v)``, with the personal model v, the received model w, and weights W in [0, 1]
    for each parameter. Each client trains its weights on its examples before local training.

    Attributes:
        parameters: name patterns of the parameters with weights. All others start at the received model.
        learning_rate: learning rate of the weights, >= 0.
        max_passes: maximum number of passes when a client first trains its weights, >= 1. Later rounds make one pass.
        tolerance: these first passes end when the loss of a client falls by less than this share, >= 0.
    """

    parameters: tuple[str, ...]
    learning_rate: float = 1.0
    max_passes: int = 20
    tolerance: float = 0.01


class LocalRule(NamedTuple):
    """Describe how local training differs from plain SGD.

    Attributes:
        correct: corrects the gradient of each local step before the optimizer,
            ``(grad, w, w_global, **vectors) -> grad``. Use arithmetic only: it gets torch tensors and JAX arrays of any
            shape. ``vectors`` are the client states and broadcast vectors, by name.
        client_state: names of the D-vectors that each client keeps between rounds; zero before its first round.
        receives: names of the D-vectors that the server broadcasts (see `Transform.broadcast`).
        after_training: returns the new client state and extra vectors to send, all K x D,
            ``(delta_KD, num_steps_K, learning_rate, **vectors) -> (state, extra)``. It gets array-API arrays; broadcast
            vectors have shape D.
        personal_parameters: name patterns of parameters that never leave a client, e.g. ``head.*``. They keep their
            values between rounds, and start at the values of the global model.
        frozen_parameters: name patterns of parameters that keep the values of the received model. Local steps do not
            change them, and no update contains them. So DP-SGD neither clips nor adds noise for them.
        personal_epochs: passes that train only the personal parameters, before the passes of the request, which then
            train only the others. 0 trains all parameters together.
        personal: a personal model beside the global one; None for none.
        evaluate_models: received models (``w_global``, or names in ``receives``) that each client evaluates before it
            trains, at the cost of a pass each. Training starts at the model with the smallest loss. The losses are sent
            as the metrics ``loss/NAME``.
        adjust_logits: changes the outputs of the model (B x C) before the training loss, ``(outputs, counts) ->
            outputs``. ``counts`` has the number of training examples per class (C, but two if C is 1). Use arithmetic
            on torch tensors and JAX arrays. None: no change. Only for classification.
        penalty: returns a penalty for the loss, ``(batch, w_global, **vectors) -> penalty``, with a
            `fedlearn.algorithm.Batch` of one client. The result has one number per example (B), or is one number for
            the batch. Use array-API arithmetic. None: no penalty.
        couples_examples: True if the penalty of an example depends on other examples of its batch. Micro-batches are
            then refused.
        previous_model: True if each client keeps its model after its last round, and ``penalty`` gets it as
            ``w_previous``. In the first round of a client, it is the received model.
        gradient: replaces the gradient of a local step, ``(gradient_at, w, w_global, **vectors) -> grad``, all vectors
            of D. ``gradient_at(w)`` is the gradient of the training loss at any parameters, on the same batch and with
            the same random draws. Call it with ``w`` first: this call determines the training loss that is reported,
            and the batch statistics of the model. `correct` follows. None: ``gradient_at(w)``.
        send: returns the update that a client sends, ``(delta, **state) -> delta``, K x D, with its new client state.
            None: the update itself.
        num_steps: returns the number of local steps of all clients in a round, ``(round, rng) -> steps``, and replaces
            ``local.epochs`` and ``local.steps``. None: the local settings.
        requires_sgd: True if the rule or the aggregation is correct for SGD only. Other optimizers, other momentum than
            ``momentum``, and learning rates that change within a round are then refused.
        momentum: momentum of SGD that the rule accounts for, in [0, 1); see `gradient_weight`. None: only plain SGD.
        optimizer_state: names of the vectors of the optimizer that each client keeps between rounds; see
            `with_optimizer_state`.
        averages_optimizer: whether clients send these vectors to the server, which averages them.
        aggregation: adaptive local aggregation before local training; needs ``personal``. None: start at the received
            model.
        start: returns the parameters at which a client starts local training, ``(layout, w_global, client) -> w``, with
            the layout of the model. The update is the difference to them, and the server calls it too. It does not
            change ``w_global``. None: start at the received model.
    """

    correct: Callable[..., Any] = _gradient
    client_state: tuple[str, ...] = ()
    receives: tuple[str, ...] = ()
    after_training: Callable[..., tuple[State, Mapping[str, Array]]] = _nothing
    personal_parameters: tuple[str, ...] = ()
    frozen_parameters: tuple[str, ...] = ()
    personal_epochs: int = 0
    personal: PersonalModel | None = None
    evaluate_models: tuple[str, ...] = ()
    adjust_logits: Callable[[Any, Any], Any] | None = None
    penalty: Callable[..., Any] | None = None
    couples_examples: bool = False
    previous_model: bool = False
    gradient: Callable[..., Any] | None = None
    send: Callable[..., Any] | None = None
    num_steps: Callable[[int, np.random.Generator], int] | None = None
    requires_sgd: bool = False
    momentum: float | None = None
    optimizer_state: tuple[str, ...] = ()
    averages_optimizer: bool = False
    aggregation: LocalAggregation | None = None
    start: Callable[[Layout, Array, ClientId], Array] | None = None

    @property
    def supports_mixed_rounds(self) -> bool:
        """True if clients with different received models can train as one block.

        Such a rule trains each client once, from the received model. Rules with personal parameters, a personal model
        that trains, `evaluate_models`, a penalty, a gradient of their own, local aggregation, or `start` do not.
        """
        trains_personal = self.personal is not None and self.personal.correct is not None
        trains_again = self.personal_parameters or self.personal_epochs or trains_personal or self.evaluate_models
        changes_steps = self.penalty is not None or self.gradient is not None
        changes_start = self.aggregation is not None or self.start is not None
        return not (trains_again or changes_steps or changes_start)

    @property
    def unshared_parameters(self) -> tuple[str, ...]:
        """Name patterns of the parameters that no update contains: personal and frozen ones."""
        return (*self.personal_parameters, *self.frozen_parameters)

    @property
    def has_custom_loss(self) -> bool:
        """True if the training loss differs from the loss of the task."""
        return self.adjust_logits is not None or self.penalty is not None

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the parts of this rule that change local steps; see `HOOKS`."""
        return tuple(name for name in HOOKS if getattr(self, name) is not getattr(plain_training, name))


plain_training = LocalRule()


def gradient_weight(num_steps: Any, momentum: float) -> Any:
    """Return the sum of the weights of all gradients in an update of SGD with momentum, in learning rates.

    ``a = (S - m (1 - m^S) / (1 - m)) / (1 - m)`` for ``S`` steps with momentum ``m``. Without momentum, it is ``S``.

    Args:
        num_steps: number of local steps, >= 0; a number or an array of any library.
        momentum: momentum, in [0, 1).

    Reference: Wang, Liu, Liang, Joshi, Poor, *Tackling the Objective Inconsistency Problem in Heterogeneous Federated
    Optimization*, NeurIPS 2020, arXiv:2007.07481, section 4.

    >>> round(gradient_weight(2, 0.9), 12)  # the update is -learning_rate * ((1 + 0.9) * grad_1 + grad_2)
    2.9
    """
    rest = 1 - momentum
    return (num_steps - momentum * (1 - momentum**num_steps) / rest) / rest


def require_sgd(rule: LocalRule, local: LocalSettings) -> None:
    """Check that the local settings are SGD with the momentum of the rule, if the rule requires it.

    Raises:
        SettingError: The optimizer is not SGD, or has another momentum, Nesterov momentum or a state of the last
            round. Or the learning rate changes within a round.
    """
    if not rule.requires_sgd:
        return
    plain = "plain SGD" if rule.momentum is None else "SGD"
    reason = f"this strategy is correct for {plain} only"
    optimizer = describe_option(local.optimizer)
    require(
        option_name(local.optimizer) == "sgd", "local.optimizer", optimizer, f"sgd: {reason}", "local.optimizer=sgd"
    )
    if rule.momentum is None:
        require(not local.momentum, "local.momentum", local.momentum, f"0: {reason}", "local.momentum=0")
    else:
        expected, advice = f"{rule.momentum:g}, as strategy.momentum", f"strategy.momentum={local.momentum:g}"
        require(local.momentum == rule.momentum, "local.momentum", local.momentum, expected, advice)
    nesterov = bool(local.momentum and option_values(local.optimizer).get("nesterov"))
    expected = "sgd without nesterov: this strategy computes the weights of gradients for the other momentum"
    require(not nesterov, "local.optimizer", optimizer, expected, "local.optimizer=sgd")
    is_reset = not local.momentum or local.optimizer_state == "reset"
    expected = "reset: this strategy computes the weights of gradients for momentum that starts at zero"
    require(is_reset, "local.optimizer_state", local.optimizer_state, expected, "local.optimizer_state=reset")
    expected = f"a schedule over rounds: {reason}"
    schedule = describe_option(local.schedule)
    require(local.rate_is_constant, "local.schedule", schedule, expected, "local.schedule=cosine")


def with_optimizer_state(rule: LocalRule, local: LocalSettings) -> LocalRule:
    """Return the rule for clients that keep the state of the optimizer, if the settings ask for it.

    Raises:
        SettingError: The rule trains the parts of the model one after another.
    """
    names = state_names(local)
    expected = "reset: this strategy trains the parts of the model one after another"
    can_keep = not (names and rule.personal_epochs)
    require(can_keep, "local.optimizer_state", local.optimizer_state, expected, "local.optimizer_state=reset")
    averages = bool(names) and local.optimizer_state == "average"
    expected = "reset or keep: personal parameters would leave the clients with the state of the optimizer"
    is_shared = not (averages and rule.personal_parameters)
    require(is_shared, "local.optimizer_state", local.optimizer_state, expected, "local.optimizer_state=keep")
    if (names, averages) == (rule.optimizer_state, rule.averages_optimizer):
        return rule
    return rule._replace(optimizer_state=names, averages_optimizer=averages)


def parameter_patterns(names: str | Sequence[str], *, name: str = "personal_parameters") -> tuple[str, ...]:
    """Return one or several name patterns as a tuple, for `LocalRule.personal_parameters` and similar settings.

    Args:
        names: one pattern, or a sequence of patterns.
        name: name of the setting, for the error.

    >>> parameter_patterns("out.*"), parameter_patterns(["norm*", "out.bias"])
    (('out.*',), ('norm*', 'out.bias'))

    Raises:
        SettingError: there is no pattern, or a pattern is not a text.
    """
    patterns = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Sequence) else ()
    is_valid = bool(patterns) and all(isinstance(pattern, str) and pattern for pattern in patterns)
    require(is_valid, name, names, "one or more patterns of parameter names", f"'{name}=out.*'")
    return patterns


def proximal(mu: float) -> LocalRule:
    """Return a rule that adds ``mu / 2 * ||w - w_global||^2`` to the local objective."""
    return LocalRule(correct=lambda grad, w, w_global: grad + mu * (w - w_global))
