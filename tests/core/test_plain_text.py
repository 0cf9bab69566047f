"""Text of another party cannot control a terminal, imitate a line of a log, or show other text than it has."""

import logging
import sys

import pytest

from fedlearn.core.plain_text import PlainFormatter, plain_line, plain_text

HOSTILE = {
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;title\x07",
    "c1": "\x9b2J\x85\x90",
    "overwrite": "bad\rgood\b\b",
    "direction": "\u202egpj.exe\u2066\u200f",
    "invisible": "\u200b\u2060\ufeff\u00ad",
    "lines": "\u2028\u2029\x0b\x0c",
    "surrogate": "\ud800",
    "nul": "\x00\x7f",
}


def is_safe(text, allowed=""):
    return all(character.isprintable() or character in allowed for character in text)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_control_characters_are_removed_from_each_kind_of_text(text):
    assert is_safe(plain_line(f"a\n{text}\tb"))
    assert is_safe(plain_text(f"a\n{text}\tb"), "\n\t")
    assert plain_text("a\n\tb") == "a\n\tb"


def test_no_character_of_unicode_gets_through():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert is_safe(plain_text(every), "\n\t")
    assert is_safe(plain_line(every, max_length=len(every)))


def test_styles_are_kept_if_asked_for_and_no_other_sequence():
    text = "\x1b[1mbold\x1b[0m \x1b[2J\x1b]0;x\x07 \x1b[31\x1b[38;5;1mred\x1b[0m"
    kept = plain_text(text, keep_styles=True)
    assert kept == "\x1b[1mbold\x1b[0m [2J]0;x [31\x1b[38;5;1mred\x1b[0m"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_log_record_is_safe_and_its_further_lines_are_indented(text):
    record = logging.LogRecord("x", logging.INFO, "", 0, "refused %s", (f"{text}\n2026-01-01 INFO forged",), None)
    logged = PlainFormatter("%(levelname)s %(message)s").format(record)
    assert is_safe(logged, "\n\t")
    assert all(line.startswith("  ") for line in logged.splitlines()[1:])
