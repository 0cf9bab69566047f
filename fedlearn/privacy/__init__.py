"""Privacy mechanisms, their accounting, and the calculator. The file README.md beside this one explains them."""

from typing import TYPE_CHECKING

from fedlearn.core.lazy_names import LazyName, lazy_names
from fedlearn.privacy.accounting import (
    calibrate_noise_multiplier,
    calibrate_num_rounds,
    epsilon_bounds,
    max_epsilon_bounds,
)
from fedlearn.privacy.gaussian_noise import add_gaussian_noise, standard_normals
from fedlearn.privacy.mechanisms import central, distributed, example, ftrl, local, secagg
from fedlearn.privacy.mechanisms.base import (
    Mechanism,
    Population,
    refuse_example_dp,
    refuse_extra_uploads,
    refuse_unequal_weights,
)

if TYPE_CHECKING:
    from fedlearn.privacy.calculator import PrivacyEstimate, PrivacyQuery, solve
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "PrivacyEstimate": LazyName("fedlearn.privacy.calculator"),
            "PrivacyQuery": LazyName("fedlearn.privacy.calculator"),
            "solve": LazyName("fedlearn.privacy.calculator"),
        },
    )

__all__ = [
    "Mechanism",
    "Population",
    "PrivacyEstimate",
    "PrivacyQuery",
    "add_gaussian_noise",
    "calibrate_noise_multiplier",
    "calibrate_num_rounds",
    "central",
    "distributed",
    "epsilon_bounds",
    "example",
    "ftrl",
    "local",
    "max_epsilon_bounds",
    "refuse_example_dp",
    "refuse_extra_uploads",
    "refuse_unequal_weights",
    "secagg",
    "solve",
    "standard_normals",
]
