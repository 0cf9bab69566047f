"""Define the base class of partitions. `fedlearn.data.partition` has the kinds and the functions.

Shapes: N examples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedlearn.errors import is_count, is_number, require

DEFAULTS: Mapping[str, Any] = {  # used for settings that neither the user nor the scenario sets
    "num_clients": 10,
    "test_share": 0.25,
    "alpha": 0.5,
    "classes_per_client": 2,
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Describe the rows that a partition divides.

    Args:
        labels_N: class numbers (integers) or real targets.
        natural_N: number of the client that collected each row, from 0; None if unknown.
        order_N: finite numbers that order the rows, e.g. dates; None if there are none.
    """

    labels_N: np.ndarray
    natural_N: np.ndarray | None = None
    order_N: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels_N)


@dataclass(frozen=True, kw_only=True)
class Partition(ABC):
    """Divide the rows of a data set among clients. Subclasses implement `client_rows` and may add fields.

    Args:
        num_clients: number of clients, >= 1; None takes the default of the scenario.
        test_share: share of the examples that each client holds out, in [0, 1); None takes the default of the scenario.

    Attributes:
        kind: name for the header of a run; the name of the class if it is empty.
        needs_classes: True if the labels must be class numbers.
        covers_all_rows: True if each row is at a client.
    """

    num_clients: int | None = None
    test_share: float | None = None

    kind: ClassVar[str] = ""
    needs_classes: ClassVar[bool] = False
    covers_all_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        is_valid_count = self.num_clients is None or is_count(self.num_clients)
        require(is_valid_count, "num_clients", self.num_clients, "a whole number >= 1", "num_clients=10")
        is_share = self.test_share is None or is_number(self.test_share, at_least=0, below=1)
        require(is_share, "test_share", self.test_share, "a share in [0, 1)", "test_share=0.25")

    @property
    def held_out_share(self) -> float:
        """Share of held-out examples: ``test_share``, or its default."""
        return float(DEFAULTS["test_share"] if self.test_share is None else self.test_share)

    @abstractmethod
    def client_rows(self, rows: Rows, seed: int) -> Sequence[np.ndarray]:
        """Return the row numbers of each client. Equal arguments must give equal rows.

        Args:
            rows: labels and other properties of the rows; do not change its arrays.
            seed: seed of all random choices.
        """

    def __str__(self) -> str:
        """Return the name of the kind, for the header of a run."""
        return self.kind or type(self).__name__
