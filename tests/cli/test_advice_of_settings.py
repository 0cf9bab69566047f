"""The advice for a wrong setting, applied to the command line, gets past the error."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Iterator, Sequence

import pytest

from fedlearn.errors import FedlearnError, SettingError
from fedlearn.runner.callbacks import build_callbacks
from fedlearn.runner.compose import compose
from fedlearn.runner.conf_files import installed_options
from fedlearn.runner.experiment import build_scenario
from fedlearn.runner.plan import build_plan
from fedlearn.runner.start import parse_args

GROUPS = ("strategy", "privacy", "poisoning", "compress", "system", "partition")
BASE = {
    "partition": ["scenario=digits"],
    "privacy": ["scenario=diabetes", "strategy.clients_per_round=2", "strategy.weighting=equal"],
}
SAMPLE_SIZE = 60  # command lines of a group; all of them take 20 minutes
WRONG = ("-1", "0", "1.5", "nan", "abc", "null", "[1]")
TOP_LEVEL = (
    *("rounds", "seed", "cohort", "evaluate_every", "evaluate_clients", "max_failures", "checkpoint_every", "device"),
    *("num_cores", "num_jobs"),
    *("framework", "buffers", "baseline", "init", "report", "early_stop.patience", "early_stop.min_delta"),
    *("local.epochs", "local.steps", "local.batch_size", "local.optimizer", "local.learning_rate", "local.momentum"),
    *("local.weight_decay", "callbacks.console.width", "callbacks.checkpoints.keep", "allow_targets", "model"),
)


def key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def apply(words: Sequence[str], fix: str) -> list[str]:
    """Return the command line with the advice in place of settings with the same names."""
    new = shlex.split(fix)
    settings = [word for word in new if "=" in word]
    replaced = {key(word) for word in settings}
    options = [word for word in new if word not in settings]
    # another option of a group has other settings
    kept = [word for word in words if key(word) not in replaced and key(word).partition(".")[0] not in replaced]
    return [*options, *kept, *settings]


def error_of(words: Sequence[str], *, with_data: bool = False) -> FedlearnError | None:
    """Return the error of a command line, without a run."""
    try:
        for job in compose(parse_args(list(words))):
            build_plan(job.cfg)
            build_callbacks(job.cfg)
            if with_data:
                build_scenario(job.cfg)
    except FedlearnError as error:
        return error
    return None


def faults_of(words: Sequence[str], *, with_data: bool = False) -> list[str]:
    """Follow the advice, at most five times, and return the advice that does not get past its error."""
    seen: list[str] = []
    words = list(words)
    for _ in range(5):
        error = error_of(words, with_data=with_data)
        if error is None:
            return []
        text = error.on_command_line()
        if "Traceback" in text or text in seen:
            return [f"{shlex.join(words)}\n{text}"]
        seen.append(text)
        fix = re.search(r"^  try {7}(.*)$", text, re.MULTILINE) or re.search(
            r"did you mean (.*)\?$", text, re.MULTILINE
        )
        if not fix:
            # an instruction that cannot be typed
            return [] if "\n  advice " in text or "\n  because " in text else [f"{shlex.join(words)}\n{text}"]
        unknown = re.match(r"(\S+?)(?:=.*)? is (?:not a setting|not known|.*\n.*there is no )", text)
        words = apply([word for word in words if not unknown or key(word) != unknown[1]], fix[1])
    return [f"{shlex.join(words)}\n{seen[-1]}"]


def wrong_words(group: str) -> Iterator[list[str]]:
    """Yield command lines with a value out of range, or a misspelt name, for each setting of each option."""
    for option, node in installed_options().get(group, {}).items():
        start = [*BASE.get(group, ["scenario=diabetes"]), f"{group}={option}"]
        names = [name for name in (node if isinstance(node, dict) else {}) if not name.startswith("_")]
        for name in names:
            yield from ([*start, f"{group}.{name}={value}"] for value in WRONG)
            yield [*start, f"{group}.{name[:-1]}{name[-1] * 2}=1"]
            yield [*start, f"+{group}.{name}x=1"]


def combinations() -> Iterator[list[str]]:
    """Yield pairs of options, many of which are refused."""
    options = installed_options()
    for strategy in options["strategy"]:
        for privacy in options["privacy"]:
            yield ["scenario=digits", f"strategy={strategy}", f"privacy={privacy}"]
            yield ["scenario=digits", f"strategy={strategy}", f"privacy={privacy}", "privacy.epsilon=2"]
        for other in ("system=constant", "buffers=average", "compress=qsgd", "poisoning=alie", "engine=grid"):
            yield ["scenario=digits", f"strategy={strategy}", other]


SAMPLE = [
    ["scenario=diabetes", "strategy=fedprox", "strategy.mu=-1"],
    ["scenario=diabetes", "strategy.weighting=size"],
    ["scenario=diabetes", "strategy=ditto", "privacy=central"],
    ["scenario=diabetes", "strategy=fedmedian", "privacy=central", "privacy.epsilon=2"],
    ["scenario=diabetes", "strategy=krum", "privacy=central", "privacy.epsilon=2"],
    ["scenario=diabetes", "local.epochs=2", "local.steps=3"],
    ["scenario=diabetes", "+strategy.mux=1", "strategy=fedprox"],
    ["scenario=diabetes", "baseline=centrl"],
    ["scenario=diabetes", "allow_targets=my_code"],
    ["scenario=diabetes", "early_stop.patience=0"],
    ["scenario=diabetes", "poisoning=alie", "strategy=fedbuff"],
    ["scenario=folder", "scenario.path=x", "scenario.ignore=[Cost [EUR]]"],
    ["scenario=folder", "scenario.path=x", "scenario.target=50 % (a"],
    ["scenario=folder", "scenario.path=x", "scenario.ignore=[#1, it's]"],
]


@pytest.mark.parametrize("words", SAMPLE, ids=" ".join)
def test_the_advice_for_a_wrong_setting_works(words, here):
    pytest.importorskip("torch")
    assert error_of(words) is not None
    assert not faults_of(words)


def some(lines: Iterator[list[str]]) -> list[list[str]]:
    """Return `SAMPLE_SIZE` of the lines, the same in each run."""
    every = list(lines)
    return random.Random(1).sample(every, min(SAMPLE_SIZE, len(every)))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_the_advice_for_settings_of_options_works(group, here):
    faults = [fault for words in some(wrong_words(group)) for fault in faults_of(words, with_data=group == "partition")]
    assert not faults, "\n\n".join(faults)


@pytest.mark.slow
def test_the_advice_for_each_setting_of_the_top_level_works(here):
    words = [["scenario=diabetes", f"{name}={value}"] for name in TOP_LEVEL for value in WRONG]
    faults = [fault for line in words for fault in faults_of(line)]
    assert not faults, "\n\n".join(faults)


@pytest.mark.slow
def test_the_advice_for_refused_combinations_works(here):
    faults = [fault for words in some(combinations()) for fault in faults_of(words)]
    assert not faults, "\n\n".join(faults)


def test_advice_of_an_exception_of_python_is_not_for_the_command_line():
    assert "try       steps=None" in str(SettingError("steps", 0, "null, or >= 1", "steps=null"))
