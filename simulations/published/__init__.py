"""Published results, and the runs that reproduce them: the source of the page ``docs/results.md``.

Each module declares one table: the experiment of its paper as settings, seeds, and the published values with their
sources. `simulations.results` runs a row, stores its values, and writes the page.
"""

from __future__ import annotations

from collections.abc import Mapping

from simulations.published import (
    byzantine,
    flamby_heart,
    mcmahan_mnist,
    niid_bench,
    opacus_mnist,
    pfl_research_cifar10,
    pfllib,
    qffl,
)
from simulations.published.records import Row, Table

TABLES: Mapping[str, Table] = {
    module.TABLE.name: module.TABLE
    for module in (
        flamby_heart,
        mcmahan_mnist,
        niid_bench,
        pfllib,
        qffl,
        opacus_mnist,
        pfl_research_cifar10,
        byzantine,
    )
}


def all_rows() -> Mapping[str, Row]:
    """Return the rows of all tables by their names, e.g. ``flamby_heart/fedavg``."""
    return {f"{table.name}/{row.name}": row for table in TABLES.values() for row in table.rows}


__all__ = ["TABLES", "all_rows"]
