"""All commands share a parser: an error has three lines, and the exit codes are equal."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedlearn.core import command_line
from fedlearn.core.command_line import (
    UsageError,
    as_called,
    command_parser,
    exit_code,
    option_names,
    read_settings,
    run_command,
    take_settings,
)
from fedlearn.errors import FedlearnError, SettingError

HELP = "  try       python -m simulations.some --help"


@pytest.fixture
def parser():
    built = command_parser("simulations.some", "Do something.")
    built.add_argument("folder", metavar="RUN")
    built.add_argument("--target", type=float)
    built.add_argument("--kind", choices=("torch", "jax"))
    built.add_argument("--count", type=int)
    return built


@pytest.fixture
def nested():
    built = command_parser("simulations.some", "Do something.")
    current = built.add_subparsers(dest="command", required=True).add_parser("fetch")
    current.add_argument("name", metavar="NAME")
    current.add_argument("--base-url")
    return built


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("run --targt 1", ["--targt is not an option", "  did you mean --target?", "  expected  one of --version, "]),
        ("run --zzz", ["--zzz is not an option", "  expected  one of --version, ", HELP]),
        ("run --targ 1", ["--targ is not an option", "  did you mean --target?"]),
        ("run --target x", ["--target is x", "  expected  a number", HELP]),
        ("run --count 1.5", ["--count is 1.5", "  expected  a whole number", HELP]),
        ("run --kind torhc", ["--kind is torhc", "  expected  one of torch, jax", "  try       --kind torch"]),
        ("run --target", ["--target has no value", "  expected  one argument after --target", HELP]),
        ("", ["RUN is missing", "  expected  python -m simulations.some [-h]", HELP]),
        ("--targt 1", ["--targt is not an option", "  did you mean --target?"]),
        ("run again", ["again is not expected", "  expected  python -m simulations.some [-h]", HELP]),
    ],
)
def test_a_wrong_word_is_told_in_three_lines_with_a_way_on(parser, typed, lines, capsys):
    assert run_command(parser, lambda **options: 0, typed.split()) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 3
    assert all(line.startswith(start) for line, start in zip(err.splitlines(), lines, strict=False)), err


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("", ["command is missing"]),
        ("ftch x", ["command is ftch", "  expected  one of fetch", "  try       python -m simulations.some fetch"]),
        ("fetch", ["NAME is missing"]),
        ("fetch x --base-ulr y", ["--base-ulr is not an option", "  did you mean --base-url?"]),
        ("fetch x y", ["y is not expected"]),
    ],
)
def test_subcommands_are_parsed_with_the_same_errors(nested, typed, lines, capsys):
    assert run_command(nested, lambda **options: 0, typed.split()) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 3
    assert all(line.startswith(start) for line, start in zip(err.splitlines(), lines, strict=False)), err


def test_settings_are_found_before_and_behind_options():
    built = command_parser("simulations.some", "Do something.")
    built.add_argument("--plot")
    built.add_argument("settings", nargs="*")
    parsed = built.parse_args(["a=1", "--plot", "x", "b=2"])
    assert (parsed.settings, parsed.plot) == (["a=1", "b=2"], "x")
    with pytest.raises(UsageError, match="did you mean a=1"):
        built.parse_args(["--a=1"])


def test_words_of_another_parser_are_passed_on_and_its_options_are_in_the_hint():
    other = command_parser("simulations.other", "Do more.")
    other.add_argument("--config-dir")
    other.add_argument("overrides", nargs="*")
    built = command_parser("simulations.some", "Do something.", passes_on=other)
    built.add_argument("--keep")
    parsed, rest = built.parse_known_args(["--config-dir", "x", "--keep", "y", "a=1"])
    assert (parsed.keep, rest) == ("y", ["--config-dir", "x", "a=1"])
    for typed, meant in (("--kep", "--keep"), ("--config-dri", "--config-dir"), ("--a=1", "a=1")):
        with pytest.raises(UsageError, match=rf"did you mean {meant}\?"):
            built.parse_known_args([typed])
    with pytest.raises(UsageError, match="--config-dir has no value"):
        built.parse_known_args(["--config-dir"])


def test_the_version_is_shown(parser, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"{command_line.VERSION_LINE}\n")
    assert "--version" in option_names(parser)


class Failed(FedlearnError):
    exit_code = 3


def test_each_error_has_its_exit_code(capsys):
    def fail(error):
        raise error

    assert exit_code(lambda: 7) == 7
    assert exit_code(lambda: fail(FedlearnError("no"))) == 2
    assert exit_code(lambda: fail(Failed("no"))) == 3
    assert exit_code(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "no\nno\nstopped\n"
    with pytest.raises(ZeroDivisionError):
        exit_code(lambda: 1 // 0)


EXAMPLES = {"rounds": 3, "noise": [0.5, 1.0], "rules": ["a", "b"], "out": Path("x"), "audit.rate": 0.5}


def test_a_setting_gets_the_type_of_its_example():
    typed = ["rounds=1_000", "noise=[1,2]", "rules=nnm+krum, rfa", "out=a=b", "audit.rate=1e-3", "rounds=7"]
    expected = {"rounds": 7, "noise": [1.0, 2.0], "rules": ["nnm+krum", "rfa"], "out": Path("a=b"), "audit.rate": 1e-3}
    assert read_settings(typed, EXAMPLES) == expected


@pytest.mark.parametrize(
    ("typed", "error", "lines"),
    [
        ("rouns=3", UsageError, "rouns=3 is not a setting\n  did you mean rounds=3?\n  expected  one of rounds, noise"),
        ("zzz=3", UsageError, "zzz=3 is not a setting\n  expected  one of rounds, .*\n  try       rounds=3"),
        ("rounds", UsageError, "rounds has no value\n  expected  rounds=value\n  try       rounds=3"),
        ("rounds=", UsageError, "rounds= has no value\n  expected  rounds=value\n  try       rounds=3"),
        ("rounds=2.5", SettingError, "rounds is 2.5\n  expected  a whole number\n  try       rounds=3"),
        (
            "noise=1,x",
            SettingError,
            "noise is 1,x\n  expected  a number, or several with commas\n  try +noise='0.5,1.0'",
        ),
    ],
)
def test_a_wrong_setting_is_told_with_one_that_works(typed, error, lines):
    with pytest.raises(error, match=lines.replace("?", r"\?").replace("=", r"\=")):
        read_settings([typed], EXAMPLES)


def test_the_fix_of_each_setting_is_accepted():
    for name in EXAMPLES:
        with pytest.raises(UsageError) as refused:
            read_settings([name], EXAMPLES)
        assert read_settings([str(refused.value).split("try       ")[1]], EXAMPLES) == {name: EXAMPLES[name]}


def test_settings_of_a_command_are_separated_from_the_others_by_their_group():
    current, rest = take_settings(["audit.rate=1", "strategy.mu=2", "rounds=5", "-m", "x"], EXAMPLES)
    assert (current, rest) == ({"audit.rate": 1.0, "rounds": 5}, ["strategy.mu=2", "-m", "x"])
    with pytest.raises(UsageError, match=r"did you mean audit\.rate=1\?"):
        take_settings(["audit.rat=1"], EXAMPLES)


def test_texts_name_commands_as_the_user_called_them(monkeypatch):
    text = "try python -m simulations.privacy_attack kind=x, python -m fedlearn.deploy.keys, python -m pytest."
    assert as_called(text) == text
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/fedlearn", "run"])
    assert as_called(text) == "try fedlearn privacy-attack kind=x, fedlearn deploy keys, python -m pytest."
    assert command_parser("simulations.some", "See python -m simulations.run.").format_help().splitlines() == [
        "usage: fedlearn some [-h] [--version]",
        "",
        "See fedlearn run.",
        "",
        "options:",
        "  -h, --help  show this help message and exit",
        "  --version   show the version of fedlearn",
    ]


@pytest.mark.process
def test_a_reader_that_closes_the_pipe_ends_a_command_without_an_error():
    code = "from fedlearn.core.command_line import exit_code; exit_code(lambda: [print('x' * 80) for _ in range(9999)])"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "x" * 80 + "\n"
    assert ended.stderr == ""
