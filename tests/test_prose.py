"""Check the language of code, settings and pages."""

from __future__ import annotations

import pytest
from prose import broken_rules, findings, project_files


def test_no_sentence_of_the_project_breaks_a_rule():
    found = [str(finding) for finding in findings(project_files())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("sentence", "rule"),
    [
        ("Whether the node is busy.", "clause-start"),
        ("Of a node's data leave updates.", "clause-start"),
        ("It keeps what the server remembers.", "noun-clause"),
        ("Raises an error for whoever is late.", "noun-clause"),
        ("Clients tell their loss.", "banned-phrase"),
        (" ".join(["word"] * 26), "long-sentence"),
    ],
)
def test_a_broken_rule_is_found(sentence, rule):
    assert rule in broken_rules(sentence)


@pytest.mark.parametrize(
    "sentence",
    ["Return the weighted mean of the updates.", "See the how-to guides.", "Only model updates leave a node."],
)
def test_a_plain_sentence_passes(sentence):
    assert broken_rules(sentence) == []
