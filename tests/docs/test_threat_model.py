"""The page on threats names a test for each defence, and these tests exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/explanation/threat_model.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)))
SECTIONS = re.split(r"^##+ ", PAGE, flags=re.M)[1:]
ADVERSARIES = ("coordinator", "node", "submitter", "shared settings", "data subject", "network", "user of the machine")
MECHANISMS = ("none", "example", "central", "ftrl", "local", "secagg", "distributed")


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_each_test_on_the_page_exists(file, name):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert not name or re.search(rf"^(async )?def {name}\(", source, re.M)


def test_each_attack_has_a_defence_and_a_test():
    tables = [section for section in SECTIONS if "| attack | defence | test |" in section]
    assert len(tables) >= 7
    for section in tables:
        for row in [line for line in section.splitlines() if line.startswith("| ")][1:]:
            attack, defence, test = (cell.strip() for cell in row.strip("|").split(" | "))
            assert attack, row
            assert defence, row
            assert re.fullmatch(r"`tests/[\w/]+\.py(::test_\w+)?`", test), row


def test_the_page_speaks_of_each_adversary_and_each_mechanism():
    titles = " ".join(section.splitlines()[0] for section in SECTIONS)
    assert not [adversary for adversary in ADVERSARIES if adversary not in titles]
    assert not [name for name in MECHANISMS if f"`{name}`" not in PAGE]
    assert not [mode for mode in ("simulation", "rehearsal", "deployment") if f"| {mode} |" not in PAGE]


def test_what_is_not_defended_is_listed():
    (section,) = (section for section in SECTIONS if section.startswith("No defence"))
    assert section.count("\n- ") >= 10


@pytest.mark.parametrize("page", ["SECURITY.md", "README.md", "docs/index.md", "docs/explanation/index.md"])
def test_other_pages_lead_to_it(page):
    assert re.search(r"threat_model\b", (ROOT / page).read_text(encoding="utf-8"))
