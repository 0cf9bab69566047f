"""Optimizer steps and DP-SGD in NumPy, for `fedlearn.trainers.base.BaseTrainer`.

Shapes: D parameters, N examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, product

import numpy as np

from fedlearn.core.named_option import option_name
from fedlearn.core.noise_grid import round_to_grid
from fedlearn.core.optimizers import optimizer_values
from fedlearn.core.random import Purpose, generator, secret_normals
from fedlearn.core.records import ClientWork, ExampleDP, Examples, LocalSettings, Request
from fedlearn.trainers.batching import round_of
from fedlearn.trainers.example_check import Evaluated, find_mixing, probe_examples, refuse

Step = Callable[[np.ndarray, np.ndarray, float], np.ndarray]  # (w_D, grad_D, learning_rate) -> w_D
Direction = Callable[[np.ndarray], np.ndarray]  # grad_D -> step_D, before the multiplication by the learning rate


def optimizer(local: LocalSettings) -> Step:
    """Return a function that takes the steps of a portable optimizer, as in torch.optim, with a new state."""
    name, values = option_name(local.optimizer), optimizer_values(local.optimizer)
    directions: dict[str, Callable[..., Direction]] = {
        "sgd": _sgd,
        "adam": _adam,
        "adamw": _adam,
        "adagrad": _adagrad,
        "rmsprop": _rmsprop,
    }
    direction_of, decay = directions[str(name)](local, **values), local.weight_decay

    def step(w_D: np.ndarray, grad_D: np.ndarray, rate: float) -> np.ndarray:
        if name == "adamw":
            return np.asarray(w_D - rate * (decay * w_D + direction_of(grad_D)))
        return np.asarray(w_D - rate * direction_of(grad_D + decay * w_D if decay else grad_D))

    return step


def clip_gradient(max_norm: float | None, grad_D: np.ndarray) -> np.ndarray:
    """Return the gradient, scaled to an L2 norm of at most ``max_norm``."""
    norm = float(np.linalg.norm(grad_D))
    return grad_D if max_norm is None or norm <= max_norm else grad_D * (max_norm / norm)


def _sgd(local: LocalSettings, nesterov: bool) -> Direction:
    velocity_D: np.ndarray | None = None

    def direction(grad_D: np.ndarray) -> np.ndarray:
        nonlocal velocity_D
        if not local.momentum:
            return grad_D
        velocity_D = grad_D if velocity_D is None else local.momentum * velocity_D + grad_D
        return grad_D + local.momentum * velocity_D if nesterov else velocity_D

    return direction


def _adam(local: LocalSettings, betas: tuple[float, float], eps: float) -> Direction:
    first_D, second_D, t, (beta1, beta2) = np.zeros(1), np.zeros(1), 0, betas

    def direction(grad_D: np.ndarray) -> np.ndarray:
        nonlocal first_D, second_D, t
        t += 1
        first_D = beta1 * first_D + (1 - beta1) * grad_D
        second_D = beta2 * second_D + (1 - beta2) * grad_D**2
        return np.asarray(first_D / (1 - beta1**t) / (np.sqrt(second_D / (1 - beta2**t)) + eps))

    return direction


def _adagrad(local: LocalSettings, eps: float) -> Direction:
    sum_D = np.zeros(1)

    def direction(grad_D: np.ndarray) -> np.ndarray:
        nonlocal sum_D
        sum_D = sum_D + grad_D**2
        return np.asarray(grad_D / (np.sqrt(sum_D) + eps))

    return direction


def _rmsprop(local: LocalSettings, alpha: float, eps: float) -> Direction:
    mean_D = np.zeros(1)

    def direction(grad_D: np.ndarray) -> np.ndarray:
        nonlocal mean_D
        mean_D = alpha * mean_D + (1 - alpha) * grad_D**2
        return np.asarray(grad_D / (np.sqrt(mean_D) + eps))

    return direction


def clipped_sum(grad_ND: np.ndarray, clip: float) -> np.ndarray:
    """Return the sum of N gradients, each clipped to the L2 norm ``clip``. Gradients that are not finite add 0."""
    norm_N = np.linalg.norm(grad_ND.astype(np.float64), axis=1)
    factor_N = np.where(np.isfinite(norm_N), np.minimum(1, clip / np.maximum(norm_N, 1e-300)), 0)
    finite_ND = np.where(np.isfinite(norm_N)[:, None], grad_ND, 0).astype(np.float64)
    return np.asarray(factor_N @ finite_ND)


def require_separate_examples(
    example_gradients: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    name: str,
    params_D: np.ndarray,
    examples: Examples,
    *,
    synthetic: bool,
) -> None:
    """Refuse DP-SGD if the loss or the gradient of an example depends on other examples of its batch.

    Args:
        example_gradients: see `BaseTrainer.example_gradients`.
        name: name of the trainer.
        params_D: parameters. The check also adds noise to them, because mixing is invisible if weights are zero.
        examples: examples of a client.
        synthetic: see `probe_examples`.

    Raises:
        SettingError: Examples alone and in batches have different losses or gradients.
    """
    noise_D = np.random.default_rng(1).normal(0, 0.1, params_D.shape).astype(params_D.dtype)
    groups = list(islice(probe_examples(examples, synthetic=synthetic), 2))
    for start_D, group in product((params_D, params_D + noise_D), groups):

        def evaluate(x: np.ndarray, y: np.ndarray, start_D: np.ndarray = start_D) -> Evaluated:
            loss_N, grad_ND = example_gradients(start_D, x, y)
            return Evaluated(np.asarray(grad_ND), np.asarray(loss_N))

        if find_mixing(evaluate, group):
            raise refuse(f"{name}.example_gradients mixes the examples of a batch")


def noise_source(request: Request, work: ClientWork) -> Callable[[int], np.ndarray]:
    """Return a function that draws standard normal numbers for a client.

    A deployment draws secret numbers from the operating system. A simulation draws them from the seed of the run.
    """
    if request.deployed:
        return lambda size: secret_normals((size,))
    rng = generator(request.seed, Purpose.NOISE, round=round_of(request, work), client=work.client)
    return lambda size: rng.standard_normal(size)


def private_gradient(
    grad_ND: np.ndarray, dp: ExampleDP, expected_batch: int, normals: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Return the gradient of DP-SGD: ``(sum_n clip(grad_n, C) + N(0, (z C)^2 I)) / expected_batch``.

    The noisy sum is rounded to the grid of `fedlearn.core.noise_grid`.

    Reference: Abadi et al., *Deep Learning with Differential Privacy*, CCS 2016, arXiv:1607.00133.
    """
    sum_D, std = clipped_sum(grad_ND, dp.clip), dp.noise_multiplier * dp.clip
    if not std:
        return sum_D / expected_batch
    return round_to_grid(sum_D + std * normals(grad_ND.shape[1]), std) / expected_batch
