"""``python -m simulations.tune SETTING=RANGE ...``: search for good values of settings with Optuna.

  python -m simulations.tune scenario=digits 'local.learning_rate=loguniform(1e-3,1)' trials=20 jobs=2

A range is ``uniform(low,high)``, ``loguniform(low,high)``, ``integer(low,high)`` or ``choice(a,b,...)``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fedlearn.core.command_line import command_parser, run_command
from fedlearn.runner.tuning.tune import tune_command

EPILOG = """settings of this command, in addition to the settings of simulations.run:
  trials=30        number of trials, >= 1; trials of earlier calls in the same folder count
  jobs=1           number of trials at the same time, >= 1
  prune=auto       end a trial with a bad metric early: true, false or auto (true without privacy)
  folder=FOLDER    folder of the tuning; the command continues a tuning in it
  sampler_seed=0   seed of the search
  metric=NAME      metric to tune; default: main metric of the scenario

ranges: uniform(low,high), loguniform(low,high), integer(low,high), choice(a,b,...)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 2 for a wrong setting, 3 if no trial has a value, or 130 after Ctrl-C."""
    parser = command_parser(
        "simulations.tune", "Search for good values of settings with Optuna. Each trial is a run.", epilog=EPILOG
    )
    parser.add_argument("--config-dir", type=Path, help="folder with options of the user")
    parser.add_argument("overrides", nargs="*", default=[], metavar="setting=value", help="a value or a range")
    return run_command(parser, tune_command, argv)


if __name__ == "__main__":
    sys.exit(main())
