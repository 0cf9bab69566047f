"""Define readers of the content of responses, and pack and read evaluations and initial parameters.

Shapes: K clients in a response, D parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from fedlearn.core.records import Array, ClientEvaluation, ClientId
from fedlearn.core.serialization import Payload, WireError, require_array, require_vector, select_prefix, with_prefix

RESPONSE_OVERHEAD_BYTES = 2**20  # bytes of a response besides the numbers of its results
Result = TypeVar("Result")


class ResponseReader(Protocol[Result]):
    """Read the results in the content of a response.

    Attributes:
        may_omit_clients: True if a response may leave out clients, for example clients with few test examples.
    """

    @property
    def may_omit_clients(self) -> bool: ...  # noqa: D102

    def max_bytes(self, num_clients: int) -> int:
        """Return the size limit of a response with the results of this many clients."""
        ...

    def read(self, content: Payload, clients: Sequence[ClientId]) -> list[Result]:
        """Return one result per client.

        Raises:
            WireError: The content does not have the expected form.
        """
        ...


def pack_evaluations(results: Sequence[ClientEvaluation]) -> Payload:
    """Return the evaluations of clients as the content of a response, with one row per client."""
    if not results:
        return Payload()
    arrays: dict[str, Any] = {"num_examples": np.array([result.num_examples for result in results], np.int64)}
    for name in results[0].metrics:
        arrays[f"metric/{name}"] = np.array([result.metrics[name] for result in results], np.float64)
    for name in results[0].sums:
        arrays[f"sum/{name}"] = np.stack([np.asarray(result.sums[name], np.float64) for result in results])
    return Payload(arrays=arrays)


@dataclass(frozen=True, kw_only=True)
class EvaluationReader:
    """Read the evaluations of clients, with checks of names, shapes, dtypes and values.

    Args:
        template: an evaluation of the same task, for the names and shapes of metrics.
    """

    template: ClientEvaluation
    may_omit_clients: bool = True

    def max_bytes(self, num_clients: int) -> int:
        """Return the size limit of a response with the evaluations of this many clients."""
        numbers = len(self.template.metrics) + sum(np.size(value) for value in self.template.sums.values()) + 1
        return RESPONSE_OVERHEAD_BYTES + 8 * numbers * num_clients

    def read(self, content: Payload, clients: Sequence[ClientId]) -> list[ClientEvaluation]:
        """Return one evaluation per client.

        Raises:
            WireError: A metric is missing or unknown, has a wrong shape or dtype, or a sum is not finite.
        """
        if not clients:
            return []
        shapes = {"num_examples": (), **with_prefix("metric/", dict.fromkeys(self.template.metrics, ()))}
        shapes |= with_prefix("sum/", {name: np.shape(value) for name, value in self.template.sums.items()})
        if content.arrays.keys() != shapes.keys():
            raise WireError(f"the response has the arrays {sorted(content.arrays)[:9]}, expected {sorted(shapes)}")
        for name, shape in shapes.items():
            dtype = np.int64 if name == "num_examples" else np.float64
            require_array(content.arrays[name], (len(clients), *shape), dtype, name)
        counts_K = content.arrays["num_examples"]
        metrics, sums = select_prefix(content.arrays, "metric/"), select_prefix(content.arrays, "sum/")
        if not all(np.isfinite(rows).all() for rows in sums.values()) or not (counts_K > 0).all():
            raise WireError("a metric sum is not finite, or an example count is not positive")
        return [
            ClientEvaluation(
                client=client,
                num_examples=int(counts_K[k]),
                metrics={name: float(values_K[k]) for name, values_K in metrics.items()},
                sums={name: rows[k] for name, rows in sums.items()},
            )
            for k, client in enumerate(clients)
        ]


def pack_parameters(params_D: Array) -> Payload:
    """Return initial parameters as the content of a response."""
    return Payload(arrays={"params": params_D})


@dataclass(frozen=True, kw_only=True)
class ParameterReader:
    """Read initial parameters, the content of a response to an ``init`` request.

    Args:
        num_parameters: length of the vector.
    """

    num_parameters: int
    may_omit_clients: bool = True

    def max_bytes(self, num_clients: int) -> int:
        """Return the size limit of a response with initial parameters."""
        return RESPONSE_OVERHEAD_BYTES + 4 * self.num_parameters

    def read(self, content: Payload, clients: Sequence[ClientId]) -> list[np.ndarray]:
        """Return the initial parameters in a list with one vector ``params_D``.

        Raises:
            WireError: The parameters are missing, are not finite, or have another shape or dtype.
        """
        if content.arrays.keys() != {"params"}:
            raise WireError("the response has no parameters")
        require_vector(content.arrays["params"], (self.num_parameters,), "params")
        return [content.arrays["params"]]
