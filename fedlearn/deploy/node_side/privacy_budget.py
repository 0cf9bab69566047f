"""Keep the node's own privacy ledger, over all runs. It does not depend on the coordinator's ledger."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import EpsilonDeltaEvent, Ledger
from fedlearn.core.private_files import write_private_json
from fedlearn.core.records import ClientId
from fedlearn.deploy.node_side.client_states import ClientStateError
from fedlearn.deploy.node_side.policy_violation import NodeRefusal, PolicyViolation
from fedlearn.deploy.node_side.required_privacy import RequiredPrivacy
from fedlearn.privacy.accounting import max_epsilon_bounds
from fedlearn.protocol.refusals import RefusalCode

LEDGER_FILE = "ledger.json"


@dataclass(frozen=True)
class PrivacyBudget:
    """The privacy ledger of a node, in a file.

    A charge is on disk before the node trains or evaluates. A node that stops in between has paid for nothing, which is
    the safe side.

    Args:
        folder: folder of the client states.
        required: limit of the privacy loss.
    """

    folder: Path
    required: RequiredPrivacy = field(default_factory=RequiredPrivacy)

    def charge_training(self, guarantee: PrivacyGuarantee | None, release: Release) -> None:
        """Charge a training request on disk, if the node has a limit.

        Args:
            guarantee: privacy guarantee of the strategy; None for none.
            release: clients, examples and steps of the request.

        Raises:
            PolicyViolation: The strategy has no epsilon for the clients of this node.
            NodeRefusal: The request would exceed the limit. Nothing is charged.
        """
        if self.required.max_epsilon is None:
            return
        before = self.ledger()
        after = before if guarantee is None else guarantee.charge(before, release)
        if guarantee is None or guarantee.epsilon_of(after) is None or after.histories == before.histories:
            kind = "none" if guarantee is None else guarantee.kind
            raise PolicyViolation(
                f"privacy={kind} has no epsilon for the clients of this node, which has required_privacy.max_epsilon="
                f"{self.required.max_epsilon:g}; try privacy=example, privacy=local or privacy=distributed"
            )
        self._write_within_limit(after)

    def charge_evaluation(self, clients: Sequence[ClientId], epsilon: float) -> None:
        """Charge one evaluation with noise on disk.

        Args:
            clients: ids of the evaluated clients.
            epsilon: privacy loss of the evaluation of a client, > 0.

        Raises:
            NodeRefusal: The evaluation would exceed the limit. Nothing is charged.
        """
        event = EpsilonDeltaEvent(epsilon)
        self._write_within_limit(self.ledger().charge_clients(dict.fromkeys(clients, (event, 1))))

    def epsilon(self) -> float | None:
        """Return the largest privacy loss of a client so far; None if nothing was charged.

        Raises:
            ClientStateError: The ledger is damaged.
        """
        histories = self.ledger().histories
        return float(max_epsilon_bounds(histories, delta=self.required.delta).value) if histories else None

    def ledger(self) -> Ledger:
        """Return the ledger with all charged releases.

        Raises:
            ClientStateError: The file is damaged.
        """
        path = self.folder / LEDGER_FILE
        try:
            return Ledger.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Ledger()
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise ClientStateError(
                f"{path} is damaged: the privacy loss of this node is unknown\n"
                "  advice    restore a backup of this file"
            ) from error

    def _write_within_limit(self, ledger: Ledger) -> None:
        limit, delta = self.required.max_epsilon, self.required.delta
        if limit is not None and (epsilon := max_epsilon_bounds(ledger.histories, delta=delta).value) > limit:
            spent = f"the request would raise epsilon at this node to {epsilon:.4g} at delta={delta:g}"
            raise NodeRefusal(RefusalCode.EPSILON_LIMIT, f"{spent}; required_privacy.max_epsilon is {limit:g}")
        write_private_json(self.folder / LEDGER_FILE, ledger.to_json())
