"""Explain the privacy guarantee of a run in plain words, for readers without knowledge of the field.

The text follows from the attributes of the guarantee, so it is right for mechanisms of users, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

WEAK = 10.0  # an epsilon above this value excludes little
UNITS = {"client": "one client", "example": "one example, such as one row of a table"}


def privacy_paragraph(privacy: Mapping[str, Any] | None, *, is_simulation: bool) -> str:
    """Return a paragraph on the protected data, the parties, epsilon and delta, and the limits.

    Args:
        privacy: entry ``privacy`` of ``summary.json``; None or empty without a mechanism.
        is_simulation: whether all data were on this machine.
    """
    if not privacy:
        sentences = _without_mechanism()
    elif privacy["delta"] is None:
        sentences = _without_epsilon(privacy)
    else:
        sentences = _with_epsilon(privacy)
    if is_simulation:
        sentences.append(
            "This run was a simulation: all examples were on one machine, and all randomness follows from the seed. "
            "The text describes the same settings at real sites."
        )
    return " ".join(sentences)


def _without_mechanism() -> list[str]:
    return [
        "No privacy mechanism protected this run.",
        "Examples stay at the sites, but the coordinator reads the model update of each site.",
        "Such updates, and the trained model, can reveal information about single persons.",
    ]


def _without_epsilon(privacy: Mapping[str, Any]) -> list[str]:
    sentences = []
    if privacy.get("threshold") is not None:
        sentences = [
            "Each site masks its model update, so the coordinator can open only sums of updates.",
            f"A sum has at least {privacy['threshold']} parties. The update of a single site stays hidden.",
        ]
    return [
        *sentences,
        "No noise is added, so there is no epsilon and no differential privacy.",
        "The opened values and the trained model can still reveal information about single persons.",
        _limits(privacy),
    ]


def _with_epsilon(privacy: Mapping[str, Any]) -> list[str]:
    protected = UNITS.get(privacy["unit"], f"one {privacy['unit']}")
    sentences = [f"Randomness in the training hides the contribution of {protected}."]
    if privacy.get("holds_against_server"):
        sentences.append("This protects against everyone who reads the trained model, and against the coordinator.")
    else:
        sentences.append(
            "This protects against everyone who reads the trained model. It does not protect against the coordinator."
        )
    if privacy.get("threshold") is not None:
        sentences.append(f"The coordinator can open only sums of at least {privacy['threshold']} parties.")
    if privacy["unit"] == "example":
        sentences.append("A person with several examples has less protection.")
    else:
        sentences.append("All examples of a client are protected together.")
    return [*sentences, _meaning(privacy), _limits(privacy)]


def _meaning(privacy: Mapping[str, Any]) -> str:
    epsilon, delta = privacy["epsilon"], privacy["delta"]
    if epsilon is None:
        return "The accounting found no bound on epsilon, so there is no guarantee."
    size = _rounded_up(math.exp(min(epsilon, 700.0)))
    weak = " A factor of this size excludes little: the protection is weak." if epsilon > WEAK else ""
    return (
        f"The guarantee is epsilon {_rounded_up(epsilon)} at delta {delta:g}. It compares two trainings that differ "
        f"by: {privacy['adjacency']}. Any result is at most {size} times as probable in one of them as in the other, "
        f"plus {delta:g}.{weak}"
    )


def _limits(privacy: Mapping[str, Any]) -> str:
    open_values = "; ".join(privacy["not_covered"])
    return f"The protection does not cover: {open_values}." if open_values else ""


def _rounded_up(value: float) -> str:
    """Return a number with three digits, rounded up: a privacy loss is never understated."""
    if value <= 0:
        return "0"
    scale = 10 ** (2 - math.floor(math.log10(value)))
    return f"{math.ceil(value * scale) / scale:g}"
