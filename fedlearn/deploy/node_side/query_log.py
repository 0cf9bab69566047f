"""Count the answers of a node that depend on its data, on disk and over all runs.

A coordinator chooses the models that a node evaluates and the scenarios that it builds. So each answer can reveal
something about the data, even if it is only a refusal. The log bounds the number of answers:

* Each scenario counts once, also if the node cannot build it.
* A node evaluates one model per round of a run. An equal request again gets an equal response and costs nothing.
* The next training request of the run must have the evaluated model. Otherwise the node closes the run.

A strategy that sends each client its own model (`fedamp`) is free in the choice of these models.

A coordinator can still train on a model that it chose for its evaluation. Then each evaluation costs a counted round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedlearn.core.private_files import write_private_json
from fedlearn.core.serialization import WireError, read_fields
from fedlearn.deploy.node_side.client_states import ClientStateError
from fedlearn.deploy.node_side.policy_violation import NodeRefusal
from fedlearn.protocol.refusals import RefusalCode

QUERY_LOG_FILE = "queries.json"


@dataclass(frozen=True, kw_only=True)
class RunQueries:
    """The answers of a node in one run.

    Attributes:
        scenario: digest of the settings of the scenario; empty before the first training or evaluation.
        num_evaluations: number of rounds in which the node evaluated a model.
        round: round of the last evaluation; -1 before the first one.
        params: digest of the model of this evaluation; empty if the next training request may have any model.
        requests: kind of evaluation -> digest of this request of the round.
        is_closed: True if the node refuses all further requests of the run.
    """

    scenario: str = ""
    num_evaluations: int = 0
    round: int = -1
    params: str = ""
    requests: Mapping[str, str] = field(default_factory=dict)
    is_closed: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationLimits:
    """The largest numbers of evaluations: of one run, and of all runs."""

    of_run: int
    total: int


@dataclass(frozen=True)
class QueryLog:
    """The answers of a node that depend on its data, in a file.

    Args:
        folder: folder of the client states.
    """

    folder: Path

    def admit_scenario(self, settings: Mapping[str, Any], *, limit: int) -> None:
        """Count a scenario on disk, unless the node has counted the same settings before.

        Raises:
            NodeRefusal: The node has counted ``limit`` other scenarios.
        """
        content, scenario = self._read(), digest_of(settings)
        if scenario in content.scenarios:
            return
        if len(content.scenarios) >= limit:
            raise NodeRefusal(RefusalCode.SCENARIO_LIMIT, f"{len(content.scenarios)} scenarios, max_scenarios={limit}")
        self._write(replace(content, scenarios=(*content.scenarios, scenario)))

    def admit_evaluation(
        self,
        run: str,
        round: int,
        *,
        scenario: str,
        params: str,
        kind: str,
        request: str,
        limits: EvaluationLimits,
    ) -> None:
        """Count an evaluation on disk, before the node evaluates.

        The global model and the personal models of a round count as one evaluation: their requests have equal
        parameters. A repeated request is not counted again.

        Args:
            run: name of the run.
            round: round of the request, >= 0.
            scenario: digest of the scenario's settings.
            params: digest of the model.
            kind: kind of evaluation: of the model itself, or of the personal models.
            request: digest of the request without its id.
            limits: largest numbers of evaluations.

        Raises:
            NodeRefusal: The run is closed or has another scenario, the node has evaluated another model in this or a
                later round, or a limit is reached.
        """
        content = self._read()
        queries = _in_scenario(content.runs.get(run, RunQueries()), scenario)
        if queries.requests.get(kind) == request:
            return
        is_other = params != queries.params or kind in queries.requests
        if round < queries.round or (round == queries.round and is_other):
            raise NodeRefusal(RefusalCode.EVALUATION_REPEATED, f"round {round}, after round {queries.round}")
        if round > queries.round:
            total = sum(each.num_evaluations for each in content.runs.values())
            if queries.num_evaluations >= limits.of_run or total >= limits.total:
                detail = f"{queries.num_evaluations} evaluations of this run, {total} of all runs"
                raise NodeRefusal(RefusalCode.EVALUATION_LIMIT, detail)
            count = queries.num_evaluations + 1
            queries = replace(queries, num_evaluations=count, round=round, params=params, requests={})
        queries = replace(queries, requests={**queries.requests, kind: request})
        self._write(replace(content, runs={**content.runs, run: queries}))

    def check_training(self, run: str, round: int, *, scenario: str, params: str | None) -> None:
        """Check a training request against the last evaluation of its run.

        Args:
            run: name of the run.
            round: round of the request.
            scenario: digest of the scenario's settings.
            params: digest of the model; None if each client gets its own model, which no node evaluates before.

        Raises:
            NodeRefusal: The run is closed or has another scenario, or the model is not the evaluated one. The node then
                closes the run.
        """
        content = self._read()
        queries = _in_scenario(content.runs.get(run, RunQueries()), scenario)
        if round == queries.round + 1 and queries.params and params not in (None, queries.params):
            self._write(replace(content, runs={**content.runs, run: replace(queries, is_closed=True)}))
            raise NodeRefusal(RefusalCode.RUN_CLOSED, f"the model of round {round} differs from the evaluated model")

    def record_training(self, run: str, round: int, *, scenario: str) -> None:
        """Record a training request that the node has counted.

        After a resume, a coordinator repeats rounds, perhaps with other models. So a request of an evaluated round
        allows an evaluation of this round again. It costs a counted round.
        """
        content = self._read()
        queries = _in_scenario(content.runs.get(run, RunQueries()), scenario)
        if round <= queries.round:
            queries = replace(queries, round=round - 1, params="", requests={})
        if queries != content.runs.get(run):
            self._write(replace(content, runs={**content.runs, run: queries}))

    def _read(self) -> _Content:
        path = self.folder / QUERY_LOG_FILE
        try:
            fields = read_fields(json.loads(path.read_text(encoding="utf-8")), scenarios=list, runs=dict)
            runs = {str(run): RunQueries(**values) for run, values in fields["runs"].items()}
            return _Content(scenarios=tuple(map(str, fields["scenarios"])), runs=runs)
        except FileNotFoundError:
            return _Content()
        except (ValueError, TypeError, KeyError, WireError) as error:
            raise ClientStateError(
                f"{path} is damaged: the number of answers of this node is unknown\n"
                "  advice    restore a backup of this file"
            ) from error

    def _write(self, content: _Content) -> None:
        runs = {run: asdict(queries) for run, queries in content.runs.items()}
        write_private_json(self.folder / QUERY_LOG_FILE, {"scenarios": content.scenarios, "runs": runs})


@dataclass(frozen=True, kw_only=True)
class _Content:
    """The content of the file: digests of scenarios, and run -> answers of the run."""

    scenarios: tuple[str, ...] = ()
    runs: Mapping[str, RunQueries] = field(default_factory=dict)


def digest_of(settings: Mapping[str, Any]) -> str:
    """Return a digest of settings. It does not depend on the order of their names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def digest_of_params(params_D: np.ndarray) -> str:
    """Return a digest of the parameters of a model."""
    return hashlib.sha256(np.ascontiguousarray(params_D, np.float32).reshape(-1).view(np.uint8).data).hexdigest()


def _in_scenario(queries: RunQueries, scenario: str) -> RunQueries:
    """Return the answers of a run with its scenario; refuse a closed run and another scenario."""
    if queries.is_closed:
        raise NodeRefusal(RefusalCode.RUN_CLOSED)
    if queries.scenario and queries.scenario != scenario:
        raise NodeRefusal(RefusalCode.OTHER_SCENARIO)
    return replace(queries, scenario=scenario)
