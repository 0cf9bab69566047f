"""Hold parts of an experiment that a Python program has built, in place of settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlearn.algorithm.strategy import Strategy
from fedlearn.callbacks.base import Callback
from fedlearn.errors import FedlearnError
from fedlearn.loop.scenario import Scenario
from fedlearn.privacy.mechanisms.base import Mechanism

OBJECT_TARGET = "fedlearn.run"  # _target_ of a group in config.yaml whose object came from a Python program
KINDS: Mapping[str, type[Any]] = {"scenario": Scenario, "strategy": Strategy, "privacy": Mechanism}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Objects that replace groups of settings. None takes the part from the settings.

    Args:
        scenario: data, trainer and metrics.
        strategy: algorithm.
        privacy: privacy mechanism.
        callbacks: name -> callback, in addition to the callbacks of the settings.
    """

    scenario: Scenario | None = None
    strategy: Strategy | None = None
    privacy: Mechanism | None = None
    callbacks: Mapping[str, Callback] = field(default_factory=dict)

    def find(self, group: str, node: Mapping[str, Any]) -> Any:
        """Return the object of a group, or None if the settings describe the part.

        Args:
            group: name of the group.
            node: settings of the group.

        Raises:
            FedlearnError: the run was started with an object, and this program has not given it again.
        """
        found = getattr(self, group, None)
        if found is None and node.get("_target_") == OBJECT_TARGET:
            problem = f"{group} is an object of a Python program, which the run folder does not contain"
            fix = f"fedlearn.run(resume=FOLDER, {group}=...)   (in Python, with the same {KINDS[group].__name__})"
            raise FedlearnError(f"{problem}\n  expected  the same object\n  advice    {fix}")
        return found


NO_PARTS = Parts()


def object_settings() -> dict[str, str]:
    """Return the settings that stand for an object in the configuration of a run."""
    return {"_target_": OBJECT_TARGET}
