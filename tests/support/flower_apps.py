"""Run ten apps in the style of Flower's examples, with the installed Flower: ``python tests/support/flower_apps.py``.

Each app runs in its own process by ``python -m fedlearn.flower.run``, and must print a known result. The script prints
a table with the version of Flower, and returns 0 if all apps do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
APPS = ROOT / "tests/flower/apps"


@dataclass(frozen=True)
class Expected:
    """The exit code and the last line that begins with ``result``, for an app with these settings."""

    result: str
    settings: tuple[str, ...] = ()
    code: int = 0


EXPECTED = {
    "quickstart": Expected("result [1.3125, 1.3125, 1.3125, 1.3125] 3"),
    "legacy": Expected("result 2 6.0"),
    "vertical": Expected("result 0.0625"),
    "analytics": Expected("result [18, 5, 1]"),
    "stateful": Expected("result [6.0] 4.0"),
    "fedprox": Expected("result [1.977]"),
    "mods": Expected("result [0.625, 0.625] 4 4"),
    "devices": Expected("result [1.5] 7.0", ("node_config.dataset-path=parts/{partition}",)),
    "secaggplus": Expected("result [1.5, 1.5, 1.5]"),
    "survival": Expected("result [0, 1, 1, 2, 2, 3]", code=4),
}


def run_app(name: str) -> tuple[int, str, str]:
    """Run an app, and return its exit code, its result and its other output."""
    command = [sys.executable, "-m", "fedlearn.flower.run", str(APPS / name), *EXPECTED[name].settings]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    results = [line for line in done.stdout.splitlines() if line.startswith("result")]
    return done.returncode, results[-1] if results else "", done.stderr


def main() -> int:
    """Run all apps and print a table."""
    num_wrong = 0
    sys.stdout.write(f"flwr {version('flwr')}\n")
    for name, expected in EXPECTED.items():
        code, result, errors = run_app(name)
        is_right = (code, result) == (expected.code, expected.result)
        num_wrong += not is_right
        sys.stdout.write(f"{'ok   ' if is_right else 'wrong'} {name:<11} exit code {code}  {result}\n")
        sys.stdout.write("" if is_right else f"expected {expected}\n{errors[-2000:]}\n")
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
