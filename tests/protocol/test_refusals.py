"""Codes of refusals: the table on the operators' page, and the difference between transient and final refusals."""

import re
from pathlib import Path

import pytest

import fedlearn
from fedlearn.core.records import FailureStage
from fedlearn.protocol.refusals import SENTENCES, Refusal, RefusalCode

PAGE = Path(fedlearn.__file__).parent / "deploy/README.md"


def test_the_table_of_codes_on_the_operators_page_is_that_of_the_code():
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:yes|no) \| .*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert list(rows) == [str(code) for code in RefusalCode]
    for code in RefusalCode:
        transient, _, meaning = rows[code].partition(" | ")
        assert (transient == "yes") == code.is_transient
        assert meaning == (meaning if code.has_detail else SENTENCES[code][0])


def test_a_code_has_either_a_sentence_or_a_detail():
    assert set(SENTENCES) == {code for code in RefusalCode if not code.has_detail}
    texts = [problem for problem, _ in SENTENCES.values()]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("code", RefusalCode)
def test_only_a_response_that_may_come_later_is_transient(code):
    refusal = Refusal(stage=code.stage, code=code)
    assert refusal.is_transient == (code in ("busy", "connection"))
    assert not Refusal(stage=FailureStage.RESPONSE, code=code).is_transient


def test_the_messages_of_a_refused_node_on_the_page_are_in_the_code():
    messages = re.findall(r"^\| `([a-z]+ [^`]+)` \| (?:yes|no) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    sources = [path.read_text(encoding="utf-8") for path in PAGE.parent.rglob("*.py")]
    text = "\n".join(sources).replace("{owner}", "node")
    assert len(messages) == 3
    assert [message for message in messages if message not in text] == []
