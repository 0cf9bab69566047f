"""Add privacy, normalization statistics and compression to a strategy. A run and a node call the same function."""

from __future__ import annotations

from fedlearn.algorithm.strategy import Strategy, with_buffer_policy, with_compression
from fedlearn.algorithm.transforms import Stage
from fedlearn.core.records import LocalSettings
from fedlearn.errors import require
from fedlearn.loop.optimizer_averaging import refuse_with_privacy, with_kept_optimizer
from fedlearn.loop.protocols import Trainer
from fedlearn.loop.rule_support import require_support
from fedlearn.privacy.mechanisms.base import Mechanism, Population
from fedlearn.trainers.base import refuse_dp_sgd_with_buffers


def protect_strategy(
    mechanism: Mechanism,
    strategy: Strategy,
    local: LocalSettings,
    population: Population,
    *,
    trainer: Trainer,
    buffers: str,
    compress: Stage | None,
) -> tuple[Strategy, LocalSettings]:
    """Return strategy and local settings with a privacy mechanism, a policy for statistics, and compression.

    Args:
        mechanism: privacy mechanism.
        strategy: strategy without privacy.
        local: local settings without DP-SGD.
        population: population of the run.
        trainer: trainer of the model.
        buffers: policy for normalization statistics.
        compress: compression of updates; None for none.

    Raises:
        FedlearnError: The guarantee does not hold for this combination. A node raises it too, so it does not depend on
            the honesty of a coordinator.
    """
    require_support(trainer, strategy.local, local)
    strategy = with_kept_optimizer(strategy, local)
    refuse_with_privacy(strategy.local, mechanism.kind)
    trainer.check_local(local)
    protected, local = mechanism.protect(strategy, local, population)
    keeps_rule = strategy.aggregate.rule is None or protected.aggregate.rule is not None
    expected = "a mechanism that keeps the aggregation rule of the strategy, but it replaces the rule by a mean"
    require(keeps_rule, "privacy", mechanism.kind, expected, "strategy=fedavg")
    is_supported = local.example_dp is None or trainer.supports_dp_sgd
    expected = "another mechanism than example: the trainer of this scenario has no DP-SGD"
    require(is_supported, "privacy", mechanism.kind, expected, "privacy=central")
    refuse_dp_sgd_with_buffers(trainer.layout, local)
    protected = with_buffer_policy(protected, trainer.layout, buffers)
    adaptive = protected.privacy_guarantee is not None and protected.privacy_guarantee.clip == "adaptive"
    expected = "none with privacy.clip=adaptive: its clipping bit is part of the update and must not be compressed"
    is_possible = compress is None or compress.codec is None or not adaptive
    require(is_possible, "compress", "a codec", expected, "compress=none")
    return (with_compression(protected, compress) if compress else protected), local
