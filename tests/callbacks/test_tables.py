"""Tables fit a terminal, are complete in a pipe, and show names as text."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from fedlearn.callbacks import tables
from fedlearn.callbacks.tables import format_table, markdown_table, print_table

SKIN_TONES = [chr(code) for code in range(0x1F3FB, 0x1F400)]  # their width depends on the character before them
CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Mn", "Me", "Cf", "Cs"), exclude_characters=SKIN_TONES)
CELLS = st.text(CHARACTERS, max_size=30)
TABLES = st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=4))
ROWS = [("setting", "accuracy"), ("a" * 300, "61.2 %"), ("b", "5.0 %")]


class Terminal(io.StringIO):
    """Standard output of a given width, on a terminal or in a pipe."""

    encoding = "utf-8"

    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.fixture
def output(monkeypatch):
    def use(is_terminal, encoding="utf-8"):
        stream = Terminal(is_terminal)
        stream.encoding = encoding
        monkeypatch.setattr(tables.sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", "40")
        monkeypatch.setenv("FORCE_COLOR", "1")
        return stream

    return use


def test_a_pipe_gets_complete_lines_without_colours(output):
    stream = output(is_terminal=False)
    print_table(ROWS)
    assert stream.getvalue().splitlines() == [
        f"{'setting':302}accuracy",
        f"{'a' * 300}    61.2 %",
        f"b{'5.0 %':>309}",
    ]


def test_a_terminal_gets_lines_of_its_width_with_all_characters(output):
    stream = output(is_terminal=True)
    print_table(ROWS)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert stream.getvalue().count("a") == 302
    assert "\x1b" not in stream.getvalue()


@given(TABLES, st.integers(1, 100))
def test_no_line_is_wider_than_the_terminal_and_no_character_is_lost(rows, width):
    text = format_table(rows, width=width)
    assert max(map(cell_len, text.split("\n"))) <= max(width, tables.MIN_COLUMN_WIDTH * len(rows[0]))
    shown = sorted(c for c in text if not c.isspace())
    assert shown == sorted("".join(str(tables._plain(cell)) for row in rows for cell in row if cell).translate(SPACES))


SPACES = {code: None for code in range(0x3001) if chr(code).isspace()}


@given(TABLES)
def test_control_characters_never_reach_the_terminal(rows):
    text = format_table(rows)
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_name_with_a_command_for_the_terminal_is_shown_as_text():
    assert "\x1b" not in format_table([("name",), ("\x1b]0;title\x07\x1b[2J",)])


def test_columns_with_wide_characters_are_aligned():
    lines = format_table([("clinic", "size"), ("東京", "12"), ("Lyon", "3")]).splitlines()
    assert {cell_len(line) for line in lines} == {12}


def test_a_terminal_without_the_characters_gets_replacements(output):
    stream = output(is_terminal=True, encoding="ascii")
    print_table([("ε", "–"), ("1", "2")])
    assert stream.getvalue() == "?  ?\n1  2\n"


def test_markdown_keeps_one_line_for_each_row_and_one_cell_for_each_value():
    text = markdown_table([("rule", "note"), ("krum", "a|b\nc"), ("rfa", "")])
    assert text == "| rule | note |\n| --- | --- |\n| krum | a\\|b c |\n| rfa |  |\n"
