"""Record the features of a flax model: the inputs of its last layer.

Shapes: B batch, F features, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
from flax import linen as nn

from fedlearn.trainers.base import require_features


def record_features(
    run: Callable[[], Any], leaves: Collection[tuple[str, ...]]
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Return the outputs of a module, ``(B, C)``, and a function that returns the features of the batch, ``(B, F)``.

    The features are the inputs of the last ``nn.Dense``. Its outputs must be the outputs of the module. The model must
    have trainable parameters before this layer, and one feature vector per example. Otherwise the function raises
    `SettingError`.

    Args:
        run: calls the module and returns its outputs.
        leaves: paths of the parameters of the module.
    """
    calls: list[tuple[tuple[str, ...], jax.Array, jax.Array]] = []

    def watch(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = method(*args, **kwargs)
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            calls.append((context.module.path, args[0], output))
        return output

    with nn.intercept_methods(watch):
        outputs_BC = run()

    def features() -> jax.Array:
        last = next((call for call in calls if call[2] is outputs_BC), None)
        has_parameters_before = last is not None and any(path[:-1] != last[0] for path in leaves)
        require_features(last is not None and last[1].ndim == 2 and has_parameters_before)
        assert last is not None
        return last[1]

    return outputs_BC, features
