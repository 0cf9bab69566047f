"""Hide the settings of a run from other persons.

All persons see name, person, folder, scenario, strategy, privacy mechanism, state, rounds, metrics, epsilon and output
of each run. Settings, overrides, commands, reports and files of a run are for its submitter and for admins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedlearn.deploy.coordinator_side.app_bundle import PERSON_KEY, REQUEST_KEY
from fedlearn.deploy.coordinator_side.run_requests import read_request
from fedlearn.deploy.persons import Person, Role

SHARED_EVENT_FIELDS = (  # fields of a line of the audit log that all persons see
    *("n", "time", "event", "prev", "hash", "person", "role", "request", "do", "code", "accepted"),
    *("run", "number", "folder", "exit_code", "status", "rounds", "epsilon", "bytes_up", "bytes_down"),
    *("client_failures", "parameters_sha256", "settings_sha256", "node", "framework", "version"),
)
SHARED_REQUEST_FIELDS = ("do", "folder", "continues")
SHARED_GROUPS = ("scenario", "strategy", "privacy")  # groups of settings whose option all persons see


def visible_events(events: Sequence[Mapping[str, Any]], person: Person) -> list[dict[str, Any]]:
    """Return lines of the audit log, without the settings of other persons' runs unless the person is an admin."""
    if person.role.includes(Role.ADMIN):
        return [dict(event) for event in events]
    return [dict(event) if event.get("person") == person.name else _shared_event(event) for event in events]


def visible_config(config: Mapping[str, Any], person: Person) -> dict[str, Any]:
    """Return the configuration of a run of Flower, without the settings of another person's run."""
    if config.get(PERSON_KEY) == person.name or person.role.includes(Role.ADMIN):
        return dict(config)
    request = read_request(str(config.get(REQUEST_KEY)))
    shared = {name: request[name] for name in SHARED_REQUEST_FIELDS if name in request}
    shared["settings"] = _options(request.get("settings"))
    return {**config, REQUEST_KEY: json.dumps(shared)}


def _shared_event(event: Mapping[str, Any]) -> dict[str, Any]:
    shared = {name: event[name] for name in SHARED_EVENT_FIELDS if name in event}
    return {**shared, "settings": _options(event["settings"])} if "settings" in event else shared


def _options(settings: Any) -> dict[str, Any]:
    """Return the name of the option of each of `SHARED_GROUPS`."""
    groups = settings if isinstance(settings, Mapping) else {}
    chosen = {group: groups.get(group) for group in SHARED_GROUPS}
    return {
        group: {"name": option["name"]}
        for group, option in chosen.items()
        if isinstance(option, Mapping) and isinstance(option.get("name"), str)
    }
