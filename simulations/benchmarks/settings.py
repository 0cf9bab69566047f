"""Settings of ``python -m simulations.benchmarks.speed``, read and checked before a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlearn.errors import FedlearnError, SettingError, did_you_mean, require
from simulations.benchmarks.workloads import SIZES, Workload, workload

FRAMEWORKS = ("torch", "jax")
SYSTEMS = ("ours", "bare", "flower", "pfl")
SLOW = ("flower", "pfl")
COUNTS = (*SIZES, "repeats", "slow_rounds", "limit")
SETTING_NAMES = ("workload", "framework", "systems", "device", *COUNTS, "out")

HELP = """\
python -m simulations.benchmarks.speed workload=w1 [setting=value ...]

Measure the duration of a round. The systems take turns, and each run has its own process. Ratios compare
runs of the same repeat.

  workload=w1          w1  MLP 784-128-64-10, 100 clients x 600 examples, cohort 10, batch 32
                       w2  EMNIST CNN of LEAF and FedJAX, 1,000 clients x about 100, cohort 50, batch 20
                       w3  logistic regression, 10,000 clients x 20, cohort 1,000, batch 10
                       w4  w1 with DP-SGD on the clients (clip 1, noise multiplier 1)
                       w5  CIFAR-10 CNN of pfl-research, 1,000 clients x 50, cohort 50, batch 10
  framework=torch,jax  one or both
  systems=ours,bare    ours    fedlearn with its default engine
                       bare    the best hand-written program for the workload
                       flower  Flower's simulation with Ray and the client of bare; w4 uses Opacus in torch
                               for both frameworks                           (flwr[simulation])
                       pfl     pfl-research, torch only                              (pfl)
  device=cpu           device of ours, e.g. cuda:0; the other systems run on the CPU
  repeats=3            number of repeats; each system runs once per repeat
  rounds=N             number of rounds; default: w1 and w4 20, w2 and w5 5, w3 10
  slow_rounds=3        maximum number of rounds for flower and pfl
  clients=N cohort=N examples=N
                       other sizes; examples is the mean number of examples of a client
  limit=600            maximum duration of a process, seconds
  out=DIR              folder for results.json, results.md and rounds.png;
                       default: outputs/benchmarks/WORKLOAD/TIME

Exit codes: 0 done, 2 bad setting, 3 no measurement, 130 stopped.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one comparison.

    Args:
        workload: workload with its sizes.
        sizes: sizes as typed; they are passed to the processes.
        frameworks: frameworks to compare, from `FRAMEWORKS`.
        systems: systems to compare, from `SYSTEMS`.
        repeats: number of repeats, >= 1, default 3.
        slow_rounds: maximum number of rounds of the systems in `SLOW`, default 3.
        limit: maximum duration of a process, seconds, default 600.
        out: folder for the results; None uses a new folder below ``outputs/benchmarks``.
    """

    workload: Workload
    sizes: dict[str, int]
    frameworks: tuple[str, ...] = FRAMEWORKS
    systems: tuple[str, ...] = ("ours", "bare")
    repeats: int = 3
    slow_rounds: int = 3
    limit: int = 600
    out: Path | None = None

    def rounds(self, system: str) -> int:
        """Return the number of rounds of a system."""
        return min(self.workload.rounds, self.slow_rounds) if system in SLOW else self.workload.rounds


def read(argv: Sequence[str]) -> Settings:
    """Parse settings of the form ``setting=value``.

    Raises:
        FedlearnError: A setting is unknown, or its value is not possible.
    """
    overrides = dict(_parse(override) for override in argv)
    counts = {name: _count(name, overrides[name]) for name in COUNTS if name in overrides}
    sizes = {name: counts.pop(name) for name in SIZES if name in counts}
    return Settings(
        workload=workload(overrides.get("workload", "w1"), device=overrides.get("device", "cpu"), **sizes),
        sizes=sizes,
        frameworks=_choices("framework", overrides.get("framework", "torch,jax"), FRAMEWORKS),
        systems=_choices("systems", overrides.get("systems", "ours,bare"), SYSTEMS),
        out=Path(overrides["out"]) if "out" in overrides else None,
        **counts,
    )


def _parse(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if key not in SETTING_NAMES:
        guess = did_you_mean(key, SETTING_NAMES) or "workload"
        raise FedlearnError(
            f"{override} is not a setting of this command\n"
            f"  expected  {', '.join(SETTING_NAMES)}\n  try       {guess}={value}"
        )
    if not (equals and value):
        raise FedlearnError(f"{override} has no value\n  expected  setting=value\n  advice    add a value: {key}=VALUE")
    return key, value


def _count(name: str, value: str) -> int:
    valid = value.isdecimal() and int(value) >= 1
    require(valid, name, value, "a whole number >= 1", f"{name}=3")
    return int(value)


def _choices(name: str, value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(value.split(",")))
    for choice in chosen:
        if choice not in known:
            guess = did_you_mean(choice, known) or known[0]
            raise SettingError(name, value, f"some of {','.join(known)}", f"{name}={guess}")
    return chosen
