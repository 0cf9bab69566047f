"""Each command on the page for operators exists."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import fedlearn.deploy
from fedlearn.deploy import coordinator, keys, node, submit, trainer

FOLDER = Path(fedlearn.deploy.__file__).parent
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
READERS = ("cancel", "check", "fetch", "history", "logs", "runs", "status")
UNITS = sorted((FOLDER / "units").glob("*.service"))


def commands(text):
    """Return the arguments of each ``python -m fedlearn.deploy.`` in a text, after the name of the command."""
    for found in re.findall(r"python -m fedlearn\.deploy\.([^`#>\n]+)", text.replace("\\\n", " ")):
        yield shlex.split(found)


def from_pages():
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
    inline = "\n".join(re.findall(r"`(python -m [^`]+)`", PAGE))
    return [*commands(blocks), *commands(inline), *(words for unit in UNITS for words in commands(unit.read_text()))]


def test_the_commands_were_found():
    named = {words[0] for words in from_pages()}
    assert named == {
        *READERS,
        "coordinator",
        "keys",
        "node",
        "node_side.policy",
        "rehearse",
        "submit",
        "trainer",
    }


def parser_of(module):
    return (getattr(module, "build_parser", None) or module._parser)()


@pytest.mark.parametrize("words", from_pages(), ids=" ".join)
def test_each_command_is_one_that_its_program_takes(words, tmp_path):
    program, *rest = words
    if program in ("keys", "coordinator", "trainer"):
        module = {"keys": keys, "coordinator": coordinator, "trainer": trainer}[program]
        parser_of(module).parse_args(rest)
    elif program in READERS:
        import_module(f"fedlearn.deploy.{program}").build_parser().parse_args(rest)
    elif program == "node":
        built = node.node_from_args(node.build_parser().parse_args(rest))
        if built.trainer_args is not None:
            parser_of(trainer).parse_args(["--socket", str(tmp_path / "s"), *built.trainer_args])
    elif program == "submit":
        args, settings = submit.build_parser().parse_known_args(rest)
        if args.resume is None and args.follow is None:
            submit.compose_request(settings)
    elif program == "rehearse":
        submit.compose_request([word for word in rest if word.partition("=")[0] not in ("nodes", "num_nodes")])


def test_links_lead_somewhere_and_lines_are_not_too_wide():
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
        assert target[1:] in headings if target.startswith("#") else (FOLDER / target).exists(), target
    assert all(len(line) <= 140 or line.startswith("|") for line in PAGE.splitlines())


def test_the_messengers_unit_may_not_see_what_the_trainers_may():
    messenger, current = ((FOLDER / f"units/fedlearn-{name}.service").read_text() for name in ("messenger", "trainer"))
    data = re.search(r"--data (\S+)", current)[1]
    assert f"InaccessiblePaths={data}" in messenger
    assert "PrivateNetwork=yes" in current
    assert re.search(r"^User=(.*)$", messenger, re.M)[1] != re.search(r"^User=(.*)$", current, re.M)[1]
