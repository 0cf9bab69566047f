"""How local training departs from plain SGD: one definition for torch and JAX.

Shapes: K clients in a block, D parameters laid flat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedlearn.core.records import Array, State
from fedlearn.errors import require

GLOBAL_MODEL = "w_global"  # the model that an order carries, among the names of vectors
PREVIOUS_MODEL = (
    "local.last"  # in a client's memory: the model with which its last round ended, for `LocalRule.feature_penalty`
)


def _gradient(grad: Any, w: Any, w_global: Any, **vectors: Any) -> Any:
    return grad


def _nothing(
    delta_KD: Array, num_steps_K: Array, learning_rate: float, **vectors: Array
) -> tuple[State, Mapping[str, Array]]:
    return {}, {}


class PersonalModel(NamedTuple):
    """Describe a model that each client keeps beside the global one. It never leaves the client; evaluation judges
    both.

    Before its client's first round it is the global model that the client receives. All three are array-API
    arithmetic: ``own`` and ``delta`` are K x D, ``w_global`` is D.

    Attributes:
        correct: ``(grad, w, w_global) -> grad`` of a training of its own, on the same batches, after the one whose
            update is sent; None: there is none, it is where that one ended.
        start: ``(own, w_global) -> model``: where its training begins, and what the client predicts with.
        after_training: ``(own, delta) -> own`` after its training has moved that model by ``delta``.
    """

    correct: Callable[..., Any] | None = None
    start: Callable[[Array, Array], Array] = lambda own, w_global: own
    after_training: Callable[[Array, Array], Array] = lambda own, delta: own + delta


class LocalRule(NamedTuple):
    """Describe how local training differs from plain SGD.

    Attributes:
        correct: ``(grad, w, w_global, **vectors) -> grad``, arithmetic only, applied to torch tensors and JAX arrays
            of any shape at each local step, before the optimiser; ``vectors`` are the memories and broadcasts named
            below, by name.
        client_state: names of the D-vectors that each client keeps for itself; zero before its first round.
        receives: names of the D-vectors that the server broadcasts (see `Transform.broadcast`).
        after_training: ``(delta_KD, num_steps_K, learning_rate, **vectors) -> (new state, extra values to send)``, each
            K x D, on array-API arrays, after training. Broadcast vectors have shape D.
        personal_parameters: name patterns of parameters that never leave a client, e.g. ``head.*``. They keep their
            values between rounds, and start at those of the global model.
        personal_epochs: passes that train only the personal parameters, before the passes of the request, which then
            train only the others. 0 trains all parameters together.
        personal: a model of each client's own beside the global one; None: there is none.
        evaluate_models: received models (``w_global``, or names in ``receives``) that each client evaluates before it
            trains, at the cost of a pass each. Training starts at the model with the least loss. The losses are sent as
            the metrics ``loss/NAME``.
        adjust_logits: ``(outputs, counts) -> outputs``: changes the outputs of the model (B x C) before the training
            loss, given the number of examples of each class (C; two where C is 1). Arithmetic on torch tensors and JAX
            arrays. None: no change. Only for classification.
        feature_penalty: ``(features, of_global, of_last) -> penalty``: what is added to the loss of each example (B) in
            training, given its features (B x F) under the model that is trained, under the one that was received, and
            under the one with which the client's last round ended (in its first round: the one received). Features are
            what a model hands to its last layer, which must be ``nn.Linear`` in torch, ``nn.Dense`` in flax. Array-API
            arithmetic. None: nothing, and no model but the one that is trained is run.
    """

    correct: Callable[..., Any] = _gradient
    client_state: tuple[str, ...] = ()
    receives: tuple[str, ...] = ()
    after_training: Callable[..., tuple[State, Mapping[str, Array]]] = _nothing
    personal_parameters: tuple[str, ...] = ()
    personal_epochs: int = 0
    personal: PersonalModel | None = None
    evaluate_models: tuple[str, ...] = ()
    adjust_logits: Callable[[Any, Any], Any] | None = None
    feature_penalty: Callable[[Any, Any, Any], Any] | None = None

    @property
    def supports_mixed_rounds(self) -> bool:
        """Whether clients with different received models can train as one block.

        Such a rule trains each client once, from the model that it received. Rules with personal parameters, a
        personal model, a comparison of models or a feature penalty do not.
        """
        trains_again = self.personal_parameters or self.personal_epochs or self.personal or self.evaluate_models
        return not trains_again and self.feature_penalty is None

    @property
    def has_custom_loss(self) -> bool:
        """Whether clients train with another loss than the task's."""
        return self.adjust_logits is not None or self.feature_penalty is not None


plain_training = LocalRule()


def parameter_patterns(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return a pattern of names, or several, as a tuple for `LocalRule.personal_parameters`.

    >>> parameter_patterns("out.*"), parameter_patterns(["norm*", "out.bias"])
    (('out.*',), ('norm*', 'out.bias'))

    Raises:
        SettingError: there is none, or one is no text.
    """
    found = (names,) if isinstance(names, str) else tuple(names)
    ok = bool(found) and all(isinstance(name, str) and name for name in found)
    require(ok, "personal_parameters", names, "patterns of names of parameters", "personal_parameters=out.*")
    return found


def proximal(mu: float) -> LocalRule:
    """Pull local parameters towards the global ones: the gradient of ``mu / 2 * ||w - w_global||^2`` is added."""
    return LocalRule(correct=lambda grad, w, w_global: grad + mu * (w - w_global))
