"""Provide nodes and runs of a coordinator for its page and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlearn.deploy.audit_log import AuditLog, RefusalLimit
from fedlearn.deploy.connectivity import ConnectionProblem
from fedlearn.deploy.coordinator_side.app_bundle import PERSON_KEY
from fedlearn.deploy.coordinator_side.control_api import CoordinatorClient, NodeState, RunState
from fedlearn.deploy.coordinator_side.ownership import DEPLOYMENT_FILE, owner_of
from fedlearn.deploy.coordinator_side.run_audit import MEMBERS_FILE
from fedlearn.deploy.coordinator_side.run_files import RunFileError, find_folder
from fedlearn.deploy.persons import Person, Persons, PersonsError, Role, read_persons
from fedlearn.web.run_list import RunList
from fedlearn.web.run_views import QUEUED, RunDetail, RunView
from fedlearn.web.safe_files import as_object, as_text, read_object
from fedlearn.web.sources import NodeView, Snapshot


@dataclass
class CoordinatorSource:
    """The nodes of a federation, and the runs in the coordinator's folder of runs.

    Args:
        control: connection to the coordinator; its calls only read.
        runs: folder of the run folders.
        title: name of the federation on the page.
        state: state folder of the coordinator.
    """

    control: CoordinatorClient
    runs: Path
    title: str
    state: Path
    list: RunList = field(init=False)

    def __post_init__(self) -> None:
        self.list = RunList(self.runs)

    def snapshot(self) -> Snapshot:
        """Return nodes and runs. If the coordinator gives no answer, the snapshot has the runs of the folder only."""
        views = [self._with_origin(view) for view in self.list.update()]
        nodes: Sequence[NodeView] = []
        problem = ""
        try:
            nodes = self._nodes(self.control.node_states())
            views = [*_queued(self.control.run_states()), *views]
        except ConnectionProblem as error:
            problem = f"The coordinator gives no answer: {str(error).splitlines()[0]}"
        num_runs = self.list.num_runs + sum(view.state == QUEUED for view in views)
        return Snapshot(title=self.title, runs=views, num_runs=num_runs, nodes=nodes, problem=problem)

    def _nodes(self, states: Sequence[NodeState]) -> Sequence[NodeView]:
        """Return the nodes, with version and framework of the last run that they joined."""
        state = self.state.resolve()
        members = read_object(state, state / MEMBERS_FILE)
        described = [(node, as_object(members.get(node.name))) for node in states]
        return [
            NodeView(
                name=node.name,
                state=node.state,
                since=node.since,
                version=as_text(member.get("version")),
                framework=as_text(member.get("framework")),
            )
            for node, member in described
        ]

    def detail(self, key: str) -> RunDetail | None:
        """Return all about a run; None for other keys."""
        detail = self.list.detail(key)
        return detail and replace(detail, run=self._with_origin(detail.run))

    def report(self, key: str) -> bytes:
        """Return the report of a run; empty without a report, and for other keys."""
        return self.list.report(key)

    def _with_origin(self, view: RunView) -> RunView:
        """Return a run with its name and the person who submitted it."""
        root = self.list.root
        origin = read_object(root, root / view.key / DEPLOYMENT_FILE)
        return replace(view, name=as_text(origin.get("id")), submitter=as_text(origin.get(PERSON_KEY)))


def _queued(runs: Sequence[RunState]) -> list[RunView]:
    """Return the runs that wait for their start, which have no run folder yet."""
    waiting = [run for run in runs if run.status == "pending"]
    parts = [run.experiment.partition(" · ") for run in waiting]
    return [
        RunView(
            key=f"{run.folder} ({run.id})",
            state=QUEUED,
            name=run.name,
            scenario=part[0],
            strategy=part[2],
            submitter=run.person,
        )
        for run, part in zip(waiting, parts, strict=True)
    ]


@dataclass
class PersonAccounts:
    """The persons of a coordinator, as accounts of its page. Each role may read the page.

    Args:
        path: path of ``persons.json``.
        audit: audit log, which gets a line for each attempt to sign in.
        runs: folder of the run folders.
    """

    path: Path
    audit: AuditLog
    runs: Path
    persons: Persons = field(init=False)
    _limit: RefusalLimit = field(init=False)

    def __post_init__(self) -> None:
        self.persons, self._limit = Persons(self.path), RefusalLimit()

    def check(self, token: str) -> str | None:
        """Return the name of the person with this token; None for a wrong token."""
        person = self.persons.authenticate(token.encode("utf-8", "replace"))
        return person.name if person else None

    def record(self, person: str | None, address: str) -> None:
        """Write an attempt to sign in to the audit log; 100 lines per hour for each person, and for all strangers."""
        if not self._limit.allows(person or ""):
            return
        event = "web.refused" if person is None else "web.signed_in"
        fields = {} if person is None else {"person": person}
        with suppress(OSError):  # a full disk does not stop reading
            self.audit.append(event, **fields, address=address)

    def is_active(self, person: str) -> bool:
        """Return whether the token of a person is still valid."""
        return self._find(person) is not None

    def may_open_report(self, person: str, key: str) -> bool:
        """Return whether a person is an admin, or the submitter of a run."""
        known = self._find(person)
        if known is None or known.role.includes(Role.ADMIN):
            return known is not None
        try:
            return owner_of(find_folder(self.runs, key)) == person
        except RunFileError:
            return False

    def _find(self, name: str) -> Person | None:
        try:
            person = read_persons(self.path).get(name)
        except PersonsError:
            return None
        return None if person is None or person.revoked else person
