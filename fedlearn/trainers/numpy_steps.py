"""Optimizer steps and DP-SGD in NumPy, for `fedlearn.trainers.base.BaseTrainer`.

Shapes: D parameters, N examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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
State = dict[str, np.ndarray]  # optimizer state by name


def optimizer(local: LocalSettings, state: State) -> Step:
    """Return a function that takes the steps of a portable optimizer, as in torch.optim.

    Args:
        local: settings of local training.
        state: optimizer state, which the steps change; empty for a new state.
    """
    name, values, decay = option_name(local.optimizer), optimizer_values(local.optimizer), local.weight_decay
    directions: dict[str, Callable[..., np.ndarray]] = {
        "sgd": partial(_sgd, momentum=local.momentum),
        "adam": _adam,
        "adamw": _adam,
        "adagrad": _adagrad,
        "rmsprop": _rmsprop,
    }
    direction = partial(directions[str(name)], state, **values)

    def step(w_D: np.ndarray, grad_D: np.ndarray, rate: float) -> np.ndarray:
        if name == "adamw":
            return np.asarray(w_D - rate * (decay * w_D + direction(grad_D)))
        return np.asarray(w_D - rate * direction(grad_D + decay * w_D if decay else grad_D))

    return step


def clip_gradient(max_norm: float | None, grad_D: np.ndarray) -> np.ndarray:
    """Return the gradient, scaled to an L2 norm of at most ``max_norm``."""
    norm = float(np.linalg.norm(grad_D))
    return grad_D if max_norm is None or norm <= max_norm else grad_D * (max_norm / norm)


def _sgd(state: State, grad_D: np.ndarray, *, momentum: float, nesterov: bool) -> np.ndarray:
    if not momentum:
        return grad_D
    velocity_D = state.get("velocity")
    velocity_D = grad_D if velocity_D is None else momentum * velocity_D + grad_D
    state["velocity"] = velocity_D
    return grad_D + momentum * velocity_D if nesterov else velocity_D


def _adam(state: State, grad_D: np.ndarray, *, betas: tuple[float, float], eps: float) -> np.ndarray:
    (beta1, beta2), t = betas, float(np.sum(state.get("steps", 0))) + 1
    state["steps"] = np.array([t])
    state["first"] = beta1 * state.get("first", 0) + (1 - beta1) * grad_D
    state["second"] = beta2 * state.get("second", 0) + (1 - beta2) * grad_D**2
    return np.asarray(state["first"] / (1 - beta1**t) / (np.sqrt(state["second"] / (1 - beta2**t)) + eps))


def _adagrad(state: State, grad_D: np.ndarray, *, eps: float) -> np.ndarray:
    state["total"] = state.get("total", 0) + grad_D**2
    return np.asarray(grad_D / (np.sqrt(state["total"]) + eps))


def _rmsprop(state: State, grad_D: np.ndarray, *, alpha: float, eps: float) -> np.ndarray:
    state["mean"] = alpha * state.get("mean", 0) + (1 - alpha) * grad_D**2
    return np.asarray(grad_D / (np.sqrt(state["mean"]) + eps))


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
