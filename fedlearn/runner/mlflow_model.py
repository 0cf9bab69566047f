"""Load a model of fedlearn in MLflow: ``mlflow.pyfunc.load_model("models:/sepsis/1").predict(frame)``.

The file ``MLmodel`` of `fedlearn.callbacks.mlflow.MLflow` names this module.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlearn.runner.trained_model import TrainedModel, load


class PythonModel:
    """Predict with a trained model in the interface of MLflow.

    Args:
        model: trained model of a run.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """Return one prediction for each example, see `fedlearn.runner.trained_model.TrainedModel.predict`.

        Args:
            model_input: raw examples, e.g. a data frame.
            params: keyword arguments of that method; None for none.
        """
        return self.model.predict(model_input, **(params or {}))


def _load_pyfunc(path: str) -> PythonModel:
    """Return the model in a folder that MLflow has downloaded. MLflow calls this function by its name."""
    return PythonModel(load(path))
