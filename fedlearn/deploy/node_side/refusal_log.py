"""Log the details of refusals and failures at the node, under a reference that leaves the node."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedlearn.core.records import Failure
from fedlearn.core.serialization import WireError
from fedlearn.deploy.node_side.policy_violation import NodeRefusal, RequestError
from fedlearn.errors import FedlearnError
from fedlearn.protocol.refusals import Refusal, RefusalCode, new_reference

log = logging.getLogger(__name__)


def log_refusal(code: RefusalCode, detail: str, *, kind: str | None = None, run: str | None = None) -> Refusal:
    """Return a refusal, and log its details under its reference.

    Args:
        code: code of the refusal.
        detail: reason; it leaves the node only if the code allows it.
        kind: kind of the request; None for a request that cannot be read.
        run: name of the run.
    """
    reference = new_reference()
    log.warning("refused a request %s of run %s, code %s, reference %s: %s", kind, run, code, reference, detail)
    return Refusal(stage=code.stage, code=code, detail=detail if code.has_detail else "", reference=reference)


def log_failures(failures: Sequence[Failure]) -> str:
    """Log failures, and return their new reference; empty without failures."""
    reference = new_reference() if failures else ""
    for failure in failures:
        log.warning(
            "client %d failed at stage %s, reference %s: %s", failure.client, failure.stage, reference, failure.reason
        )
    return reference


@contextmanager
def reading_request(code: RefusalCode = RefusalCode.REQUEST) -> Iterator[None]:
    """Refuse a request that cannot be read; other errors of the block become refusals with this code."""
    try:
        yield
    except WireError as error:
        raise RequestError(str(error)) from error
    except NodeRefusal:
        raise
    except FedlearnError as error:
        raise NodeRefusal(code, str(error)) from error
