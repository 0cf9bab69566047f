"""The start of a run: which sites it waits for, when it begins, and when it cannot begin."""

import ast
import random
from pathlib import Path

import pytest

import fedlearn
from fedlearn.protocol.sites import RunSites, StartState, is_site_name

ALL = ("east", "north", "south", "west")


@pytest.mark.parametrize(
    "name",
    [
        "../keys",
        "a/b",
        "",
        ".",
        "..",
        ".hidden",
        "-option",
        "north\n",
        "north\x1b[2J",
        "a b",
        "nörth",
        "x" * 101,
        7,
        None,
        ["a"],
    ],
)
def test_a_name_with_a_path_or_control_characters_is_no_name(name):
    assert not is_site_name(name)


def state(sites, connected=(), joined=(), refused=(), waited_s=60.0, settled_s=0.0):
    return StartState(
        sites=sites, connected=connected, joined=joined, refused=refused, waited_s=waited_s, settled_s=settled_s
    )


def draw(rng):
    """Return the sites of a run, the behavior of each site, and the time since the start."""
    named = tuple(sorted(rng.sample(ALL, rng.randint(1, 4))))
    is_named = rng.random() < 0.5
    sites = RunSites(
        names=named,
        min_sites=rng.randint(1, len(named)),
        waits_for_disconnected=is_named,
        settle_s=rng.choice([5.0, 1e9]),
    )
    doing = {name: rng.choice(["absent", "silent", "joined", "refused"]) for name in named}
    return sites, doing, rng.choice([0.0, 4.0, 60.0])


def moment(sites, doing, waited_s):
    groups = {what: [name for name in doing if doing[name] == what] for what in ("silent", "joined", "refused")}
    connected = [name for names in groups.values() for name in names]
    return state(sites, connected, groups["joined"], groups["refused"], waited_s)


def test_the_rule_of_the_start_holds_for_random_sites():
    for seed in range(1000):
        check_rule(seed)


def check_rule(seed):
    sites, doing, waited_s = draw(random.Random(seed))
    at = moment(sites, doing, waited_s)
    counts = {what: list(doing.values()).count(what) for what in ("absent", "silent", "joined", "refused")}
    assert not (at.is_ready and at.is_hopeless)
    assert not at.is_ready or counts["joined"] >= sites.min_sites
    if counts["joined"] == len(doing):
        assert at.is_ready
    if at.is_hopeless:  # also if each remaining site of the run joins
        absent = counts["absent"] if sites.waits_for_disconnected or waited_s < 5 else 0
        assert counts["joined"] + counts["silent"] + absent < sites.min_sites
        assert counts["refused"]
    if counts["refused"] == len(doing):
        assert at.is_hopeless
    for name, what in doing.items():
        assert (what != "joined") == (name in at.describe())


@pytest.mark.parametrize("seed", range(5))
def test_only_named_sites_are_included(seed):
    sites, doing, _ = draw(random.Random(seed))
    sites = RunSites(**{**vars(sites), "site_of": dict(enumerate((*ALL, "stranger"))).get})
    assert [number for number in range(6) if sites.includes(number)] == [
        number for number, name in enumerate(ALL) if name in doing
    ]


def test_a_run_without_a_list_starts_without_absent_sites_after_a_short_time():
    sites = RunSites(names=ALL)
    early = state(sites, ["north"], ["north"], waited_s=1.0)
    assert (early.is_ready, state(sites, ["north"], ["north"], waited_s=6.0).is_ready) == (False, True)
    assert not state(sites, [], waited_s=6.0).is_ready


def test_a_run_with_a_list_waits_for_its_sites_and_not_for_a_silent_one_for_ever():
    sites = RunSites(names=("north", "south", "west"), min_sites=2, waits_for_disconnected=True, settle_s=10.0)
    connected, joined = ["north", "south", "west"], ["north", "south"]
    assert not state(sites, connected, joined, settled_s=3.0).is_ready
    assert state(sites, connected, joined, settled_s=11.0).is_ready
    assert state(sites, joined, joined).is_ready  # west is not connected


def test_a_resumed_run_waits_for_the_sites_that_took_part():
    sites = RunSites(names=ALL, rejoining=frozenset({"north", "west"}), settle_s=0.0)
    assert state(sites, ["north"], ["north"], settled_s=60.0).awaited == ("west",)
    assert not state(sites, ["north"], ["north"], settled_s=60.0).is_ready
    assert state(sites, ["north", "west"], ["north"], ["west"], settled_s=60.0).is_ready


def texts_with_ids(path):
    """Yield the lines of formatted texts and of log calls that contain Flower's id of a node."""
    ids = {"node_id", "src_node_id", "dst_node_id", "sender"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        parts = [value.value for value in getattr(node, "values", ()) if isinstance(value, ast.FormattedValue)]
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "log"
        ):
            parts = node.args[1:]
        for part in parts:
            if isinstance(part, ast.Name | ast.Attribute) and ast.unparse(part).rpartition(".")[2] in ids:
                yield node.lineno


def test_no_text_of_a_deployment_has_an_id_of_flower():
    root = Path(fedlearn.__file__).parent
    paths = [path for part in ("protocol", "engines", "deploy") for path in (root / part).rglob("*.py")]
    found = [(path.name, line) for path in paths for line in texts_with_ids(path)]
    assert len(paths) > 60
    assert [name for name, _ in found] == ["sites.py"], found  # the name of a node without a name, on a grid of a test


def test_messages_never_show_the_id_of_a_node():
    sites = RunSites(site_of={17: "north"}.get)
    assert (sites.name(17), sites.name(18)) == ("site north", "a node outside this run")
