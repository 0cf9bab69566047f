"""``python -m simulations.audit``: measure a lower bound on epsilon with canaries, and compare it with the claim."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from simulations.analysis.analysis_run import run_analysis_command
from simulations.analysis.privacy_audit import DEFAULTS, run_audit

USAGE = """Measure a lower bound on epsilon with canaries, and compare it with the epsilon of the ledger.

  python -m simulations.audit [group=option ...] [setting=value ...] [audit.canaries=1000] [audit.rounds=1]

Settings of python -m simulations.run, and
  audit.canaries   number of canaries, >= 100; more canaries can refute a larger epsilon
  audit.rounds     number of planned rounds that are run and audited

Examples
  python -m simulations.audit scenario=digits
  python -m simulations.audit scenario=digits strategy.weighting=equal privacy=central privacy.noise_multiplier=1
  python -m simulations.audit scenario=digits privacy=example privacy.noise_multiplier=1 local.batch_size=1000

Sampling of clients or batches hides canaries from the audit too, which weakens the lower bound. To test the mechanism
itself, let all clients take part, and set local.batch_size to audit.canaries or more.

Writes audit.json, scores.png and report.html to outputs/audit/...
Exit codes: 0 the claim holds, 2 bad configuration, 3 the claim is refuted, 130 stopped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return an exit code of ``USAGE``."""
    return run_analysis_command(
        argv,
        name="audit",
        usage=USAGE,
        defaults={f"audit.{key}": value for key, value in DEFAULTS.items()},
        action=run_audit,
    )


if __name__ == "__main__":
    sys.exit(main())
