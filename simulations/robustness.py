"""``python -m simulations.robustness``: train with every aggregation rule under every poisoning attack."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from simulations.analysis.analysis_run import run_analysis_command
from simulations.analysis.robustness import (
    DEFAULT_OVERRIDES,
    DEFAULTS,
    NUM_ROOT_EXAMPLES,
    run_robustness,
)

USAGE = f"""Runs every rule under every attack, and shows what is left of the model.

  python -m simulations.robustness [rules=...] [attacks=...] [group=option ...] [setting=value ...]

Words are those of python -m simulations.run (of strategy=, only strategy.clients_per_round counts), and
  rules      strategies, with commas; nnm+krum and bucketing+rfa put mixing before a rule
             ({",".join(DEFAULTS["rules"])})
  attacks    files in conf/poisoning, with commas ({",".join(DEFAULTS["attacks"])})
  fraction   of all clients that attack (0.2); rules that ask for it are told how many that is
  seeds      runs of each pair, from seed on (1); their mean is shown

Unless you say otherwise: scenario=digits partition.alpha=0.3 rounds=50 local.epochs=2 local.learning_rate=0.3.
Client 0 never attacks, so all rules face the same attackers. It has the root data of fltrust: {NUM_ROOT_EXAMPLES}
examples of all clients.

Examples
  python -m simulations.robustness
  python -m simulations.robustness rules=fedavg,fedmedian,nnm+krum attacks=none,alie,backdoor rounds=50 seeds=3

Leaves robustness.md, robustness.json and robustness.png in outputs/robustness/...
Exit codes: 0 done, 2 bad configuration, 3 failed, 130 stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit codes as in ``USAGE``."""
    return run_analysis_command(
        argv,
        name="robustness",
        usage=USAGE,
        defaults=DEFAULTS,
        default_overrides=DEFAULT_OVERRIDES,
        action=run_robustness,
    )


if __name__ == "__main__":
    sys.exit(main())
