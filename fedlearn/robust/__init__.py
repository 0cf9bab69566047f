"""Provide robust aggregation rules, which limit malicious clients, their parts, and poisoning for simulations."""

from fedlearn.robust.poisoning import AttackView, Poisoning, draw_malicious_clients, poison_data
from fedlearn.robust.pre_aggregation import random_permutation, with_pre_aggregation
from fedlearn.robust.robust_aggregation import (
    bucket_weights,
    coordinate_median,
    distances_to,
    inner_products,
    mean_around_median,
    nearest_neighbor_weights,
    rank_by_krum,
    resolve_num_malicious,
    select_by_krum,
    squared_distances,
    trimmed_mean,
    unweighted_mean,
    weighted_mean,
)
from fedlearn.robust.root_dataset import with_root_dataset

__all__ = [
    "AttackView",
    "Poisoning",
    "bucket_weights",
    "coordinate_median",
    "distances_to",
    "draw_malicious_clients",
    "inner_products",
    "mean_around_median",
    "nearest_neighbor_weights",
    "poison_data",
    "random_permutation",
    "rank_by_krum",
    "resolve_num_malicious",
    "select_by_krum",
    "squared_distances",
    "trimmed_mean",
    "unweighted_mean",
    "weighted_mean",
    "with_pre_aggregation",
    "with_root_dataset",
]
