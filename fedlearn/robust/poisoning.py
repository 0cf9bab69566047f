"""What malicious clients do: to their data before they train, and to their updates before they send them.

Shapes: H honest clients of a round, F malicious ones, D parameters laid flat, N examples.

For simulations. Who attacks is drawn once for a run (`attackers`); what each attack knows of the others is said at the
attack. Forged updates are what the server receives: no clip or noise of a malicious client stands in between.
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
        honest_HD: what the honest clients send, float64.
        malicious_FD: updates that malicious clients have trained, on their poisoned data if there are any.
        round, seed: of the run.
    """

    honest_HD: np.ndarray
    malicious_FD: np.ndarray
    round: int
    seed: int

    @property
    def num_updates(self) -> int:
        """All of the round's."""
        return len(self.honest_HD) + len(self.malicious_FD)

    @property
    def mean(self) -> np.ndarray:
        """Of the honest updates."""
        mean_D: np.ndarray = self.honest_HD.mean(axis=0)
        return mean_D

    @property
    def std(self) -> np.ndarray:
        """Of the honest updates, in each coordinate; zero where there is but one."""
        many = len(self.honest_HD) > 1
        return self.honest_HD.std(axis=0, ddof=1) if many else np.zeros(self.honest_HD.shape[1])


class Poisoning(NamedTuple):
    """Describe the malicious clients of a simulation, and their updates or data.

    Attributes:
        kind: its name.
        fraction: of all clients that are malicious.
        trusted: clients that never are.
        forge: from what they see to what they send, F x D, or D for all alike; None: what they have trained.
        poison: ``(examples, num_classes) -> examples`` that they train on; None: their own.
        backdoor_examples: ``examples -> examples`` with the trigger of a backdoor and its target as label, without
            examples that have this label anyway. None without a backdoor.
    """

    kind: str
    fraction: float = 0.0
    trusted: tuple[ClientId, ...] = ()
    forge: Callable[[AttackView], np.ndarray] | None = None
    poison: Callable[[Examples, int], Examples] | None = None
    backdoor_examples: Callable[[Examples], Examples] | None = None


HONEST = Poisoning("none")


def draw_malicious_clients(poisoning: Poisoning, clients: Sequence[ClientId], *, seed: int) -> frozenset[ClientId]:
    """Return the malicious clients of a run: a share of all clients, rounded to a whole number."""
    count = int(poisoning.fraction * len(clients) + 0.5)
    if not count:
        return frozenset()
    may = [client for client in clients if client not in poisoning.trusted]
    expected = f"a share of at most {len(may)} of {len(clients)} clients, the trusted left out"
    require(count <= len(may), "poisoning.fraction", poisoning.fraction, expected, "poisoning.fraction=0.2")
    return frozenset(int(may[i]) for i in generator(seed, Purpose.POISONING).choice(len(may), count, replace=False))


def poison_data(data: FederatedData, poisoning: Poisoning, malicious_clients: frozenset[ClientId]) -> FederatedData:
    """Return the data with poisoned training examples at malicious clients. Held-out examples do not change."""
    poison = poisoning.poison
    if poison is None:
        return data
    classes, held = data.task != "regression", {}
    require(
        classes,
        "poisoning",
        poisoning.kind,
        "an attack on updates: there are no labels to change",
        "poisoning=sign_flip",
    )

    def train(client: ClientId) -> Examples:
        if client not in malicious_clients:
            return data.train(client)
        if client not in held:
            held[client] = poison(data.train(client), data.num_classes)
        return held[client]

    return replace(data, train=train)


def none() -> Poisoning:
    """Return a poisoning without malicious clients."""
    return HONEST


def sign_flip(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, scale: float = 1.0) -> Poisoning:
    """Make each malicious client send ``-scale`` times its update. It does not know the other updates.

    Args:
        fraction: of all clients that attack, in [0, 1).
        trusted: clients that never do, e.g. [0].
        scale: > 0.

    Reference: Li, Xu, Chen, Giannakis, Ling, *RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed
    Learning from Heterogeneous Datasets*, AAAI 2019, arXiv:1811.03761, section 5.
    """
    _positive("scale", scale)
    return _attack("sign_flip", fraction, trusted, forge=lambda scene: -scale * scene.malicious_FD)


def gaussian(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, std: float = 1.0) -> Poisoning:
    """Make each malicious client send numbers from N(0, std^2). It does not know the other updates.

    Args:
        fraction: of all clients that attack, in [0, 1).
        trusted: clients that never do, e.g. [0].
        std: of each number, > 0.

    Reference: Blanchard, El Mhamdi, Guerraoui, Stainer, *Machine Learning with Adversaries*, NeurIPS 2017,
    arXiv:1703.02757, section 6 (with std 200).
    """
    _positive("std", std)

    def forge(scene: AttackView) -> np.ndarray:
        return std * generator(scene.seed, Purpose.POISONING, round=scene.round).standard_normal(
            scene.malicious_FD.shape
        )

    return _attack("gaussian", fraction, trusted, forge=forge)


def label_flip(*, fraction: float = 0.2, trusted: Sequence[int] | None = None) -> Poisoning:
    """Make each malicious client train on flipped labels: class ``c`` of ``C`` becomes ``C - 1 - c``.

    Args:
        fraction: of all clients that attack, in [0, 1).
        trusted: clients that never do, e.g. [0].

    Reference: Allen-Zhu, Ebrahimian, Li, Alistarh, *Byzantine-Resilient Non-Convex Stochastic Gradient Descent*, ICLR
    2021, arXiv:2012.14368, section 5.
    """

    def poison(examples: Examples, num_classes: int) -> Examples:
        return replace(examples, y=num_classes - 1 - examples.y)

    return _attack("label_flip", fraction, trusted, poison=poison)


def alie(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, z: float | None = None) -> Poisoning:
    """Make all malicious clients send ``mean - z std`` of the honest updates (A Little Is Enough), which they know.

    Args:
        fraction: of all clients that attack, in [0, 1).
        trusted: clients that never do, e.g. [0].
        z: standard deviations; None: the most that hides among a majority of n clients of which f attack, the quantile
            of the normal distribution at ``(n - f - s) / (n - f)`` with ``s = floor(n / 2 + 1) - f``, and not below 0.

    Reference: Baruch, Baruch, Goldberg, *A Little Is Enough: Circumventing Defenses For Distributed Learning*, NeurIPS
    2019, arXiv:1902.06156, Algorithm 3.
    """
    given = z is None or is_number(z)
    require(given, "z", z, "a number, or null for the most that hides", "z=1.5")

    def forge(scene: AttackView) -> np.ndarray:
        num_honest, num_malicious = len(scene.honest_HD), len(scene.malicious_FD)
        supporters = (num_honest + num_malicious) // 2 + 1 - num_malicious
        hidden = min(max((num_honest - supporters) / num_honest, 0.5), 1 - 1e-9)
        return scene.mean - (NormalDist().inv_cdf(hidden) if z is None else z) * scene.std

    return _attack("alie", fraction, trusted, forge=forge)


def inner_product(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, epsilon: float = 0.5) -> Poisoning:
    """Make all malicious clients send ``-epsilon`` times the mean of the honest updates, which they know.

    Args:
        fraction: of all clients that attack, in [0, 1).
        trusted: clients that never do, e.g. [0].
        epsilon: > 0.

    Reference: Xie, Koyejo, Gupta, *Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation*, UAI
    2019, arXiv:1903.03936, section 5.
    """
    _positive("epsilon", epsilon)
    return _attack("inner_product", fraction, trusted, forge=lambda scene: -epsilon * scene.mean)


def min_max(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, direction: str = "std") -> Poisoning:
    """Make all malicious clients send ``mean + gamma p``, no further from any honest update than two honest ones are
    apart.

    They know the honest updates. ``gamma`` is the largest for which that holds, in closed form.

    Args:
        fraction: of all clients that attack, in [0, 1).
        trusted: clients that never do, e.g. [0].
        direction: ``p``: ``std`` (minus the standard deviations), ``mean`` (minus the mean, as a unit vector) or
            ``sign`` (minus the signs of the mean).

    Reference: Shejwalkar, Houmansadr, *Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for
    Federated Learning*, NDSS 2021, section IV (AGR-agnostic attacks).
    """
    _known(direction)

    def forge(scene: AttackView) -> np.ndarray:
        p_D, apart_HD = _perturbation(scene, direction), scene.mean - scene.honest_HD
        bound = _squared_distances(scene.honest_HD).max()
        along_H, slack_H = apart_HD @ p_D, bound - (apart_HD**2).sum(axis=1)
        length = max(float(p_D @ p_D), 1e-30)
        gamma = float(((np.sqrt(along_H**2 + length * slack_H) - along_H) / length).min())
        return scene.mean + gamma * p_D

    return _attack("min_max", fraction, trusted, forge=forge)


def min_sum(*, fraction: float = 0.2, trusted: Sequence[int] | None = None, direction: str = "std") -> Poisoning:
    """Make all malicious clients act as in `min_max`, with the sum of squared distances at most that of an honest
    update.

    Args:
        fraction: of all clients that attack, in [0, 1).
        trusted: clients that never do, e.g. [0].
        direction: as of `min_max`.

    Reference: Shejwalkar, Houmansadr, NDSS 2021, as of `min_max`.
    """
    _known(direction)

    def forge(scene: AttackView) -> np.ndarray:
        p_D = _perturbation(scene, direction)
        spread = ((scene.honest_HD - scene.mean) ** 2).sum()
        room = _squared_distances(scene.honest_HD).sum(axis=1).max() - spread
        gamma = np.sqrt(max(room, 0.0) / len(scene.honest_HD) / max(float(p_D @ p_D), 1e-30))
        return scene.mean + gamma * p_D

    return _attack("min_sum", fraction, trusted, forge=forge)


def mimic(*, fraction: float = 0.2, trusted: Sequence[int] | None = None) -> Poisoning:
    """Make all malicious clients send a copy of one honest update, so that this client has more weight.

    They know the honest updates and copy the one that is furthest out along the direction in which these differ most;
    found anew each round (in the paper: learnt over the first rounds, then kept).

    Args:
        fraction: of all clients that attack, in [0, 1).
        trusted: clients that never do, e.g. [0].

    Reference: Karimireddy, He, Jaggi, *Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing*, ICLR 2022,
    arXiv:2006.09365, section 4.
    """

    def forge(scene: AttackView) -> np.ndarray:
        apart_HD = scene.honest_HD - scene.mean
        _, vectors_HH = np.linalg.eigh(apart_HD @ apart_HD.T)
        victim_D: np.ndarray = scene.honest_HD[np.argmax(np.abs(vectors_HH[:, -1]))]
        return victim_D

    return _attack("mimic", fraction, trusted, forge=forge)


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
    """Make each malicious client train on some images with a trigger and the target as label, and boost its update.

    The trigger is a square in the lower right corner. Boosted by ``n / f``, the mean of n updates, f of them malicious,
    becomes the attackers' model once the others hardly move. Knows how many take part, nothing else.
    ``attack_success`` is the share of held-out images of other classes that the global model takes for the target once
    they carry the trigger.

    Args:
        fraction: of all clients that attack, in [0, 1).
        trusted: clients that never do, e.g. [0].
        target: class that the trigger stands for.
        share: of an attacker's images that carry it, in (0, 1].
        size: of the square in pixels, >= 1.
        value: of its pixels.
        boost: > 0; None: ``n / f``.

    Reference: Bagdasaryan, Veit, Hua, Estrin, Shmatikov, *How To Backdoor Federated Learning*, AISTATS 2020,
    arXiv:1807.00459, section 4.2; the trigger is that of Gu, Dolan-Gavitt, Garg, *BadNets*, 2017, arXiv:1708.06733.
    """
    require(is_count(target, at_least=0), "target", target, "a class number from 0", "target=0")
    require(is_number(share, at_least=0) and 0 < share <= 1, "share", share, "a share in (0, 1]", "share=0.5")
    require(is_count(size), "size", size, "a whole number of pixels >= 1", "size=2")
    if boost is not None:
        _positive("boost", boost)

    def with_trigger(examples: Examples, rows: np.ndarray) -> Examples:
        images = examples.x.ndim == 4
        require(
            images, "poisoning", "backdoor", "a scenario of images, N x height x width x channels", "scenario=digits"
        )
        x, y = examples.x.copy(), examples.y.copy()
        x[rows, -size:, -size:, :], y[rows] = value, target
        return Examples(x, y)

    def poison(examples: Examples, num_classes: int) -> Examples:
        known = target < num_classes
        require(known, "poisoning.target", target, f"a class number below {num_classes}", "poisoning.target=0")
        every = np.arange(1, len(examples) + 1) * share
        return with_trigger(examples, np.floor(every) > np.floor(every - share))

    def triggered(examples: Examples) -> Examples:
        others = examples.y != target
        return with_trigger(Examples(examples.x[others], examples.y[others]), np.ones(int(others.sum()), bool))

    def forge(scene: AttackView) -> np.ndarray:
        return (boost or scene.num_updates / len(scene.malicious_FD)) * scene.malicious_FD

    made = _attack("backdoor", fraction, trusted, forge=forge, poison=poison)
    return made._replace(backdoor_examples=triggered)


def _attack(
    kind: str,
    fraction: float,
    trusted: Sequence[int] | None,
    *,
    forge: Callable[[AttackView], np.ndarray] | None = None,
    poison: Callable[[Examples, int], Examples] | None = None,
) -> Poisoning:
    share = is_number(fraction, at_least=0, below=1)
    require(share, "fraction", fraction, "a share of all clients in [0, 1)", "fraction=0.2")
    never = [] if trusted is None else list(trusted)
    numbers = all(is_count(client, at_least=0) for client in never)
    require(numbers, "trusted", trusted, "null, or a list of clients' numbers", "trusted=[0]")
    return Poisoning(kind, fraction, tuple(never), forge, poison)


def _perturbation(scene: AttackView, direction: str) -> np.ndarray:
    if direction == "std":
        return -scene.std
    mean_D = scene.mean
    return -np.sign(mean_D) if direction == "sign" else -mean_D / max(float(np.linalg.norm(mean_D)), 1e-30)


def _squared_distances(rows_HD: np.ndarray) -> np.ndarray:
    products_HH = rows_HD @ rows_HD.T
    norms_H = np.diag(products_HH)
    distances_HH: np.ndarray = np.maximum(norms_H[:, None] + norms_H - 2 * products_HH, 0)
    return distances_HH


def _known(direction: str) -> None:
    require(direction in DIRECTIONS, "direction", direction, f"one of {', '.join(DIRECTIONS)}", "direction=std")


def _positive(name: str, value: float) -> None:
    ok = is_number(value, at_least=0) and 0 < value < float("inf")
    require(ok, name, value, "a finite number > 0", f"{name}=1.0")
