"""Check data before training: a summary of each column, and flags for probable faults.

All of it is computed where the data are, from NumPy arrays. Nothing in this package sends or logs anything.
"""

from fedlearn.data.data_check.check import check_data
from fedlearn.data.data_check.records import ColumnSummary, DataCheck, Flag, SiteSummary
from fedlearn.data.data_check.settings import CheckSettings

__all__ = ["CheckSettings", "ColumnSummary", "DataCheck", "Flag", "SiteSummary", "check_data"]
