"""Audit example-level privacy: canary examples pass through the model, the loss and the DP-SGD of the run.

Shapes: M canaries, K clients of a group, D uploaded values.

Each canary has a client of its own, with a few real examples around it. A fair coin decides if the client holds the
canary. Two runs without noise give the update with and without the canary, with the same random numbers. The score of
a canary is the projection of the noisy update on this difference. No adversary with one update has a better score if
the noise is Gaussian.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy, holds_whole_numbers
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.inputs import map_fields
from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ExampleDP, Examples, LocalSettings, Updates
from fedlearn.errors import FedlearnError, is_count, require
from fedlearn.loop.protocols import Engine
from fedlearn.loop.scenario import Scenario
from fedlearn.loop.training_loop import next_request, start
from fedlearn.privacy.audit import Scores, is_gaussian
from fedlearn.privacy.example_sensitivity import OUTLIER_SCALE, measure_sensitivity, sample_examples
from fedlearn.runner.experiment import apply_privacy, build_scenario, build_scenario_engine
from fedlearn.runner.plan import Plan
from simulations.analysis.analysis_run import AnalysisRun
from simulations.analysis.audited_run import AuditedRun, accounted_multiplier, measure_noise

NUM_POOLED = 2000  # real examples from which the clients of the audit draw
MAX_GROUP_BYTES = 2**28  # memory of the updates of one group of clients
STEP_SIZE = 1e-2  # noise of a step, relative to the scale of the parameters
EXERCISED = (
    "the model, its loss and its random layers, DP-SGD of the trainer (clipping and noise), batching and engine, "
    "all client stages and the local rule",
)
NOT_EXERCISED = (
    "amplification by sampling: each audited client takes all its examples in each step",
    "momentum, weight decay and adaptive optimizers, which only process private gradients",
    "aggregator and server, which only process released updates",
)


def audit_examples(analysis: AnalysisRun) -> AuditedRun:
    """Audit with examples as canaries. The release is the update of a client.

    Raises:
        SettingError: a setting is out of range, or the trainer refuses DP-SGD for this model.
        FedlearnError: a client of the audit failed.
    """
    scenario = build_scenario(analysis.cfg)
    plan = apply_privacy(analysis.plan, scenario)  # keeps noise and clip norm of the run
    guarantee, dp = plan.strategy.privacy_guarantee, plan.local.example_dp
    assert guarantee is not None
    assert dp is not None
    canaries = _draw(analysis, plan, scenario)
    sensitivity = measure_sensitivity(scenario.trainer, canaries.pool, seed=plan.seed)
    results = list(_run(analysis, plan, scenario, canaries))
    ledger = _charge(guarantee, canaries, int(analysis.settings["rounds"]), plan.local)
    claimed = guarantee.epsilon_of(ledger)
    score_M, noise, signal_M = (np.concatenate([getattr(part, name) for part in results]) for name in _Measured._fields)
    included_M = canaries.included_M
    return AuditedRun(
        scores=Scores(included=score_M[included_M], excluded=score_M[~included_M]),
        privacy_unit="example",
        num_rounds=int(analysis.settings["rounds"]),
        delta=float(guarantee.delta or 0.0),
        claimed_epsilon=None if claimed is None else claimed.value,
        is_gaussian=is_gaussian(ledger, guarantee),
        sensitivity=sensitivity,
        noise=measure_noise(noise, 1.0, accounted_multiplier(ledger, guarantee.noise_multiplier)),
        signal=float(np.median(signal_M)),
        exercised=EXERCISED,
        not_exercised=NOT_EXERCISED,
    )


@dataclass(frozen=True, kw_only=True)
class CanaryClients:
    """Clients of the audit: each holds a few real examples, and possibly a canary in the middle.

    Attributes:
        pool: real examples.
        rows_MN: rows of the real examples of each client, without the canary.
        canaries: one canary per client.
        included_M: result of a fair coin for each client.
    """

    pool: Examples
    rows_MN: np.ndarray
    canaries: Examples
    included_M: np.ndarray

    @property
    def num_examples(self) -> int:
        """Number of examples of a client with its canary."""
        return self.rows_MN.shape[1] + 1

    def examples(self, client: int, *, with_canary: bool) -> Examples:
        """Return the examples of a client."""
        rows = self.rows_MN[client]
        x, y = self.pool.x[rows], self.pool.y[rows]
        if not with_canary:
            return Examples(x, y)
        middle = len(rows) // 2
        canary_x, canary_y = self.canaries.x[client], self.canaries.y[client]
        return Examples(np.insert(x, middle, canary_x, axis=0), np.insert(y, middle, canary_y))

    def data(self, data: FederatedData, *, with_canary: bool) -> FederatedData:
        """Return the data of the audit. It has no held-out examples."""
        nothing = Examples(self.pool.x[:0], self.pool.y[:0])
        return replace(
            data,
            clients=range(len(self.rows_MN)),
            names={},
            train=lambda client: self.examples(client, with_canary=with_canary),
            test=lambda client: nothing,
            pooled_test=None,
        )


def _draw(analysis: AnalysisRun, plan: Plan, scenario: Scenario) -> CanaryClients:
    count, size, batch = int(analysis.settings["canaries"]), analysis.settings["examples"], plan.local.batch_size
    require(batch >= 2, "local.batch_size", batch, "at least 2: one real example and the canary", "local.batch_size=8")
    fits = is_count(size, at_least=2) and size <= batch
    expected = f"a whole number in 2..{batch}, the size of a batch: the audit does not sample batches"
    require(fits, "audit.examples", size, expected, f"audit.examples={min(8, batch)}")
    rng, data = generator(plan.seed, Purpose.CANARIES), scenario.data
    pool = sample_examples([data.train(client) for client in data.clients], NUM_POOLED, seed=plan.seed)
    expected = f"at most {len(pool)}, the number of training examples"
    require(size <= len(pool), "audit.examples", size, expected, f"audit.examples={len(pool)}")
    rows_MN = np.stack([rng.permutation(len(pool))[:size] for _ in range(count)])
    canaries = _worst_case(Examples(pool.x[rows_MN[:, 0]], pool.y[rows_MN[:, 0]]), data, pool, rng)
    included_M = rng.integers(2, size=count).astype(bool)
    return CanaryClients(pool=pool, rows_MN=rows_MN[:, 1:], canaries=canaries, included_M=included_M)


def _worst_case(examples: Examples, data: FederatedData, pool: Examples, rng: np.random.Generator) -> Examples:
    """Return examples with a large gradient: a wrong target, and enlarged inputs unless they are whole numbers."""
    x, y = map_fields(_enlarged, np.asarray(examples.x), np.asarray(pool.x)), np.array(examples.y)
    if not data.task.has_classes:
        spread = float(np.std(pool.y)) or 1.0
        return Examples(x, (y + 100 * spread * rng.choice([-1, 1], len(y))).astype(y.dtype))
    num_classes = max(2, data.num_classes)
    return Examples(x, ((y + rng.integers(1, num_classes, len(y))) % num_classes).astype(y.dtype))


def _enlarged(x: np.ndarray, pool_x: np.ndarray) -> np.ndarray:
    return x if holds_whole_numbers(pool_x) else OUTLIER_SCALE * x


class _Measured(NamedTuple):
    """Measurements of a group of clients, in multiples of the clip norm.

    Attributes:
        score_M: projection of the released update on the known difference.
        noise: released minus noiseless values of all clients, per step.
        signal_M: contribution of each canary, per step.
    """

    score_M: np.ndarray
    noise: np.ndarray
    signal_M: np.ndarray


def _run(analysis: AnalysisRun, plan: Plan, scenario: Scenario, canaries: CanaryClients) -> Iterator[_Measured]:
    """Run the audited rounds for one group of clients after another. Groups have the size of a cohort of the run."""
    law, layout = plan.strategy.select.law, scenario.trainer.layout
    cohort = int(law.size) if law is not None and law.size else len(scenario.data.clients)
    group_size = max(1, min(cohort, MAX_GROUP_BYTES // (16 * layout.num_parameters)))
    engines = [
        build_scenario_engine(
            analysis.cfg, replace(scenario, data=canaries.data(scenario.data, with_canary=with_canary))
        )
        for with_canary in (True, False)
    ]
    try:
        sums = [
            _Sums(engine, plan, scenario.trainer.init(plan.seed), canaries.num_examples, with_canary=with_canary)
            for engine, with_canary in zip(engines, (True, False), strict=True)
        ]
        clients = range(len(canaries.rows_MN))
        for first in clients[::group_size]:
            yield _measure(sums, canaries, clients[first : first + group_size], int(analysis.settings["rounds"]))
    finally:
        for engine in engines:
            engine.close()


def _measure(sums: Sequence[_Sums], canaries: CanaryClients, group: range, rounds: int) -> _Measured:
    """Return scores, noise and signals of a group over all rounds."""
    with_canary, without_canary = sums
    dots_K, squares_K, noises = np.zeros(len(group)), np.zeros(len(group)), []
    included_K1 = canaries.included_M[group.start : group.stop, None]
    for round in range(1, rounds + 1):
        with_KD, without_KD = (part(group, round=round, is_noisy=False) for part in sums)
        released_KD = np.where(
            included_K1,
            with_canary(group, round=round, is_noisy=True),
            without_canary(group, round=round, is_noisy=True),
        )
        difference_KD = with_KD - without_KD
        dots_K += ((released_KD - without_KD) * difference_KD).sum(axis=1)
        squares_K += np.square(difference_KD).sum(axis=1)
        noises.append((released_KD - np.where(included_K1, with_KD, without_KD)).ravel())
    norm_K, steps = np.sqrt(squares_K), with_canary.num_steps
    return _Measured(
        score_M=dots_K / np.maximum(norm_K, 1e-12),
        noise=np.concatenate(noises) / np.sqrt(steps),
        signal_M=norm_K / (steps * np.sqrt(rounds)),
    )


class _Sums:
    """Summed private gradients of clients over a round, in multiples of the clip norm.

    The numbers of examples are public. So a client without its canary has a smaller learning rate. All updates then
    have the same scale.

    Args:
        engine: engine of the clients.
        plan: plan of the run, with DP-SGD.
        params_D: parameters from which all clients start.
        num_examples: number of examples of a client with its canary.
        with_canary: True if the clients of the engine hold their canaries.
    """

    def __init__(
        self, engine: Engine, plan: Plan, params_D: np.ndarray, num_examples: int, *, with_canary: bool
    ) -> None:
        dp = plan.local.example_dp
        assert dp is not None
        self.engine, self.plan, self.dp = engine, plan, dp
        self.strategy: Strategy = plan.strategy
        self.params_D = params_D
        size = num_examples if with_canary else num_examples - 1
        scale = float(np.sqrt(np.mean(np.square(self.params_D)))) or 1.0
        self.unit = STEP_SIZE * scale / max(dp.noise_multiplier, 0.1)  # change of the parameters per clip norm
        self.learning_rate = self.unit * size / dp.clip
        self.num_steps = int(plan.local.num_steps(num_examples))

    def __call__(self, group: range, *, round: int, is_noisy: bool) -> np.ndarray:
        """Return the sums of a group of clients, ``(K, D)``."""
        dp = self.dp if is_noisy else ExampleDP(clip=self.dp.clip, noise_multiplier=0.0)
        local = LocalSettings(
            epochs=self.plan.local.epochs,
            steps=self.plan.local.steps,
            batch_size=self.plan.local.batch_size,
            learning_rate=self.learning_rate,
            example_dp=dp,
        )
        self.engine.client_states = {}
        state = replace(start(self.strategy, self.params_D, self.engine, seed=self.plan.seed), round=round - 1)
        request = next_request(self.strategy, self.engine, state, local)
        rows: dict[int, np.ndarray] = {}
        for result in self.engine.fit(request, self.strategy, tuple(group)):
            if not isinstance(result, Updates):
                raise _failed(getattr(result, "reason", "it sent no update"))
            rows |= zip(result.clients_K.tolist(), as_numpy(result.delta_KD), strict=True)
        return np.stack([rows[client] for client in group]).astype(np.float64) / -self.unit


def _charge(guarantee: PrivacyGuarantee, canaries: CanaryClients, rounds: int, local: LocalSettings) -> Ledger:
    """Return the ledger of one client of the audit after its rounds."""
    ledger, size = Ledger(), canaries.num_examples
    for round in range(1, rounds + 1):
        steps = int(local.num_steps(size))
        release = Release(round=round, clients=(0,), num_examples=(size,), num_steps=(steps,))
        ledger = guarantee.charge(ledger, release)
    return ledger


def _failed(reason: str) -> FedlearnError:
    return FedlearnError(
        f"a client of the audit failed: {reason}\n  expected  an update of each client\n"
        "  advice    check_trainer of fedlearn.testing, which names the fault of a trainer"
    )
