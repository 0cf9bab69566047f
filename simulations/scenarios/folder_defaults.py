"""State the default settings of local training for the scenario `folder`.

`docs/how_to/local_training.md` compares them with tuned settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlearn.loop.local_defaults import LocalDefaults

MAX_GRAD_NORM = 1.0  # it prevents the divergence of a regression whose columns have outliers
SGD_RATE, SGD_RATE_OF_TEXT = 0.1, 1.0  # features of hashed words are small
ADAM_RATES = {("text", "mlp"): 0.003, ("text", "linear"): 0.01, ("columns", "mlp"): 0.01, ("columns", "cnn"): 0.01}
ADAM_RATE_OF_TAGGERS = 0.01
ADAM_RATE_OF_OTHER_MODELS = 0.001


def folder_defaults(settings: Mapping[str, Any]) -> LocalDefaults:
    """Return the defaults for the inputs and the model of the settings.

    A linear model of columns trains with SGD, because its features have the same scale. All others train with Adam.
    """
    if settings.get("task") == "token_classification":
        return _tagger_defaults(settings.get("model"))
    inputs, model = "text" if settings.get("text") else "columns", settings.get("model") or "mlp"
    name = model if isinstance(model, str) else "your model"
    is_linear = (inputs, name) == ("columns", "linear")
    adam = 0.03 if is_linear else ADAM_RATES.get((inputs, name), ADAM_RATE_OF_OTHER_MODELS)
    return LocalDefaults(
        optimizer="sgd" if is_linear else "adam",
        learning_rates={"sgd": SGD_RATE_OF_TEXT if inputs == "text" else SGD_RATE, "adam": adam},
        max_grad_norm=MAX_GRAD_NORM,
        reason=f"{name} of {'texts' if inputs == 'text' else 'columns or images'}",
    )


def _tagger_defaults(model: Any) -> LocalDefaults:
    return LocalDefaults(
        optimizer="adam",
        learning_rates={"sgd": SGD_RATE_OF_TEXT, "adam": ADAM_RATE_OF_TAGGERS},
        max_grad_norm=MAX_GRAD_NORM,
        reason=f"{model if isinstance(model, str) else 'your model'} of tokens",
    )
