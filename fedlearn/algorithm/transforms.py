"""Pure, stateful maps on updates, and the stages that pair a client half with a server half.

Shapes: K clients in a block, D parameters laid flat; a transform works on ``(..., D)``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from fedlearn.core.layout import Layout
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import Array, State
from fedlearn.errors import is_number, require


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Hold the information about a round that transforms and aggregation rules may use.

    Attributes:
        round: number of the round, from 1.
        seed: seed of the run.
        clients_K: clients of the block in a client half; responding clients on the server.
        num_examples_K: number of training examples of each client; on the server only.
        metrics: training metrics by name, K each; NaN for a client that did not send it; on the server only.
        num_clients: size of the population.
        cohort_size: number of clients in the cohort of this round.
        extra: means of the extra vectors of clients, by name, D each; on the server only.
        broadcast: vectors that the server half of this stage sends to its client half; on clients only.
        learning_rate: learning rate of local training in this round; on the server only.
        num_steps: mean number of local steps of the clients; on the server only. It is exact if all take the same
            number, and 0 if the privacy mechanism withholds it.
        params_D: global model at the start of the round; on the server only.
        layout: layout of the updates; on the server only.
        model_layout: layout of ``params_D``, with the parameters that no update contains; on the server only.
        deployed: True if clients are real. Noise then comes from the operating system, not from ``seed``.
        staleness_K: server steps since each client got its model; asynchronous strategies only.
        sent_D: mean of the models that were sent to these clients; asynchronous strategies only.
        received_KD: shared parameters of the model that each responding client received, for aggregators with
            `Aggregator.client_models`; else None.
        shared_D: shared parameters of ``params_D``, for the same aggregators; else None.
    """

    round: int
    seed: int
    clients_K: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_examples_K: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    metrics: Mapping[str, np.ndarray] = field(default_factory=dict)
    num_clients: int = 0
    cohort_size: int = 0
    extra: Mapping[str, Array] = field(default_factory=dict)
    broadcast: Mapping[str, Array] = field(default_factory=dict)
    learning_rate: float = 0.0
    num_steps: float = 0.0
    params_D: Array = None
    layout: Layout | None = None
    model_layout: Layout | None = None
    deployed: bool = False
    staleness_K: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    sent_D: Array = None
    received_KD: np.ndarray | None = None
    shared_D: np.ndarray | None = None

    def random_generator(self) -> np.random.Generator:
        """Return a generator for random draws at the server.

        In a simulation it follows from seed and round: each call in a round starts the same stream. In a deployment
        the operating system seeds it, because clients know the seed of the run and could predict the draws.
        """
        if self.deployed:
            return np.random.Generator(np.random.PCG64(int.from_bytes(os.urandom(32), "big")))
        return generator(self.seed, Purpose.MIXING, round=self.round)


def no_state(layout: Layout) -> State:
    """Return the empty state of a transform without state."""
    return {}


def no_broadcast(state: State) -> Mapping[str, Array]:
    """Return no vectors, for a transform without broadcast."""
    return {}


def _unchanged(update: Array, state: State, context: Context) -> tuple[Array, State]:
    return update, state


class Transform(NamedTuple):
    """Map updates to updates with a state, as in optax.

    Attributes:
        update: ``(update, state, context) -> (update, state)``, on ``(..., D)`` arrays of any array library.
        init: returns the state before the first round: named arrays of D (or scalars). The server keeps one state. In a
            client half each client keeps one, and ``update`` gets them stacked, K x D.
        broadcast: arrays of the state that the next request carries: D-vectors for the local rule from a server
            optimizer, small arrays for the client half from a stage.
        reads_num_steps: whether ``update`` reads `Context.num_steps`; only a server optimizer can.
    """

    update: Callable[[Array, State, Context], tuple[Array, State]] = _unchanged
    init: Callable[[Layout], State] = no_state
    broadcast: Callable[[State], Mapping[str, Array]] = no_broadcast
    reads_num_steps: bool = False


identity = Transform()


class Codec(NamedTuple):
    """Encode the update of one client as bytes, and decode it. Both get the layout and equally seeded generators.

    Attributes:
        encode: ``(vector_D, layout, rng) -> bytes``, of a float32 NumPy vector.
        decode: ``(bytes, layout, rng) -> vector_D``; raises `ValueError` for bytes that do not come from `encode`.
    """

    encode: Callable[[np.ndarray, Layout, np.random.Generator], bytes]
    decode: Callable[[bytes, Layout, np.random.Generator], np.ndarray]


class Stage(NamedTuple):
    """Combine a client half and a server half: clip and noise, encode and decode, mask and unmask.

    Attributes:
        client: transform of an update before it leaves the client, in the order of the stages.
        server: transform of the aggregate, in reverse order of the stages.
        event: privacy cost of the noise of the server half in one round, or None. It needs a clip before it, an
            aggregator of known sensitivity and fixed denominator, and a selector with a known sampling law. Noise in a
            client half needs none of these.
        is_nonexpansive: whether the client half (and the codec) never increases the norm of an update; only such stages
            may follow a clip.
        has_norm_bound: whether the client half bounds the norm of an update.
        needs_sum: whether the server half only works on a sum or mean (masking).
        codec: codec of the update, in the last stage only. The client encodes the result of the client half and keeps
            the decoded value. A client state named ``error`` is added before, and the difference is its next
            value (error feedback).
        is_sign_only: whether only the sign of each number is sent.
    """

    client: Transform = identity
    server: Transform = identity
    event: Any | None = None
    is_nonexpansive: bool = False
    has_norm_bound: bool = False
    needs_sum: bool = False
    codec: Codec | None = None
    is_sign_only: bool = False


def chain(*transforms: Transform) -> Transform:
    """Return a transform that applies several transforms in order.

    The names of its state start with the number of the transform.
    """

    def init(layout: Layout) -> State:
        return {f"{i}.{name}": v for i, t in enumerate(transforms) for name, v in t.init(layout).items()}

    def state_of(state: State, number: int) -> State:
        prefix = f"{number}."
        return {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}

    def update(update: Array, state: State, context: Context) -> tuple[Array, State]:
        after: dict[str, Any] = {}
        for i, transform in enumerate(transforms):
            update, new_state = transform.update(update, state_of(state, i), context)
            after |= {f"{i}.{name}": v for name, v in new_state.items()}
        return update, after

    def broadcast(state: State) -> Mapping[str, Array]:
        return {name: v for i, t in enumerate(transforms) for name, v in t.broadcast(state_of(state, i)).items()}

    reads_num_steps = any(transform.reads_num_steps for transform in transforms)
    return Transform(init=init, update=update, broadcast=broadcast, reads_num_steps=reads_num_steps)


def clip_norm(update: Array, bound: float) -> Array:
    """Scale each vector of ``(..., D)`` down to an L2 norm of at most ``bound``. Shorter vectors do not change.

    *Guarantees*: idempotent up to rounding; zero stays zero; NaN stays NaN (the client step refuses NaN before).
    """
    xp = array_namespace(update)
    norm = xp.linalg.vector_norm(update, axis=-1, keepdims=True)
    return update * (bound / xp.where(norm > bound, norm, xp.full_like(norm, bound)))


def clip(bound: float) -> Stage:
    """Return a stage that bounds the L2 norm of each update at the client. It gives no privacy without noise."""
    positive = is_number(bound, at_least=0) and 0 < bound < float("inf")
    require(positive, "clip", bound, "a finite number > 0", "clip=1.0")

    def update(update: Array, state: State, context: Context) -> tuple[Array, State]:
        return clip_norm(update, bound), state

    return Stage(client=Transform(update=update), is_nonexpansive=True, has_norm_bound=True)


def estimate_bytes(codec: Codec, layout: Layout) -> int:
    """Estimate the size of an encoded update, bytes, from Gaussian numbers."""
    typical_D = generator(0, Purpose.COMPRESS).standard_normal(layout.num_parameters, dtype=np.float32)
    return len(codec.encode(typical_D, layout, generator(0, Purpose.COMPRESS)))
