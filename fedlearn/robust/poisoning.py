"""Simulate malicious clients, which change their training data or forge their updates.

Shapes: H honest clients of a round, F malicious clients, D parameters, flattened; N examples.

For simulations only. The malicious clients are drawn once per run (`draw_malicious_clients`). Each poisoning states its
knowledge of the other updates. The server receives a forged update as it is, without the clipping or noise of client
halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.random import Purpose, generator
from fedlearn.core.records import ClientId, Examples
from fedlearn.errors import is_count, is_number, require

__all__ = [
    "AttackView",
    "Poisoning",
    "alie",
    "backdoor",
    "draw_malicious_clients",
    "gaussian",
    "inner_product",
    "label_flip",
    "mimic",
    "min_max",
    "min_sum",
    "none",
    "poison_data",
    "sign_flip",
]

DIRECTIONS = ("std", "mean", "sign")


@dataclass(frozen=True, kw_only=True)
class AttackView:
    """Hold the values that the malicious clients of a round may use.

    Attributes:
        honest_HD: updates of the honest clients, float64.
        malicious_FD: updates that the malicious clients have trained, on poisoned data if the poisoning changes data.
        round: number of the round.
        seed: seed of the run.
    """

    honest_HD: np.ndarray
    malicious_FD: np.ndarray
    round: int
    seed: int

    @property
    def num_updates(self) -> int:
        """Number of all updates in the round."""
        return len(self.honest_HD) + len(self.malicious_FD)

    @property
    def mean(self) -> np.ndarray:
        """Mean of the honest updates (D)."""
        mean_D: np.ndarray = self.honest_HD.mean(axis=0)
        return mean_D

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the honest updates in each coordinate (D); zero for a single update."""
        many = len(self.honest_HD) > 1
        return self.honest_HD.std(axis=0, ddof=1) if many else np.zeros(self.honest_HD.shape[1])


class Poisoning(NamedTuple):
    """Describe the malicious clients of a simulation, and their updates or data.

    Attributes:
        kind: name of the poisoning.
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious.
        forge: ``view -> updates``, F x D, or D for F equal updates; None sends the trained updates.
        poison: ``(examples, num_classes) -> examples`` for training; None keeps the examples.
        backdoor_examples: ``examples -> examples`` with the trigger of a backdoor and its target as label, without
            examples that have this label already. None without a backdoor.
    """

    kind: str
    fraction: float = 0.0
    trusted: tuple[ClientId, ...] = ()
    forge: Callable[[AttackView], np.ndarray] | None = None
    poison: Callable[[Examples, int], Examples] | None = None
    backdoor_examples: Callable[[Examples], Examples] | None = None


HONEST = Poisoning("none")


def draw_malicious_clients(poisoning: Poisoning, clients: Sequence[ClientId], *, seed: int) -> frozenset[ClientId]:
    """Return the malicious clients of a run: a share of all clients, rounded to a whole number.

    Args:
        poisoning: its ``fraction`` and ``trusted`` are used.
        clients: all clients.
        seed: seed of the run.

    Raises:
        SettingError: there are too few clients that are not trusted.
    """
    count = int(poisoning.fraction * len(clients) + 0.5)
    if not count:
        return frozenset()
    candidates = [client for client in clients if client not in poisoning.trusted]
    expected = f"a share of at most {len(candidates)} of {len(clients)} clients, because the others are trusted"
    require(count <= len(candidates), "poisoning.fraction", poisoning.fraction, expected, "poisoning.fraction=0.2")
    return frozenset(
        int(candidates[i]) for i in generator(seed, Purpose.POISONING).choice(len(candidates), count, replace=False)
    )


def poison_data(data: FederatedData, poisoning: Poisoning, malicious_clients: frozenset[ClientId]) -> FederatedData:
    """Return the data with poisoned training examples at malicious clients. Held-out examples do not change.

    Args:
        data: federated data of the scenario.
        poisoning: its ``poison`` changes the examples.
        malicious_clients: result of `draw_malicious_clients`.

    Raises:
        SettingError: the poisoning changes labels, but the targets of the task are not class numbers.
    """
    poison = poisoning.poison
    if poison is None:
        return data
    has_classes, poisoned = data.task.has_classes, {}
    require(
        has_classes,
        "poisoning",
        poisoning.kind,
        "a poisoning of updates, because this task has no labels to change",
        "poisoning=sign_flip",
    )

    def train(client: ClientId) -> Examples:
        if client not in malicious_clients:
            return data.train(client)
        if client not in poisoned:
            poisoned[client] = poison(data.train(client), data.num_classes)
        return poisoned[client]

    return replace(data, train=train)


def none() -> Poisoning:
    """Return a poisoning without malicious clients."""
    return HONEST


def sign_flip(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, scale: float = 1.0) -> Poisoning:
    """Return a poisoning that sends ``-scale`` times each malicious update, without knowledge of other updates.

    Args:
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious, e.g. [0]; None trusts no client.
        scale: factor, > 0.

    Reference: Li, Xu, Chen, Giannakis, Ling, *RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed
    Learning from Heterogeneous Datasets*, AAAI 2019, arXiv:1811.03761, section 5.
    """
    _require_positive("scale", scale)
    return _poisoning("sign_flip", fraction, trusted, forge=lambda view: -scale * view.malicious_FD)


def gaussian(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, std: float = 1.0) -> Poisoning:
    """Return a poisoning that sends numbers from N(0, std^2), without knowledge of other updates.

    Args:
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious, e.g. [0]; None trusts no client.
        std: standard deviation of each number, > 0.

    Reference: Blanchard, El Mhamdi, Guerraoui, Stainer, *Machine Learning with Adversaries*, NeurIPS 2017,
    arXiv:1703.02757, section 6 (with std 200).
    """
    _require_positive("std", std)

    def forge(view: AttackView) -> np.ndarray:
        return std * generator(view.seed, Purpose.POISONING, round=view.round).standard_normal(view.malicious_FD.shape)

    return _poisoning("gaussian", fraction, trusted, forge=forge)


def label_flip(*, fraction: float = 0.2, trusted: Sequence[int] | None = None) -> Poisoning:
    """Return a poisoning that trains on flipped labels: class ``c`` of ``C`` becomes ``C - 1 - c``.

    Args:
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious, e.g. [0]; None trusts no client.

    Reference: Allen-Zhu, Ebrahimian, Li, Alistarh, *Byzantine-Resilient Non-Convex Stochastic Gradient Descent*, ICLR
    2021, arXiv:2012.14368, section 5.
    """

    def poison(examples: Examples, num_classes: int) -> Examples:
        return replace(examples, y=num_classes - 1 - examples.y)

    return _poisoning("label_flip", fraction, trusted, poison=poison)


def alie(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, z: float | None = None) -> Poisoning:
    """Return a poisoning that sends ``mean - z std`` of the honest updates (A Little Is Enough).

    The malicious clients know the honest updates.

    Args:
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious, e.g. [0]; None trusts no client.
        z: number of standard deviations; None takes the largest number that a majority still hides. For n
            clients, f of them malicious, it is the normal quantile at ``(n - f - s) / (n - f)``, but not below 0, with
            ``s = floor(n / 2 + 1) - f``.

    Reference: Baruch, Baruch, Goldberg, *A Little Is Enough: Circumventing Defenses For Distributed Learning*, NeurIPS
    2019, arXiv:1902.06156, Algorithm 3.
    """
    is_valid = z is None or is_number(z)
    require(is_valid, "z", z, "a number, or null for the largest number that a majority hides", "z=1.5")

    def forge(view: AttackView) -> np.ndarray:
        num_honest, num_malicious = len(view.honest_HD), len(view.malicious_FD)
        supporters = (num_honest + num_malicious) // 2 + 1 - num_malicious
        quantile = min(max((num_honest - supporters) / num_honest, 0.5), 1 - 1e-9)
        return view.mean - (NormalDist().inv_cdf(quantile) if z is None else z) * view.std

    return _poisoning("alie", fraction, trusted, forge=forge)


def inner_product(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, epsilon: float = 0.5) -> Poisoning:
    """Return a poisoning that sends ``-epsilon`` times the mean of the honest updates.

    The malicious clients know the honest updates.

    Args:
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious, e.g. [0]; None trusts no client.
        epsilon: factor, > 0.

    Reference: Xie, Koyejo, Gupta, *Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation*, UAI
    2019, arXiv:1903.03936, section 5.
    """
    _require_positive("epsilon", epsilon)
    return _poisoning("inner_product", fraction, trusted, forge=lambda view: -epsilon * view.mean)


def min_max(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, direction: str = "std") -> Poisoning:
    """Return a poisoning that sends ``mean + gamma p``, as close to all honest updates as they are to each other.

    The distance to any honest update is at most the largest distance between two honest updates. ``gamma`` is the
    largest value with this property, in closed form. The malicious clients know the honest updates.

    Args:
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious, e.g. [0]; None trusts no client.
        direction: vector ``p``: ``std`` (minus the standard deviations), ``mean`` (minus the mean, as a unit vector) or
            ``sign`` (minus the signs of the mean).

    Reference: Shejwalkar, Houmansadr, *Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for
    Federated Learning*, NDSS 2021, section IV (AGR-agnostic attacks).
    """
    _require_direction(direction)

    def forge(view: AttackView) -> np.ndarray:
        p_D, difference_HD = _perturbation(view, direction), view.mean - view.honest_HD
        bound = _squared_distances(view.honest_HD).max()
        along_H, slack_H = difference_HD @ p_D, bound - (difference_HD**2).sum(axis=1)
        length = max(float(p_D @ p_D), 1e-30)
        gamma = float(((np.sqrt(along_H**2 + length * slack_H) - along_H) / length).min())
        return view.mean + gamma * p_D

    return _poisoning("min_max", fraction, trusted, forge=forge)


def min_sum(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, direction: str = "std") -> Poisoning:
    """Return a poisoning that sends ``mean + gamma p``, with a bounded sum of squared distances to honest updates.

    The bound is the largest sum of squared distances of one honest update to the others. ``gamma`` is the largest value
    with this property. The malicious clients know the honest updates.

    Args:
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious, e.g. [0]; None trusts no client.
        direction: vector ``p``, see `min_max`.

    Reference: Shejwalkar, Houmansadr, NDSS 2021, see `min_max`.
    """
    _require_direction(direction)

    def forge(view: AttackView) -> np.ndarray:
        p_D = _perturbation(view, direction)
        spread = ((view.honest_HD - view.mean) ** 2).sum()
        room = _squared_distances(view.honest_HD).sum(axis=1).max() - spread
        gamma = np.sqrt(max(room, 0.0) / len(view.honest_HD) / max(float(p_D @ p_D), 1e-30))
        return view.mean + gamma * p_D

    return _poisoning("min_sum", fraction, trusted, forge=forge)


def mimic(*, fraction: float = 0.2, trusted: Sequence[int] | None = None) -> Poisoning:
    """Return a poisoning that copies one honest update, so that this client has more weight.

    The malicious clients know the honest updates. They copy the update that is farthest from the mean along the
    direction of largest variance. This direction is computed in each round. In the paper, it is learned in the first
    rounds and then kept.

    Args:
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious, e.g. [0]; None trusts no client.

    Reference: Karimireddy, He, Jaggi, *Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing*, ICLR 2022,
    arXiv:2006.09365, section 4.
    """

    def forge(view: AttackView) -> np.ndarray:
        difference_HD = view.honest_HD - view.mean
        _, vectors_HH = np.linalg.eigh(difference_HD @ difference_HD.T)
        victim_D: np.ndarray = view.honest_HD[np.argmax(np.abs(vectors_HH[:, -1]))]
        return victim_D

    return _poisoning("mimic", fraction, trusted, forge=forge)


def backdoor(
    *,
    fraction: float = 0.1,
    trusted: Sequence[int] | None = None,
    target: int = 0,
    share: float = 0.5,
    size: int = 2,
    value: float = 1.0,
    boost: float | None = None,
) -> Poisoning:
    """Return a poisoning that trains on images with a trigger and the target as label, and boosts the update.

    The trigger is a square in the lower right corner. With the factor ``n / f``, the mean of n updates, f of them
    malicious, becomes the malicious model once honest updates are small. The malicious clients know only these numbers
    of clients. The metric ``attack_success`` uses held-out images of other classes with the trigger. It is the share
    that the global model classifies as the target.

    Args:
        fraction: share of all clients that are malicious, in [0, 1).
        trusted: clients that are never malicious, e.g. [0]; None trusts no client.
        target: class that the trigger produces.
        share: share of the images of a malicious client with the trigger, in (0, 1].
        size: side of the square in pixels, >= 1.
        value: value of its pixels.
        boost: factor of the update, > 0; None takes ``n / f``.

    Reference: Bagdasaryan, Veit, Hua, Estrin, Shmatikov, *How To Backdoor Federated Learning*, AISTATS 2020,
    arXiv:1807.00459, section 4.2; trigger: Gu, Dolan-Gavitt, Garg, *BadNets*, 2017, arXiv:1708.06733.
    """
    require(is_count(target, at_least=0), "target", target, "a class number from 0", "target=0")
    require(is_number(share, at_least=0) and 0 < share <= 1, "share", share, "a share in (0, 1]", "share=0.5")
    require(is_count(size), "size", size, "a whole number of pixels >= 1", "size=2")
    if boost is not None:
        _require_positive("boost", boost)

    def with_trigger(examples: Examples, rows: np.ndarray) -> Examples:
        are_images = examples.x.ndim == 4
        require(
            are_images,
            "poisoning",
            "backdoor",
            "a scenario with images, N x height x width x channels",
            "scenario=digits",
        )
        x, y = examples.x.copy(), examples.y.copy()
        x[rows, -size:, -size:, :], y[rows] = value, target
        return Examples(x, y)

    def poison(examples: Examples, num_classes: int) -> Examples:
        is_class = target < num_classes
        require(is_class, "poisoning.target", target, f"a class number below {num_classes}", "poisoning.target=0")
        counts = np.arange(1, len(examples) + 1) * share
        return with_trigger(examples, np.floor(counts) > np.floor(counts - share))

    def triggered(examples: Examples) -> Examples:
        others = examples.y != target
        return with_trigger(Examples(examples.x[others], examples.y[others]), np.ones(int(others.sum()), bool))

    def forge(view: AttackView) -> np.ndarray:
        return (boost or view.num_updates / len(view.malicious_FD)) * view.malicious_FD

    poisoning = _poisoning("backdoor", fraction, trusted, forge=forge, poison=poison)
    return poisoning._replace(backdoor_examples=triggered)


def _poisoning(
    kind: str,
    fraction: float,
    trusted: Sequence[int] | None,
    *,
    forge: Callable[[AttackView], np.ndarray] | None = None,
    poison: Callable[[Examples, int], Examples] | None = None,
) -> Poisoning:
    is_share = is_number(fraction, at_least=0, below=1)
    require(is_share, "fraction", fraction, "a share of all clients in [0, 1)", "fraction=0.2")
    is_list = trusted is None or (isinstance(trusted, Sequence) and not isinstance(trusted, str))
    require(is_list, "trusted", trusted, "null, or a list of client ids", "'trusted=[0]'")
    trusted_clients = [] if trusted is None else list(trusted)
    are_ids = all(is_count(client, at_least=0) for client in trusted_clients)
    require(are_ids, "trusted", trusted, "null, or a list of client ids", "'trusted=[0]'")
    return Poisoning(kind, fraction, tuple(trusted_clients), forge, poison)


def _perturbation(view: AttackView, direction: str) -> np.ndarray:
    if direction == "std":
        return -view.std
    mean_D = view.mean
    return -np.sign(mean_D) if direction == "sign" else -mean_D / max(float(np.linalg.norm(mean_D)), 1e-30)


def _squared_distances(rows_HD: np.ndarray) -> np.ndarray:
    products_HH = rows_HD @ rows_HD.T
    norms_H = np.diag(products_HH)
    distances_HH: np.ndarray = np.maximum(norms_H[:, None] + norms_H - 2 * products_HH, 0)
    return distances_HH


def _require_direction(direction: str) -> None:
    require(direction in DIRECTIONS, "direction", direction, f"one of {', '.join(DIRECTIONS)}", "direction=std")


def _require_positive(name: str, value: float) -> None:
    is_positive = is_number(value, at_least=0) and 0 < value < float("inf")
    require(is_positive, name, value, "a finite number > 0", f"{name}=1.0")
