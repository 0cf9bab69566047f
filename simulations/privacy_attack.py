"""``python -m simulations.privacy_attack kind=...``: measure how much the updates of clients reveal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlearn.core.command_line import UsageError, exit_code
from fedlearn.errors import did_you_mean
from simulations.analysis.analysis_run import AnalysisRun, run_analysis_command
from simulations.attacks import gradient_inversion, membership_inference

KINDS: Mapping[str, tuple[Mapping[str, Any], Sequence[str], Callable[[AnalysisRun], int]]] = {
    "gradient_inversion": (
        gradient_inversion.DEFAULTS,
        gradient_inversion.DEFAULT_OVERRIDES,
        gradient_inversion.run_gradient_inversion,
    ),
    "membership_inference": (
        membership_inference.DEFAULTS,
        membership_inference.DEFAULT_OVERRIDES,
        membership_inference.run_membership_inference,
    ),
}
USAGE = """Attack the updates of clients, with and without protection, and show the recovered information.

  python -m simulations.privacy_attack kind=gradient_inversion  [group=option ...] [setting=value ...]
  python -m simulations.privacy_attack kind=membership_inference [group=option ...] [setting=value ...]

Settings of python -m simulations.run, and
  gradient_inversion: recover an input and its label from the update of a client with one example; the model needs
  inputs of real numbers and an affine first layer
    privacy_attack.victims      number of attacked updates (200)
    privacy_attack.clip         L2 norm for clipped updates (1)
    privacy_attack.noise        noise multipliers for clipped updates ([0.01,0.1,0.5,1])
  membership_inference: decide if an example was in the training data of a client (LiRA with shadow models; loss)
    privacy_attack.members      training examples of a client (300)
    privacy_attack.shadows      number of shadow models (24)
    privacy_attack.label_noise  share of wrong labels (0.15)

Examples
  python -m simulations.privacy_attack kind=gradient_inversion
  python -m simulations.privacy_attack kind=membership_inference privacy=example privacy.noise_multiplier=1 \\
      privacy.delta=1e-3

Writes privacy_attack.json, a figure and report.html to outputs/privacy_attack/...
Exit codes: 0 done, 2 bad configuration, 3 failed, 130 stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return an exit code of ``USAGE``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    kinds = [argument.removeprefix("kind=") for argument in arguments if argument.startswith("kind=")]
    if {"-h", "--help", "--version"} & set(arguments):
        kinds = ["gradient_inversion"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        return exit_code(lambda: _refuse(kinds))
    defaults, preset, action = KINDS[kinds[0]]
    return run_analysis_command(
        arguments,
        name="privacy_attack",
        usage=USAGE,
        defaults={"kind": kinds[0], **{f"privacy_attack.{key}": value for key, value in defaults.items()}},
        default_overrides=preset,
        action=action,
    )


def _refuse(kinds: Sequence[str]) -> int:
    typed = " ".join(f"kind={kind}" for kind in kinds)
    near = did_you_mean(kinds[0], KINDS) if kinds else None
    problem = f"{typed} is not known" if kinds else "kind is missing"
    raise UsageError(
        f"{problem}\n  expected  one of {', '.join(KINDS)}\n  try       kind={near or 'gradient_inversion'}"
    )


if __name__ == "__main__":
    sys.exit(main())
