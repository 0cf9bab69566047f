"""``python -m simulations.run``: run one experiment, or a sweep of experiments."""

from __future__ import annotations

import sys

from fedlearn.runner.start import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
