"""Read the settings for the sites of a deployed run: sites, min_sites and study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlearn.advice import assignment
from fedlearn.errors import SettingError, is_count, require
from fedlearn.protocol.sites import is_site_name
from fedlearn.runner.plain_values import shortened

FORM = "letters, digits, - _ and ., at most 100 characters"


@dataclass(frozen=True, kw_only=True)
class SiteSettings:
    """The sites of a run, as the submitter names them.

    Args:
        sites: names of the sites; None: all admitted sites.
        min_sites: smallest number of sites at the start; None: all named sites, or one site.
        study: name of the study; None: no study.
    """

    sites: tuple[str, ...] | None = None
    min_sites: int | None = None
    study: str | None = None


def read_site_settings(settings: Mapping[str, Any]) -> SiteSettings:
    """Return the checked settings.

    Args:
        settings: all settings of a run, or an untrusted mapping.

    Raises:
        SettingError: A name is malformed or occurs twice, the list is empty, or ``min_sites`` is out of range.
    """
    sites, min_sites, study = (settings.get(name) for name in ("sites", "min_sites", "study"))
    if sites is not None:
        _check_names(sites)
    expected, fix = "a whole number >= 1, or null", "min_sites=2"
    require(min_sites is None or is_count(min_sites), "min_sites", min_sites, expected, fix)
    if sites is not None and min_sites is not None:
        expected = f"at most {len(sites)}, the number of sites"
        require(min_sites <= len(sites), "min_sites", min_sites, expected, f"min_sites={len(sites)}")
    require(study is None or is_site_name(study), "study", shortened(study), f"a name with {FORM}", "study=null")
    return SiteSettings(sites=None if sites is None else tuple(sites), min_sites=min_sites, study=study)


def refuse_site_settings(settings: Mapping[str, Any]) -> None:
    """Refuse these settings in a simulation, which has no sites.

    Raises:
        SettingError: A setting has a value.
    """
    for name in ("sites", "min_sites", "study"):
        expected = "null in a simulation: only fedlearn.deploy.submit and fedlearn.deploy.rehearse have sites"
        require(settings.get(name) is None, name, shortened(settings.get(name)), expected, f"{name}=null")


def _check_names(sites: Any) -> None:
    fix = assignment("sites", [sites]) if is_site_name(sites) else "sites=[north,south]"
    if not isinstance(sites, list | tuple) or not sites:
        raise SettingError("sites", shortened(sites), "a list of names of sites, or null", fix)
    for site in sites:
        fix = assignment("sites", [str(site)]) if is_site_name(str(site)) else "sites=[north,south]"
        require(is_site_name(site), "sites", shortened(site), f"names with {FORM}", fix)
    site, count = Counter(sites).most_common(1)[0]
    require(count == 1, "sites", site, "each site once", assignment("sites", list(dict.fromkeys(sites))))
