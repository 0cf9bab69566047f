"""A node's own ledger: what its clients' data have paid for in all runs together, whatever a coordinator counts."""

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
    """The ledger in a folder.

    Args:
        folder: of the node's memories.
    """

    folder: Path

    def refusal_reason(
        self, guarantee: PrivacyGuarantee, release: Release, *, epsilon: float, delta: float
    ) -> str | None:
        """Why an order must not be carried out: a client would pass ``epsilon``. None if it may."""
        after = max_epsilon_bounds(guarantee.charge(self.ledger(), release).histories, delta=delta).value
        if after <= epsilon:
            return None
        return f"it would bring epsilon at this node to {after:.4g} at delta {delta:g}; this node accepts {epsilon:g}"

    def charge(self, guarantee: PrivacyGuarantee, release: Release) -> None:
        """Note what an order costs, on disk before anything is trained; one that is repeated costs again."""
        ledger = guarantee.charge(self.ledger(), release)
        write_atomically(self.folder / LEDGER_FILE, json.dumps(ledger.to_json(), indent=1) + "\n")

    def ledger(self) -> Ledger:
        """What was paid for so far.

        Raises:
            MemoryLost: the file is damaged.
        """
        path = self.folder / LEDGER_FILE
        try:
            return Ledger.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Ledger()
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise ClientStateError(f"{path} is damaged: it is not known what this node's data have paid for") from error
