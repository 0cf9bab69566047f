"""Each line ``try`` of an error can be typed, for any name and value."""

from __future__ import annotations

import ast
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedlearn.advice import PLAIN_WORD, WORD, as_python, assignment, is_typed, with_group
from fedlearn.runner.compat import parse_override

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("fedlearn", "strategies", "simulations")
    for path in (ROOT / folder).rglob("*.py")
    if path.name not in ("advice.py", "errors.py")
)
PLACEHOLDER = "X"
PIECES = [*"abz 019[]{}()%#'\"$\\,:=;-+.~!é京&|<>?*`/_\t", "${", "null", "None", "true", "1e5", "::1", "\\\\", '\\"']
NAMES = ["Cost [EUR]", "50 %", "#1", "it's", 'a "b"', "$x", "007", "a,b", "[::1]:9092", "None", "null", "Größe", "北京"]
DESTRUCTIVE = re.compile(r"\b(delet\w*|remov\w*|drop\w*)\b.*\b(rows?|class(es)?|files?|images?|cells?|examples?)\b")


def read_back(word: str) -> object:
    """Return the value that Hydra and OmegaConf read from a word of a shell command."""
    (unquoted,) = shlex.split(word)
    (parsed,) = parse_override(unquoted)
    cfg = OmegaConf.create({"group": {"name": None}})
    OmegaConf.update(cfg, "group.name", parsed.value)
    return OmegaConf.to_container(cfg, resolve=True)["group"]["name"]


@pytest.mark.parametrize("name", [*NAMES, "-O", "\\", "a\\", "", " ", "true", "1e5", "${x}", "a\tb", "~", "x=y"])
def test_a_name_survives_shell_and_hydra(name):
    assert read_back(assignment("group.name", name)) == name
    assert read_back(assignment("group.name", [name, "x"])) == [name, "x"]


@pytest.mark.parametrize("value", [None, True, False, 0, -1, 0.1, 1e-9, 1e300, [], [1, "1", None], {"a b": [0, 1]}])
def test_a_value_keeps_its_type(value):
    assert read_back(assignment("group.name", value)) == value


def test_random_text_survives_shell_and_hydra():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 6)))
        assert read_back(assignment("group.name", text)) == text, text


@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_added_inside_the_quotes(name):
    fix = with_group(f"{assignment('ignore', [name])} strategy=fedavg", "scenario", {"ignore"}.__contains__)
    assert fix == f"{assignment('scenario.ignore', [name])} strategy=fedavg"


@pytest.mark.parametrize("value", [None, True, 0.1, "examples", "it's", ["a b", "1"], [1, 2]])
def test_advice_for_python_is_python(value):
    (keyword,) = ast.parse(f"f({as_python(assignment('name', value))})", mode="eval").body.keywords
    assert ast.literal_eval(keyword.value) == value


def text_of(node: ast.AST) -> str:
    """Return the text of an expression, with ``X`` in place of values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return ""


def advice_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of each advice: a line ``try`` in a text, and the last argument of an error."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in parts:
            for fix in re.findall(r"^  try {7}(.*)$", text_of(node), re.MULTILINE):
                yield node.lineno, fix
        if isinstance(node, ast.Call):
            position = {"require": 4, "SettingError": 3}.get(getattr(node.func, "id", ""))
            if position and len(node.args) > position and is_typed(fix := text_of(node.args[position])):
                yield node.lineno, fix
        is_fix = isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "fix" for target in node.targets)
        if is_fix and is_typed(fix := text_of(node.value)):
            yield node.lineno, fix


def is_safe(fix: str) -> bool:
    """Return whether all words outside quotes are unchanged by a shell."""
    is_other = re.match(r"[\w.]+: |class |return |[\w.]+\(|\w+=.*[({]", fix)  # a line of a policy, or Python
    words = [re.sub(r"'[^']*'|\"[^\"]*\"|>", "q", word) for word in WORD.findall(fix)]
    return bool(is_other) or all(map(PLAIN_WORD.fullmatch, words))


def test_each_try_in_the_source_can_be_typed():
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {fix}"
        for path in SOURCES
        for line, fix in advice_in(ast.parse(path.read_text(encoding="utf-8")))
        if fix not in ("", PLACEHOLDER, f"{PLACEHOLDER} --help") and not (is_typed(fix) and is_safe(fix))
    ]
    assert not faults, "\n".join(faults)


def test_no_advice_destroys_data():
    faults = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = text_of(node) if isinstance(node, ast.JoinedStr | ast.Constant) else ""
            lines = re.findall(r"^  (?:try|advice) +(.*)$", text, re.MULTILINE)
            lines += [text_of(node.args[-1])] if getattr(getattr(node, "func", None), "attr", "") == "refuse" else []
            faults += [f"{path.relative_to(ROOT)}: {line}" for line in lines if DESTRUCTIVE.search(line)]
    assert not faults, "\n".join(faults)
