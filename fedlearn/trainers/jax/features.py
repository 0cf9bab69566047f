"""What a flax model hands to its last layer.

Shapes: B batch, F features, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
from flax import linen as nn

from fedlearn.trainers.base import require_features


def with_features(run: Callable[[], Any], leaves: Collection[tuple[str, ...]]) -> tuple[jax.Array, jax.Array]:
    """The outputs that ``run`` gets of a module (B x C), and their features (B x F).

    ``leaves`` are the paths of its parameters. Features are the inputs of the ``nn.Dense`` whose outputs are the
    module's own: nothing may come after it.

    Raises:
        SettingError: there is no such layer, nothing is learnt before it, or an example has several vectors of them.
    """
    calls: list[tuple[tuple[str, ...], jax.Array, jax.Array]] = []

    def watch(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = method(*args, **kwargs)
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            calls.append((context.module.path, args[0], output))
        return output

    with nn.intercept_methods(watch):
        outputs_BC = run()
    last = next((call for call in calls if call[2] is outputs_BC), None)
    learns_before = last is not None and any(path[:-1] != last[0] for path in leaves)
    require_features(last is not None and last[1].ndim == 2 and learns_before)
    assert last is not None
    return outputs_BC, last[1]
