"""Describe the result of the check of a model before training.

Shapes: C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass


class ModelWarning(UserWarning):
    """Warn about a model that trains, but probably not as intended."""


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """Result of the check of a model and its loss on a few examples.

    Attributes:
        num_outputs: number of outputs of an example, C; 0 if the trainer did not check it.
        unused: names of trainable parameters without a gradient, because the outputs do not depend on them.
        frozen: names of parameters that training does not change.
        warnings: sentences about probable mistakes in the model.
    """

    num_outputs: int = 0
    unused: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
