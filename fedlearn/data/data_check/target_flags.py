"""Flag columns that determine the target, and classes with few rows.

Shapes: N rows, C classes, S sites.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedlearn.data.data_check.coded_table import CodedColumn, CodedTable
from fedlearn.data.data_check.records import Flag
from fedlearn.data.data_check.unit_flags import join_names

MIN_ROWS = 20  # fewer rows are not enough for a statement
MIN_CLASS = 8  # rows of a class, for an area under the curve
LEAKING_AUC = 0.98
LEAKING_RULE = 0.98  # share of the rows that the value of the nearest row predicts
LEAKING_R2 = 0.99
LARGEST_CLASS = 0.9  # share of the largest class
DIFFERENCE_OF_SHARES = 0.4  # between the shares of a class at two sites
MAX_CLASSES = 100
ROWS_PER_VALUE = 10  # more rows give a value a class of its own


def flag_leakage(table: CodedTable) -> Iterator[Flag]:
    """Yield a flag for each column that determines the target nearly alone."""
    target = table.target
    if target is None or len(target.values_L) < 2:
        return
    for column in table.of_kind("number", "category", "id", "many levels", "date"):
        if not column.is_numeric and 2 * len(column.values_L) > column.num_present:
            continue  # each text occurs once, so that no rule follows
        strength = determination(column, target, is_regression=table.is_regression)
        if strength:
            yield Flag(
                kind="leakage",
                column=column.name,
                message=f"{column.name}: {strength}; it may not be known before the target",
                advice=table.settings.without(column.name),
            )


def determination(column: CodedColumn, target: CodedColumn, *, is_regression: bool) -> str:
    """Return a description of the way in which a column determines the target; empty if it does not."""
    both_N = column.present & target.present
    if both_N.sum() < MIN_ROWS or len(column.values_L) < 2:
        return ""
    x_N = column.cell_numbers[both_N] if column.is_numeric else column.codes_N[both_N].astype(float)
    if is_regression:
        return _determines_number(x_N, target.cell_numbers[both_N], is_ordered=column.is_numeric, name=target.name)
    y_N = target.codes_N[both_N]
    if len(np.unique(y_N)) < 2:
        return ""
    if column.is_numeric and target.is_numeric and np.array_equal(x_N, target.cell_numbers[both_N]):
        return f"equal to {target.name} in all rows"
    share = _rule(x_N, y_N)
    chance = float(((np.bincount(y_N) / len(y_N)) ** 2).sum())
    if share > LEAKING_RULE and (share - chance) / (1 - chance) > 0.95:
        return f"determines {target.name} alone in {100 * share:.1f} % of the rows"
    auc = _best_auc(x_N if column.is_numeric else _class_shares(x_N, y_N), y_N)
    return f"separates the classes of {target.name} alone (AUC {auc:.3f})" if auc > LEAKING_AUC else ""


def _determines_number(x_N: np.ndarray, y_N: np.ndarray, *, is_ordered: bool, name: str) -> str:
    variance = float(y_N.var())
    if variance == 0 or not np.isfinite(variance):
        return ""
    if is_ordered and np.array_equal(x_N, y_N):
        return f"equal to {name} in all rows"
    order_N = _shuffled_order(x_N)
    explained = 1 - float(np.diff(y_N[order_N]).__pow__(2).mean()) / (2 * variance)
    spread = float(x_N.std())
    linear = float(np.mean((x_N - x_N.mean()) * (y_N - y_N.mean())) / (spread * variance**0.5)) ** 2 if spread else 0.0
    best = max(explained, linear if is_ordered else 0.0)
    return f"determines {name} alone (R² {best:.3f})" if best > LEAKING_R2 else ""


def _rule(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Return the share of rows with the most frequent class of their value, or with the class of the next row."""
    values, codes_N = np.unique(x_N, return_inverse=True)
    if ROWS_PER_VALUE * len(values) <= len(y_N):
        classes_N = np.unique(y_N, return_inverse=True)[1]
        counts = np.bincount(codes_N * (classes_N.max() + 1) + classes_N, minlength=len(values) * (classes_N.max() + 1))
        return float(counts.reshape(len(values), -1).max(axis=1).sum() / len(y_N))
    y_N = y_N[_shuffled_order(x_N)]
    return float((y_N[1:] == y_N[:-1]).mean())


def _shuffled_order(x_N: np.ndarray) -> np.ndarray:
    """Return the order of a column. Ties have a random order, so that the order of the file has no effect."""
    shuffled_N = np.random.Generator(np.random.PCG64(0)).permutation(len(x_N))
    return shuffled_N[np.argsort(x_N[shuffled_N], kind="stable")]


def _class_shares(x_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    """Return the share of the first class among the rows of the other half with the same level.

    The other rows of the same half have no effect: a share that omits the row alone depends on its class.
    """
    codes_N = np.unique(x_N, return_inverse=True)[1]
    first_N, half_N = y_N == y_N[0], np.random.Generator(np.random.PCG64(0)).permutation(len(x_N)) % 2
    cells_N = 2 * codes_N + half_N
    size = 2 * (int(codes_N.max()) + 1)
    counts, firsts = np.bincount(cells_N, minlength=size), np.bincount(cells_N, first_N, minlength=size)
    other_N = 2 * codes_N + 1 - half_N
    return np.asarray((firsts[other_N] + 0.5) / (counts[other_N] + 1))


def _best_auc(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Return the area under the curve of two classes, in the better direction; 0 for more classes or small ones."""
    classes, number_N = np.unique(y_N, return_inverse=True)
    counts = np.bincount(number_N)
    if len(classes) != 2 or counts.min() < MIN_CLASS:
        return 0.0
    _, inverse_N, ties_U = np.unique(x_N, return_inverse=True, return_counts=True)
    rank_U = np.cumsum(ties_U) - (ties_U - 1) / 2
    total = float(rank_U[inverse_N][number_N == 1].sum())
    auc = (total - counts[1] * (counts[1] + 1) / 2) / (counts[0] * counts[1])
    return max(auc, 1 - auc)


def flag_classes(table: CodedTable) -> Iterator[Flag]:
    """Yield flags for a rare or dominant class, and for classes that are missing or unequal at sites."""
    target = table.target
    if target is None or table.is_regression or not 2 <= len(target.values_L) <= MAX_CLASSES:
        return
    share_C = target.counts / target.num_present
    top = int(share_C.argmax())
    if share_C[top] > LARGEST_CLASS:
        text = f"{target.name}: {100 * share_C[top]:.0f} % of the rows have the class {target.texts[top]}"
        advice = "early_stop.metric=f1"
        yield Flag(kind="imbalance", column=target.name, message=text, advice=advice)
    yield from _flag_classes_by_site(table, target) if table.num_sites > 1 else ()


def _flag_classes_by_site(table: CodedTable, target: CodedColumn) -> Iterator[Flag]:
    counts_SC = target.counts_by_site(table.site_N, table.num_sites)
    enough_S = counts_SC.sum(axis=1) >= MIN_ROWS
    lacking_S = enough_S & (counts_SC == 0).any(axis=1)
    if lacking_S.any():
        sites = table.names(lacking_S)
        classes = [target.texts[c] for c in np.flatnonzero((counts_SC[lacking_S] == 0).any(axis=0))]
        text = f"{target.name}: no rows of the class {join_names(classes)} at {join_names(sites)}"
        yield Flag(kind="classes by site", column=target.name, sites=sites, message=text, advice="strategy=fedlc")
        return
    share_SC = counts_SC[enough_S] / counts_SC[enough_S].sum(axis=1, keepdims=True)
    if enough_S.sum() > 1 and float(np.ptp(share_SC, axis=0).max()) > DIFFERENCE_OF_SHARES:
        worst = int(np.ptp(share_SC, axis=0).argmax())
        sites = table.names(np.flatnonzero(enough_S)[[share_SC[:, worst].argmin(), share_SC[:, worst].argmax()]])
        low, high = 100 * float(share_SC[:, worst].min()), 100 * float(share_SC[:, worst].max())
        text = f"{target.name}: {low:.0f} % of the rows at {sites[0]} have the class {target.texts[worst]}"
        text += f", {high:.0f} % at {sites[1]}"
        yield Flag(kind="imbalance", column=target.name, sites=sites, message=text, advice="strategy=fedlc")
