"""Choose the sites of a run at its start, and remember them in the run folder for a resumed run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from fedlearn.advice import assignment
from fedlearn.core.checkpoint import write_atomically
from fedlearn.deploy.coordinator_side.admission import NODES_FILE
from fedlearn.deploy.coordinator_side.studies import Study
from fedlearn.errors import SettingError, require
from fedlearn.protocol.sites import SETTLE_S, RunSites, is_site_name
from fedlearn.runner.site_settings import SiteSettings

SITES_FILE = "sites.json"  # in the run folder: sites of the run, and the sites that have joined


class SiteDirectory:
    """Names of the admitted nodes, from the list that the coordinator writes into its state folder.

    Args:
        state: state folder of the coordinator.
    """

    def __init__(self, state: Path) -> None:
        self.path = state / NODES_FILE
        self._names: dict[int, str] = {}
        self._modified_ns = -1

    def site_of(self, node_id: int) -> str | None:
        """Return the name of a node's site; None if no admitted node has this id."""
        self._refresh()
        return self._names.get(node_id)

    def names(self) -> list[str]:
        """Return the names of all admitted sites, in order."""
        self._refresh()
        return sorted(set(self._names.values()))

    def _refresh(self) -> None:
        """Read the list again if it has changed: nodes are admitted and revoked during a run."""
        try:
            modified_ns = self.path.stat().st_mtime_ns
            if modified_ns != self._modified_ns:
                nodes = json.loads(self.path.read_text(encoding="utf-8"))
                self._names = {int(node_id): str(name) for node_id, (name, _) in nodes.items()}
                self._modified_ns = modified_ns
        except FileNotFoundError:
            self._names = {}


@dataclass(frozen=True, kw_only=True)
class StoredSites:
    """The sites of a run in its folder.

    Args:
        names: sites that the run may ask.
        started: sites that took part in the first start; empty before it.
        joined: sites that took part when the file was written.
    """

    names: tuple[str, ...]
    started: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the file of a run folder."""
        write_atomically(folder / SITES_FILE, json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> StoredSites | None:
        """Return the sites in a run folder; None for a run that has not stored its sites."""
        try:
            content = json.loads((folder / SITES_FILE).read_text(encoding="utf-8"))
            stored = cls(**{field.name: tuple(content[field.name]) for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return stored if all(map(is_site_name, (*stored.names, *stored.started, *stored.joined))) else None


def choose_sites(settings: SiteSettings, study: Study | None, admitted: Collection[str]) -> tuple[str, ...]:
    """Return the sites that a new run may ask.

    Args:
        settings: settings of the submitter.
        study: study of the run; None: the coordinator has no studies.
        admitted: names of the admitted sites.

    Raises:
        SettingError: A named site is not admitted, or is not in the study; both have the same text.
    """
    possible = sorted(set(admitted) if study is None else set(admitted) & set(study.sites))
    if settings.sites is None:
        require(bool(possible), "sites", "null", "at least one admitted site", "fedlearn deploy keys add")
        return tuple(possible)
    unknown = [site for site in settings.sites if site not in possible]
    if unknown:
        fix = assignment("sites", possible) if possible else "ask the operator to admit a site"
        raise SettingError("sites", unknown[0], f"one of {', '.join(possible) or 'no site'}", fix)
    return settings.sites


def build_run_sites(
    settings: SiteSettings,
    directory: SiteDirectory,
    folder: Path,
    *,
    study: Study | None = None,
    is_private: bool = False,
) -> RunSites:
    """Return the sites of a new or resumed run, and store them in its folder.

    A resumed run asks the sites of its start only. A site that was removed from the study is not asked either.

    Args:
        settings: settings of the submitter.
        directory: names of the admitted nodes.
        folder: run folder.
        study: study of the run; None: the coordinator has no studies.
        is_private: True if a privacy mechanism is for the sites of the first start; a resumed run then has no others.

    Raises:
        SettingError: A named site is not admitted, or is not in the study.
    """
    stored = StoredSites.read(folder)
    names = stored.names if stored else choose_sites(settings, study, directory.names())
    if stored and stored.started and is_private:
        names = tuple(name for name in names if name in stored.started)
    if study is not None:
        names = tuple(name for name in names if name in study.sites)
    joined = frozenset(stored.joined if stored else ()) & set(names)
    state = replace(stored or StoredSites(names=names), names=names, joined=tuple(sorted(joined)))
    state.write(folder)

    def remember(present: Collection[str]) -> None:
        nonlocal state
        now = tuple(sorted(present))
        if now and now != state.joined:  # the loss of all sites is a fault of the network
            state = replace(state, joined=now, started=state.started or now)
            state.write(folder)

    return RunSites(
        site_of=directory.site_of,
        names=names,
        min_sites=settings.min_sites or (1 if settings.sites is None else len(settings.sites)),
        waits_for_disconnected=settings.sites is not None,
        rejoining=joined,
        settle_s=math.inf if settings.min_sites is None else SETTLE_S,
        on_join=remember,
        report=_print_line,
    )


def _print_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
