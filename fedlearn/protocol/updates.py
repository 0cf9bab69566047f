"""Write the updates of clients as the content of a response, and read them with all checks.

Shapes: K clients in a response, D parameters.

A malformed content raises `WireError`, and all clients of the node fail. If only the numbers of a client are wrong,
only this client fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlearn.algorithm.strategy import Strategy, extra_names
from fedlearn.core.arrays import as_numpy, is_finite
from fedlearn.core.layout import Layout
from fedlearn.core.records import ClientId, Failure, FailureStage, MetricSum, Request, Updates
from fedlearn.core.serialization import Payload, WireError, require_array, select_prefix
from fedlearn.loop.client_update import codec_rng, update_size_and_dtype
from fedlearn.protocol.responses import RESPONSE_OVERHEAD_BYTES

MAX_EXAMPLES = 2**40
Decode = Callable[[bytes, ClientId], np.ndarray]


def pack_updates(results: Sequence[Updates]) -> Payload:
    """Return the updates of clients as the content of a response, one row per client, without client states."""
    if not results:
        return Payload()
    first = results[0]
    arrays = _deltas(results)
    arrays |= {f"extra/{name}": _rows(update.extra[name] for update in results) for name in first.extra}
    arrays["num_examples"] = _rows(update.num_examples_K for update in results)
    arrays["num_steps"] = _rows(update.num_steps_K for update in results)
    for name in first.metrics:
        arrays[f"total/{name}"] = _rows(update.metrics[name].total_K for update in results).astype(np.float64)
        arrays[f"count/{name}"] = _rows(update.metrics[name].count_K for update in results).astype(np.float64)
    return Payload(arrays=arrays)


@dataclass(frozen=True, kw_only=True)
class UpdateReader:
    """Read the updates of clients, and check each update before it can change the model.

    Args:
        sizes: name -> length of each vector that a client sends, ``delta`` included.
        losses: names of the losses that each client must send: ``loss``, or ``loss/NAME`` of a received model.
        num_examples: client -> example count that its node declared when it joined; other clients are not checked.
        decode: decoder of compressed updates; None if updates are not compressed.
    """

    sizes: Mapping[str, int]
    losses: Sequence[str] = ()
    num_examples: Mapping[ClientId, int] = field(default_factory=dict)
    decode: Decode | None = None
    may_omit_clients: bool = False

    @classmethod
    def of(
        cls, strategy: Strategy, request: Request, layout: Layout, num_examples: Mapping[ClientId, int]
    ) -> UpdateReader:
        """Return the reader of the updates of a strategy in a round.

        Args:
            strategy: strategy of the run.
            request: training order of the round.
            layout: layout of the model.
            num_examples: client -> declared example count; not used if the privacy guarantee withholds the counts.
        """
        sizes = dict.fromkeys(extra_names(strategy.local), layout.num_parameters)
        sizes["delta"], _ = update_size_and_dtype(strategy, request, layout)
        guarantee, codec, shared = strategy.privacy_guarantee, strategy.codec, strategy.shared_layout(layout)
        if guarantee is not None and "examples" in guarantee.withheld:
            num_examples = {}

        def decode(payload: bytes, client: ClientId) -> np.ndarray:
            assert codec is not None
            return codec.decode(payload, shared, codec_rng(request, client))

        training_loss = ("loss",) if "metrics" in strategy.aggregate.reads else ()
        losses = (*training_loss, *(f"loss/{name}" for name in strategy.local.evaluate_models))
        return cls(sizes=sizes, losses=losses, num_examples=num_examples, decode=decode if codec else None)

    def max_bytes(self, num_clients: int) -> int:
        """Return the size limit of a response with the updates of this many clients."""
        return RESPONSE_OVERHEAD_BYTES + 4 * sum(self.sizes.values()) * num_clients

    def read(self, content: Payload, clients: Sequence[ClientId]) -> list[Updates | Failure]:
        """Return the update of each client, or the failure of a client whose numbers are wrong.

        Raises:
            WireError: The content does not have the expected arrays.
        """
        if not clients:
            return []
        arrays, k, undecoded = dict(content.arrays), len(clients), set[ClientId]()
        lengths_K = np.full(k, 4 * self.sizes["delta"], np.int64)
        if self.decode is not None:
            arrays["delta"], lengths_K, undecoded = self._decoded(arrays, clients, self.decode)
        self._require_form(arrays, k)
        totals, counts = select_prefix(arrays, "total/"), select_prefix(arrays, "count/")
        updates = Updates(
            clients_K=np.array(clients, np.int64),
            delta_KD=arrays["delta"],
            num_examples_K=arrays["num_examples"],
            num_steps_K=arrays["num_steps"],
            metrics={name: MetricSum(totals[name], counts[name]) for name in totals},
            extra=select_prefix(arrays, "extra/"),
            num_bytes_K=lengths_K + 4 * (sum(self.sizes.values()) - self.sizes["delta"]),
        )
        rows = [updates] if k == 1 else [updates.rows(np.array([row])) for row in range(k)]  # rows are copies
        return [self._checked(row, undecoded) for row in rows]

    def _require_form(self, arrays: Mapping[str, np.ndarray], k: int) -> None:
        missing = [name for name in ("delta", "num_examples", "num_steps") if name not in arrays]
        if missing:
            raise WireError(f"the response has no {missing[0]}")
        vectors = {"delta": arrays["delta"], **select_prefix(arrays, "extra/")}
        totals, counts = select_prefix(arrays, "total/"), select_prefix(arrays, "count/")
        if sorted(vectors) != sorted(self.sizes) or sorted(totals) != sorted(counts):
            raise WireError(f"the response has the vectors {sorted(vectors)[:9]}, expected {sorted(self.sizes)}")
        for name, rows_KD in vectors.items():
            require_array(rows_KD, (k, self.sizes[name]), np.float32, name)
        for name in ("num_examples", "num_steps"):
            require_array(arrays[name], (k,), np.int64, name)
        for name, values_K in [*totals.items(), *counts.items()]:
            require_array(values_K, (k,), np.float64, name)

    def _decoded(
        self, arrays: dict[str, np.ndarray], clients: Sequence[ClientId], decode: Decode
    ) -> tuple[np.ndarray, np.ndarray, set[ClientId]]:
        """Return the decoded updates, the lengths of their payloads, and the clients whose payload is unreadable."""
        payload, lengths_K = (arrays.pop(name, np.zeros(0)) for name in ("payload", "payload_length"))
        require_array(lengths_K, (len(clients),), np.int64, "payload_length")
        possible = bool((lengths_K >= 0).all() and (lengths_K <= payload.size).all())
        require_array(payload, (int(lengths_K.sum()) if possible else -1,), np.uint8, "payload")
        delta_KD, undecoded = np.zeros((len(clients), self.sizes["delta"]), np.float32), set[ClientId]()
        for k, part in enumerate(np.split(payload, np.cumsum(lengths_K)[:-1])):
            try:
                delta_KD[k] = decode(part.tobytes(), clients[k])
            except ValueError:
                undecoded.add(clients[k])
        return delta_KD, lengths_K, undecoded

    def _checked(self, update: Updates, undecoded: set[ClientId]) -> Updates | Failure:
        (client,) = update.clients_K.tolist()
        reason = "the update cannot be decoded" if client in undecoded else self._problem(client, update)
        return Failure(client=client, stage=FailureStage.UPDATE, reason=reason) if reason else update

    def _problem(self, client: ClientId, update: Updates) -> str:
        """Return the reason to refuse the update of one client; empty if there is none."""
        vectors = {"update": update.delta_KD, **update.extra}
        infinite = [name for name, rows_KD in vectors.items() if not is_finite(rows_KD)]
        if infinite:
            return f"the {infinite[0]} is not finite"
        count, steps = int(update.num_examples_K[0]), int(update.num_steps_K[0])
        if not (0 < count <= MAX_EXAMPLES and steps > 0):
            return f"the response has {count} training examples and {steps} steps, expected 1 or more"
        metrics = update.metrics
        if not all(np.isfinite(s.total_K).all() and np.isfinite(s.count_K).all() for s in metrics.values()):
            return "a training metric is not finite"
        means = {name: metrics[name].client_means() for name in self.losses if name in metrics}
        missing = [name for name in self.losses if name not in means or not np.isfinite(means[name]).all()]
        if missing:
            models = (name.partition("/")[2] or "training" for name in missing)
            return f"the response lacks the loss of {', '.join(models)}"
        declared = self.num_examples.get(client, count)
        return "" if count == declared else f"the update has {count} training examples; the node declared {declared}"


def _deltas(results: Sequence[Updates]) -> dict[str, np.ndarray]:
    """Return the updates as arrays, or the payloads of compressed updates."""
    payloads = [payload for update in results for payload in update.payloads]
    if not payloads:
        return {"delta": _rows(update.delta_KD for update in results)}
    lengths_K = np.array([len(payload) for payload in payloads], np.int64)
    return {"payload": np.frombuffer(b"".join(payloads), np.uint8), "payload_length": lengths_K}


def _rows(parts: Iterable[Any]) -> np.ndarray:
    arrays = [as_numpy(part) for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
