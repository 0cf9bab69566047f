"""The movement of the clipped sum by one example, and parameters without a gradient, for trainers in NumPy."""

from dataclasses import replace

import numpy as np
import pytest

from fedlearn.core.arrays import holds_whole_numbers
from fedlearn.core.records import Examples
from fedlearn.errors import SettingError
from fedlearn.privacy.example_sensitivity import measure_sensitivity, sample_examples, untrained_leaves, with_outliers
from fedlearn.testing import LinearTrainer, check_trainer, linear_problem
from fedlearn.trainers.example_check import probe_examples

DATA = linear_problem(num_features=6)
CLIENTS = [DATA.train(k) for k in range(3)]
EXAMPLES = sample_examples(CLIENTS, 20, seed=1)


class Unchecked(LinearTrainer):
    """Skips the check before training, which refuses trainers that mix examples."""

    def check_example_dp(self, request, examples):
        pass


class Dropout(Unchecked):
    """Drops features of an example by its place in the batch, or by its content."""

    by_place = True

    def example_gradients(self, params_D, x, y):
        seeds = range(len(x)) if self.by_place else [abs(hash(row.tobytes())) for row in x]
        masks = [np.random.default_rng(seed).random(x.shape[1]) < 0.5 for seed in seeds]
        return super().example_gradients(params_D, x * np.reshape(masks, x.shape), y)


class DropoutByContent(Dropout):
    by_place = False


class Centered(Unchecked):
    def example_gradients(self, params_D, x, y):
        return super().example_gradients(params_D, x - x.mean(axis=0) if len(x) else x, y)


class DividesByTheBatchDrawn(LinearTrainer):
    def example_gradients(self, params_D, x, y):
        loss_N, grad_ND = super().example_gradients(params_D, x, y)
        return loss_N, grad_ND

    def fit(self, request, rule, work):
        updates = super().fit(request, rule, work)
        drawn_K1 = np.maximum(1, updates.metrics["loss"].count_K)[:, None]
        return replace(updates, delta_KD=updates.delta_KD * request.local.batch_size / drawn_K1)


class Unclipped(LinearTrainer):
    def fit(self, request, rule, work):
        return super().fit(replace(request, local=replace(request.local, example_dp=None)), rule, work)


@pytest.mark.parametrize("kind", [LinearTrainer, DropoutByContent])
def test_one_example_moves_the_sum_of_a_sound_trainer_by_one_clip_norm(kind):
    found = measure_sensitivity(kind(6), EXAMPLES)
    assert found.movement == pytest.approx(1, abs=0.01)
    assert found.is_bounded
    assert found.num_pairs > 20


@pytest.mark.parametrize("kind", [Dropout, Centered, DividesByTheBatchDrawn, Unclipped])
@pytest.mark.parametrize("is_quick", [True, False])
def test_faults_of_dp_sgd_move_the_sum_by_more(kind, is_quick):
    assert measure_sensitivity(kind(6), EXAMPLES, is_quick=is_quick).movement > 1.1


def test_a_gradient_that_is_not_finite_is_no_bounded_movement():
    class Broken(LinearTrainer):
        def fit(self, request, rule, work):
            updates = super().fit(request, rule, work)
            return replace(updates, delta_KD=updates.delta_KD * (np.nan if len(work[0].examples) > 5 else 1))

    assert not measure_sensitivity(Broken(6), EXAMPLES).is_bounded


def test_a_model_that_fails_for_a_batch_is_refused_by_name():
    class NeedsTwo(LinearTrainer):
        def example_gradients(self, params_D, x, y):
            if len(x) == 1:
                raise ValueError("more than 1 value per channel")
            return super().example_gradients(params_D, x, y)

    with pytest.raises(SettingError, match="fails for a batch of"):
        measure_sensitivity(NeedsTwo(6), EXAMPLES)


def test_outliers_keep_whole_numbers():
    for kind in (np.int32, np.float32):  # scenarios of text keep tokens as floating-point numbers
        tokens = Examples(np.arange(12, dtype=kind).reshape(6, 2), np.arange(6))
        assert np.array_equal(with_outliers(tokens).x, tokens.x)
        groups = probe_examples(tokens, synthetic=False)
        assert all(part.x.min() >= 0 and part.x.max() < 12 and holds_whole_numbers(part.x) for part in groups)
    assert not np.array_equal(with_outliers(EXAMPLES).x, EXAMPLES.x)


class LosesTheBias(LinearTrainer):
    """Loses the gradient of the bias in DP-SGD, as a wrapper of another library can."""

    def gradient(self, params_D, x, y):
        loss_N, grad_ND = super().example_gradients(params_D, x, y)
        return loss_N, grad_ND.mean(axis=0)

    def example_gradients(self, params_D, x, y):
        loss_N, grad_ND = super().example_gradients(params_D, x, y)
        return loss_N, grad_ND * [0, *[1] * x.shape[1]]


class NoBias(LinearTrainer):
    supports_dp_sgd = False

    def gradient(self, params_D, x, y):
        loss_N, grad_D = super().gradient(params_D, x, y)
        return loss_N, grad_D * [0, *[1] * x.shape[1]]


class TrainsNothing(LinearTrainer):
    supports_dp_sgd = False

    def gradient(self, params_D, x, y):
        loss_N, grad_D = super().gradient(params_D, x, y)
        return loss_N, 0 * grad_D


def test_parameters_without_a_gradient_are_named():
    assert untrained_leaves(LinearTrainer(6), EXAMPLES, private=True) == ()
    assert untrained_leaves(LosesTheBias(6), EXAMPLES, private=True) == ("out.bias",)
    assert untrained_leaves(LosesTheBias(6), EXAMPLES, private=False) == ()


def test_check_trainer_rejects_dp_sgd_that_loses_a_parameter_and_warns_about_parameters_that_never_train():
    with pytest.raises(AssertionError, match=r"DP-SGD does not train out\.bias"):
        check_trainer(LosesTheBias(6), CLIENTS)
    with pytest.warns(UserWarning, match=r"never train: out\.bias"):
        check_trainer(NoBias(6), CLIENTS)


def test_check_trainer_rejects_random_numbers_that_follow_the_place_of_an_example():
    with pytest.raises(AssertionError, match=r"another example|moves the sum|add up|must not depend"):
        check_trainer(Dropout(6), CLIENTS)


def test_check_trainer_rejects_a_trainer_that_trains_nothing():
    with pytest.raises(AssertionError):
        check_trainer(TrainsNothing(6), CLIENTS)


@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize("padding", [-1, -100])
def test_random_codes_are_no_numbers_between_padding_and_the_first_code(padding, synthetic):
    codes = np.array([[3, 1, padding], [2, padding, padding], [7, 6, padding]], np.int32)
    examples = Examples(codes, np.zeros(3, np.int64))
    drawn = np.concatenate([np.unique(group.x) for group in probe_examples(examples, synthetic=synthetic)])
    assert set(drawn.tolist()) <= {padding, *range(8)}
    assert len(set(drawn.tolist())) > 3


def test_signed_whole_numbers_are_drawn_from_their_range():
    examples = Examples(np.array([[-9], [-2]], np.int32), np.zeros(2, np.int64))
    _, other = list(probe_examples(examples, synthetic=False))[:2]
    assert other.x.min() >= -9
    assert other.x.max() <= -2
