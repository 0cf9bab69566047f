"""Check each response just before it leaves the node. A response may have only the values of an allow list.

The list follows from the kind of the request, from the policy, and from the privacy guarantee of the strategy. The
functions that build responses cannot widen it. A response with other values is refused as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fedlearn.algorithm.strategy import Strategy, extra_names
from fedlearn.core.privacy_guarantee import PrivacyGuarantee
from fedlearn.core.records import ClientId
from fedlearn.core.serialization import Payload
from fedlearn.core.tasks import Task, as_task
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.policy_violation import NodeRefusal
from fedlearn.protocol.cohort_request import evaluation_template
from fedlearn.protocol.messages import RequestKind
from fedlearn.protocol.refusals import RefusalCode

HELLO_FIELDS = (
    "name",
    "task",
    "num_classes",
    "model",
    "partition",
    "framework",
    "device",
    "supports_metrics",
    "masking_key",
    "base_digest",
    "version",
    "leaves",
    "num_examples",
    "names",
)
UPDATE_ARRAYS = ("delta", "payload", "payload_length", "num_examples", "num_steps")


@dataclass(frozen=True, kw_only=True)
class AllowedContent:
    """The values that a response may have.

    Attributes:
        fields: names of metadata.
        arrays: names of arrays.
        hides_counts: True if the numbers of examples and steps must be 1.
    """

    fields: Collection[str] = ()
    arrays: Collection[str] = ()
    hides_counts: bool = False


def allowed_content(
    kind: RequestKind,
    policy: Policy,
    *,
    strategy: Strategy | None = None,
    task: Task | str = "binary",
    num_classes: int = 2,
    clients: Collection[ClientId] = (),
) -> AllowedContent:
    """Return the values that a response may have.

    Args:
        kind: kind of the request.
        policy: policy of the node.
        strategy: strategy of the request, with its privacy mechanism; used for ``fit`` only.
        task: task of the scenario, with all its metrics; only their names and sums may leave.
        num_classes: number of classes of the task.
        clients: clients of the request.
    """
    if kind == RequestKind.HELLO:
        return AllowedContent(fields=HELLO_FIELDS)
    if kind == RequestKind.INIT:
        return AllowedContent(arrays=("params",))
    if kind == RequestKind.MASK:
        return AllowedContent(arrays=[f"response/{client}" for client in clients])
    if kind == RequestKind.EVALUATE:
        template = evaluation_template(as_task(task), num_classes)
        sums = [f"sum/{name}" for name in template.sums]
        arrays = ["num_examples", *(f"metric/{name}" for name in template.metrics), *sums]
        return AllowedContent(arrays=arrays if policy.metrics else ())
    assert strategy is not None
    return _allowed_update(policy, strategy)


def check_response(
    kind: RequestKind,
    content: Payload,
    allowed: AllowedContent,
    *,
    policy: Policy,
    clients: Collection[ClientId],
    requested: Collection[ClientId],
) -> None:
    """Refuse a response that has other values than the allowed ones.

    Args:
        kind: kind of the request.
        content: content of the response.
        allowed: values that the response may have.
        policy: policy of the node.
        clients: clients of the response, with a result or a failure.
        requested: clients of the request.

    Raises:
        NodeRefusal: The response has such a value; the log of the node has its name.
    """
    unknown = [*(content.metadata.keys() - set(allowed.fields)), *(content.arrays.keys() - set(allowed.arrays))]
    if kind != RequestKind.HELLO:
        unknown += [f"client {client}" for client in sorted(set(clients) - set(requested))]
    if allowed.hides_counts:
        names = [name for name in ("num_examples", "num_steps") if name in content.arrays]
        unknown += [name for name in names if (np.asarray(content.arrays[name]) != 1).any()]
    unknown += _imprecise_counts(content.metadata if kind == RequestKind.HELLO else {}, policy)
    if unknown:
        raise NodeRefusal(RefusalCode.WITHHELD, f"a response to {kind} has {', '.join(sorted(unknown))}")


def _allowed_update(policy: Policy, strategy: Strategy) -> AllowedContent:
    guarantee, minimum = strategy.privacy_guarantee, policy.required_privacy.minimum
    if minimum == "secagg" or any(stage.needs_sum for stage in strategy.stages):
        return AllowedContent()  # updates leave through secure aggregation only
    arrays = [*UPDATE_ARRAYS]
    if guarantee is None or guarantee.covers_extra_vectors:
        arrays += [f"extra/{name}" for name in extra_names(strategy.local)]
    if minimum == "none" and not _withholds(guarantee, "metrics"):
        names = ["loss", *(f"loss/{name}" for name in strategy.local.evaluate_models)]
        arrays += [f"{part}/{name}" for part in ("total", "count") for name in names]
    return AllowedContent(arrays=arrays, hides_counts=_withholds(guarantee, "examples"))


def _withholds(guarantee: PrivacyGuarantee | None, name: str) -> bool:
    return guarantee is not None and name in guarantee.withheld


def _imprecise_counts(metadata: Mapping[str, object], policy: Policy) -> list[str]:
    """Return the name of the example counts if they are more precise than the policy allows."""
    counts = metadata.get("num_examples", [])
    is_precise = isinstance(counts, list) and any(policy.reveal.reported_count(count) != count for count in counts)
    return ["num_examples"] if is_precise else []
