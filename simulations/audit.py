"""``python -m simulations.audit``: does a mechanism keep what its ledger says? Canaries give a lower bound on epsilon.

Shapes: M canaries, D parameters laid flat.

Where the unit of protection is a client, canaries are clients: they train, and then send one parameter, pushed hard,
through the run's own stages, engine, aggregator and noise. Where it is an example, canaries are examples of one client,
of a linear model whose gradient at each is one parameter, and it is the run's own DP-SGD that clips and noises them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from simulations.analysis.analysis_run import run_analysis_command
from simulations.analysis.privacy_audit import DEFAULTS, _report

# where nothing is claimed
USAGE = """Measures a lower bound on epsilon with canaries and holds it against what the ledger claims.

  python -m simulations.audit [group=option ...] [setting=value ...] [audit.canaries=1000] [audit.rounds=1]

Words are those of python -m simulations.run, and
  audit.canaries   how many, 100 or more; the more, the larger an epsilon can be refuted
  audit.rounds     how many of the planned rounds are run and audited

Examples
  python -m simulations.audit scenario=digits
  python -m simulations.audit scenario=digits strategy.weighting=equal privacy=central privacy.noise_multiplier=1
  python -m simulations.audit scenario=digits privacy=example privacy.noise_multiplier=1 local.batch_size=1000

Sampling (of clients, or of batches) hides canaries from the audit as well as from anyone else: to put the mechanism
itself to the test let everyone take part, and let batches be as large as audit.canaries.

Leaves audit.json, scores.png and report.html in outputs/audit/...
Exit codes: 0 the claim stands, 2 bad configuration, 3 the claim is refuted, 130 stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; exit codes as in ``USAGE``."""
    return run_analysis_command(argv, name="audit", usage=USAGE, defaults=DEFAULTS, action=_report)


if __name__ == "__main__":
    sys.exit(main())
