"""Read cells of the held-out rows again, so that a run keeps no raw rows in memory.

Shapes: N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlearn.core.records import ClientId
from fedlearn.data.tables import Table
from fedlearn.errors import DataError


@dataclass(frozen=True, kw_only=True)
class HeldOutColumns:
    """Name the columns of a table, and read the cells of one of them.

    Args:
        names: names of the columns.
        read: function from a name to the cells of the held-out rows of each client, in the order of the test examples.
    """

    names: tuple[str, ...]
    read: Callable[[str], Mapping[ClientId, np.ndarray]]


def held_out_columns(
    read_table: Callable[[Sequence[str]], Table], names: Sequence[str], rows: Sequence[np.ndarray], num_rows: int
) -> HeldOutColumns:
    """Return the columns of a table whose rows were divided before.

    Args:
        read_table: function from columns to leave out to the table, which reads the files again.
        names: all columns of the files, also columns without an effect on the model.
        rows: held-out rows of each client.
        num_rows: number of rows of the table.
    """

    def read(name: str) -> Mapping[ClientId, np.ndarray]:
        table = read_table([other for other in names if other != name])
        cells_N = table.column(name, "subgroups")
        if len(cells_N) != num_rows:
            problem = f"the files have {len(cells_N):,} rows, but they had {num_rows:,} rows at the start of the run"
            raise DataError(f"{problem}\n  advice    the files of the start, or subgroups=null")
        return {client: cells_N[rows_k] for client, rows_k in enumerate(rows)}

    return HeldOutColumns(names=tuple(dict.fromkeys(names)), read=read)
