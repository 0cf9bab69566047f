"""Import the components of a Flower app."""

from __future__ import annotations

import traceback
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlearn.errors import FedlearnError


def load_component(reference: str, kind: type[Any], project: Path, target: str = "") -> Any:
    """Import the component at ``module:attribute``.

    Args:
        reference: ``module:attribute``.
        kind: expected class.
        project: pyproject.toml of the app, for messages.
        target: version of Flower for which the app was written, for messages; empty if unknown.

    Raises:
        FedlearnError: the component cannot be imported, or is of another class.
    """
    module, _, attribute = str(reference).partition(":")
    try:
        component = import_module(module)
        for name in attribute.split("."):
            component = getattr(component, name)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error}\n  in        {place.filename}, line {place.lineno}"
        if target and target != version("flwr") and isinstance(error, ImportError):
            reason += f"\n  because   the app was written for flwr {target}; installed is flwr {version('flwr')}"
        raise FedlearnError(f"{reference} of {project} cannot be imported: {reason}") from error
    if not isinstance(component, kind):
        raise FedlearnError(f"{reference} of {project} is a {type(component).__name__}, expected a {kind.__name__}")
    return component
