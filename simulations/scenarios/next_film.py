"""The scenario `next_film`: predict the next film of a user with a small causal model."""

from __future__ import annotations

from os import PathLike
from typing import Any

from fedlearn.core.federated_data import FederatedData
from fedlearn.data.partition import Partition, natural_partition
from fedlearn.errors import is_count, require
from fedlearn.loop.scenario import Network, Scenario
from simulations.datasets.movielens import read_ratings
from simulations.models.recommendation.next_film import (
    NEXT_FILM,
    NUM_OUTPUTS,
    build_next_film,
    test_sequence,
    training_sequences,
)
from simulations.scenarios.movielens import NUM_TEST_NEGATIVES, held_out_films


def next_film(
    *,
    framework: str = "torch",
    model: Any = "decoder",
    partition: Partition | str = "natural",
    size: str = "100k",
    length: int = 50,
    width: int = 32,
    layers: int = 1,
    heads: int = 2,
    seed: int = 1,
    path: str | PathLike[str] | None = None,
    device: str = "cpu",
) -> Scenario:
    """Predict the next film of a user from the earlier ones, in the order of time. Each user is a client.

    All rated films count, as in ``scenario=movielens scenario.task=ranking``. The last film of a user is held out and
    ranked among the same 99 unseen films as there, for equal seeds. The unit of privacy of a client is a user.

    Args:
        framework: ``torch``, ``jax`` or ``mixed`` (even clients in torch, odd ones in JAX).
        model: ``decoder``, a small LLaMA whose tokens are films. With torch it needs the extra ``hf``.
        partition: ``natural``: each user is a client. The last film of a user is the test set.
        size: ``100k`` (943 users), ``latest-small`` (671) or ``1m`` (6,040).
        length: films of a sequence, >= 3; longer histories are divided.
        width: width of the vector of a film, a multiple of twice the number of heads.
        layers: number of layers, >= 1.
        heads: number of attention heads, >= 1.
        seed: seed of the unseen films.
        path: folder with the data; None searches for them.
        device: device for training, e.g. ``cpu`` or ``cuda``.

    Raises:
        SettingError: a setting is out of range.
        DataError: the data are missing or damaged.

    Reference: Kang, McAuley, *Self-Attentive Sequential Recommendation*, ICDM 2018, arXiv:1808.09781.
    """
    natural_partition("next_film", partition, test_share=0.2)
    require(is_count(length, at_least=3), "length", length, "a whole number >= 3", "length=50")
    for name, value in (("width", width), ("layers", layers), ("heads", heads)):
        require(is_count(value), name, value, "a whole number >= 1", f"{name}={32 if name == 'width' else 1}")
    user_R, item_R, _, time_R, place = read_ratings(size, path=path)
    train, test = [], []
    for user in held_out_films(user_R, item_R, time_R, seed=seed):
        train.append(training_sequences(user.history, length=length, num_candidates=NUM_TEST_NEGATIVES + 1))
        test.append(test_sequence(user.history, user.wanted, user.others, length=length))
    data = FederatedData(
        task=NEXT_FILM,
        clients=range(len(train)),
        train=train.__getitem__,
        test=test.__getitem__,
        num_classes=NUM_OUTPUTS,
        source=f"MovieLens {size}, from {place}",
    )
    sizes: dict[str, Any] = {"num_items": int(item_R.max()) + 1, "length": length}
    sizes |= {"width": width, "layers": layers, "heads": heads}
    trainer, line = build_next_film(model, data, framework=framework, device=device, **sizes)
    return Scenario(
        name="next_film",
        data=data,
        trainer=trainer,
        model=line,
        network=Network(builder=f"{build_next_film.__module__}.{build_next_film.__name__}", arguments=sizes),
    )
