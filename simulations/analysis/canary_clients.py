"""Audit client-level privacy: canary clients send one large parameter through the stages and the server of the run.

Shapes: M canaries, D parameters, S parameters that clients share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedlearn import sgd
from fedlearn.algorithm.strategy import with_buffer_policy
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.privacy_guarantee import Neighbors
from fedlearn.core.records import Examples, Round
from fedlearn.errors import SettingError, require
from fedlearn.loop.scenario import Scenario
from fedlearn.loop.schedule import Schedule
from fedlearn.loop.training_loop import federate, start
from fedlearn.privacy.audit import (
    Canaries,
    CanaryTrainer,
    Observer,
    ObservingEngine,
    draw_canaries,
    is_gaussian,
)
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.runner.experiment import Experiment, build_experiment
from fedlearn.runner.plan import Plan
from simulations.analysis.analysis_run import AnalysisRun
from simulations.analysis.audited_run import AuditedRun, MeasuredNoise, accounted_multiplier, measure_noise

DEFAULT_DELTA = 1e-5
EXERCISED = (
    "the layout of the model, the client selection, all client stages (clipping, noise, compression), the engine, the "
    "aggregator, and the noise of the server",
)
NOT_EXERCISED = (
    "the values of the update, because a canary replaces them after training: the guarantee covers any update",
    "the server optimizer, which only processes released values",
)


def audit_clients(analysis: AnalysisRun) -> AuditedRun:
    """Audit with clients as canaries.

    Raises:
        SettingError: the model has fewer parameters than canaries, or the budget allows no round.
    """
    plan = _audited_plan(analysis.plan)
    released = _Release.run(analysis, plan)
    scores = released.canaries.split_scores(released.scores_M(is_local=plan.privacy.kind == "local"))
    guarantee, last = released.experiment.plan.strategy.privacy_guarantee, released.last
    return AuditedRun(
        scores=scores,
        privacy_unit="client",
        num_rounds=last.number,
        delta=DEFAULT_DELTA if guarantee is None or guarantee.delta is None else float(guarantee.delta),
        claimed_epsilon=None if last.privacy is None else last.privacy.value,
        is_gaussian=guarantee is None or is_gaussian(last.state.ledger, guarantee),
        noise=_measured_noise(analysis, plan, released),
        exercised=EXERCISED,
        not_exercised=NOT_EXERCISED,
    )


def _audited_plan(plan: Plan) -> Plan:
    """Return the plan with the server optimizer SGD and one local step, because canaries replace the update."""
    return replace(plan, strategy=replace(plan.strategy, server=sgd()), local=replace(plan.local, epochs=1, steps=1))


def _measured_noise(analysis: AnalysisRun, plan: Plan, released: _Release) -> MeasuredNoise | None:
    """Return the noise of one round over the movement by one canary, from two runs with the same random numbers.

    Parameters without a canary contain noise only. The second run changes one canary: it is blank, or has the opposite
    sign if the guarantee is about replacement.
    """
    guarantee, ledger = released.experiment.plan.strategy.privacy_guarantee, released.last.state.ledger
    changed = released.first_participant
    if guarantee is None or guarantee.noise_multiplier is None or released.last.number != 1 or changed is None:
        return None
    other = _Release.run(analysis, plan, changed=changed)
    is_local = plan.privacy.kind == "local"
    first_S, second_S = (
        run.observer.first_upload_D if is_local else run.params_D[run.shared_S] for run in (released, other)
    )
    if first_S is None or second_S is None or len(first_S) != len(released.shared_S):
        return None
    noise_S = np.delete(np.asarray(first_S, np.float64), released.observer.position_M)
    moved = float(np.linalg.norm(np.asarray(first_S, np.float64) - second_S))
    return measure_noise(noise_S, moved, accounted_multiplier(ledger, guarantee.noise_multiplier))


@dataclass(frozen=True)
class _Release:
    """Released values of the audited rounds, for a model that starts at zero.

    Clients share the parameters at the positions ``shared_S``.
    """

    experiment: Experiment
    canaries: Canaries
    shared_S: np.ndarray
    observer: Observer
    last: Round
    params_D: np.ndarray

    @classmethod
    def run(cls, analysis: AnalysisRun, plan: Plan, *, changed: int | None = None) -> _Release:
        """Run the audited rounds.

        Args:
            analysis: settings.
            plan: plan of the rounds.
            changed: canary whose contribution is changed; None for none.
        """
        drawn: list[Canaries] = []

        def with_canaries(scenario: Scenario) -> Scenario:
            drawn.append(replace(_draw(analysis, plan, scenario), changed=changed))
            trainer = CanaryTrainer(scenario.trainer, drawn[0])
            return replace(scenario, data=_one_example_each(scenario.data, drawn[0].participants), trainer=trainer)

        experiment = build_experiment(analysis.cfg, plan, transform_scenario=with_canaries)
        shared_S = experiment.plan.strategy.shared_positions(experiment.engine.layout)
        observer = Observer(np.searchsorted(shared_S, drawn[0].index_M))
        last = _run(experiment, int(analysis.settings["rounds"]), observer)
        return cls(experiment, drawn[0], shared_S, observer, last, np.asarray(last.state.params_D, np.float64))

    def scores_M(self, *, is_local: bool) -> np.ndarray:  # noqa: N802
        """Return the released value at the parameter of each canary; the uploads if each is itself a release."""
        return self.observer.observed_M if is_local else self.params_D[self.canaries.index_M]

    @property
    def first_participant(self) -> int | None:
        """The first canary whose upload arrived; None without one."""
        return self.observer.first_client


def _draw(analysis: AnalysisRun, plan: Plan, scenario: Scenario) -> Canaries:
    layout = scenario.trainer.layout
    strategy = with_buffer_policy(plan.strategy, layout, analysis.cfg.get("buffers", "refuse"))
    shared_S = strategy.shared_positions(layout)
    count, size = int(analysis.settings["canaries"]), len(shared_S)
    expected = f"at most {size}, the number of parameters that clients share: each canary needs one"
    require(count <= size, "audit.canaries", count, expected, f"audit.canaries={size}")
    population = Population(clients=range(count), rounds=plan.schedule.rounds)
    guarantee = plan.privacy.protect(plan.strategy, plan.local, population)[0].privacy_guarantee
    is_replacement = guarantee is not None and guarantee.neighbors is Neighbors.REPLACE
    canaries = draw_canaries(count, size, seed=plan.seed, is_replacement=is_replacement)
    return replace(canaries, index_M=shared_S[canaries.index_M])


def _one_example_each(data: FederatedData, participants: Sequence[int] | np.ndarray) -> FederatedData:
    """Return the data of an audit: each client has one real training example and no test example."""
    real_clients = [client for client in data.clients if len(data.train(client))]
    first = data.train(real_clients[0])
    train, test = Examples(first.x[:1], first.y[:1]), Examples(first.x[:0], first.y[:0])
    clients = tuple(np.asarray(participants).tolist())
    return replace(data, clients=clients, names={}, train=lambda client: train, test=lambda client: test)


def _run(experiment: Experiment, rounds: int, observer: Observer) -> Round:
    """Run the audited rounds with a model that starts at zero, and return the last round."""
    plan, engine = experiment.plan, experiment.engine
    state = start(plan.strategy, np.zeros(engine.layout.num_parameters, np.float32), engine, seed=plan.seed)
    schedule = Schedule(rounds=rounds, max_failures=plan.schedule.max_failures)
    observed = ObservingEngine(engine, observer)
    try:
        done = list(federate(plan.strategy, observed, state, schedule=schedule, local=plan.local))
    finally:
        engine.close()
    if not done:
        raise SettingError("privacy", plan.privacy.kind, "a budget for one round or more", "privacy.epsilon=2")
    return done[-1]
