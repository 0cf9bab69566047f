"""Refuse a local rule that a trainer or the local settings do not support, before any training."""

from __future__ import annotations

from fedlearn.algorithm.local_rule import LocalRule, require_sgd
from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.records import LocalSettings
from fedlearn.errors import require
from fedlearn.loop.protocols import Trainer

_CHANGES = {  # part of a rule -> change of local training, in words
    "correct": "one that corrects gradients",
    "adjust_logits": "one that adjusts logits",
    "penalty": "one with a penalty in the loss",
    "gradient": "one that takes gradients at other parameters",
    "frozen_parameters": "one with frozen parameters",
}


def require_support(trainer: Trainer, rule: LocalRule, local: LocalSettings) -> None:
    """Check that a trainer with these settings applies all functions of a rule.

    A trainer without the attribute ``rule_hooks`` corrects gradients only.

    Raises:
        SettingError: The trainer would ignore a function of the rule, or a local setting contradicts the rule.
    """
    supported = getattr(trainer, "rule_hooks", frozenset({"correct"}))
    for name in rule.hooks:
        expected = f"a strategy without LocalRule.{name}, which the {trainer.framework} trainer does not apply"
        require(name in supported, "strategy", _CHANGES[name], expected, "strategy=fedavg")
    require_settings(rule, local)


def require_settings(rule: LocalRule, local: LocalSettings) -> None:
    """Check that the local settings fit a rule.

    Raises:
        SettingError: DP-SGD, micro-batches, the optimizer or the number of steps contradict the rule.
    """
    dp, size = local.example_dp, local.micro_batch_size
    expected = "null, because this strategy changes the loss of the task"
    require(dp is None or not rule.has_custom_loss, "local.example_dp", dp, expected, "strategy=fedavg")
    expected = "null, because this strategy takes several gradients per step, and DP-SGD accounts for one"
    require(dp is None or rule.gradient is None, "local.example_dp", dp, expected, "strategy=fedavg")
    expected = "null, because the noise would fill the parameters that clients of a lower rank leave at zero"
    require(dp is None or rule.start is None, "local.example_dp", dp, expected, "strategy.ranks=null")
    expected = "null, because the penalty of this strategy compares all examples of a batch"
    is_whole = size is None or not rule.couples_examples
    require(is_whole, "local.micro_batch_size", size, expected, "local.micro_batch_size=null")
    require_sgd(rule, local)


def require_steps(strategy: Strategy, local: LocalSettings) -> None:
    """Check that the number of local steps is not set twice, and that the server knows it where it reads it.

    Raises:
        SettingError: The strategy draws the number of steps and the settings also state it. Or the server optimizer
            reads the number of steps, which the privacy mechanism withholds.
    """
    draws = strategy.local.num_steps is not None
    expected = "null, because this strategy draws the number of local steps"
    require(not draws or local.steps is None, "local.steps", local.steps, expected, "local.steps=null")
    expected = "1, because this strategy draws the number of local steps"
    require(not draws or local.epochs == 1, "local.epochs", local.epochs, expected, "local.epochs=1")
    guarantee = strategy.privacy_guarantee
    withheld = guarantee is not None and "examples" in guarantee.withheld
    is_known = not withheld or local.steps is not None or draws
    expected = "a number, because the server of this strategy reads the number of steps and clients withhold it"
    require(is_known or not strategy.server.reads_num_steps, "local.steps", local.steps, expected, "local.steps=10")
