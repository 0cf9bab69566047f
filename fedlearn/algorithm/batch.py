"""Show the batch of a local step to a penalty: outputs, features, targets, and further models.

Shapes: B batch with padding, C outputs, F features, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from array_api_compat import array_namespace, is_torch_array

from fedlearn.core.records import Array


@dataclass(frozen=True, kw_only=True)
class ModelOutputs:
    """Hold the outputs of one model on a batch.

    Attributes:
        outputs: raw outputs, ``(B, C)``.
        read_features: returns `features`.
    """

    outputs: Array
    read_features: Callable[[], Array]

    @property
    def features(self) -> Array:
        """Inputs of the last layer, ``(B, F)``. The last layer must be ``nn.Linear`` in torch and ``nn.Dense`` in flax.

        Raises:
            SettingError: The model does not end in such a layer, or has no parameters before it.
        """
        return self.read_features()


@dataclass(frozen=True, kw_only=True)
class Batch(ModelOutputs):
    """Hold the batch of a local step of one client. Outputs and features belong to the trained model.

    JAX and blocks of clients pad batches to one size. A statistic of the batch must use `mean`, `zero_padding` or
    ``mask``. `fedlearn.testing.check_strategy` finds a penalty that reads padding.

    Attributes:
        targets: targets, ``(B,)``.
        mask: True for examples, False for padding, ``(B,)``.
        run: returns the `ModelOutputs` of the model with other parameters ``(D,)``, in evaluation mode and without
            gradients.
    """

    targets: Array
    mask: Array
    run: Callable[[Array], ModelOutputs]

    @property
    def is_target(self) -> Array:
        """True at the class of each example, ``(B, C)``."""
        xp, num_classes = array_namespace(self.outputs), self.outputs.shape[-1]
        device = {"device": self.outputs.device} if is_torch_array(self.outputs) else {}  # JAX arrays in jit have none
        return self.targets[:, None] == xp.arange(num_classes, **device)

    @property
    def count(self) -> Array:
        """Number of examples, as a floating-point scalar, at least 1."""
        xp = array_namespace(self.outputs)
        count = xp.sum(xp.astype(self.mask, self.outputs.dtype))
        return xp.where(count > 0, count, xp.ones_like(count))

    def zero_padding(self, values: Array) -> Array:
        """Return values ``(B, ...)`` with 0 in the rows of padding."""
        xp = array_namespace(values)
        mask = xp.reshape(self.mask, (-1, *(1,) * (values.ndim - 1)))
        return xp.where(mask, values, xp.zeros_like(values))

    def mean(self, values: Array) -> Array:
        """Return the mean of values ``(B, ...)`` over the examples, without padding."""
        return array_namespace(values).sum(self.zero_padding(values), axis=0) / self.count
