"""Guess the columns of texts, targets, prompts and responses from usual names. The header of a run shows a guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedlearn.advice import assignment
from fedlearn.data.contents import Contents
from fedlearn.data.tables import Table
from fedlearn.errors import SettingError, require

TEXT = ("text", "sentence", "review", "content", "body", "document", "comment", "tweet", "message", "title", "question")
TARGET = ("label", "labels", "target", "class", "category", "sentiment", "intent", "topic", "coarse_label", "stars")
MESSAGES = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
PROMPT = ("instruction", "prompt", "question", "query", "input")
RESPONSE = ("response", "output", "completion", "answer", "reply", "target", "chosen")
CONTEXT = ("context", "input")


def classification_columns(
    text: Any,
    target: str | None,
    read: Callable[[], Contents],
    *,
    others: Sequence[str | None] = (),
    deployed: bool = False,
) -> tuple[Any, str, str]:
    """Return the columns of texts and of targets, and a note on guesses.

    Args:
        text: column or columns of texts; None guesses.
        target: column of targets; None guesses.
        read: function that reads the data. It is called only for a guess.
        others: columns with another meaning, which are no candidates.
        deployed: whether the data are at a real node, which guesses nothing.

    Raises:
        SettingError: a column is not stated at a node, or there is no likely column.
    """
    if text is not None and target is not None:
        return text, target, ""
    _require_stated(text, "text", "review", deployed)
    _require_stated(target, "target", "label", deployed)
    table = read().table
    free = [name for name in table.columns if name not in (*others, target, *(np.atleast_1d(text) if text else ()))]
    if target is None:
        target = _find(free, TARGET)
        if target is None:
            raise _no_column("target", free, "the column with the class of each text")
        free.remove(target)
    if text is None:
        text = _find(free, TEXT) or _longest(table, free)
        if text is None:
            raise _no_column("text", free, "the column of texts")
    return text, target, f"columns: text {text if isinstance(text, str) else ', '.join(text)}, target {target}"


def causal_columns(stated: Mapping[str, str | None], table: Table, *, deployed: bool) -> tuple[dict[str, str], str]:
    """Return the columns of a language model, and a note on guesses.

    Args:
        stated: ``text``, ``prompt``, ``context``, ``response`` and ``messages``; None for no statement.
        table: rows of the user.
        deployed: whether the data are at a real node, which guesses nothing.

    Raises:
        SettingError: the statements contradict each other, or there is no likely column.
        DataError: a column does not exist.
    """
    named = {name: column for name, column in stated.items() if column}
    for name, column in named.items():
        table.column(column, f"scenario.{name}")
    if named:
        _require_complete(named)
        return named, ""
    _require_stated(None, "text", "text", deployed)
    found = _guessed(list(table.columns))
    if not found and (longest := _longest(table, list(table.columns))):
        found = {"text": longest}
    if not found:
        raise _no_column("text", list(table.columns), "the column of texts, or prompt and response, or messages")
    return found, "columns: " + ", ".join(f"{name} {column}" for name, column in found.items())


def _guessed(columns: list[str]) -> dict[str, str]:
    if messages := _find(columns, MESSAGES):
        return {"messages": messages}
    response = _find(columns, RESPONSE)
    prompt = _find([name for name in columns if name != response], PROMPT)
    if prompt and response:
        context = _find([name for name in columns if name not in (prompt, response)], CONTEXT)
        return {"prompt": prompt, "response": response} | ({"context": context} if context else {})
    text = _find(columns, TEXT)
    return {"text": text} if text else {}


def _require_complete(named: Mapping[str, str]) -> None:
    forms = [name for name in ("text", "prompt", "messages") if name in named]
    expected = "one of text, prompt with response, or messages"
    require(
        len(forms) <= 1,
        forms[-1] if forms else "text",
        named.get(forms[-1]) if forms else None,
        expected,
        "messages=null",
    )
    for name, other in (("prompt", "response"), ("response", "prompt"), ("context", "prompt")):
        is_complete = name not in named or other in named
        require(is_complete, other, None, f"a column beside {name}", f"{other}={other}")


def _require_stated(column: Any, name: str, example: str, deployed: bool) -> None:
    expected = "the name of a column: a real node guesses nothing"
    require(column is not None or not deployed, name, column, expected, f"{name}={example}")


def _find(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the column with the most usual name, in any case."""
    by_lower = {column.lower(): column for column in reversed(columns)}
    return next((by_lower[name] for name in names if name in by_lower), None)


def _longest(table: Table, columns: Sequence[str]) -> str | None:
    """Return the column of text whose cells are longest, if they look like texts: 20 characters or more on average."""
    sizes = {}
    for name in columns:
        cells = [cell for cell in table.columns[name][:1000].tolist() if isinstance(cell, str)]
        sizes[name] = sum(map(len, cells)) / len(cells) if cells else 0.0
    longest = max(sizes, key=lambda name: sizes[name], default=None)
    return longest if longest is not None and sizes[longest] >= 20 else None


def _no_column(setting: str, columns: Sequence[str], meaning: str) -> SettingError:
    fix = assignment(setting, columns[-1] if columns else setting)
    return SettingError(setting, None, f"{meaning}, one of {', '.join(columns)}", fix)
