"""A YAML file has options of a command; the command line takes precedence, and unknown keys are refused."""

import json
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn.core.command_line import UsageError
from fedlearn.deploy import coordinator, node, submit, trainer

pytestmark = pytest.mark.framework
PARSERS = {"coordinator": coordinator.build_parser, "node": node.build_parser, "trainer": trainer.build_parser}
VALUES = {"int": 7, "float": 7.5, "Path": "place/x", "None": "text"}


def write(tmp_path, content, name="c.yaml"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def value_of(action):
    if action.choices:
        return next(iter(action.choices))
    return True if action.nargs == 0 else VALUES[getattr(action.type, "__name__", "None")]


@pytest.mark.parametrize("command", PARSERS)
def test_each_option_of_a_command_can_be_in_its_file(command, tmp_path):
    parser = PARSERS[command]()
    actions = [action for action in parser._actions if action.dest not in ("help", "version", "config")]
    content = {action.option_strings[-1].removeprefix("--").replace("-", "_"): value_of(action) for action in actions}
    parsed = vars(parser.parse_args(["--config", str(write(tmp_path, content))]))
    assert "config" not in parsed
    for action in actions:
        expected = value_of(action)
        expected = tmp_path / expected if action.type is Path else expected
        read = parsed[action.dest]
        assert read == ([expected] if isinstance(read, list) else expected), action.dest


def test_the_command_line_takes_precedence_and_a_list_replaces_a_list(tmp_path):
    path = write(tmp_path, {"coordinator": "a:1", "keys": "k", "client": [0, 1], "connect_timeout": 5})
    words = ["--config", str(path), "--coordinator", "b:2", "--client", "7"]
    for order in (words, [*words[2:], *words[:2]], [f"--config={path}", *words[2:]]):
        parsed = node.build_parser().parse_args(order)
        assert (parsed.coordinator, parsed.client, parsed.connect_timeout) == ("b:2", [7], 5.0)
        assert parsed.keys == tmp_path / "k"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"coordinater": "a:1"}, r"coordinater in .* is not an option of this command\n  did you mean coordinator\?"),
        ({"config": "x"}, "config in .* is not an option"),
        ({"help": True}, "help in .* is not an option"),
        ({"settings": {"rounds": 1}}, "settings in .* is not an option"),
        ({"state": ["a", "b"]}, r"state in .* is \['a', 'b'\]\n  expected  a text or a number"),
        ({"state": {"a": 1}}, "state in .*\n  expected  a text or a number"),
        ({"state": True}, "state in .*\n  expected  a text or a number"),
        ({"client": [[0]]}, "client in .*\n  expected  a text or a number"),
        ({"client": "north"}, "--client is north\n  expected  a whole number"),
        ("[a, b]", "has no keys"),
        ("{", "cannot be read"),
        ("!!python/object/apply:os.system ['touch stolen']", "cannot be read"),
        ("a\x00b", "cannot be read"),
    ],
)
def test_a_wrong_file_is_refused_with_the_nearest_name(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    base = {"coordinator": "a:1", "keys": "k"} if isinstance(content, dict) else {}
    path = write(tmp_path, {**base, **content} if base else content)
    with pytest.raises(UsageError, match=message):
        node.build_parser().parse_args(["--config", str(path)])
    assert not (tmp_path / "stolen").exists()


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        node.build_parser().parse_args(["--config", str(tmp_path / "none.yaml")])


def test_a_null_is_the_default(tmp_path):
    path = write(tmp_path, {"coordinator": "a:1", "keys": "k", "framework": None})
    assert node.build_parser().parse_args(["--config", str(path)]).framework is None


STUDY = """
coordinator: c.example.org:443
keys: anna
settings:
  scenario: folder
  scenario.clients: [north, south]
  scenario.scales: {age: [55, 10]}
  scenario.target: "heart disease"
  rounds: 20
  privacy.noise_multiplier: null
"""


@pytest.mark.parametrize("first", [True, False])
def test_a_study_has_the_settings_of_a_run(tmp_path, first):
    path = str(write(tmp_path, STUDY, "study.yaml"))
    words = [path, "rounds=5"] if first else ["rounds=5", "--config", path]
    args, overrides = submit.build_parser().parse_known_args(words)
    assert (args.coordinator, args.keys) == ("c.example.org:443", tmp_path / "anna")
    assert overrides == [
        "scenario=folder",
        "scenario.clients=[north,south]",
        "scenario.scales={age:[55,10]}",
        'scenario.target="heart disease"',
        "privacy.noise_multiplier=null",
        "rounds=5",
    ]


@pytest.mark.slow
def test_a_study_composes_as_its_words_do(tmp_path):
    path = write(tmp_path, {"settings": {"scenario": "diabetes", "strategy": "fedprox", "rounds": 3}}, "study.yaml")
    _, overrides = submit.build_parser().parse_known_args([str(path)])
    typed = submit.compose_request(["scenario=diabetes", "strategy=fedprox", "rounds=3"])
    assert submit.compose_request(overrides)["settings"] == typed["settings"]
