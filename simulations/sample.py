"""``python -m simulations.sample``: old name of `simulations.generate`. Its error names the new command."""

from __future__ import annotations

import sys

from fedlearn.runner.renames import refuse_renamed_command

if __name__ == "__main__":
    sys.exit(refuse_renamed_command("simulations.sample"))
