"""Read the search space of a tuning from its command line: ``local.learning_rate=loguniform(1e-3,1)``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hydra.errors import OverrideParseException

from fedlearn.advice import shell_word
from fedlearn.core.command_line import UsageError
from fedlearn.runner.compat import parse_override

SEARCHED = re.compile(r"(?P<name>[\w@/.]+)=(?P<kind>\w+)\((?P<arguments>.*)\)")
NUMBERS = {"uniform": "numbers", "loguniform": "numbers > 0", "integer": "whole numbers"}
KINDS = (*NUMBERS, "choice")
OTHER_NAMES = {
    "interval": "uniform",
    "log_uniform": "loguniform",
    "randint": "integer",
    "int": "integer",
    "range": "integer",
}
EXAMPLES = {
    "uniform": "uniform(0.1,0.9)",
    "loguniform": "loguniform(1e-3,1)",
    "integer": "integer(1,5)",
    "choice": "choice(0,0.1,1)",
}


@dataclass(frozen=True)
class Range:
    """Values of one searched setting.

    Attributes:
        kind: ``uniform``, ``loguniform``, ``integer`` or ``choice``.
        low: smallest number; None for a choice.
        high: largest number, included; None for a choice.
        choices: values as texts of overrides; empty for numbers.
    """

    kind: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def corners(self) -> tuple[str, ...]:
        """Values that a check tries before the first trial: both ends, or all choices."""
        return self.choices or (self.text(self.low), self.text(self.high))

    def text(self, value: float | str | None) -> str:
        """Return a value as the text of an override."""
        if isinstance(value, str):
            return value
        assert value is not None
        return str(round(value)) if self.kind == "integer" else f"{value:.6g}"


@dataclass(frozen=True)
class SearchSpace:
    """Searched settings and fixed settings of a tuning.

    Attributes:
        fixed: overrides that all trials have.
        ranges: setting -> its values.
        seeds: seeds of the runs of each trial; empty for one run with the seed of the settings.
    """

    fixed: tuple[str, ...]
    ranges: Mapping[str, Range]
    seeds: tuple[str, ...] = ()

    @property
    def runs(self) -> tuple[tuple[str, ...], ...]:
        """Further overrides of each run of a trial."""
        return tuple((f"seed={seed}",) for seed in self.seeds) or ((),)

    def overrides(self, values: Mapping[str, float | str]) -> list[str]:
        """Return the overrides of a trial. A setting without a value is absent."""
        return [*self.fixed, *(f"{name}={self.ranges[name].text(value)}" for name, value in values.items())]


def parse_space(overrides: Sequence[str]) -> SearchSpace:
    """Divide the overrides of a command line into searched and fixed settings.

    Several seeds, ``seed=1,2,3``, are runs of each trial. Other settings have one value or a range.

    Raises:
        UsageError: a range is wrong, a setting is searched twice, nothing is searched, or a setting has a sweep.

    >>> parse_space(["rounds=5", "local.learning_rate=loguniform(1e-3,1)"]).ranges
    {'local.learning_rate': Range(kind='loguniform', low=0.001, high=1.0, choices=())}
    """
    fixed: list[str] = []
    ranges: dict[str, Range] = {}
    seeds: tuple[str, ...] = ()
    for override in overrides:
        if re.fullmatch(r"seed=[^()]*,[^()]*", override):
            seeds = _choices(override, "seed=1,2,3")
            continue
        found = SEARCHED.fullmatch(override)
        if found is None or found["kind"] not in (*KINDS, *OTHER_NAMES):
            _refuse_sweep(override)
            fixed.append(override)
            continue
        if found["name"] in ranges:
            raise UsageError(f"{found['name']} is searched twice\n  expected  one range for each setting")
        ranges[found["name"]] = _range(found["name"], found["kind"], found["arguments"], override)
    if not ranges:
        fix = "'local.learning_rate=loguniform(1e-3,1)'"
        raise UsageError(f"no setting is searched\n  expected  a range for at least one setting\n  try       {fix}")
    return SearchSpace(tuple(fixed), ranges, seeds)


def _range(name: str, kind: str, arguments: str, override: str) -> Range:
    if kind in OTHER_NAMES:
        right = OTHER_NAMES[kind]
        raise _wrong(override, f"one of {', '.join(KINDS)}", f"{name}={right}({arguments})")
    if kind == "choice":
        return Range(kind, choices=_choices(override, f"{name}={EXAMPLES['choice']}"))
    try:
        low, high = (float(word) for word in arguments.split(","))
    except ValueError:
        raise _wrong(override, f"two {NUMBERS[kind]}", f"{name}={EXAMPLES[kind]}") from None
    is_whole = kind != "integer" or (low.is_integer() and high.is_integer())
    is_positive = kind != "loguniform" or low > 0
    if not (is_whole and is_positive and float("-inf") < low < high < float("inf")):
        raise _wrong(override, f"two {NUMBERS[kind]}, the smaller first", f"{name}={EXAMPLES[kind]}")
    return Range(kind, low, high)


def _choices(override: str, example: str) -> tuple[str, ...]:
    try:
        (parsed,) = parse_override(override)
        texts = tuple(text.partition("=")[2] for text in parsed.choices())
    except (OverrideParseException, ValueError) as error:
        raise _wrong(override, "values that Hydra can read", example) from error
    if len(set(texts)) < 2 or len(set(texts)) < len(texts):
        raise _wrong(override, "two or more different values", example)
    return texts


def _refuse_sweep(override: str) -> None:
    try:
        sweeps = [parsed for parsed in parse_override(override) if parsed.is_sweep]
    except OverrideParseException:
        return  # the check of the configuration explains the word
    if sweeps:
        name, _, values = override.partition("=")
        raise _wrong(override, "one value, or a range", f"{name}=choice({values})")


def _wrong(override: str, expected: str, fix: str) -> UsageError:
    return UsageError(f"{override} is not a range\n  expected  {expected}\n  try       {shell_word(fix)}")
