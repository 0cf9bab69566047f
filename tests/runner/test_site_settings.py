"""Settings that name the sites of a run: forms that are refused before a run starts."""

import pytest

from fedlearn.errors import SettingError
from fedlearn.runner.site_settings import read_site_settings, refuse_site_settings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sites": ["../keys"]}, "names with letters"),
        ({"sites": ["/etc/passwd"]}, "names with letters"),
        ({"sites": ["north\x1b[2J"]}, "names with letters"),
        ({"sites": ["north\nround 1/9"]}, "names with letters"),
        ({"sites": [7]}, r"names with letters.*\n.*sites=\['7'\]"),
        ({"sites": [["north"]]}, "names with letters"),
        ({"sites": [{"north": 1}]}, "names with letters"),
        ({"sites": []}, "a list of names"),
        ({"sites": "north"}, r"a list of names.*\n  try       sites=\['north'\]"),
        ({"sites": {"north": 1}}, "a list of names"),
        (
            {"sites": ["north", "south", "north"]},
            r"sites is north\n  expected  each site once.*\n.*\['north', 'south'\]",
        ),
        ({"sites": ["north"], "min_sites": 2}, "at most 1, the number of sites"),
        ({"min_sites": 0}, "a whole number >= 1"),
        ({"min_sites": True}, "a whole number >= 1"),
        ({"min_sites": 0.5}, "a whole number >= 1"),
        ({"study": "../heart"}, "a name with letters"),
        ({"study": 7}, "a name with letters"),
    ],
    ids=str,
)
def test_a_malformed_name_is_refused_with_the_form(settings, reason):
    with pytest.raises(SettingError, match=rf"(?s){reason}") as caught:
        read_site_settings(settings)
    assert "\x1b" not in caught.value.on_command_line()


def test_sites_are_read_in_their_order():
    read = read_site_settings({"sites": ["south", "north"], "min_sites": 1, "study": "heart"})
    assert (read.sites, read.min_sites, read.study) == (("south", "north"), 1, "heart")
    assert read_site_settings({}).sites is None


@pytest.mark.parametrize("settings", [{"sites": ["north"]}, {"min_sites": 1}, {"study": "heart"}], ids=str)
def test_a_simulation_has_no_sites(settings):
    with pytest.raises(SettingError, match="null in a simulation"):
        refuse_site_settings(settings)
