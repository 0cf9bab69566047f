"""What a node answers, and what an answer must hold to be believed.

Shapes: K clients in a reply, D parameters laid flat.

Both ends are written here, so that they change together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import ClientEvaluation, ClientId, Failure, FailureStage, MetricSum, Updates
from fedlearn.core.serialization import Payload, WireError, pack, read_fields, require_array, select_prefix, unpack
from fedlearn.errors import FedlearnError
from fedlearn.protocol.requests import RequestHeader

MAX_EXAMPLES = 2**40
Decode = Callable[[bytes, ClientId], np.ndarray]
RESPONSE_OVERHEAD_BYTES = 2**20  # bytes of a reply that are not parameters


class InvalidResponse(FedlearnError):
    """A node that did not answer, or said why it does not."""

    def __init__(self, stage: FailureStage, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


def pack_response(header: RequestHeader, arrays: Mapping[str, Any] | None = None, **facts: Any) -> bytes:
    """An answer to a request."""
    same = {"kind": header.kind, "run": header.run, "round": header.round, "id": header.id, "layout": header.layout}
    return pack(Payload(metadata={**facts, **same}, arrays=arrays or {}))


def pack_refusal(metadata: Mapping[str, Any], stage: str, reason: str) -> bytes:
    """An answer that says only why there is none; ``metadata`` are those of the request, as far as it could be read."""
    same = {name: metadata.get(name) for name in ("kind", "run", "round", "id", "layout")}
    return pack(Payload(metadata={**same, "error": {"stage": stage, "reason": reason}}))


def unpack_response(header: RequestHeader, data: bytes) -> Payload | tuple[FailureStage, str]:
    """The parcel that answers a request, or the stage and reason of a refusal.

    Raises:
        WireError: it is damaged, or an answer to something else, such as an earlier round.
    """
    parcel = unpack(data)
    for name in ("kind", "run", "round", "id", "layout"):
        found, expected = parcel.metadata.get(name), getattr(header, name)
        if found != expected:
            raise WireError(f"the reply answers another request: its {name} is {found!r}, expected {expected!r}")
    error = parcel.metadata.get("error")
    if error is None:
        return parcel
    given = read_fields(error, stage=str, reason=str)
    return _stage(given["stage"]), given["reason"][:2000]


def pack_fit_response(header: RequestHeader, results: Sequence[Updates | Failure]) -> bytes:
    """What clients bring back; their memories stay."""
    updates = [result for result in results if isinstance(result, Updates)]
    arrays: dict[str, Any] = {}
    if updates:
        arrays |= _deltas(updates)
        arrays |= {f"extra/{name}": _rows(one.extra[name] for one in updates) for name in updates[0].extra}
        arrays |= {name: _rows(getattr(one, f"{name}_K") for one in updates) for name in ("num_examples", "num_steps")}
        for name in updates[0].metrics:
            arrays[f"total/{name}"] = _rows(one.metrics[name].total_K for one in updates).astype(np.float64)
            arrays[f"count/{name}"] = _rows(one.metrics[name].count_K for one in updates).astype(np.float64)
    clients = [int(client) for one in updates for client in one.clients_K]
    return pack_response(header, arrays, clients=clients, failures=failures_to_json(results))


def _deltas(updates: Sequence[Updates]) -> dict[str, np.ndarray]:
    """Updates as numbers; or, where a codec has written them, as what it wrote."""
    payloads = [payload for one in updates for payload in one.payloads]
    if not payloads:
        return {"delta": _rows(one.delta_KD for one in updates)}
    lengths_K = np.array([len(payload) for payload in payloads], np.int64)
    return {"payload": np.frombuffer(b"".join(payloads), np.uint8), "payload_length": lengths_K}


def _rows(parts: Iterable[Any]) -> np.ndarray:
    return np.concatenate([as_numpy(part) for part in parts])


def failures_to_json(results: Sequence[Any]) -> list[dict[str, Any]]:
    """The failures among results, as JSON."""
    failures = [result for result in results if isinstance(result, Failure)]  # a traceback stays in the node's own log
    return [{"client": one.client, "stage": one.stage, "reason": one.reason} for one in failures]


def read_updates(
    payload: Payload, header: RequestHeader, sizes: Mapping[str, int], *, decode: Decode | None = None
) -> list[Updates | Failure]:
    """The updates in a reply, one record a client, each checked before it may touch the model.

    Args:
        payload: from `unpack_response`.
        header: the request.
        sizes: what a client must send under this strategy, and how many numbers of each: ``delta``, and what else.
        decode: ``(payload, client) -> delta``, where updates come as a codec has written them.

    Raises:
        WireError: the reply is not in the form of an answer to this request. A client whose own numbers are wrong (not
            finite, no examples) is a `Failure` in the result instead, and does not cost the others of its node.
    """
    results: list[Updates | Failure] = list(read_failures(payload, header))
    clients = _clients_of(payload, header, taken={one.client for one in results if isinstance(one, Failure)})
    if not clients:
        return results
    arrays, k, unreadable = payload.arrays, len(clients), list[ClientId]()
    lengths_K = np.full(k, 4 * sizes["delta"], np.int64)
    if decode is not None:
        arrays, lengths_K, unreadable = _decoded(arrays, clients, sizes["delta"], decode)
    totals, counts, sent = (select_prefix(arrays, prefix) for prefix in ("total/", "count/", "extra/"))
    for name in ("delta", "num_examples", "num_steps"):
        if name not in arrays:
            raise WireError(f"the reply has no {name}")
    vectors = {"delta": arrays["delta"], **sent}
    if sorted(vectors) != sorted(sizes) or sorted(totals) != sorted(counts):
        extra = sorted(sizes.keys() - {"delta"})
        raise WireError(f"the reply brings {sorted(sent)} besides updates, expected {extra}")
    for name, rows_KD in vectors.items():
        require_array(rows_KD, (k, sizes[name]), np.float32, name)
    for name in ("num_examples", "num_steps"):
        require_array(arrays[name], (k,), np.int64, name)
    for name in totals:
        require_array(totals[name], (k,), np.float64, name)
        require_array(counts[name], (k,), np.float64, name)
    whole = Updates(
        clients_K=np.array(clients, np.int64),
        delta_KD=arrays["delta"],
        num_examples_K=arrays["num_examples"],
        num_steps_K=arrays["num_steps"],
        metrics={name: MetricSum(totals[name], counts[name]) for name in totals},
        extra=sent,
        num_bytes_K=lengths_K + 4 * (sum(sizes.values()) - sizes["delta"]),
    )
    garbled = "the update that arrived cannot be decoded"
    results += [Failure(client=client, stage=FailureStage.UPDATE, reason=garbled) for client in unreadable]
    rows = [row for row, client in enumerate(clients) if client not in unreadable]
    return results + [_believed(whole.rows(np.array([row]))) for row in rows]


def _decoded(
    arrays: Mapping[str, np.ndarray], clients: Sequence[ClientId], size: int, decode: Decode
) -> tuple[dict[str, np.ndarray], np.ndarray, list[ClientId]]:
    """The arrays with updates in the place of payloads, how long these were, and whose cannot be read."""
    payload, lengths_K = (arrays.get(name, np.zeros(0)) for name in ("payload", "payload_length"))
    require_array(lengths_K, (len(clients),), np.int64, "payload_length")
    sound = bool((lengths_K >= 0).all() and (lengths_K <= payload.size).all())
    require_array(payload, (int(lengths_K.sum()) if sound else -1,), np.uint8, "payload")
    delta_KD, unreadable = np.zeros((len(clients), size), np.float32), []
    for k, part in enumerate(np.split(payload, np.cumsum(lengths_K)[:-1])):
        try:
            delta_KD[k] = decode(part.tobytes(), clients[k])
        except ValueError:
            unreadable.append(clients[k])
    return {**arrays, "delta": delta_KD}, lengths_K, unreadable


def _believed(one: Updates) -> Updates | Failure:
    """One client's update, or why it must not touch the model."""
    (client,) = one.clients_K.tolist()
    vectors = {"update": one.delta_KD, **one.extra}
    broken = [name for name, rows_KD in vectors.items() if not np.isfinite(rows_KD).all()]
    if broken:
        return Failure(client=client, stage=FailureStage.UPDATE, reason=f"the {broken[0]} that arrived is not finite")
    count, steps = int(one.num_examples_K[0]), int(one.num_steps_K[0])
    if not (0 < count <= MAX_EXAMPLES and steps > 0):
        reason = f"the reply tells {count} training examples and {steps} steps, expected 1 or more"
        return Failure(client=client, stage=FailureStage.UPDATE, reason=reason)
    if not all(np.isfinite(s.total_K).all() and np.isfinite(s.count_K).all() for s in one.metrics.values()):
        return Failure(client=client, stage=FailureStage.UPDATE, reason="a training metric that arrived is not finite")
    return one


def pack_evaluation_response(header: RequestHeader, results: Sequence[ClientEvaluation | Failure]) -> bytes:
    """What clients tell of an evaluation."""
    tallies = [result for result in results if isinstance(result, ClientEvaluation)]
    arrays: dict[str, Any] = {}
    if tallies:
        arrays["num_examples"] = np.array([one.num_examples for one in tallies], np.int64)
        for name in tallies[0].metrics:
            arrays[f"metric/{name}"] = np.array([one.metrics[name] for one in tallies], np.float64)
        for name in tallies[0].sums:
            arrays[f"sum/{name}"] = np.stack([np.asarray(one.sums[name], np.float64) for one in tallies])
    return pack_response(header, arrays, clients=[one.client for one in tallies], failures=failures_to_json(results))


def read_evaluations(
    payload: Payload, header: RequestHeader, template: ClientEvaluation
) -> list[ClientEvaluation | Failure]:
    """The tallies in a reply.

    Args:
        payload: from `unpack_response`.
        header: the request.
        template: a tally of the same task, for the names and shapes that must have come.

    Raises:
        WireError: the reply is not in the form of an answer to this request.
    """
    results: list[ClientEvaluation | Failure] = list(read_failures(payload, header))
    clients = _clients_of(payload, header, taken={one.client for one in results if isinstance(one, Failure)})
    if not clients:
        return results
    metrics, sums = select_prefix(payload.arrays, "metric/"), select_prefix(payload.arrays, "sum/")
    counts_K = payload.arrays.get("num_examples", np.zeros(0))
    if set(metrics) != set(template.metrics) or set(sums) != set(template.sums):
        raise WireError(
            f"the reply brings {sorted([*metrics, *sums])}, expected {sorted([*template.metrics, *template.sums])}"
        )
    require_array(counts_K, (len(clients),), np.int64, "num_examples")
    for name, values_K in metrics.items():
        require_array(values_K, (len(clients),), np.float64, name)
    for name, rows in sums.items():
        require_array(rows, (len(clients), *template.sums[name].shape), np.float64, name)
    if not all(np.isfinite(rows).all() for rows in sums.values()) or not (counts_K > 0).all():
        raise WireError("the reply's sums are not finite, or over no examples")
    for k, client in enumerate(clients):
        own = {name: float(values_K[k]) for name, values_K in metrics.items()}
        told = {name: rows[k] for name, rows in sums.items()}
        results.append(ClientEvaluation(client=client, num_examples=int(counts_K[k]), metrics=own, sums=told))
    return results


def read_failures(payload: Payload, header: RequestHeader) -> list[Failure]:
    """The failures in a reply.

    Raises:
        WireError: one is of a client that was not asked.
    """
    found = []
    for one in read_fields(payload.metadata, failures=list)["failures"]:
        given = read_fields(one, client=int, stage=str, reason=str)
        if given["client"] not in header.clients:
            raise WireError(f"the reply speaks for client {given['client']}, who was not asked")
        found.append(Failure(client=given["client"], stage=_stage(given["stage"]), reason=given["reason"][:2000]))
    return found


def _stage(named: str) -> FailureStage:
    """Return the stage that a node names, `FailureStage.NODE` if a node may not name it."""
    stage = FailureStage(named) if named in set(FailureStage) else FailureStage.NODE
    return stage if stage.may_be_named_by_node else FailureStage.NODE


def _clients_of(parcel: Payload, ask: RequestHeader, *, taken: set[ClientId]) -> list[ClientId]:
    clients = read_fields(parcel.metadata, clients=list)["clients"]
    strangers = [client for client in clients if type(client) is not int or client not in ask.clients]
    if strangers:
        raise WireError(f"the reply speaks for clients {strangers}, who were not asked")
    if len(taken) + len(clients) != len(taken | set(clients)):
        raise WireError(f"the reply speaks for clients {sorted(clients)} more than once")
    return clients
