"""Define the errors for requests that a node refuses."""

from __future__ import annotations

from fedlearn.errors import FedlearnError
from fedlearn.protocol.refusals import RefusalCode


class NodeRefusal(FedlearnError):
    """Report a request that this node refuses.

    Args:
        code: reason, which the coordinator receives.
        detail: details, for the log of the node only, unless the code has a detail.
    """

    def __init__(self, code: RefusalCode, detail: str = "") -> None:
        super().__init__(detail or code.value)
        self.code = code


class PolicyViolation(NodeRefusal):
    """Report a setting that the policy of this node refuses, with its value and the accepted values.

    Args:
        detail: text for the coordinator. It must follow from the request and from the policy alone, never from data.
    """

    def __init__(self, detail: str) -> None:
        super().__init__(RefusalCode.POLICY, detail)


class RequestError(NodeRefusal):
    """Report a malformed request.

    Args:
        detail: text for the coordinator. It must follow from the request alone, never from data.
    """

    def __init__(self, detail: str) -> None:
        super().__init__(RefusalCode.REQUEST, detail)
