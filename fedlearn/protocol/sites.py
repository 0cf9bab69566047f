"""Define the sites of a run: the nodes that it may ask, and the number of sites that it needs to start.

The operator of the coordinator gives each node's key a name, the name of its site. Flower's ids of nodes are addresses
only; no message shows them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

CONNECT_GRACE_S = 5.0  # seconds for the sites of a run without a list of sites to connect at its start
SETTLE_S = 10.0  # seconds for connected sites to answer after ``min_sites`` sites have joined
SITE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
STRANGER = "a node outside this run"


def is_site_name(name: object) -> bool:
    """Return whether a value has the form of a site's name. No such name is a path or has control characters.

    >>> is_site_name("north-2"), is_site_name("../keys"), is_site_name("north\\n"), is_site_name(7)
    (True, False, False, False)
    """
    return isinstance(name, str) and SITE_NAME.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class RunSites:
    """The sites of a run.

    Args:
        site_of: function from Flower's id of a node to the name of its site; None: no admitted node has this id.
        names: sites of the run; no other node is asked. None: all sites.
        min_sites: smallest number of sites for the start, >= 1, default 1.
        waits_for_disconnected: True if the start waits for sites that are not connected.
        rejoining: sites that took part before the run was interrupted; the start waits for them.
        settle_s: seconds to wait for connected sites after ``min_sites`` sites have joined; default: to the deadline.
        on_join: function that gets the names of the joined sites at the start, and after each change.
        report: function that gets a line about the wait.
    """

    site_of: Callable[[int], str | None] = lambda node_id: f"node{node_id}"
    names: tuple[str, ...] | None = None
    min_sites: int = 1
    waits_for_disconnected: bool = False
    rejoining: frozenset[str] = frozenset()
    settle_s: float = math.inf
    on_join: Callable[[Collection[str]], None] = lambda names: None
    report: Callable[[str], None] = lambda line: None

    def includes(self, node_id: int) -> bool:
        """Return whether the run may ask a node."""
        site = self.site_of(node_id)
        return site is not None and (self.names is None or site in self.names)

    def name(self, node_id: int) -> str:
        """Return the name of a node's site, for a message."""
        return f"site {self.site_of(node_id)}" if self.includes(node_id) else STRANGER


@dataclass(frozen=True, kw_only=True)
class StartState:
    """The sites at one moment of the start.

    Args:
        sites: sites of the run.
        connected: names of the connected sites.
        joined: names of the sites that have joined.
        refused: reason of the refusal of each refusing site.
        waited_s: seconds since the start.
        settled_s: seconds since ``min_sites`` sites had joined.
    """

    sites: RunSites
    connected: Collection[str]
    joined: Collection[str]
    refused: Collection[str]
    waited_s: float
    settled_s: float = 0.0

    @property
    def has_enough(self) -> bool:
        """True if as many sites as needed have joined."""
        return len(self.joined) >= self.sites.min_sites

    @property
    def is_ready(self) -> bool:
        """True if enough sites have joined, and all sites to wait for have answered."""
        return self.has_enough and (not self.awaited or self._is_settled)

    @property
    def is_hopeless(self) -> bool:
        """True if the sites that have not refused are too few."""
        possible = set(self._candidates) - set(self.refused)
        return bool(self.refused) and len(possible) < self.sites.min_sites

    @property
    def awaited(self) -> tuple[str, ...]:
        """Names of the sites that may still join, and for which the start waits."""
        names = {*self.connected, *self.sites.rejoining}
        if not self.has_enough or self.waited_s < CONNECT_GRACE_S:
            names |= set(self._candidates)
        return tuple(sorted(names - {*self.joined, *self.refused}))

    @property
    def _is_settled(self) -> bool:
        return self.settled_s >= self.sites.settle_s and not self.sites.rejoining - {*self.joined, *self.refused}

    @property
    def _candidates(self) -> Collection[str]:
        """Names of the sites that may join: absent sites count if the run waits for them."""
        is_open = self.sites.waits_for_disconnected or self.waited_s < CONNECT_GRACE_S
        return self.sites.names if self.sites.names is not None and is_open else self.connected

    def describe(self) -> str:
        """Return a line with the missing sites by name.

        >>> sites = RunSites(names=("north", "south", "west"), min_sites=3, waits_for_disconnected=True)
        >>> state = StartState(sites=sites, connected=["north", "south"], joined=["north"], refused=[], waited_s=7.0)
        >>> state.describe()
        '1 of 3 sites joined; no answer yet: south; not connected: west'
        """
        names = sorted(self.sites.names or {*self.connected, *self.joined, *self.refused})
        absent = [name for name in names if name not in {*self.connected, *self.refused}]
        silent = [name for name in names if name in self.connected and name not in {*self.joined, *self.refused}]
        groups = {"no answer yet": silent, "not connected": absent, "refused": sorted(self.refused)}
        missing = [f"; {state}: {', '.join(group)}" for state, group in groups.items() if group]
        return f"{len(self.joined)} of {len(names)} sites joined{''.join(missing)}"
