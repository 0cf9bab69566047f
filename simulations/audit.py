"""``python -m simulations.audit``: measure a lower bound on epsilon with canaries, and compare it with the claim."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from simulations.analysis.analysis_run import run_analysis_command
from simulations.analysis.privacy_audit import DEFAULTS, run_audit

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
    """Run the command; exit codes as in ``USAGE``."""
    return run_analysis_command(
        argv,
        name="audit",
        usage=USAGE,
        defaults={f"audit.{key}": value for key, value in DEFAULTS.items()},
        action=run_audit,
    )


if __name__ == "__main__":
    sys.exit(main())
