"""Define the error for a request that the policy of a node refuses."""

from __future__ import annotations

from fedlearn.errors import FedlearnError


class PolicyViolation(FedlearnError):
    """Report a request that the policy of this node refuses, with the value and the accepted values."""
