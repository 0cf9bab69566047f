"""Charge and count a training request on the disk of a node, before its clients train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.privacy_guarantee import Release
from fedlearn.core.records import ClientId, Request
from fedlearn.deploy.node_side.client_states import ClientStates
from fedlearn.deploy.node_side.pending_charges import PendingCharges
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.privacy_budget import PrivacyBudget
from fedlearn.deploy.node_side.query_log import QueryLog, digest_of, digest_of_params
from fedlearn.loop.scenario import Scenario


@dataclass(frozen=True, kw_only=True)
class TrainingAdmission:
    """Decide whether a node trains for a request.

    Args:
        policy: policy in force.
        client_states: counts of training requests.
        queries: log of models and evaluations.
        budget: ledger of the node.
        pending: charges of requests in progress.
    """

    policy: Policy
    client_states: ClientStates
    queries: QueryLog
    budget: PrivacyBudget
    pending: PendingCharges

    def admit(
        self,
        run: str,
        settings: Mapping[str, Any],
        order: Request,
        strategy: Strategy,
        scenario: Scenario,
        *,
        clients: Sequence[ClientId],
        kind: str,
        digest: str,
    ) -> dict[ClientId, int]:
        """Charge and count a training request on disk. Return the charged number of local steps of each client.

        The request costs the same if its training fails later. It costs nothing if an equal request was charged, and
        this process was killed before its training ended.

        Args:
            run: name of the run.
            settings: settings of the request.
            order: training order.
            strategy: strategy of the request.
            scenario: scenario of the request.
            clients: clients that train.
            kind: kind of the request.
            digest: digest of the request.

        Raises:
            NodeRefusal: A limit is reached, or the run is closed. Then nothing is charged.
        """
        is_paid = self.pending.includes(run, kind, digest)
        of_run, total = (0, 0) if is_paid else self.client_states.request_counts(run)
        self.policy.check_request(order, settings, num_requests_of_run=of_run, num_requests_total=total)
        scenario_digest = digest_of(settings["scenario"])
        params = None if order.client_models else digest_of_params(order.params_D)
        self.queries.check_training(run, order.round, scenario=scenario_digest, params=params)
        sizes = np.array([len(scenario.data.train(client)) for client in clients])
        release = Release(
            round=order.round,
            clients=tuple(clients),
            num_examples=tuple(sizes.tolist()),
            num_steps=tuple(order.local.num_steps(sizes).tolist()),
        )
        if not is_paid:
            self.budget.charge_training(strategy.privacy_guarantee, release)
            self.client_states.count_request(run)
        self.queries.record_training(run, order.round, scenario=scenario_digest)
        return dict(zip(release.clients, release.num_steps or (), strict=True))
