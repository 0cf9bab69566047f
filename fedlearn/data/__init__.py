"""Data of clients: partitions, files and folders, and data sets of the Hugging Face Hub.

All names are imported on first use: most of them need readers of files and downloads.
"""

from typing import TYPE_CHECKING

from fedlearn.core.lazy_names import LazyName, lazy_names

if TYPE_CHECKING:
    from fedlearn.data.federated_statistics import ColumnSums, column_sums
    from fedlearn.data.folder import Contents, read_contents
    from fedlearn.data.hugging_face import from_datasets, read_hub
    from fedlearn.data.partition import Partition, add_feature_noise, partition_rows
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "ColumnSums": LazyName("fedlearn.data.federated_statistics"),
            "Contents": LazyName("fedlearn.data.folder"),
            "Partition": LazyName("fedlearn.data.partition"),
            "add_feature_noise": LazyName("fedlearn.data.partition"),
            "column_sums": LazyName("fedlearn.data.federated_statistics"),
            "from_datasets": LazyName("fedlearn.data.hugging_face"),
            "partition_rows": LazyName("fedlearn.data.partition"),
            "read_contents": LazyName("fedlearn.data.folder"),
            "read_hub": LazyName("fedlearn.data.hugging_face"),
        },
    )

__all__ = [
    "ColumnSums",
    "Contents",
    "Partition",
    "add_feature_noise",
    "column_sums",
    "from_datasets",
    "partition_rows",
    "read_contents",
    "read_hub",
]
