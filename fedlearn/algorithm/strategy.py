"""The strategy: five small pure parts that are checked together; the buffer policy and the root dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedlearn.advice import label
from fedlearn.algorithm.aggregation import Aggregator, mean
from fedlearn.algorithm.client_selection import Selector
from fedlearn.algorithm.local_rule import LocalRule, plain_training
from fedlearn.algorithm.server_optimizers import sgd
from fedlearn.algorithm.staleness import Asynchrony
from fedlearn.algorithm.transforms import Codec, Stage, Transform
from fedlearn.core.adapters import is_mergeable
from fedlearn.core.layout import Layout
from fedlearn.core.optimizers import STEPS
from fedlearn.core.privacy_guarantee import PrivacyGuarantee
from fedlearn.core.records import ClientId
from fedlearn.errors import FedlearnError, is_count, require

BUFFER_POLICIES = ("refuse", "average", "local")  # for a model's buffers


class CompositionError(FedlearnError, ValueError):
    """Report parts of a strategy that do not fit together. The message names the setting to change."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Describe a federated algorithm as data, without inheritance.

    Args:
        select: selector of the cohort of each round.
        local: difference of local training from plain SGD.
        stages: transforms of each update between client and server, each with a client half and a server half.
        aggregate: aggregator, which reduces many updates to one.
        server: server optimizer, which turns the aggregate into the step of the global model.
        privacy_guarantee: guarantee to clients and its cost, set by `fedlearn.privacy`; None for no guarantee.
        asynchrony: settings of an asynchronous strategy; None works in rounds.
        root: the root dataset of the server; None for none.
        buffers: policy for the buffers of a model, set by `with_buffer_policy`; ``refuse`` allows no buffers.
        merges_adapters: whether the server merges adapters into matrices of the model that clients do not send; see
            `fedlearn.core.adapters`. The aggregator then returns an update of all parameters.

    Raises:
        CompositionError: the parts do not fit together, or their privacy claim would be wrong.
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
    merges_adapters: bool = False

    @property
    def codec(self) -> Codec | None:
        """The codec of the last stage; None if updates are not compressed."""
        return self.stages[-1].codec if self.stages else None

    @property
    def supports_partial_aggregates(self) -> bool:
        """True if engines may aggregate parts of a cohort.

        An asynchronous strategy weighs updates by staleness, which only the training loop knows.
        """
        return self.aggregate.merge is not None and self.asynchrony is None

    def shared_layout(self, layout: Layout) -> Layout:
        """Return the layout of updates: the layout of the model without personal and frozen parameters.

        Raises:
            SettingError: no parameter is left to share, or a pattern matches no parameter. Or the model has buffers
                without a policy for them, or no adapters that the strategy can merge.
        """
        _refuse_buffers(layout, self.buffers)
        can_merge = not self.merges_adapters or is_mergeable(layout)
        expected = "true, for a pretrained model: this strategy merges adapters"
        require(can_merge, "model.mergeable", False, expected, "model.mergeable=true")
        personal, frozen = self.local.personal_parameters, self.local.frozen_parameters
        layout.positions(personal)
        layout.positions(frozen, setting="strategy.frozen_parameters")
        shared = layout.without(self.local.unshared_parameters)
        name = "frozen_parameters" if frozen else "personal_parameters"
        require(
            bool(shared.leaves) or not self.local.unshared_parameters,
            name,
            self.local.unshared_parameters,
            "patterns that match some parameters, not all",
            f"'{name}=out.*'",
        )
        return shared

    def shared_positions(self, layout: Layout) -> np.ndarray:
        """Return the positions of the shared parameters in the model, ascending."""
        return np.delete(np.arange(layout.num_parameters), layout.positions(self.local.unshared_parameters))

    def __post_init__(self) -> None:
        self._check_local()
        _refuse_if(
            any(stage.event is not None for stage in self.stages) and self.aggregate.sensitivity is None,
            "a stage makes a privacy claim, but the sensitivity of the aggregator is unknown",
            "aggregate=mean(weighting='equal')",
        )
        _refuse_if(
            any(stage.event is not None for stage in self.stages) and self.aggregate.denominator is None,
            "the aggregator divides by the number of responding clients, but the noise of a stage is calibrated for "
            "the expected cohort",
            "aggregate=expected_mean(clients_per_round)",
        )
        _refuse_if(
            any(stage.event is not None for stage in self.stages) and self.select.law is None,
            "a stage makes a privacy claim, but the sampling law of the selector is unknown",
            "select=uniform(clients_per_round)",
        )
        _refuse_if(
            any(stage.needs_sum for stage in self.stages) and not self.aggregate.is_sum,
            "a stage masks updates, and only a sum removes the masks, but the aggregator is not a sum",
            "aggregate=mean(weighting='equal')",
        )
        self._check_order_of_stages()
        self._check_client_models()
        if self.asynchrony is not None:
            self._check_asynchrony()
        _refuse_if(
            self.privacy_guarantee is not None
            and "metrics" in self.privacy_guarantee.withheld
            and "metrics" in self.aggregate.reads,
            "the aggregation rule reads the metrics of each client, and the privacy mechanism adds no noise to them",
            "privacy=none, or an aggregation rule that reads updates only",
        )
        _refuse_if(
            self.privacy_guarantee is not None
            and not self.privacy_guarantee.covers_extra_vectors
            and bool(extra_names(self.local)),
            f"the local rule also sends {', '.join(extra_names(self.local))}, "
            "and the privacy mechanism adds no noise to these vectors",
            "strategy=fedavg, strategy=fedprox, or privacy=example",
        )

    def _check_client_models(self) -> None:
        """Refuse parts that are wrong if the server sends each client another model."""
        if self.aggregate.client_models is None:
            return
        reason = "the server sends each client its own model, which depends on single updates"
        _refuse_if(
            any(stage.needs_sum for stage in self.stages),
            f"{reason}, but secure aggregation reveals only their sum",
            "strategy=fedavg, or privacy=none",
        )
        _refuse_if(
            any(stage.event is not None for stage in self.stages),
            f"{reason}, but the server adds noise only to their mean",
            "strategy=fedavg, or privacy=local",
        )
        _refuse_if(
            self.asynchrony is not None,
            f"{reason}, but an asynchronous strategy sends the newest global model",
            "strategy=fedavg, or a synchronous strategy",
        )

    def _check_asynchrony(self) -> None:
        """Refuse parts that need a cohort, because an asynchronous strategy has none."""
        _refuse_if(
            self.privacy_guarantee is not None
            or any(stage.event is not None or stage.needs_sum for stage in self.stages),
            "privacy is accounted and updates are masked per round, but an asynchronous strategy has no rounds",
            "privacy=none, or strategy=fedavg",
        )
        _refuse_if(
            self.local.num_steps is not None,
            "the strategy draws the number of local steps per round, but an asynchronous strategy has no rounds",
            "asynchrony=None",
        )
        _refuse_if(
            self.merges_adapters or self.local.start is not None,
            "the server needs the model at which a client started, but an asynchronous strategy does not keep it",
            "asynchrony=None",
        )
        law = self.select.law
        _refuse_if(
            law is None or law.kind != "all",
            "an asynchronous strategy sends requests to idle clients and draws no cohort",
            "select=everyone()",
        )

    def _check_local(self) -> None:
        """Refuse a local rule that would send personal parameters, or values without noise."""
        rule = self.local
        _refuse_if(
            bool(rule.personal_epochs) and not rule.personal_parameters,
            f"personal_epochs={rule.personal_epochs} trains personal parameters, but there are none",
            "'personal_parameters=out.*'",
        )
        _refuse_if(
            bool(rule.personal_parameters) and bool(extra_names(rule)),
            f"personal_parameters={rule.personal_parameters} stay at the clients, "
            f"but the vectors {', '.join(extra_names(rule))} of the local rule would contain them",
            "personal_parameters=()",
        )
        _refuse_if(
            rule.aggregation is not None and (rule.personal is None or rule.personal.correct is not None),
            "local aggregation mixes the model that a client has trained, but the rule does not keep it",
            "personal=PersonalModel()",
        )
        _refuse_if(
            rule.aggregation is not None and bool(rule.personal_parameters or rule.evaluate_models),
            "local aggregation starts at a mixture of two models, but personal parameters, buffers=local and "
            "evaluate_models start at other models",
            "personal_parameters=(), evaluate_models=() and buffers=average",
        )
        _refuse_if(
            rule.start is not None
            and bool(rule.personal_parameters or rule.personal or rule.evaluate_models or rule.aggregation),
            "the rule chooses the start of local training, but personal models, evaluate_models or local aggregation "
            "start at other models",
            "start=None",
        )
        _refuse_if(
            self.privacy_guarantee is not None and bool(rule.evaluate_models),
            f"each client sends its loss of {', '.join(rule.evaluate_models)}, "
            "and the privacy mechanism adds no noise to losses",
            "privacy=none, or a strategy whose clients send no losses",
        )
        _refuse_if(
            self.privacy_guarantee is not None and self.select.update is not None,
            "the selector uses the training metrics of clients, and the privacy mechanism adds no noise to them",
            "select=uniform(clients_per_round)",
        )

    def _check_order_of_stages(self) -> None:
        is_encoded = [stage.codec is not None for stage in self.stages]
        _refuse_if(
            any(is_encoded[:-1]),
            "a stage compresses updates, but a later stage changes them",
            "one compression, as the last stage",
        )
        _refuse_if(
            any(is_encoded) and any(stage.needs_sum for stage in self.stages),
            "a stage masks updates, and masked updates of single clients cannot be compressed",
            "compress=none",
        )
        is_clipped = False
        for stage in self.stages:
            _refuse_if(
                is_clipped and not stage.is_nonexpansive,
                "a stage after the clip may lengthen an update, so the norm has no bound",
                "put the clip after it",
            )
            is_clipped = is_clipped or stage.has_norm_bound
            _refuse_if(
                stage.event is not None and not is_clipped,
                "a stage makes a privacy claim, but no stage before it bounds an update",
                "stages=(..., clip(1.0), noise)",
            )


def extra_names(rule: LocalRule) -> tuple[str, ...]:
    """Return the names of the vectors that a local rule sends beside the update."""
    state_KD = np.ones((1, 1), np.float32)
    vectors = dict.fromkeys(rule.client_state, state_KD) | dict.fromkeys(rule.receives, state_KD[0])
    return (*rule.after_training(state_KD, np.ones(1, np.int64), 0.1, **vectors)[1], *averaged_names(rule))


def averaged_names(rule: LocalRule) -> tuple[str, ...]:
    """Return the names of the optimizer states that clients send to the server; empty if it does not average them."""
    counts = (STEPS,) if len(rule.optimizer_state) == 2 else ()  # the two moments of Adam have a bias correction
    return (*rule.optimizer_state, *counts) if rule.averages_optimizer else ()


def with_compression(strategy: Strategy, compression: Stage) -> Strategy:
    """Return the strategy with a compression as its last stage."""
    return strategy if compression.codec is None else replace(strategy, stages=(*strategy.stages, compression))


def with_buffer_policy(strategy: Strategy, layout: Layout, policy: str) -> Strategy:
    """Return the strategy for a model that may have buffers (statistics of batch norm).

    Args:
        strategy: the strategy, with its privacy mechanism.
        layout: layout of the model; without buffers the policy makes no difference.
        policy: ``refuse``, ``average`` or ``local``. With ``average``, buffers are sent and aggregated like parameters,
            and the server takes the aggregate itself, without its optimizer. With ``local``, each client keeps its
            buffers like personal parameters, and predicts with them.

    *Guarantees*: no gradient, optimizer, weight decay or local rule changes a buffer. With ``local`` no update contains
    a buffer, so clipping, noise, masks and robust rules see parameters only. The global model keeps its initial
    buffers, so it is not evaluated on the data of all clients.

    Raises:
        SettingError: the policy is unknown, refuses the model, or does not work with the strategy. Noise would make
            variances negative. Updates from different model versions have no mean of statistics. Vectors beside the
            updates would contain buffers.

    Reference: Andreux et al., *Siloed Federated Learning for Multi-Centric Histopathology Datasets*, 2020,
    arXiv:2008.07424 (``local``: SiloBN).
    """
    require(policy in BUFFER_POLICIES, "buffers", policy, f"one of {', '.join(BUFFER_POLICIES)}", "buffers=average")
    if not layout.buffers:
        return strategy
    _refuse_buffers(layout, policy)
    if policy == "local":
        expected = "average: the penalty of this strategy may run the global model, which then has initial buffers only"
        require(strategy.local.penalty is None, "buffers", policy, expected, "buffers=average")
        extra = ", ".join(extra_names(strategy.local))
        expected = f"average: the vectors that this strategy sends beside updates ({extra}) would contain buffers"
        require(not extra, "buffers", policy, expected, "buffers=average")
        personal = dict.fromkeys((*strategy.local.personal_parameters, *layout.buffers))
        return replace(strategy, buffers=policy, local=strategy.local._replace(personal_parameters=tuple(personal)))
    has_noise = strategy.privacy_guarantee is not None and strategy.privacy_guarantee.noise_multiplier is not None
    expected = "local: noise would make running variances negative"
    require(not has_noise, "buffers", policy, expected, "buffers=local")
    expected = "local: updates from different model versions have no mean of batch statistics"
    require(strategy.asynchrony is None, "buffers", policy, expected, "buffers=local")
    sends_signs = any(stage.is_sign_only for stage in strategy.stages)
    require(not sends_signs, "buffers", policy, "local: signs cannot update batch statistics", "buffers=local")
    return replace(strategy, buffers=policy)


def _refuse_buffers(layout: Layout, policy: str) -> None:
    names = ", ".join(layout.buffers[:3]) + ", ..." * (len(layout.buffers) > 3)
    expected = f"average or local for this model, which has buffers ({names}); or a model with group norm"
    require(policy != "refuse" or not layout.buffers, "buffers", policy, expected, "buffers=average")


def _refuse_if(unsound: bool, reason: str, fix: str) -> None:
    if unsound:
        raise CompositionError(f"{reason}\n{label(fix)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RootDataset:
    """Describe the root dataset of the server. A client of the server's operator has it (`Strategy.root`).

    Args:
        client: id of the client with these examples. It takes part in each round and trains like all others;
            poisoning spares it.
        num_examples: in simulations, number of examples of all clients that replace its own; see `with_root_dataset`.
            None: its own examples are the root dataset.
    """

    client: ClientId = 0
    num_examples: int | None = None

    def __post_init__(self) -> None:
        require(is_count(self.client, at_least=0), "root_client", self.client, "a client id >= 0", "root_client=0")
        expected = "null (the client's own), or a whole number >= 1"
        is_valid = self.num_examples is None or is_count(self.num_examples)
        require(is_valid, "num_root_examples", self.num_examples, expected, "num_root_examples=100")

    def add_to_cohorts(self, selector: Selector) -> Selector:
        """Return a selector that adds the root client to each cohort of ``selector``."""

        def choose(round: int, clients: Sequence[ClientId], rng: np.random.Generator) -> Sequence[ClientId]:
            return [*{self.client, *selector.choose(round, clients, rng)}]

        return Selector(choose=choose)

    def is_root(self, clients_K: np.ndarray) -> np.ndarray:
        """Return a mask (K) that is True for the update of the root client.

        Raises:
            FedlearnError: the root client sent no update.
        """
        is_root_K: np.ndarray = clients_K == self.client
        if not is_root_K.any():
            raise FedlearnError(f"the root client, client {self.client}, sent no update")
        return is_root_K
