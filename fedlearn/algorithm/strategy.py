"""The strategy: five small pure parts, checked together when it is built; its buffer policy and root dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedlearn.algorithm.aggregation import Aggregator, mean
from fedlearn.algorithm.client_selection import Selector
from fedlearn.algorithm.local_rule import LocalRule, plain_training
from fedlearn.algorithm.server_optimizers import sgd
from fedlearn.algorithm.staleness import Asynchrony
from fedlearn.algorithm.transforms import Codec, Stage, Transform
from fedlearn.core.layout import Layout
from fedlearn.core.privacy_guarantee import PrivacyGuarantee
from fedlearn.core.records import ClientId
from fedlearn.errors import FedlearnError, is_count, require

BUFFER_POLICIES = ("refuse", "average", "local")  # for a model's buffers


class CompositionError(FedlearnError, ValueError):
    """Report parts of a strategy that do not fit together. The message names the setting to change."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Describe a federated algorithm as data; nothing is inherited.

    Args:
        select: selects the cohort of a round.
        local: difference of local training from plain SGD.
        stages: transforms of each update between client and server, each with a client half and a server half.
        aggregate: reduces many updates to one.
        server: turns the aggregated update into the step of the global model.
        privacy_guarantee: guarantee to clients and its cost, set by `fedlearn.privacy`; None for no guarantee.
        asynchrony: settings of an asynchronous strategy; None works in rounds.
        root: the root dataset of the server; None for none.
        buffers: policy for the buffers of a model, set by `with_buffer_policy`; ``refuse`` allows no buffers.

    Raises:
        CompositionError: a privacy claim would not hold, or a part would not work, in this combination.
    """

    select: Selector
    local: LocalRule = plain_training
    stages: tuple[Stage, ...] = ()
    aggregate: Aggregator = field(default_factory=mean)
    server: Transform = field(default_factory=sgd)
    privacy_guarantee: PrivacyGuarantee | None = None
    asynchrony: Asynchrony | None = None
    root: RootDataset | None = None
    buffers: str = "refuse"

    @property
    def codec(self) -> Codec | None:
        """How updates are written as bytes, if they are: the last stage's."""
        return self.stages[-1].codec if self.stages else None

    @property
    def supports_partial_aggregates(self) -> bool:
        """Whether engines may aggregate parts of a cohort.

        An asynchronous strategy weighs updates by staleness, which only the training loop knows.
        """
        return self.aggregate.merge is not None and self.asynchrony is None

    def shared_layout(self, layout: Layout) -> Layout:
        """The layout of updates: that of the model without the parameters that stay at the clients.

        Raises:
            SettingError: nothing would be left to send, a pattern matches no parameter, or the model has buffers that
                nothing is said of.
        """
        _refuse_buffers(layout, self.buffers)
        keeps = self.local.personal_parameters
        layout.positions(keeps)
        left = layout.without(keeps)
        require(
            bool(left.leaves) or not keeps,
            "personal_parameters",
            keeps,
            "patterns that leave some of the model to share",
            "personal_parameters=out.*",
        )
        return left

    def __post_init__(self) -> None:
        self._check_local()
        _refuse_if(
            any(stage.event is not None for stage in self.stages) and self.aggregate.sensitivity is None,
            "a stage makes a privacy claim, but the aggregator's sensitivity is unknown",
            "aggregate=mean(weighting='equal')",
        )
        _refuse_if(
            any(stage.event is not None for stage in self.stages) and self.aggregate.denominator is None,
            "a stage makes a privacy claim, but the aggregator divides by whoever delivers: where clients drop out, "
            "each of the others would count for more than the noise was made for",
            "aggregate=expected_mean(clients_per_round)",
        )
        _refuse_if(
            any(stage.event is not None for stage in self.stages) and self.select.law is None,
            "a stage makes a privacy claim, but the selector's sampling law is unknown",
            "select=uniform(clients_per_round)",
        )
        _refuse_if(
            any(stage.needs_sum for stage in self.stages) and not self.aggregate.is_sum,
            "a stage masks updates, which only a sum removes, but the aggregator is no sum",
            "aggregate=mean(weighting='equal')",
        )
        self._check_order_of_stages()
        if self.asynchrony is not None:
            self._check_asynchrony()
        _refuse_if(
            self.privacy_guarantee is not None
            and "metrics" in self.privacy_guarantee.withheld
            and "metrics" in self.aggregate.reads,
            "the aggregation rule reads the metrics of each client, and the privacy mechanism adds no noise to them",
            "privacy=none, or an aggregation rule that reads updates only",
        )

    def _check_asynchrony(self) -> None:
        """There is no cohort to draw, to mask or to account for."""
        _refuse_if(
            self.privacy_guarantee is not None
            or any(stage.event is not None or stage.needs_sum for stage in self.stages),
            "privacy is accounted, and updates are masked, by rounds, which an asynchronous strategy does not have",
            "privacy=none, or strategy=fedavg",
        )
        law = self.select.law
        _refuse_if(
            law is None or law.kind != "all",
            "an asynchronous strategy asks whoever is idle, and draws no cohort",
            "select=everyone()",
        )

    def _check_local(self) -> None:
        """What stays at the clients must stay there, and what they tell must not leave without noise."""
        rule = self.local
        _refuse_if(
            bool(rule.personal_epochs) and not rule.personal_parameters,
            f"personal_epochs={rule.personal_epochs} trains parameters that stay at the clients, but none do",
            "personal_parameters=out.*",
        )
        _refuse_if(
            bool(rule.personal_parameters) and bool(extra_names(rule)),
            f"personal_parameters={rule.personal_parameters} stay at the clients, "
            "but what the local rule sends beside updates would hold them",
            "personal_parameters=()",
        )
        _refuse_if(
            self.privacy_guarantee is not None and bool(rule.evaluate_models),
            f"clients tell the loss of {', '.join(rule.evaluate_models)} on their examples, "
            "which would leave without noise",
            "privacy=none, or a strategy whose clients tell no losses",
        )
        _refuse_if(
            self.privacy_guarantee is not None and self.select.update is not None,
            "clients are selected by what they told of their training, which is not to leave without noise",
            "select=uniform(clients_per_round)",
        )

    def _check_order_of_stages(self) -> None:
        written = [stage.codec is not None for stage in self.stages]
        _refuse_if(
            any(written[:-1]),
            "a stage writes updates as bytes, but another one would change them after that",
            "one compression, as the last stage",
        )
        _refuse_if(
            any(written) and any(stage.needs_sum for stage in self.stages),
            "a stage masks updates, and masked numbers cannot be compressed one client at a time",
            "compress=none",
        )
        clipped = False
        for stage in self.stages:
            _refuse_if(
                clipped and not stage.is_nonexpansive,
                "a stage after the clip may lengthen an update again, so the clip would bound nothing",
                "put the clip after it",
            )
            clipped = clipped or stage.has_norm_bound
            _refuse_if(
                stage.event is not None and not clipped,
                "a stage makes a privacy claim, but nothing before it bounds an update",
                "stages=(..., clip(1.0), noise)",
            )


def extra_names(rule: LocalRule) -> tuple[str, ...]:
    """Names of what a local rule sends besides the update; it is arithmetic, so one client with one parameter tells."""
    one = np.ones((1, 1), np.float32)
    vectors = dict.fromkeys(rule.client_state, one) | dict.fromkeys(rule.receives, one[0])
    return tuple(rule.after_training(one, np.ones(1, np.int64), 0.1, **vectors)[1])


def with_compression(strategy: Strategy, compression: Stage) -> Strategy:
    """Return the strategy with a compression as its last stage."""
    return strategy if compression.codec is None else replace(strategy, stages=(*strategy.stages, compression))


def with_buffer_policy(strategy: Strategy, layout: Layout, policy: str) -> Strategy:
    """Return the strategy for a model that may have buffers: the statistics of its batch norms.

    Args:
        strategy: with its protection, if it has one.
        layout: of the model; without buffers the policy makes no difference.
        policy: ``refuse``; ``average``: they travel with the parameters and are aggregated as these are, but the
            server's step is that aggregate itself, whatever its optimiser (Flower's strategies, which aggregate and
            step in one, treat them as parameters); or ``local``: each client keeps its own, as it does parameters that
            a strategy ``keeps``, and predicts with them.

    *Guarantees*: no gradient, optimiser, weight decay or local rule touches a buffer under either. Under ``local`` none
    is in an update, so that clip, noise, masks and robust rules are of the parameters; the model at the server has
    those of its beginning, which fit no data, so that nothing is judged on data of all clients with it.

    Raises:
        SettingError: there is no such policy, the model has buffers and it is ``refuse``, or the strategy cannot follow
            it: noise would make variances negative and a clip would be filled by numbers of another scale than weights;
            moves from models of different age add up to more than a mean; and what is sent beside updates would hold
            what is to stay.

    Reference: Andreux et al., *Siloed Federated Learning for Multi-Centric Histopathology Datasets*, 2020,
    arXiv:2008.07424 (``local``: SiloBN).
    """
    require(policy in BUFFER_POLICIES, "buffers", policy, f"one of {', '.join(BUFFER_POLICIES)}", "buffers=average")
    if not layout.buffers:
        return strategy
    _refuse_buffers(layout, policy)
    expected = "another for a model with buffers: those of the models that it compares with are not kept apart"
    require(
        strategy.local.feature_penalty is None, "strategy", "one that compares features", expected, "strategy=fedprox"
    )
    if policy == "local":
        beside = ", ".join(extra_names(strategy.local))
        expected = f"average: what this strategy sends beside updates ({beside}) would hold the buffers"
        require(not beside, "buffers", policy, expected, "buffers=average")
        keeps = dict.fromkeys((*strategy.local.personal_parameters, *layout.buffers))
        return replace(strategy, buffers=policy, local=strategy.local._replace(personal_parameters=tuple(keeps)))
    noisy = strategy.privacy_guarantee is not None and strategy.privacy_guarantee.noise_multiplier is not None
    expected = "local: noise would make running variances negative, and they are of another scale than weights"
    require(not noisy, "buffers", policy, expected, "buffers=local")
    expected = "local: what clients make of models of different age is no mean of statistics"
    require(strategy.asynchrony is None, "buffers", policy, expected, "buffers=local")
    votes = any(stage.is_sign_only for stage in strategy.stages)
    require(not votes, "buffers", policy, "local: a vote has no size, so that it moves no statistic", "buffers=local")
    return replace(strategy, buffers=policy)


def _refuse_buffers(layout: Layout, policy: str) -> None:
    some = ", ".join(layout.buffers[:3]) + ", ..." * (len(layout.buffers) > 3)
    expected = f"average or local for this model, which has buffers ({some}); or a model with group norm"
    require(policy != "refuse" or not layout.buffers, "buffers", policy, expected, "buffers=average")


def _refuse_if(unsound: bool, reason: str, fix: str) -> None:
    if unsound:
        raise CompositionError(f"{reason}\n  try       {fix}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RootDataset:
    """Describe the root dataset of the server, held by a client that its operator runs (`Strategy.root`).

    Args:
        client: id of the client that holds the examples. It takes part in each round and trains like all others;
            poisoning spares it.
        num_examples: in simulations, number of examples of all clients that replace its own; see `with_root_dataset`.
            None: its own examples are the root dataset.
    """

    client: ClientId = 0
    num_examples: int | None = None

    def __post_init__(self) -> None:
        require(is_count(self.client, at_least=0), "root_client", self.client, "a client's number", "root_client=0")
        expected = "null (the client's own), or a whole number >= 1"
        counts = self.num_examples is None or is_count(self.num_examples)
        require(counts, "num_root_examples", self.num_examples, expected, "num_root_examples=100")

    def add_to_cohorts(self, selector: Selector) -> Selector:
        """Return a selector that adds the root client to each cohort of ``selector``."""

        def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
            return [*{self.client, *selector.choose(round, clients, rng)}]

        return Selector(choose=choose)

    def is_root(self, clients_K: np.ndarray) -> np.ndarray:
        """Which of a round's updates is the server's own, K booleans.

        Raises:
            FedlearnError: none is, so that there is nothing to trust.
        """
        is_root_K: np.ndarray = clients_K == self.client
        if not is_root_K.any():
            raise FedlearnError(f"client {self.client}, where the server's root data lie, sent no update")
        return is_root_K
