"""``python -m simulations.attack kind=inversion|membership``: what a server reads from what clients send."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlearn.errors import did_you_mean
from simulations.attacks import inversion, membership
from simulations.exits import exit_code
from simulations.inquiry import Inquiry, command
from simulations.overrides import UsageError

KINDS: Mapping[str, tuple[Mapping[str, Any], Sequence[str], Callable[[Inquiry], int]]] = {
    "inversion": (inversion.DEFAULTS, inversion.PRESET, inversion.invert),
    "membership": (membership.DEFAULTS, membership.PRESET, membership.infer),
}
USAGE = """Attacks what clients send, with and without protection, and shows what comes out.

  python -m simulations.attack kind=inversion  [group=option ...] [setting=value ...]
  python -m simulations.attack kind=membership [group=option ...] [setting=value ...]

Words are those of python -m simulations.run, and
  inversion: an image and its label, from the update of a client with one example
    attack.victims      how many updates are attacked (200)
    attack.clip         L2 norm that updates are clipped to (1)
    attack.noise        noise multipliers to try on top ([0.01,0.1,0.5,1])
  membership: was an example in a client's training set? (LiRA with shadow models, and the loss alone)
    attack.members      training examples of a client (300)
    attack.shadows      models to learn from (24)
    attack.label_noise  share of labels that are wrong (0.15)

Examples
  python -m simulations.attack kind=inversion
  python -m simulations.attack kind=membership privacy=example privacy.noise_multiplier=1 privacy.delta=1e-3

Leaves attack.json, a picture and report.html in outputs/attack/...
Exit codes: 0 done, 2 bad configuration, 3 failed, 130 stopped.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says; exit codes as in ``USAGE``."""
    given = list(sys.argv[1:] if words is None else words)
    kinds = [word.removeprefix("kind=") for word in given if word.startswith("kind=")]
    if {"-h", "--help"} & set(given):
        kinds = ["inversion"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        return exit_code(lambda: _refuse(kinds))
    defaults, preset, body = KINDS[kinds[0]]
    return command(given, name="attack", usage=USAGE, defaults=defaults, preset=preset, body=body)


def _refuse(kinds: Sequence[str]) -> int:
    typed = " ".join(f"kind={kind}" for kind in kinds)
    near = did_you_mean(kinds[0], KINDS) if kinds else None
    why = f"{typed} is not known" if kinds else "kind is missing"
    raise UsageError(f"{why}\n  expected  one of {', '.join(KINDS)}\n  try       kind={near or 'inversion'}")


if __name__ == "__main__":
    sys.exit(main())
