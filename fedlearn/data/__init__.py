"""Provide the data of clients: partitions, files and folders, and data sets of the Hugging Face Hub.

All names are imported on first use, because most of them need readers of files and downloads.
"""

from typing import TYPE_CHECKING

from fedlearn.core.lazy_names import LazyName, lazy_names

if TYPE_CHECKING:
    from fedlearn.data.contents import Contents
    from fedlearn.data.federated_statistics import ColumnSums, column_sums
    from fedlearn.data.folder import read_contents
    from fedlearn.data.from_arrays import partition_arrays
    from fedlearn.data.hugging_face import from_datasets, read_hub
    from fedlearn.data.partition import (
        Dirichlet,
        DirichletEqual,
        Feature,
        Iid,
        Natural,
        Partition,
        Pathological,
        Quantity,
        Rows,
        Shards,
        Time,
        add_feature_noise,
        as_partition,
        natural_partition,
        partition_rows,
    )
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "ColumnSums": LazyName("fedlearn.data.federated_statistics"),
            "Contents": LazyName("fedlearn.data.contents"),
            "Dirichlet": LazyName("fedlearn.data.partition"),
            "DirichletEqual": LazyName("fedlearn.data.partition"),
            "Feature": LazyName("fedlearn.data.partition"),
            "Iid": LazyName("fedlearn.data.partition"),
            "Natural": LazyName("fedlearn.data.partition"),
            "Partition": LazyName("fedlearn.data.partition"),
            "Pathological": LazyName("fedlearn.data.partition"),
            "Quantity": LazyName("fedlearn.data.partition"),
            "Rows": LazyName("fedlearn.data.partition"),
            "Shards": LazyName("fedlearn.data.partition"),
            "Time": LazyName("fedlearn.data.partition"),
            "add_feature_noise": LazyName("fedlearn.data.partition"),
            "as_partition": LazyName("fedlearn.data.partition"),
            "column_sums": LazyName("fedlearn.data.federated_statistics"),
            "from_datasets": LazyName("fedlearn.data.hugging_face"),
            "natural_partition": LazyName("fedlearn.data.partition"),
            "partition_arrays": LazyName("fedlearn.data.from_arrays"),
            "partition_rows": LazyName("fedlearn.data.partition"),
            "read_contents": LazyName("fedlearn.data.folder"),
            "read_hub": LazyName("fedlearn.data.hugging_face"),
        },
    )

__all__ = [
    "ColumnSums",
    "Contents",
    "Dirichlet",
    "DirichletEqual",
    "Feature",
    "Iid",
    "Natural",
    "Partition",
    "Pathological",
    "Quantity",
    "Rows",
    "Shards",
    "Time",
    "add_feature_noise",
    "as_partition",
    "column_sums",
    "from_datasets",
    "natural_partition",
    "partition_arrays",
    "partition_rows",
    "read_contents",
    "read_hub",
]
