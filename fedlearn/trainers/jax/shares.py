"""Divide a block of clients among the cores or the devices of a machine in JAX.

Shapes: K clients in a block, D parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from fedlearn.core.records import Array
from fedlearn.core.threads import available_cores
from fedlearn.trainers.batching import balance_shares
from fedlearn.trainers.jax.block_arrays import BlockArrays, pad_rows


class Shares:
    """Run a compiled program on shares of the clients, one share per core or per device.

    Args:
        device: name of the device of JAX.
        jax_devices: the devices with this name, as objects.
        arrays: sizes of the compiled programs.
    """

    def __init__(self, device: str, jax_devices: Sequence[Any], arrays: BlockArrays) -> None:
        self.device, self._jax_devices, self._arrays = device, jax_devices, arrays
        self._num_shares = available_cores() if device == "cpu" else len(jax_devices)
        self._inputs: dict[Any, tuple[Any, Any]] = {}  # device: inputs on the first device, and their copy

    def run(
        self, block: Any, shared: Any, per_client: Any, steps_K: np.ndarray
    ) -> tuple[Array, np.ndarray, dict[str, np.ndarray]]:
        """Run the program on one share of the clients per core or device, in parallel.

        All shares have one size, and few sizes occur in a run. So few programs are compiled.
        """
        size = self._arrays.share_size(-(-len(steps_K) // self._num_shares))
        shares = balance_shares(steps_K.tolist(), self._num_shares, max_size=size)

        def run(rows: np.ndarray, device: Any) -> Any:
            share = jax.tree.map(lambda v_K: pad_rows(v_K[rows], size), per_client)
            with jax.default_device(device):  # the default device of this thread only
                return jax.block_until_ready(block(*self._copied(shared, device), *share))

        devices = [self._jax_devices[i % len(self._jax_devices)] for i in range(len(shares))]
        if len(shares) == 1:
            delta_KD, losses_K, states = run(shares[0], devices[0])
            state_KD = {name: np.asarray(rows_KD)[: len(steps_K)] for name, rows_KD in states.items()}
            if size > len(steps_K):
                delta_KD, losses_K = delta_KD[: len(steps_K)], losses_K[: len(steps_K)]
            return (np.asarray(delta_KD) if self.device == "cpu" else delta_KD), np.asarray(losses_K), state_KD
        delta_KD = np.empty((len(steps_K), len(shared[0])), np.float32)
        losses_K = np.empty(len(steps_K), np.float32)
        parts: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

        def put(rows: np.ndarray, device: Any) -> None:
            delta, losses, states = run(rows, device)
            parts.append((rows, {name: np.asarray(v_KD)[: len(rows)] for name, v_KD in states.items()}))
            delta_KD[rows], losses_K[rows] = np.asarray(delta)[: len(rows)], np.asarray(losses)[: len(rows)]

        # a device runs programs in parallel only if a different thread waits for each
        with ThreadPoolExecutor(len(shares) - 1) as threads:
            futures = [threads.submit(put, *share) for share in zip(shares[1:], devices[1:], strict=True)]
            put(shares[0], devices[0])
            for future in futures:
                future.result()
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        names = parts[0][1]
        return delta_KD, losses_K, {name: np.concatenate([part[name] for _, part in parts])[order] for name in names}

    def _copied(self, shared: Any, device: Any) -> Any:
        """Return the values that all clients share, on a device. Its copy of the inputs stays there between rounds."""
        if device == self._jax_devices[0]:
            return shared
        params_D, broadcast, x, y = shared
        if device not in self._inputs or self._inputs[device][0] is not x:
            self._inputs[device] = x, jax.device_put(x, device)
        params_D, broadcast, y = jax.device_put((params_D, broadcast, y), device)
        return params_D, broadcast, self._inputs[device][1], y
