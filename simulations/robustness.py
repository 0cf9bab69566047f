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

USAGE = f"""Train with every aggregation rule under every poisoning attack, and show the final metric of the model.

  python -m simulations.robustness [rules=...] [attacks=...] [group=option ...] [setting=value ...]

Settings of python -m simulations.run (strategy.clients_per_round is the only setting of strategy), and
  rules      strategies, separated by commas; nnm+krum and bucketing+rfa have a pre-aggregation before a rule
             ({",".join(DEFAULTS["rules"])})
  attacks    files in conf/poisoning, separated by commas ({",".join(DEFAULTS["attacks"])})
  fraction   share of malicious clients (0.2); rules with the argument num_malicious receive their number
  seeds      runs of each pair, with consecutive seeds (1); the table has their mean

Defaults: scenario=digits partition.alpha=0.3 rounds=50 local.epochs=2 local.learning_rate=0.3.
Client 0 is never malicious, so the attackers are the same for all rules. Client 0 has the root data set of fltrust:
{NUM_ROOT_EXAMPLES} examples of all clients.

Examples
  python -m simulations.robustness
  python -m simulations.robustness rules=fedavg,fedmedian,nnm+krum attacks=none,alie,backdoor rounds=50 seeds=3

Writes robustness.md, robustness.json and robustness.png to outputs/robustness/...
Exit codes: 0 done, 2 bad configuration, 3 failed, 130 stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return an exit code of ``USAGE``."""
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
