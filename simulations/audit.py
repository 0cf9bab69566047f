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
  audit.sentences  number of canary sentences in the training data of a text model, default 0; see below
  audit.copies     copies of each canary sentence, default 4
  audit.examples   examples of each client of the audit with privacy=example, at most local.batch_size

With privacy=example, canaries are examples. They pass through the model, the loss and the DP-SGD of the run. The audit
also measures how far one example moves the clipped sum, and the noise. With other mechanisms, canaries are clients.
They send one large parameter through selection, stages, aggregator and noise of the run. A bound, movement or noise
that contradicts the ledger is an alarm.

Canary sentences measure memorization. The command trains all planned rounds with them. It ranks the loss of each canary
among 127 sentences that were not in the data. Without memorization, the mean exposure is 1.44 bits; the largest is 7.

Examples
  python -m simulations.audit scenario=digits
  python -m simulations.audit scenario=digits strategy.weighting=equal privacy=central privacy.noise_multiplier=1
  python -m simulations.audit scenario=digits privacy=example privacy.noise_multiplier=1
  python -m simulations.audit scenario=text scenario.path=DIR model.path=DIR audit.sentences=20
  python -m simulations.audit --config-path outputs/digits/fedavg/2026-11-29_12-00-00   (settings of a run folder)

Sampling of clients hides canaries from the audit too, which weakens the lower bound. To test the mechanism itself, let
all clients take part. With privacy=example, the audit does not sample batches.

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
