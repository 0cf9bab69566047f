"""The coordinator chooses the sites of a run: named sites, sites of a study, and the sites of a resumed run."""

import pytest

from fedlearn.deploy.coordinator_side.admission import write_nodes
from fedlearn.deploy.coordinator_side.run_sites import SITES_FILE, SiteDirectory, StoredSites, build_run_sites
from fedlearn.deploy.coordinator_side.studies import Study, StudyError, find_study, read_studies
from fedlearn.errors import SettingError
from fedlearn.runner.site_settings import SiteSettings

NODES = {1: ("north", b"n"), 2: ("south", b"s"), 3: ("west", b"w")}
HEART = Study(sites=("north", "south"), submitters=("anna",))


@pytest.fixture
def directory(tmp_path):
    write_nodes(tmp_path, NODES)
    return SiteDirectory(tmp_path)


def admit(tmp_path, node_id, name):
    write_nodes(tmp_path, {**NODES, node_id: (name, name.encode())})


def test_a_run_asks_its_named_sites_and_needs_all_of_them(directory, tmp_path):
    chosen = build_run_sites(SiteSettings(sites=("south", "north")), directory, tmp_path)
    assert [node for node in range(5) if chosen.includes(node)] == [1, 2]
    assert (chosen.min_sites, chosen.waits_for_disconnected) == (2, True)


def test_a_run_without_a_list_is_for_the_sites_admitted_at_its_start(directory, tmp_path):
    chosen = build_run_sites(SiteSettings(), directory, tmp_path)
    assert chosen.names == ("north", "south", "west")
    assert (chosen.min_sites, chosen.waits_for_disconnected) == (1, False)
    admit(tmp_path, 4, "east")
    assert directory.site_of(4) == "east"
    assert not chosen.includes(4)


@pytest.mark.parametrize("settings", [SiteSettings(), SiteSettings(sites=("north", "west"))], ids=str)
def test_a_resumed_run_asks_only_the_sites_of_its_start(directory, tmp_path, settings):
    first = build_run_sites(settings, directory, tmp_path)
    first.on_join(["north", "west"])
    admit(tmp_path, 4, "east")
    again = build_run_sites(settings, directory, tmp_path)
    assert (again.names, again.rejoining) == (first.names, {"north", "west"})
    assert not again.includes(4)


def test_a_resumed_run_can_do_without_a_site(directory, tmp_path):
    build_run_sites(SiteSettings(sites=("north", "south")), directory, tmp_path)
    again = build_run_sites(SiteSettings(sites=("north", "south"), min_sites=1), directory, tmp_path)
    assert (again.names, again.min_sites) == (("north", "south"), 1)


def test_a_resumed_private_run_has_the_sites_of_its_first_start(directory, tmp_path):
    first = build_run_sites(SiteSettings(min_sites=1), directory, tmp_path, is_private=True)
    assert first.names == ("north", "south", "west")
    first.on_join(["north", "west"])
    first.on_join(["west"])
    again = build_run_sites(SiteSettings(min_sites=1), directory, tmp_path, is_private=True)
    assert (again.names, again.rejoining) == (("north", "west"), {"west"})
    again.on_join(["north", "west"])
    assert StoredSites.read(tmp_path).started == ("north", "west")


def test_a_loss_of_all_sites_at_once_is_not_remembered(directory, tmp_path):
    chosen = build_run_sites(SiteSettings(), directory, tmp_path)
    chosen.on_join(["north"])
    chosen.on_join([])
    assert StoredSites.read(tmp_path).joined == ("north",)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"names": ["../keys"], "started": [], "joined": []}', '{"names": 7}']
)
def test_a_damaged_file_of_sites_is_not_used(tmp_path, text):
    (tmp_path / SITES_FILE).write_text(text)
    assert StoredSites.read(tmp_path) is None


@pytest.mark.parametrize("site", ["east", "west"])
def test_a_site_outside_the_study_is_refused_as_an_unknown_one(directory, tmp_path, site):
    with pytest.raises(SettingError) as caught:
        build_run_sites(SiteSettings(sites=("north", site)), directory, tmp_path, study=HEART)
    assert str(caught.value).splitlines()[:2] == [f"sites is {site}", "  expected  one of north, south"]
    assert not (tmp_path / SITES_FILE).exists()


def test_a_run_of_a_study_asks_only_the_sites_of_the_study(directory, tmp_path):
    chosen = build_run_sites(SiteSettings(), directory, tmp_path, study=HEART)
    assert chosen.names == ("north", "south")
    smaller = Study(sites=("north",))  # the operator has removed south
    assert build_run_sites(SiteSettings(), directory, tmp_path, study=smaller).names == ("north",)


def test_a_person_learns_only_the_names_of_own_studies():
    studies = {"heart": HEART, "lung": Study(sites=("west",), submitters=("ben",))}
    assert find_study(studies, "heart", "anna") is HEART
    texts = set()
    for name in ("lung", "liver", None, "heart"):
        with pytest.raises(SettingError) as caught:
            find_study(studies, name, "carla")
        texts.add(str(caught.value).replace(str(name), "?"))
        assert "heart" not in str(caught.value).replace(f"study is {name}", "")
    assert len(texts) == 1
    with pytest.raises(SettingError, match="expected  one of heart\n"):
        find_study(studies, "lung", "anna")


@pytest.mark.parametrize("person", ["", "ben", "ANNA", "anna\n"])
def test_only_a_named_submitter_may_submit(person):
    with pytest.raises(SettingError, match="study is heart"):
        find_study({"heart": HEART}, "heart", person)


def test_a_coordinator_without_studies_has_runs_without_study():
    assert find_study(None, None, "") is None
    with pytest.raises(SettingError, match="this coordinator has no studies"):
        find_study(None, "heart", "anna")


def test_studies_are_read(tmp_path):
    path = tmp_path / "studies.yaml"
    assert read_studies(path) is None
    path.write_text("heart: {sites: [north, south], submitters: [anna]}\nopen: {sites: [west]}\n")
    assert read_studies(path) == {"heart": HEART, "open": Study(sites=("west",))}
    path.write_text("")
    assert read_studies(path) == {}  # no run is possible, which is the safe reading of an empty file


@pytest.mark.parametrize(
    "text",
    [
        "heart: [north]",
        "heart: {sites: north}",
        "heart: {sites: ['../keys']}",
        "heart: {sites: [north], submitters: anna}",
        "heart: {sites: [north], roles: [anna]}",
        "'../heart': {sites: [north]}",
        "heart: {submitters: [anna]}",
        "- heart",
        "heart: {",
        "heart: !!python/object/apply:os.system ['true']",
    ],
)
def test_a_malformed_file_of_studies_permits_nothing(tmp_path, text):
    (tmp_path / "studies.yaml").write_text(text)
    with pytest.raises(StudyError, match="cannot be read"):
        read_studies(tmp_path / "studies.yaml")
