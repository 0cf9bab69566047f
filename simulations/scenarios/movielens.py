"""The scenario `movielens`: recommend films to users.

Shapes: R ratings, M items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from fedlearn.core.federated_data import FederatedData
from fedlearn.core.random import Purpose, generator
from fedlearn.data.column_types import Number
from fedlearn.data.from_arrays import from_arrays
from fedlearn.data.inputs import TableInputs
from fedlearn.data.partition import Partition, natural_partition
from fedlearn.data.preprocessing import Preprocessing, Target
from fedlearn.errors import is_count, require
from fedlearn.loop.scenario import Network, Scenario
from simulations.datasets.movielens import read_ratings
from simulations.models.recommendation import build_recommender
from simulations.models.recommendation.negative_sampling import NegativeSamplingTrainer, label_items

GLOBAL_MEAN = 3.5  # stars: a public estimate of the mean rating
TASKS = ("rating", "ranking")
NUM_TEST_NEGATIVES = 99  # films without a rating that are ranked together with the held-out film


def movielens(
    *,
    framework: str = "torch",
    model: Any = "mf",
    partition: Partition | str = "natural",
    size: str = "100k",
    task: str = "rating",
    factors: int = 16,
    num_negatives: int = 4,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Predict the stars that a user gives a film, or the next film of a user. Each user is a client.

    The parameters ``user.*`` describe the user. They stay at the client if the strategy makes them personal:
    ``strategy=fcf``, or ``strategy=fedper strategy.personal_parameters=user.*``.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``mf`` (biased matrix factorisation), ``ncf`` (neural collaborative filtering), or a module.
        partition: ``natural``: each user is a client; default of ``rating``: test share 0.2.
        size: ``100k`` (943 users), ``latest-small`` (671) or ``1m`` (6,040).
        task: ``rating`` predicts stars; the metric is the RMSE on ``test_share`` of each user's films. ``ranking``
            ranks each user's last film among 99 unseen ones; the metrics are HR@10 and NDCG@10.
        factors: dimension of the vector of a user or a film, >= 1.
        num_negatives: for ``ranking``: unseen films per seen film in training, drawn again in each round, >= 1.
        seed: seed of the test split and of the unseen films.
        path: folder with the data; None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Harper, Konstan, *The MovieLens Datasets: History and Context*, ACM TiiS 5, 2015, doi:10.1145/2827872.
    """
    partition = natural_partition("movielens", partition, test_share=0.2)
    require(task in TASKS, "task", task, f"one of {', '.join(TASKS)}", "task=rating")
    require(is_count(factors), "factors", factors, "a whole number >= 1", "factors=16")
    some = is_count(num_negatives)
    require(some, "num_negatives", num_negatives, "a whole number >= 1", "num_negatives=4")
    user_R, item_R, stars_R, time_R, place = read_ratings(size, path=path)
    num_items = int(item_R.max()) + 1
    if task == "rating":
        data = from_arrays(
            item_R, stars_R, assignment=user_R, task="regression", test_share=partition.held_out_share, seed=seed
        )
    else:
        data = leave_one_out(user_R, item_R, time_R, num_negatives=num_negatives, seed=seed)
    data = replace(data, source=f"MovieLens {size}, from {place}")
    centre = GLOBAL_MEAN if task == "rating" else 0.0
    sizes: dict[str, Any] = {"num_items": num_items, "num_factors": factors, "global_mean": centre}
    fitted, line = build_recommender(model, data, framework=framework, device=device, **sizes)
    fitted = NegativeSamplingTrainer(fitted, data, num_items=num_items) if task == "ranking" else fitted
    return Scenario(
        name="movielens",
        data=data,
        trainer=fitted,
        model=line,
        preprocessing=Preprocessing(
            inputs=TableInputs(columns=(Number(name="item", largest=num_items - 1),), shape=()),
            target=Target(name="stars", task=data.task, unit="stars" if task == "rating" else ""),
        ),
        network=Network(builder="simulations.models.recommendation.build_recommender", arguments=sizes),
    )


def leave_one_out(
    user_R: np.ndarray, item_R: np.ndarray, time_R: np.ndarray, *, num_negatives: int, seed: int
) -> FederatedData:
    """Build one client per user, and hold out each user's last film together with 99 unseen films."""
    train, test = [], []
    for user in held_out_films(user_R, item_R, time_R, seed=seed):
        negatives = user.rng.choice(user.rest, num_negatives * len(user.history)) if len(user.rest) else user.rest
        train.append(label_items(user.history, negatives))
        test.append(label_items(user.wanted, user.others))
    return FederatedData(
        task="ranking", clients=range(len(train)), train=train.__getitem__, test=test.__getitem__, num_classes=2
    )


class UserFilms(NamedTuple):
    """Hold the films of a user.

    Attributes:
        history: films in the order of time, without the held-out film.
        wanted: the held-out film; empty if there is none.
        others: unseen films that are ranked together with the held-out film.
        rest: all other unseen films.
        rng: generator of the user, for further draws.
    """

    history: np.ndarray
    wanted: np.ndarray
    others: np.ndarray
    rest: np.ndarray
    rng: np.random.Generator


def held_out_films(user_R: np.ndarray, item_R: np.ndarray, time_R: np.ndarray, *, seed: int) -> Iterator[UserFilms]:
    """Yield the films of each user, with the last one held out together with 99 unseen films.

    A user holds out no film if the user has seen only one, or if fewer than 100 are unseen.

    Reference: He et al., *Neural Collaborative Filtering*, WWW 2017, arXiv:1708.05031, section 4.1.
    """
    num_items = int(item_R.max()) + 1
    # break ties of equal seconds at random: item numbers would favour rarely seen films
    tie_break_M = generator(seed, Purpose.SPLIT).permutation(num_items)
    by_time_R = np.lexsort((tie_break_M[item_R], time_R, user_R))
    ends = np.cumsum(np.bincount(user_R))
    for user, ratings in enumerate(np.split(by_time_R, ends[:-1])):
        rng = generator(seed, Purpose.SPLIT, client=user)
        seen = item_R[ratings]
        unseen = np.setdiff1d(np.arange(num_items), seen)
        held_out = len(seen) > 1 and len(unseen) > NUM_TEST_NEGATIVES
        others = rng.choice(unseen, NUM_TEST_NEGATIVES, replace=False) if held_out else unseen[:0]
        history, rest = (seen[:-1], np.setdiff1d(unseen, others)) if held_out else (seen, unseen)
        yield UserFilms(history, seen[len(history) :], others, rest, rng)
