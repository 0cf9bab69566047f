"""Frozen arrays of a model as arguments of each compiled program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import local
from typing import Any

import jax


class FrozenArrays:
    """Hold arrays that training does not change. All programs and clients share one copy in memory.

    As constants, the arrays would be part of each program, and of each program that JAX caches on disk.

    Args:
        arrays: arrays by name.
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self.arrays, self._traced = dict(arrays), local()

    @property
    def current(self) -> Mapping[str, Any]:
        """The arrays; within a program of `jit`, its arguments."""
        traced: Mapping[str, Any] | None = getattr(self._traced, "arrays", None)
        return self.arrays if traced is None else traced

    def jit(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Compile a function that reads `current`, with the options of ``jax.jit``."""

        def traced(arrays: Any, *args: Any) -> Any:
            with self._as_arguments(arrays):
                return function(*args)

        compiled = jax.jit(traced, **options)
        return lambda *args: compiled(self.arrays, *args)

    @contextmanager
    def _as_arguments(self, arrays: Any) -> Iterator[None]:
        before = getattr(self._traced, "arrays", None)
        self._traced.arrays = arrays
        try:
            yield
        finally:
            self._traced.arrays = before
