"""Divide a block of clients among the cores of a machine in JAX.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from fedlearn.core.records import Array
from fedlearn.core.threads import available_cores
from fedlearn.trainers.batching import balance_shares
from fedlearn.trainers.jax.block_arrays import BlockArrays, pad_rows


class Shares:
    """Run a compiled program on shares of the clients, one share per core.

    Args:
        device: device of JAX.
        jax_device: the same device, as an object.
        arrays: sizes of the compiled programs.
    """

    def __init__(self, device: str, jax_device: Any, arrays: BlockArrays) -> None:
        self.device, self._jax_device, self._arrays = device, jax_device, arrays
        self._num_shares = available_cores() if device == "cpu" else 1

    def run(
        self, block: Any, shared: Any, per_client: Any, steps_K: np.ndarray
    ) -> tuple[Array, np.ndarray, dict[str, np.ndarray]]:
        """Run the program on one share of the clients per core, in parallel.

        All shares have one size, and few sizes occur in a run. So few programs are compiled.
        """
        size = self._arrays.share_size(-(-len(steps_K) // self._num_shares))
        shares = balance_shares(steps_K.tolist(), self._num_shares, max_size=size)

        def run(rows: np.ndarray) -> Any:
            share = jax.tree.map(lambda v_K: pad_rows(v_K[rows], size), per_client)
            with jax.default_device(self._jax_device):  # the default device of this thread only
                return jax.block_until_ready(block(*shared, *share))

        if len(shares) == 1:
            delta_KD, losses_K, states = run(shares[0])
            state_KD = {name: np.asarray(rows_KD)[: len(steps_K)] for name, rows_KD in states.items()}
            if size > len(steps_K):
                delta_KD, losses_K = delta_KD[: len(steps_K)], losses_K[: len(steps_K)]
            return (np.asarray(delta_KD) if self.device == "cpu" else delta_KD), np.asarray(losses_K), state_KD
        delta_KD = np.empty((len(steps_K), len(shared[0])), np.float32)
        losses_K = np.empty(len(steps_K), np.float32)
        parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

        def put(rows: np.ndarray) -> None:
            delta, losses, states = run(rows)
            parts.append((rows, {name: np.asarray(v_KD)[: len(rows)] for name, v_KD in states.items()}))
            delta_KD[rows], losses_K[rows] = np.asarray(delta)[: len(rows)], np.asarray(losses)[: len(rows)]

        # a device runs programs in parallel only if a different thread waits for each
        with ThreadPoolExecutor(len(shares) - 1) as threads:
            futures = [threads.submit(put, rows) for rows in shares[1:]]
            put(shares[0])
            for future in futures:
                future.result()
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        names = parts[0][1]
        return delta_KD, losses_K, {name: np.concatenate([part[name] for _, part in parts])[order] for name in names}
