"""Helpers for authors of strategies, aggregation rules and trainers.

Checks of settings, arrays of any library, and sums that do not depend on the block size.
"""

from array_api_compat import array_namespace

from fedlearn.algorithm.aggregation import add_rows, add_totals, divide_total
from fedlearn.algorithm.local_rule import gradient_weight
from fedlearn.algorithm.server_optimizers import zeros
from fedlearn.core.arrays import as_numpy, asarray_like, log_softmax
from fedlearn.errors import is_count, is_number, require

__all__ = [
    "add_rows",
    "add_totals",
    "array_namespace",
    "as_numpy",
    "asarray_like",
    "divide_total",
    "gradient_weight",
    "is_count",
    "is_number",
    "log_softmax",
    "require",
    "zeros",
]
