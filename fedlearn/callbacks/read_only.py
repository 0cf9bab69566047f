"""Protect a run from its callbacks, with read-only arrays and copies of dicts and lists.

Shapes: D parameters of the flat vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from fedlearn.callbacks.run_info import RunInfo
from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import Evaluation, InFlight, Round, ServerState


def read_only_round(round: Round) -> Round:
    """Return the round with read-only arrays and copies of its dicts. Torch tensors become NumPy arrays."""
    return replace(
        round,
        state=_server_state(round.state),
        metrics=dict(round.metrics),
        evaluation=_evaluation(round.evaluation),
    )


def read_only_run(run: RunInfo) -> RunInfo:
    """Return the description with copies of its dicts and lists, and read-only client states."""
    return replace(
        run,
        config=deepcopy(run.config),
        history=deepcopy(run.history),
        privacy=deepcopy(run.privacy),
        partition=deepcopy(run.partition),
        client_names=MappingProxyType(run.client_names),
        client_states=lambda: {client: _arrays(state) for client, state in run.client_states().items()},
    )


def _server_state(state: ServerState) -> ServerState:
    return replace(
        state,
        params_D=_array(state.params_D),
        server=_arrays(state.server),
        stages=tuple(_arrays(stage) for stage in state.stages),
        select=_arrays(state.select),
        in_flight=tuple(_in_flight(request) for request in state.in_flight),
    )


def _in_flight(in_flight: InFlight) -> InFlight:
    request = in_flight.request
    params_D, broadcast = _array(request.params_D), _arrays(request.broadcast)
    return replace(in_flight, request=replace(request, params_D=params_D, broadcast=broadcast))


def _evaluation(evaluation: Evaluation | None) -> Evaluation | None:
    if evaluation is None:
        return None
    return replace(
        evaluation,
        pooled=dict(evaluation.pooled),
        num_examples_K=_array(evaluation.num_examples_K),
        per_client=_arrays(evaluation.per_client),
        personal=_evaluation(evaluation.personal),
        held_out=_evaluation(evaluation.held_out),
    )


def _arrays(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _array(value) for name, value in named.items()}


def _array(value: Any) -> Any:
    if is_torch_array(value):
        value = as_numpy(value)
    if not isinstance(value, np.ndarray):
        return value
    view = value.view()
    view.flags.writeable = False
    return view
