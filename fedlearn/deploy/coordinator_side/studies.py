"""Read the studies of a coordinator: the sites of each study, and the persons who may submit its runs.

The file ``studies.yaml`` in the coordinator's folder of keys has a line per study, for example::

    heart: {sites: [north, south], submitters: [anna]}

With this file, each run names its study (``study=heart``), and only the sites of the study are asked. Without the file,
the coordinator has no studies, and each person who may submit runs may ask all sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from fedlearn.errors import FedlearnError, SettingError
from fedlearn.protocol.sites import is_site_name
from fedlearn.runner.plain_values import shortened

STUDIES = "studies.yaml"


class StudyError(FedlearnError):
    """Report a file of studies that is malformed."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study.

    Args:
        sites: names of its sites.
        submitters: names of the persons who may submit its runs; None: each person who may submit runs.
    """

    sites: tuple[str, ...]
    submitters: tuple[str, ...] | None = None

    def may_submit(self, person: str) -> bool:
        """Return whether a person may submit runs; an unknown person has an empty name."""
        return self.submitters is None or (bool(person) and person in self.submitters)


def read_studies(path: Path) -> dict[str, Study] | None:
    """Return the studies by name; None if there is no file.

    Raises:
        StudyError: The file is malformed.
    """
    if not path.exists():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return {_name(name): _study(values) for name, values in content.items()}
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError) as error:
        expected = "lines such as heart: {sites: [north, south], submitters: [anna]}"
        raise StudyError(f"{path.name} cannot be read: {error}\n  expected  {expected}") from error


def find_study(studies: Mapping[str, Study] | None, name: str | None, person: str) -> Study | None:
    """Return the study of a run; None at a coordinator without studies.

    Args:
        studies: studies of the coordinator; None: it has no studies.
        name: name of the study in the settings of the run.
        person: name of the submitter; empty: unknown.

    Raises:
        SettingError: The study is missing or unknown, or the person may not submit its runs. The texts for the last two
            cases are equal, so a person learns only the names of studies that the person may use.
    """
    if studies is None:
        if name is None:
            return None
        raise SettingError("study", shortened(name), "null, because this coordinator has no studies", "study=null")
    allowed = sorted(study for study, values in studies.items() if values.may_submit(person))
    if name in allowed:
        return studies[name]
    expected = f"one of {', '.join(allowed)}" if allowed else "a study that lists you as a submitter"
    raise SettingError("study", shortened(name), expected, f"study={allowed[0]}" if allowed else "ask the operator")


def _name(name: Any) -> str:
    if not is_site_name(name):
        raise ValueError(f"{shortened(name)} is not a name")
    return str(name)


def _study(values: Mapping[str, Any]) -> Study:
    unknown = set(values) - {"sites", "submitters"}
    if unknown:
        raise ValueError(f"unknown keys {sorted(map(str, unknown))}")
    sites, submitters = values.get("sites"), values.get("submitters")
    for names in (sites, submitters if submitters is not None else []):
        if not isinstance(names, list):
            raise ValueError(f"{shortened(names)} is not a list of names")
    return Study(
        sites=tuple(map(_name, sites or ())),
        submitters=None if submitters is None else tuple(map(_name, submitters)),
    )
