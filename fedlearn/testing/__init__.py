"""The conformance kit: checks for parts that users write.

Each check raises `AssertionError` and names the guarantee that does not hold. Call the checks from a test:

>>> from strategies import fedavg
>>> check_strategy(fedavg(clients_per_round=3))
"""

from fedlearn.testing.callbacks import check_callback
from fedlearn.testing.mechanisms import check_mechanism
from fedlearn.testing.partitions import check_partition
from fedlearn.testing.problems import LOCAL_SETTINGS, LinearTrainer, linear_problem
from fedlearn.testing.scenarios import check_scenario
from fedlearn.testing.strategies import check_strategy
from fedlearn.testing.trainers import check_trainer, check_twins

__all__ = [
    "LOCAL_SETTINGS",
    "LinearTrainer",
    "check_callback",
    "check_mechanism",
    "check_partition",
    "check_scenario",
    "check_strategy",
    "check_trainer",
    "check_twins",
    "linear_problem",
]
