"""Public names are terms of the field: no name carries a word of the ban list."""

import ast
import re
from pathlib import Path

import pytest
import yaml

import fedlearn

ROOT = Path(fedlearn.__file__).parents[1]
PACKAGES = ("fedlearn", "strategies", "simulations")
BANNED = frozenset(
    # pronouns, question words and participles that say nothing about the thing
    "one own made told seen found given words what who whom whose whoever whatever which how beside besides "  # noqa: SIM905
    # paraphrases; CONTRIBUTING.md has the term of the vocabulary for each
    "ask asked answer reply replies letter letters parcel envelope post aloft landing landed lander flying flight "
    "fate tally claim claimed gathered folded memories venue ear overheard keeps leaving inquiry drill remembered "
    "suit nobody everybody absent lost late".split()
)
# terms of the field that contain such a word
TERMS = re.compile(r"in_?flight|one_?hot|leave_?one_?out|claimed_?epsilon", re.IGNORECASE)


def words_of(name):
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", TERMS.sub("", name))}


def arguments_of(function):
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def names_in(body, prefix):
    """Yield (place, name) of public definitions, their arguments and fields."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", node.name
            if not node.name.startswith("_") or node.name == "__init__":
                yield from ((f"{prefix}.{node.name}({name})", name) for name in arguments_of(node))
        elif isinstance(node, ast.ClassDef):
            yield f"{prefix}.{node.name}", node.name
            if not node.name.startswith("_"):
                yield from names_in(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            yield from ((f"{prefix}.{name}", name) for name in found)


def public_names():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield module, path.stem
            yield from names_in(ast.parse(path.read_text(encoding="utf-8")).body, module)


def settings():
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        where = path.relative_to(ROOT).as_posix()
        yield where, path.stem
        stack = [yaml.safe_load(path.read_text(encoding="utf-8")) or {}]
        while stack:
            node = stack.pop()
            for key, value in node.items() if isinstance(node, dict) else ():
                yield f"{where}: {key}", str(key)
                stack.append(value)


@pytest.mark.parametrize("names", [public_names, settings])
def test_no_public_name_carries_a_banned_word(names):
    checked = [(where, name) for where, name in names() if not name.startswith("_")]
    assert len(checked) > 100
    banned = [where for where, name in checked if words_of(name) & BANNED]
    assert not banned, "\n".join(banned)


def local_names(path):
    """Yield (place, name) of variables, arguments and functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield f"{path.name}:{node.lineno}", node.id
        elif isinstance(node, ast.arg):
            yield f"{path.name}:{node.lineno}", node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.name}:{node.lineno}", node.name


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "examples"])
def test_no_variable_is_a_bare_pronoun_or_participle(folder):
    names = [pair for path in sorted((ROOT / folder).rglob("*.py")) for pair in local_names(path)]
    assert len(names) > 100
    banned = [f"{where} {name}" for where, name in names if name.strip("_").lower() in ("one", "own", "made", "told")]
    assert not banned, "\n".join(banned)


@pytest.mark.parametrize("name", ["RunMade", "own_model", "num_replies", "AloftRequest", "told"])
def test_the_ban_list_sees_words_inside_names(name):
    assert words_of(name) & BANNED
