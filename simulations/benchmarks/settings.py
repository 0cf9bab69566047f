"""The words after ``python -m simulations.benchmarks.speed``, read and checked before anything runs."""

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
SETTING_NAMES = ("workload", "framework", "systems", *COUNTS, "out")

HELP = """\
python -m simulations.benchmarks.speed workload=w1 [word=value ...]

How fast is a round? Systems take turns, each repeat in a process of its own; ratios are taken within a repeat.

  workload=w1          w1  MLP 784-128-64-10, 100 clients x 600 examples, cohort 10, batch 32
                       w2  EMNIST CNN of LEAF and FedJAX, 1,000 clients x about 100, cohort 50, batch 20
                       w3  logistic regression, 10,000 clients x 20, cohort 1,000, batch 10
                       w4  w1 with DP-SGD on the clients (clip 1, noise multiplier 1)
                       w5  CIFAR-10 CNN of pfl-research, 1,000 clients x 50, cohort 50, batch 10
  framework=torch,jax  one or both
  systems=ours,bare    ours    the default engine
                       bare    the best hand-written program for this workload alone
                       flower  Flower's simulation with Ray and the client of bare; in w4 with Opacus in torch,
                               whatever the framework                        (flwr[simulation])
                       pfl     pfl-research, torch only                              (pfl)
  repeats=3            how often all of them run
  rounds=N             instead of the workload's own number (w1 20, w2 and w5 5, w3 10)
  slow_rounds=3        at most so many for flower and pfl
  clients=N cohort=N examples=N
                       other sizes; examples are those of one client, on average
  limit=600            seconds after which a process is given up
  out=DIR              instead of outputs/benchmarks/WORKLOAD/TIME: results.json, results.md, rounds.png

Exit codes: 0 done, 2 bad setting, 3 nothing could be measured, 130 stopped.
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison.

    Args:
        workload: with its sizes.
        sizes: as typed, for the processes.
        frameworks: some of `FRAMEWORKS`.
        systems: some of `SYSTEMS`.
        repeats: >= 1.
        slow_rounds: rounds for the systems in `SLOW`, at most.
        limit: seconds a process may take.
        out: where results go; None chooses.
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
        """How many rounds a system runs."""
        return min(self.workload.rounds, self.slow_rounds) if system in SLOW else self.workload.rounds


def read(argv: Sequence[str]) -> Settings:
    """Settings from ``word=value``.

    Raises:
        FedlearnError: a word or value means nothing here.
    """
    given = dict(_pair(word) for word in argv)
    counts = {word: _count(word, given[word]) for word in COUNTS if word in given}
    sizes = {word: counts.pop(word) for word in SIZES if word in counts}
    return Settings(
        workload=workload(given.get("workload", "w1"), **sizes),
        sizes=sizes,
        frameworks=_choices("framework", given.get("framework", "torch,jax"), FRAMEWORKS),
        systems=_choices("systems", given.get("systems", "ours,bare"), SYSTEMS),
        out=Path(given["out"]) if "out" in given else None,
        **counts,
    )


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if key not in SETTING_NAMES:
        guess = did_you_mean(key, SETTING_NAMES) or "workload"
        raise FedlearnError(
            f"{word} is no setting here\n  expected  {', '.join(SETTING_NAMES)}\n  try       {guess}={value}"
        )
    if not (equals and value):
        raise FedlearnError(f"{word} cannot be read\n  expected  setting=value\n  try       {key}=...")
    return key, value


def _count(word: str, value: str) -> int:
    ok = value.isdecimal() and int(value) >= 1
    require(ok, word, value, "a whole number >= 1", f"{word}=3")
    return int(value)


def _choices(word: str, value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(value.split(",")))
    for one in chosen:
        if one not in known:
            guess = did_you_mean(one, known) or known[0]
            raise SettingError(word, value, f"some of {','.join(known)}", f"{word}={guess}")
    return chosen
