"""A run names parameters that do not train, also if noise moves them."""

import numpy as np
import pytest

from fedlearn.core.records import LocalSettings
from fedlearn.errors import SettingError
from fedlearn.loop.training_loop import initial_server_state
from fedlearn.privacy.mechanisms import example
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.runner.training_check import MovementCheck, with_gradient_warning
from fedlearn.testing import LinearTrainer, linear_problem
from strategies import fedavg, fedper

EXAMPLES = linear_problem().train(3)
PRIVATE = example(noise_multiplier=1.0).protect(fedavg(), LocalSettings(), Population(clients=range(5), rounds=3))[0]


class Masked(LinearTrainer):
    keep = (1, 1, 1, 1)

    def example_gradients(self, params_D, x, y):
        loss_N, grad_ND = super().example_gradients(params_D, x, y)
        return loss_N, grad_ND * self.keep


class WithoutBias(Masked):
    keep = (0, 1, 1, 1)


class Nothing(Masked):
    keep = (0, 0, 0, 0)


def test_dp_sgd_warns_about_parameters_that_get_only_noise():
    before = PRIVATE.privacy_guarantee.warnings
    assert with_gradient_warning(PRIVATE, Masked(3), EXAMPLES).privacy_guarantee.warnings == before
    (text,) = with_gradient_warning(PRIVATE, WithoutBias(3), EXAMPLES).privacy_guarantee.warnings[len(before) :]
    assert text.endswith("out.bias")


def test_dp_sgd_that_trains_nothing_is_refused():
    with pytest.raises(SettingError, match="no parameter has a gradient"):
        with_gradient_warning(PRIVATE, Nothing(3), EXAMPLES)


def movement(strategy, moved, *, rounds=5, number=2):
    """Return the standard error after the given parameters moved until a round."""
    layout = LinearTrainer(3).layout
    state = initial_server_state(strategy, np.zeros(4, np.float32), layout, seed=1)
    check = MovementCheck(strategy, layout, state, rounds)
    later = initial_server_state(strategy, np.array(moved, np.float32), layout, seed=1)
    for round in range(1, number + 1):
        check(type(later)(**{name: getattr(later, name) for name in later.__slots__} | {"round": round}))


@pytest.mark.parametrize(
    ("strategy", "moved", "number", "text"),
    [
        (fedavg(), [0, 1, 1, 1], 2, "did not move in 2 rounds: out.bias"),
        (fedavg(), [0, 0, 0, 0], 3, "did not move in 2 rounds: out.bias, out.weight"),
        (fedavg(), [1, 1, 0, 0], 2, ""),
        (fedavg(), [0, 1, 1, 1], 1, ""),  # LoRA's first factor may move in round 2
        (fedper(personal_parameters=["out.bias"]), [0, 1, 1, 1], 2, ""),
        (PRIVATE, [0, 1, 1, 1], 2, ""),
    ],
)
def test_parameters_that_did_not_move_are_named_after_two_rounds(strategy, moved, number, text, capsys):
    movement(strategy, moved, number=number)
    printed = capsys.readouterr().err
    assert text in printed
    assert bool(text) == bool(printed)
