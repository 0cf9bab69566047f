"""Formats of cells are detected for whole columns; typed values survive each spelling."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlearn.data.cell_formats import EPOCH, DateFormat, NumberFormat, normalized
from fedlearn.data.format_detection import detect_format
from fedlearn.data.levels import level_numbers, to_category

NUMBERS = [
    (["12,5", "3"], 12.5),
    (["1,234", "2,345,678"], 1234),
    (["12,34,567", "1,000"], 1234567),
    (["1,234.5", "2"], 1234.5),
    (["1.234,5", "2"], 1234.5),
    (["1.234.567", "2"], 1234567),
    (["1 234", "5"], 1234),
    (["1\u202f234,5", "5,5"], 1234.5),
    (["1\u00a0234", "5"], 1234),
    (["1'234.5", "5.5"], 1234.5),
    (["1\u2019234", "5"], 1234),
    (["12 mg", "13.5 mg"], 12),
    (["5.4 mmol/L", "6 mmol/L"], 5.4),
    (["3 x10^9/L", "4 x10^9/L"], 3),
    (["7 m\u00b2", "6 m\u00b2"], 7),
    (["37\u00b0C", "36.5 \u00b0C"], 37),
    (["70kg", "65kg"], 70),
    (["12%", "13 %"], 12),
    (["12\uff05", "13%"], 12),
    (["$5", "-$6"], 5),
    (["-\u20ac5,20", "\u20ac 6"], -5.2),
    (["5 EUR", "6 EUR"], 5),
    (["\u22125", "3"], -5),
    (["- 5", "3"], -5),
    (["\uff13.\uff15", "4"], 3.5),
    (["\u0663", "4"], 3),
    (["+5", "-3"], 5),
    (["5.", ".5"], 5),
    (["1e-8", "2.5E-9"], 1e-8),
    (["1e5", "1.5e3"], 1e5),
    (["0,123", "36,512"], 0.123),
]
TEXTS = [
    ["007", "7"],
    ["01234", "98765"],
    ["1623456789012345600", "1623456789012345601"],
    ["10E2", "11E3", "12E1"],
    ["10E2", "11B2", "1012"],
    ["1e5", "100000", "x"],
    ["12A", "13B"],
    ["12V", "13V"],
    ["E11", "E12"],
    ["1.2.3", "1.2.4"],
    ["192.168.0.1", "10.0.0.1"],
    ["10-20", "20-30"],
    ["5'10", "6'1"],
    ["\u00bd", "1\u00bd"],
    ["10\u00b2", "3\u00b2"],
    ["true", "false"],
    ["1_000", "2_000"],
    ["inf", "nano"],
    ["0x1F", "0x2A"],
    ["+49 30 123", "+49 30 456"],
    ["3 x 5", "4 x 6"],
    ["1:2", "3:400"],
]
AMBIGUOUS = [
    (["1,234", "2,345"], "decimal mark or a thousands mark"),
    (["01/02/2024", "03/04/2024"], "two possible meanings"),
    (["01-02-24", "03-04-24"], "two possible meanings"),
    (["2024-01-02", "3.4.2024"], "two possible meanings"),
    (["12 mg", "13 g"], "another unit"),
    (["12 mg", "13"], "another unit"),
    (["12 %", "0.13"], "another unit"),
    (["$5", "\u20ac6"], "another unit"),
    (["10E2", "1012", "1013"], "or a code"),
    (["1.5", "2,5"], "other decimal or thousands marks"),
    (["1 234,5", "1,234.5"], "other decimal or thousands marks"),
]
DATES = [
    (["2024-01-31", "2024-02-01"], "2024-01-31"),
    (["2024-01-31 12:00", "2024-02-01 13:30"], "2024-01-31T12:00"),
    (["2024-01-31T12:00:00Z", "2024-02-01T13:30:00+02:00"], "2024-01-31T12:00"),
    (["2024-01-31 12:00:00.000000000"], "2024-01-31T12:00"),
    (["2024/01/31"], "2024-01-31"),
    (["31.01.2024", "1.2.2024"], "2024-01-31"),
    (["31/01/2024", "01/02/2024"], "2024-01-31"),
    (["01/31/2024", "02/01/2024"], "2024-01-31"),
    (["31-01-24", "01-02-24"], "2024-01-31"),
    (["31 Jan 2024"], "2024-01-31"),
    (["31-Jan-2024"], "2024-01-31"),
    (["Jan 31, 2024"], "2024-01-31"),
    (["January 31, 2024"], "2024-01-31"),
    (["01/31/2024 12:00 PM"], "2024-01-31T12:00"),
]


@pytest.mark.parametrize(("cells", "value"), NUMBERS)
def test_a_spelling_of_numbers_is_recognized_for_the_column(cells, value):
    found = detect_format(cells)
    assert not found.wrong
    assert found.format.parse(cells[0]) == value
    assert not found.format.parse_column(np.array([*cells, None, "NA"], object))[1].any()


@pytest.mark.parametrize("cells", TEXTS)
def test_codes_and_labels_stay_text(cells):
    found = detect_format(cells)
    assert found.format is None
    assert not found.wrong


@pytest.mark.parametrize(("cells", "reason"), AMBIGUOUS)
def test_a_column_with_two_readings_is_not_guessed(cells, reason):
    found = detect_format(cells)
    assert found.wrong
    assert reason in found.reason
    assert not any(cell in found.reason + found.fix for cell in cells)


@pytest.mark.parametrize(("cells", "moment"), DATES)
def test_dates_are_days_since_1970(cells, moment):
    found = detect_format(cells)
    expected = datetime.fromisoformat(moment).replace(tzinfo=UTC) - EPOCH
    assert found.format.parse(cells[0]) == expected / timedelta(days=1)


def test_marks_of_other_columns_decide_an_ambiguous_column():
    assert detect_format(["1,234"], decimal=",").format.parse("1,234") == 1.234
    assert detect_format(["1,234"], decimal=".").format.parse("1,234") == 1234
    assert detect_format(["1.234"], decimal=",").format.parse("1.234") == 1234
    assert detect_format(["1.234"]).format.parse("1.234") == 1.234


def test_a_few_other_cells_are_wrong():
    assert detect_format(["1", "2", "3", "x"]).wrong == {"x"}
    assert detect_format(["1", "2", "3", "<0.5"]).wrong == {"<0.5"}
    assert detect_format(["2024-01-31", "2024-02-01", "2024-02-30"]).wrong == {"2024-02-30"}


FORMATS = [NumberFormat(decimal=d, thousands=t, unit=u) for d, t in
           ((".", ""), (",", ""), (".", ","), (",", "."), (".", " "), (",", " "), (".", "'"))
           for u in ("", "mg", "%")]  # fmt: skip


def spell(value: float, format: NumberFormat, *, space: str, minus: str) -> str:
    """Write a number as a program with these marks writes it."""
    text = f"{abs(value):,.2f}".replace(",", "T").replace(".", "D")
    text = text.replace("T", format.thousands).replace("D", format.decimal)
    return (minus if value < 0 else "") + text + (space + format.unit if format.unit else "")


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(FORMATS),
    values=st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=8),
    space=st.sampled_from([" ", "\u00a0"]),
    minus=st.sampled_from(["-", "\u2212"]),
)
def test_numbers_survive_each_spelling(format, values, space, minus):
    numbers = [value / 100 for value in values]
    cells = [spell(number, format, space=space, minus=minus) for number in numbers]
    found = detect_format(cells)
    assert not found.wrong
    assert found.format.parse_column(np.array(cells, object))[0].tolist() == numbers


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False, max_value=1e99, min_value=-1e99))
def test_each_float_survives_its_shortest_text(number):
    assert detect_format([repr(number), "0.5"]).format.parse(repr(number)) == number


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=12))
def test_detection_accepts_any_text(text):
    assert normalized(normalized(text)) == normalized(text)
    detect_format([text, "1.5"] if text.strip() else ["1.5"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=("Cs", "Zs", "Cc")), min_size=1, max_size=5), unique=True))
def test_each_level_keeps_its_place(levels):
    assert level_numbers(np.array(levels, object), levels).tolist() == [*range(len(levels))]


@pytest.mark.parametrize(
    ("cell", "category"),
    [(1.0, "1"), ("1.0", "1"), ("1.00", "1.00"), ("007", "007"), ("1e5", "1e5"), (True, "true"), ("False", "false"),
     ("None", "None"), (10**18 + 1, "1000000000000000001"), ("1623456789012345600", "1623456789012345600")],
)  # fmt: skip
def test_a_category_is_the_text_of_the_cell(cell, category):
    assert to_category(cell) == category


def test_dates_of_a_schema_have_their_format():
    assert DateFormat(format="%d.%m.%Y").parse("02.01.1970") == 1
    assert DateFormat(format="%d.%m.%Y").parse("1970-01-02") is None
