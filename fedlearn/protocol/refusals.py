"""Define the reasons that a node may state for a refusal. A reason is a code, never a text that depends on data.

A node sends a code and a reference. The log of the node has the details under the same reference. Only two codes have
a detail, because it follows from the request and from the policy alone. The coordinator turns codes into sentences.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fedlearn.core.records import FailureStage
from fedlearn.core.serialization import read_fields, read_text

MAX_DETAIL_LENGTH = 2000  # characters
REFERENCE_BYTES = 4


class RefusalCode(StrEnum):
    """Reason of a refusal. The values are part of the message format."""

    POLICY = "policy"  # the detail names the setting, its value and the accepted values
    REQUEST = "request"  # the detail names the field of the request
    EPSILON_LIMIT = "epsilon_limit"
    SCENARIO_LIMIT = "scenario_limit"
    EVALUATION_LIMIT = "evaluation_limit"
    EVALUATION_REPEATED = "evaluation_repeated"
    EVALUATION_WITHHELD = "evaluation_withheld"
    RUN_CLOSED = "run_closed"
    OTHER_SCENARIO = "other_scenario"
    NO_MASKING_KEY = "no_masking_key"
    MASKING_KEYS = "masking_keys"
    CLIENT_STATE = "client_state"
    SCENARIO = "scenario"
    STRATEGY = "strategy"
    BUSY = "busy"
    DISK = "disk"
    WITHHELD = "withheld"
    INTERNAL = "internal"
    CONNECTION = "connection"  # the coordinator itself states this code, for a node without a response

    @property
    def has_detail(self) -> bool:
        """True if the refusal may have a detail, which follows from the request and from the policy alone."""
        return self in (RefusalCode.POLICY, RefusalCode.REQUEST, RefusalCode.CONNECTION)

    @property
    def is_transient(self) -> bool:
        """True if the same request may succeed seconds later. Such a refusal does not count at the start of a run."""
        return self in (RefusalCode.BUSY, RefusalCode.CONNECTION)

    @property
    def stage(self) -> FailureStage:
        """Stage of the failure of each client of the request."""
        return _STAGES.get(self, FailureStage.POLICY)


_STAGES = {
    **dict.fromkeys((RefusalCode.REQUEST, RefusalCode.BUSY, RefusalCode.CLIENT_STATE), FailureStage.REQUEST),
    **dict.fromkeys((RefusalCode.SCENARIO, RefusalCode.STRATEGY, RefusalCode.INTERNAL), FailureStage.NODE),
    RefusalCode.DISK: FailureStage.NODE,
    RefusalCode.CONNECTION: FailureStage.NODE,
}
_LOG = "ask the operator of the node for the log line with this reference"
SENTENCES = {  # code -> problem, and one thing to try
    RefusalCode.EPSILON_LIMIT: (
        "the request would exceed required_privacy.max_epsilon of the node, over all its runs",
        "try a larger privacy.noise_multiplier, or fewer rounds",
    ),
    RefusalCode.SCENARIO_LIMIT: (
        "the node has answered for as many scenarios as its policy accepts (max_scenarios)",
        "try the settings of an earlier run",
    ),
    RefusalCode.EVALUATION_LIMIT: (
        "the node has evaluated as many models as its policy accepts (max_evaluations_total)",
        "try a larger evaluate_every",
    ),
    RefusalCode.EVALUATION_REPEATED: (
        "the node has evaluated another model in this round, or a later round, of the same run",
        "try one evaluation per round",
    ),
    RefusalCode.EVALUATION_WITHHELD: (
        "the policy of the node keeps evaluation metrics at the node (reveal.metrics)",
        "try no evaluation, or ask the operator for reveal.metrics: noised",
    ),
    RefusalCode.RUN_CLOSED: (
        "the node has closed this run, because it evaluated another model than the run trains",
        "try a new run",
    ),
    RefusalCode.OTHER_SCENARIO: ("an earlier request of this run had another scenario", "try a new run"),
    RefusalCode.NO_MASKING_KEY: (
        "the node has no masking.key for secure aggregation",
        "try --keys at the node",
    ),
    RefusalCode.MASKING_KEYS: (
        "the cohort has a public masking key that is not in masking.pub of the node",
        "try the same masking.pub at all nodes",
    ),
    RefusalCode.CLIENT_STATE: (
        "the node cannot read the state of its clients for this run and round",
        _LOG,
    ),
    RefusalCode.SCENARIO: ("the node cannot build the scenario with its data", _LOG),
    RefusalCode.STRATEGY: ("the node cannot build the strategy or its privacy mechanism", _LOG),
    RefusalCode.BUSY: ("the node is still busy with an earlier request", "try a longer engine.deadline"),
    RefusalCode.DISK: ("the disk of the node is almost full", "ask the operator of the node to free space on it"),
    RefusalCode.WITHHELD: ("the response has values that the policy of the node withholds", _LOG),
    RefusalCode.INTERNAL: ("the request failed at the node", _LOG),
}
FAILURE_SENTENCES = {  # stage of the failure of a client at a node -> problem
    FailureStage.DATA: "the client has no usable training examples",
    FailureStage.FIT: "local training failed",
    FailureStage.UPDATE: "the update is not finite or has a wrong shape",
    FailureStage.CLIENT_STATE: "the state of the client is missing or damaged at the node",
    FailureStage.REQUEST: "the client refused a message of secure aggregation",
    FailureStage.POLICY: "the policy of the node refuses the request",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Reason for a response without results, from the node or from the connection to the node.

    Attributes:
        stage: stage at which the request failed.
        code: reason of the refusal.
        detail: for a code with a detail: text of at most `MAX_DETAIL_LENGTH` characters.
        reference: reference of the refusal in the log of the node; empty if there is none.
    """

    stage: FailureStage
    code: RefusalCode
    detail: str = ""
    reference: str = ""

    @property
    def is_transient(self) -> bool:
        """True if the same request may succeed seconds later. A response that cannot be read is no such case."""
        return self.code.is_transient and self.stage != FailureStage.RESPONSE

    @property
    def reason(self) -> str:
        """Sentence for the operator of the coordinator and for the submitter."""
        if self.code.has_detail:
            return self.detail
        problem, fix = SENTENCES[self.code]
        return f"{problem}; {fix}{_reference_text(self.reference)}"


def new_reference() -> str:
    """Return a random reference for the log of a node and for a refusal."""
    return secrets.token_hex(REFERENCE_BYTES)


def failure_reason(stage: FailureStage, reference: str) -> str:
    """Return the sentence for the failure of a client at a node."""
    return FAILURE_SENTENCES.get(stage, "the client failed at the node") + _reference_text(reference)


def refusal_to_json(refusal: Refusal) -> dict[str, Any]:
    """Return a refusal as JSON values. The detail of a code without a detail is left out."""
    detail = refusal.detail if refusal.code.has_detail else ""
    return {
        "stage": refusal.stage,
        "code": refusal.code,
        "detail": read_text(detail, "detail", max_length=MAX_DETAIL_LENGTH),
        "reference": refusal.reference,
    }


def read_refusal(value: Any) -> Refusal | None:
    """Return the refusal of a request from an untrusted value; None for no refusal.

    An unknown code becomes `RefusalCode.INTERNAL`.
    """
    if value is None:
        return None
    fields = read_fields(value, stage=str, code=str, detail=str)
    code = RefusalCode(fields["code"]) if fields["code"] in set(RefusalCode) else RefusalCode.INTERNAL
    return Refusal(
        stage=read_stage(value),
        code=code,
        detail=read_text(fields["detail"], "detail", max_length=MAX_DETAIL_LENGTH) if code.has_detail else "",
        reference=read_reference(value),
    )


def read_stage(value: Any) -> FailureStage:
    """Return the failure stage in a message. A node may name some stages only; other stages become `NODE`."""
    name = read_fields(value, stage=str)["stage"]
    stage = FailureStage(name) if name in set(FailureStage) else FailureStage.NODE
    return stage if stage.may_be_named_by_node else FailureStage.NODE


def read_reference(value: Any) -> str:
    """Return the reference in a message; empty if it is not one."""
    reference = read_fields(value, reference=str)["reference"]
    return reference if re.fullmatch(rf"[0-9a-f]{{{2 * REFERENCE_BYTES}}}", reference) else ""


def _reference_text(reference: str) -> str:
    return f" (reference {reference} in the log of the node)" if reference else ""
