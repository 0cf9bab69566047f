"""Keep the node's own privacy ledger, over all runs. It does not depend on the coordinator's ledger."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.deploy.node_side.client_states import ClientStateError
from fedlearn.privacy.accounting import max_epsilon_bounds

LEDGER_FILE = "ledger.json"


@dataclass(frozen=True)
class PrivacyBudget:
    """The privacy ledger of a node, in a file.

    Args:
        folder: folder of the client states.
    """

    folder: Path

    def refusal_reason(
        self, guarantee: PrivacyGuarantee, release: Release, *, epsilon: float, delta: float
    ) -> str | None:
        """Return the reason to refuse a request whose release would exceed a limit; None to accept it.

        Args:
            guarantee: privacy guarantee of the strategy.
            release: clients, examples and steps of the request.
            epsilon: largest accepted privacy loss of a client of this node, >= 0.
            delta: delta of ``epsilon``, in (0, 1).
        """
        epsilon_after = max_epsilon_bounds(guarantee.charge(self.ledger(), release).histories, delta=delta).value
        if epsilon_after <= epsilon:
            return None
        spent = f"the request would raise epsilon at this node to {epsilon_after:.4g} at delta={delta:g}"
        return f"{spent}; this node accepts {epsilon:g} (required_privacy.max_epsilon)"

    def charge(self, guarantee: PrivacyGuarantee, release: Release) -> None:
        """Charge a release on disk; call this before the training. A repeated request is charged again."""
        ledger = guarantee.charge(self.ledger(), release)
        write_atomically(self.folder / LEDGER_FILE, json.dumps(ledger.to_json(), indent=1) + "\n")

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
                f"{path} is damaged: the privacy loss of this node is unknown\n  try       a backup of this file"
            ) from error
