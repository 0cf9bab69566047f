"""Log files have UTC times, no colours, and one line or one JSON object per event."""

import io
import json
import logging
import re

import pytest

from fedlearn.deploy.log_format import JsonFormatter, StampedStream, UtcFormatter, stamp

UTC_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
LINES = {  # line of a library -> level, logger, message
    "\x1b[92mINFO \x1b[0m:      Starting Flower SuperLink": ("INFO", "", "Starting Flower SuperLink"),
    "\x1b[93mWARNING \x1b[0m:   experimental": ("WARNING", "", "experimental"),
    "2026-11-29T11:49:39.898Z INFO [uvicorn.error] Started": ("INFO", "uvicorn.error", "Started"),
    "Traceback (most recent call last):": ("INFO", "", "Traceback (most recent call last):"),
    "ERROR : \x1b[2J\x07bad\r": ("ERROR", "", "bad"),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_library_gets_time_and_level_and_loses_colours(line):
    level, logger, message = LINES[line]
    content = json.loads(stamp(line, "json"))
    assert {name: content[name] for name in ("level", "logger", "message")} == {
        "level": level,
        "logger": logger,
        "message": message,
    }
    assert UTC_TIME.fullmatch(content["time"])
    text = stamp(line, "text")
    assert re.match(rf"{UTC_TIME.pattern} {level} ", text)
    assert text.endswith(message)
    assert "\x1b" not in text
    if line.startswith("2026"):
        assert text.startswith("2026-11-29T11:49:39.898Z ")


def test_a_stream_writes_whole_lines_only():
    out = io.StringIO()
    stream = StampedStream(out, "json")
    for part in ("INFO : one", " line\n\nERR", "OR : two\nlast" + "x" * 50_000):
        stream.write(part)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["message"] for line in lines[:2]] == ["one line", "two"]
    assert len(lines) == 3
    assert len(lines[2]["message"]) <= 16_384
    assert not stream.isatty()


@pytest.mark.parametrize("formatter", [UtcFormatter(), JsonFormatter()])
def test_records_have_utc_times_and_no_control_characters(formatter, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    record = logging.LogRecord("a.b", logging.WARNING, "f", 1, "bad \x1b[31m%s\x07", ("text\nline",), None)
    record.created, record.msecs = 0.0, 0.0
    text = formatter.format(record)
    assert "1970-01-01T00:00:00.000Z" in text
    assert "\x1b" not in text
    assert "\x07" not in text
    if isinstance(formatter, JsonFormatter):
        assert json.loads(text)["message"] == "bad text\nline"
        assert "\n" not in text
