"""Refuse ``python -m fedlearn.deploy.local``, the old name of `fedlearn.deploy.rehearse`."""

from __future__ import annotations

import sys

from fedlearn.runner.renames import refuse_renamed_command

if __name__ == "__main__":
    sys.exit(refuse_renamed_command("fedlearn.deploy.local"))
