"""Run a privacy mechanism on known updates, and observe its releases.

Shapes: R draws of the noise, T rounds, D parameters, K clients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fedlearn.algorithm.local_rule import HOOKS, LocalRule
from fedlearn.algorithm.server_optimizers import sgd
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.layout import Layout
from fedlearn.core.privacy_guarantee import Neighbors, PrivacyGuarantee
from fedlearn.core.privacy_ledger import EventHistory, Ledger
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId, ClientWork, Examples, LocalSettings, Request, Updates
from fedlearn.engines.base import InProcessEngine
from fedlearn.loop.protocols import Engine
from fedlearn.loop.schedule import Schedule
from fedlearn.loop.training_loop import run_round, start
from fedlearn.loop.wrappers import EngineWrapper
from fedlearn.testing.problems import LinearTrainer
from fedlearn.trainers.base import BaseTrainer, LocalResult

NUM_PARAMETERS = 128
BATCH = 8  # examples per client; one step uses all of them
FAR = 1e5  # norm of an update that is above each clip norm


@dataclass(frozen=True)
class Releases:
    """Releases of a mechanism in a few rounds.

    Attributes:
        aggregate_TD: release of the server in each round.
        uploads_TKD: upload of each client in each round.
        ledgers: the ledger after each round.
    """

    aggregate_TD: np.ndarray
    uploads_TKD: list[dict[ClientId, np.ndarray]]
    ledgers: list[Ledger]


class KnownUpdates(BaseTrainer):
    """Trainer with fixed updates of the clients.

    Args:
        sent: update of each client; zero for a missing client.
        alternates: client with an update that changes its sign in each round; None for none.
    """

    rule_hooks = frozenset(HOOKS)  # the updates are fixed under any rule

    def __init__(self, sent: Mapping[ClientId, np.ndarray], alternates: ClientId | None = None) -> None:
        self.layout = Layout.from_shapes([("w", (NUM_PARAMETERS,))])
        self.sent, self.alternates = sent, alternates
        self.failing: frozenset[ClientId] = frozenset()  # clients that send NaN

    def init(self, seed: int) -> np.ndarray:
        """Return zeros, so releases are not rounded."""
        return np.zeros(NUM_PARAMETERS, np.float32)

    def outputs(self, params_D: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return zeros, ``(N, 1)``, because no check reads predictions."""
        return np.zeros((len(x), 1), np.float32)

    def fit_client(self, request: Request, rule: LocalRule, work: ClientWork) -> LocalResult:
        """Return the fixed update of the client."""
        sign = -1.0 if work.client == self.alternates and request.round % 2 == 0 else 1.0
        sent_D = sign * self.sent.get(work.client, np.zeros(NUM_PARAMETERS))
        sent_D = np.full(NUM_PARAMETERS, np.nan) if work.client in self.failing else sent_D
        return LocalResult(sent_D, 1.0, 1, 1)


class UploadTap(EngineWrapper):
    """Engine wrapper that keeps the uploads of the last round."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.uploads: dict[ClientId, np.ndarray] = {}

    def fit(self, request: Request, strategy: Strategy, cohort: Sequence[ClientId]) -> Iterator[Any]:
        """Train a cohort as `Engine.fit` does, and keep the uploads."""
        self.uploads = {}
        for result in self.engine.fit(request, strategy, cohort):
            if isinstance(result, Updates):
                self.uploads |= dict(zip(result.clients_K.tolist(), as_numpy(result.delta_KD), strict=True))
            yield result


@dataclass(frozen=True)
class Probe:
    """Protected strategy with known contributions of the clients.

    Args:
        strategy: the protected strategy.
        local: the local settings that the mechanism returned.
        num_clients: number of clients.
        rounds: planned rounds.
        seed: seed of the check.
    """

    strategy: Strategy
    local: LocalSettings
    num_clients: int
    rounds: int
    seed: int

    @property
    def guarantee(self) -> PrivacyGuarantee:
        """The privacy guarantee of the strategy."""
        assert self.strategy.privacy_guarantee is not None, "protect must return a strategy with a privacy_guarantee"
        return self.strategy.privacy_guarantee

    @cached_property
    def _unaccounted(self) -> Strategy:
        """The strategy without the computation of epsilon, for speed."""
        return replace(self.strategy, privacy_guarantee=replace(self.guarantee, epsilon_of=lambda ledger: None))

    @property
    def protects_examples(self) -> bool:
        """True if the privacy unit is an example."""
        return self.guarantee.unit == "example"

    @cached_property
    def cohorts(self) -> tuple[tuple[ClientId, ...], ...]:
        """Cohorts that the selector draws; one client takes part as often as possible."""
        if self.protects_examples:  # after one round the model differs, and so do gradients
            return ((0, 1),)
        candidates = [self._draw_cohorts(self.seed + number) for number in range(20)]
        return max(candidates, key=lambda cohorts: max(map(len, _rounds_by_client(cohorts).values()), default=0))

    def _draw_cohorts(self, seed: int) -> tuple[tuple[ClientId, ...], ...]:
        select = self.strategy.select
        return tuple(
            tuple(
                select.choose(
                    t, range(self.num_clients), generator(seed, Purpose.SELECT, round=t), **select.initial_state
                )
            )
            for t in range(1, self.rounds + 1)
        )

    @cached_property
    def target(self) -> ClientId:
        """The client that takes part in most rounds."""
        parts = _rounds_by_client(self.cohorts)
        assert parts, "the selector must draw clients"
        return max(sorted(parts), key=lambda client: len(parts[client]))

    def failing(self, cohort: Sequence[ClientId]) -> frozenset[ClientId]:
        """Return clients that fail, so secure aggregation opens the smallest allowed sum."""
        if self.guarantee.threshold is None:
            return frozenset()
        return frozenset(sorted(cohort, key=lambda client: (client != self.target, client))[self.guarantee.threshold :])

    def run(
        self,
        seed: int,
        *,
        target: np.ndarray | Examples | None = None,
        others: np.ndarray | None = None,
        drops_out: bool = False,
        alternates: bool = False,
        deployed: bool = False,
    ) -> Releases:
        """Run the rounds, and return the releases.

        Args:
            seed: seed of the noise.
            target: update of the target, or an example of it; None sends zero.
            others: update of all other clients; None sends zero.
            drops_out: True if the target does not take part.
            alternates: True if the update of the target changes its sign in each round.
            deployed: True for real clients, with noise from the operating system.
        """
        trainer, data = self._problem(target, others, self.target if alternates else None)
        inner = InProcessEngine(data, trainer, block_size=256)
        inner.deployed = deployed
        engine = UploadTap(inner)
        state = start(self._unaccounted, np.zeros(trainer.layout.num_parameters, np.float32), engine, seed=seed)
        schedule, aggregates, uploads, ledgers = Schedule(rounds=len(self.cohorts), max_failures=0.999), [], [], []
        for cohort in self.cohorts:
            if isinstance(trainer, KnownUpdates):
                trainer.failing = self.failing(cohort)
            selected = tuple(sorted(client for client in cohort if not (drops_out and client == self.target)))
            result = run_round(self._unaccounted, engine, state, selected, schedule=schedule, local=self.local)
            aggregates.append(as_numpy(result.state.params_D).astype(np.float64) - as_numpy(state.params_D))
            uploads.append(engine.uploads)
            ledgers.append(result.state.ledger)
            state = result.state
        return Releases(np.array(aggregates), uploads, ledgers)

    def _problem(
        self, target: np.ndarray | Examples | None, others: np.ndarray | None, alternates: ClientId | None
    ) -> tuple[BaseTrainer, FederatedData]:
        blank = Examples(np.zeros((BATCH, NUM_PARAMETERS - 1), np.float32), np.zeros(BATCH, np.float32))
        trainer: BaseTrainer = LinearTrainer(NUM_PARAMETERS - 1)
        clients = dict.fromkeys(range(self.num_clients), blank)
        if isinstance(target, Examples):
            x, y = blank.x.copy(), blank.y.copy()
            x[0], y[0] = target.x[0], target.y[0]
            clients[self.target] = Examples(x, y)
        elif not self.protects_examples:
            zero_D = np.zeros(NUM_PARAMETERS)
            sent = dict.fromkeys(range(self.num_clients), zero_D if others is None else others)
            trainer = KnownUpdates({**sent, self.target: zero_D if target is None else target}, alternates)
        data = FederatedData(
            task="regression",
            num_classes=1,
            clients=range(self.num_clients),
            train=clients.__getitem__,
            test=clients.__getitem__,
        )
        return trainer, data

    @cached_property
    def noises_uploads(self) -> bool:
        """True if clients add the noise and an observer can read single uploads."""
        if self.guarantee.threshold is not None:
            return False
        first, second = (self.run(self.seed + number).uploads_TKD[0][self.target] for number in (1, 2))
        return not np.array_equal(first, second)

    def observed(self, releases: Releases) -> np.ndarray:
        """Return the releases that an observer can read about the target, ``(T, D)``."""
        if not self.noises_uploads:
            return releases.aggregate_TD
        absent = np.zeros(NUM_PARAMETERS)
        return np.array([uploads.get(self.target, absent) for uploads in releases.uploads_TKD], np.float64)

    def extreme_contributions(self) -> list[Any]:
        """Return large contributions of the target, in several directions and lengths."""
        ones, first = np.ones(NUM_PARAMETERS), np.eye(NUM_PARAMETERS)[0]
        drawn = generator(self.seed, Purpose.CANARIES).standard_normal(NUM_PARAMETERS)
        if self.protects_examples:
            pairs = [(ones, FAR), (0 * ones, FAR), (first * FAR, 1.0), (drawn, -FAR)]
            return [Examples(x[None, 1:].astype(np.float32), np.full(1, y, np.float32)) for x, y in pairs]
        unit = [v / np.linalg.norm(v) for v in (ones, first, drawn, np.sign(drawn))]
        return [length * v for v in unit for length in (FAR, FAR**0.5)]

    def movements(self) -> list[np.ndarray]:
        """Return differences of the observed releases of neighboring data sets at equal noise, ``(T, D)`` each."""
        seed = self.seed + 1
        zero, differences = self.observed(self.run(seed)), []
        extremes = [(extreme, False) for extreme in self.extreme_contributions()]
        if len(self.cohorts) > 1:
            extremes.append((self.extreme_contributions()[0], True))
        for extreme, alternates in extremes:
            here = self.observed(self.run(seed, target=extreme, alternates=alternates))
            other = zero
            if self.guarantee.neighbors is Neighbors.REPLACE:
                opposite = Examples(extreme.x, -extreme.y) if isinstance(extreme, Examples) else -extreme
                other = self.observed(self.run(seed, target=opposite, alternates=alternates))
            differences.append(here - other)
        can_leave = not self.noises_uploads and not self.protects_examples and self.guarantee.threshold is None
        if can_leave and self.guarantee.neighbors is Neighbors.ADD_OR_REMOVE and min(map(len, self.cohorts)) > 1:
            others = FAR * np.ones(NUM_PARAMETERS)
            present = self.run(seed, target=-others, others=others)
            differences.append(self.observed(self.run(seed, others=others, drops_out=True)) - self.observed(present))
        return differences

    def noise(self, num_draws: int) -> tuple[np.ndarray, list[Ledger]]:
        """Return the noise of the observed releases, ``(R, T, D)``, and the ledgers of the rounds."""
        runs = [self.run(self.seed + 1 + number) for number in range(num_draws)]
        observed_RTD = np.array([self.observed(run) for run in runs])
        return observed_RTD - observed_RTD.mean(axis=0), runs[0].ledgers

    def booked(self, ledger: Ledger) -> EventHistory:
        """Return the events in a ledger that concern the target."""
        return ledger.federation + ledger.client_history(self.target)


def unmoved_server(strategy: Strategy) -> Strategy:
    """Return the strategy without a server optimizer, because it only processes releases."""
    return replace(strategy, server=sgd())


def _rounds_by_client(cohorts: Sequence[Sequence[ClientId]]) -> dict[ClientId, list[int]]:
    rounds: dict[ClientId, list[int]] = {}
    for t, cohort in enumerate(cohorts):
        for client in cohort:
            rounds.setdefault(client, []).append(t)
    return rounds
