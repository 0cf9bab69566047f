from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlearn.core.random import Purpose, integer_seed
from fedlearn.data.from_arrays import from_arrays, held_out
from fedlearn.data.partition import PARTITIONS, Feature, Natural, Time, add_feature_noise, as_partition, partition_rows
from fedlearn.errors import DataError, SettingError

LABELS = np.arange(400) % 10
KINDS = ("iid", "shards", "quantity", "feature", "time", "dirichlet", "dirichlet_equal", "pathological")


def rows_of(kind: str, *, seed: int = 1, num_clients: int = 10, labels: np.ndarray = LABELS, **settings: float):
    partition = PARTITIONS[kind](num_clients=num_clients, **settings)
    return partition_rows(partition, labels, order_N=np.sin(np.arange(len(labels))), seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_goes_to_exactly_one_client(kind):
    rows = rows_of(kind)
    assert len(rows) == 10
    assert sorted(np.concatenate(rows).tolist()) == list(range(400))


@pytest.mark.parametrize("kind", KINDS)
def test_a_partition_depends_on_its_seed_and_nothing_else(kind):
    first, again, other = rows_of(kind), rows_of(kind), rows_of(kind, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    same = all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert same == (kind == "time")  # a split by time has no randomness


GOLDEN = {
    "iid": "438db367d61e5a62",
    "shards": "1947d0896956a5e8",
    "quantity": "ded5d274af16715b",
    "feature": "01fe4a4905f3eec6",
    "time": "724562fd0539e7a3",
    "dirichlet": "6b5c915d7fbaac04",
    "dirichlet_equal": "8aabf78a05bdf5f0",
    "pathological": "b4b808ca0558182d",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_partition_is_the_same_on_every_machine(kind):
    rows = [",".join(map(str, sorted(rows_k.tolist()))) for rows_k in rows_of(kind)]
    assert hashlib.sha256(";".join(rows).encode()).hexdigest()[:16] == GOLDEN[kind]


@pytest.mark.parametrize("kind", ["iid", "dirichlet_equal"])
def test_clients_are_equally_large(kind):
    assert {len(rows) for rows in rows_of(kind, num_clients=7)} == {57, 58}


def test_many_clients_of_very_unlike_classes_are_equally_large():
    rows = rows_of("dirichlet_equal", num_clients=100, alpha=0.1)
    assert {len(rows_k) for rows_k in rows} == {4}
    assert np.mean([len(set(LABELS[rows_k].tolist())) for rows_k in rows]) < 2.5
    with pytest.raises(SettingError, match="each of 100 "):
        rows_of("dirichlet", num_clients=100, alpha=0.1)


def test_classes_may_be_numbered_with_gaps():
    alike = [np.concatenate(rows_of("dirichlet_equal", labels=labels)).tolist() for labels in (LABELS, 3 * LABELS)]
    assert alike[0] == alike[1]


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet_equal"])
def test_smaller_alpha_is_more_skewed(kind):
    def skew(alpha: float) -> float:
        return np.mean([np.bincount(LABELS[rows]).max() / len(rows) for rows in rows_of(kind, alpha=alpha)])

    assert skew(0.1) > skew(1.0) > skew(100.0)


def test_pathological_clients_have_exactly_their_number_of_classes():
    for rows in rows_of("pathological", classes_per_client=3):
        assert len(np.unique(LABELS[rows])) == 3


def test_classes_at_no_client_are_warned_of():
    with pytest.warns(UserWarning, match="leaves classes"):
        rows = rows_of("pathological", num_clients=2, classes_per_client=1)
    assert sum(map(len, rows)) == 80


def test_shards_hold_one_class_each_where_classes_are_equally_large():
    for rows in rows_of("shards", num_clients=20):
        assert len(rows) == 20
        assert len(np.unique(LABELS[rows])) <= 2


def test_smaller_alpha_makes_sizes_more_unequal():
    def spread(alpha: float) -> float:
        return float(np.std([len(rows) for rows in rows_of("quantity", alpha=alpha)]))

    assert spread(0.1) > spread(1.0) > spread(100.0)
    assert min(len(rows) for rows in rows_of("quantity", alpha=0.01, num_clients=50)) >= 2


def test_periods_follow_one_another():
    day = np.random.default_rng(3).permutation(400)
    rows = partition_rows(Time(num_clients=4), LABELS, order_N=day)
    assert [sorted(day[rows_k].tolist()) for rows_k in rows] == [[*range(k, k + 100)] for k in (0, 100, 200, 300)]


def test_stricter_is_more_by_the_feature_and_not_at_all_is_iid():
    feature = np.random.default_rng(3).standard_cauchy(400)  # outliers must not matter

    def between(strictness: float) -> float:
        how = Feature(num_clients=4, strictness=strictness)
        ranks = feature.argsort().argsort()
        return float(np.std([ranks[rows_k].mean() for rows_k in partition_rows(how, LABELS, order_N=feature)]))

    assert between(1.0) > between(0.7) > between(0.4) > between(0.0)
    assert between(0.0) < 20


@pytest.mark.parametrize("kind", ["time", "feature"])
def test_what_has_no_order_cannot_be_divided_by_it(kind):
    with pytest.raises(SettingError, match="no order of rows"):
        partition_rows(PARTITIONS[kind](num_clients=2), LABELS)


def test_feature_noise_grows_from_client_to_client():
    x, rows = np.ones((4000, 10), np.float32), np.split(np.arange(4000), 4)
    noisy = add_feature_noise(x, rows, level=0.4, seed=1)
    for rows_k, variance in zip(rows, (0.1, 0.2, 0.3, 0.4), strict=True):
        assert noisy[rows_k].var() == pytest.approx(variance, rel=0.1)
    assert np.array_equal(noisy, add_feature_noise(x, rows, level=0.4, seed=1))
    assert add_feature_noise(x, rows, level=0.0, seed=1) is x
    with pytest.raises(SettingError, match="feature_noise is -1"):
        add_feature_noise(x, rows, level=-1, seed=1)


def test_natural_follows_the_data():
    rows = partition_rows(Natural(), LABELS, natural_N=LABELS % 2)
    assert all((LABELS[rows_k] % 2 == k).all() for k, rows_k in enumerate(rows))


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"kind": "natural"}, "partition"),
        ({"kind": "dirichlet", "alpha": 0}, "alpha"),
        ({"kind": "feature", "strictness": 1.1}, "strictness"),
        ({"kind": "shards", "classes_per_client": 41}, "partition.classes_per_client"),
        ({"kind": "shards", "classes_per_client": 0}, "classes_per_client"),
        ({"kind": "dirichlet", "alpha": -1}, "alpha"),
        ({"kind": "dirichlet", "self_balancing": "yes"}, "self_balancing"),
        ({"kind": "iid", "num_clients": 0}, "num_clients"),
        ({"kind": "iid", "num_clients": 401}, "partition.num_clients"),
        ({"kind": "pathological", "classes_per_client": 0}, "classes_per_client"),
        ({"kind": "pathological", "classes_per_client": 11}, "partition.classes_per_client"),
        ({"kind": "dirichlet", "alpha": 0.001, "num_clients": 100}, "partition.alpha"),
        ({"kind": "dirichlet_equal", "alpha": 0.0001}, "partition.alpha"),
    ],
)
def test_an_impossible_setting_is_named(settings, setting):
    with pytest.raises(SettingError) as caught:
        rows_of(settings.pop("kind"), **settings)
    assert caught.value.setting == setting


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet_equal", "pathological", "shards"])
def test_real_targets_have_no_classes_to_divide(kind):
    with pytest.raises(SettingError, match="not classes"):
        rows_of(kind, labels=np.linspace(0, 1, 50))


def test_a_near_miss_is_guessed():
    with pytest.raises(SettingError, match="partition='dirichlet'"):
        as_partition("diriclet")


def test_natural_with_another_number_of_clients_says_how_many_there_are():
    with pytest.raises(SettingError, match="num_clients=2"):
        partition_rows(Natural(num_clients=3), LABELS, natural_N=LABELS % 2)


def flower_partition(kind, labels_N, num_clients, seed, alpha):
    """Return the partition of flwr-datasets, or None if it is impossible."""
    from datasets import Dataset
    from flwr_datasets import partitioner

    sizes = [len(rows) for rows in np.array_split(labels_N, num_clients)]
    kinds = {
        "dirichlet": ("DirichletPartitioner", {"num_partitions": num_clients, "alpha": alpha, "min_partition_size": 2}),
        "self_balancing": (
            "DirichletPartitioner",
            {"num_partitions": num_clients, "alpha": alpha, "min_partition_size": 2, "self_balancing": True},
        ),
        "dirichlet_equal": ("InnerDirichletPartitioner", {"partition_sizes": sizes, "alpha": alpha}),
        "pathological": (
            "PathologicalPartitioner",
            {
                "num_partitions": num_clients,
                "num_classes_per_partition": 2,
                "class_assignment_mode": "first-deterministic",
            },
        ),
    }
    name, settings = kinds[kind]
    seed = integer_seed(seed, Purpose.PARTITION)
    built = getattr(partitioner, name)(partition_by="label", shuffle=True, seed=seed, **settings)
    built.dataset = Dataset.from_dict({"row": np.arange(len(labels_N)), "label": labels_N})
    try:
        return [np.asarray(built.load_partition(client)["row"][:]) for client in range(num_clients)]
    except ValueError:
        return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dirichlet", "self_balancing", "dirichlet_equal", "pathological"])
@pytest.mark.parametrize(("num_clients", "num_classes", "alpha"), [(7, 3, 0.5), (20, 10, 0.05), (1, 2, 1.0)])
def test_class_based_partitions_equal_those_of_flower(kind, num_clients, num_classes, alpha):
    pytest.importorskip("flwr_datasets")
    labels = np.random.default_rng(num_clients).permutation(np.arange(101) % num_classes)
    settings = {} if kind == "pathological" else {"alpha": alpha}
    expected = flower_partition(kind, labels, num_clients, 5, alpha)
    if kind == "self_balancing":
        kind, settings = "dirichlet", {"self_balancing": True, **settings}
    if expected is None:
        with pytest.raises(SettingError):
            rows_of(kind, seed=5, num_clients=num_clients, labels=labels, **settings)
        return
    rows = rows_of(kind, seed=5, num_clients=num_clients, labels=labels, **settings)
    assert [rows_k.tolist() for rows_k in rows] == [rows_k.tolist() for rows_k in expected]


def test_self_balancing_narrows_the_sizes_of_clients():
    labels, sizes = np.repeat(np.arange(10), 600), {}
    for self_balancing in (False, True):
        rows = rows_of("dirichlet", num_clients=10, alpha=0.5, labels=labels, self_balancing=self_balancing)
        assert sorted(np.concatenate(rows).tolist()) == list(range(6000))
        sizes[self_balancing] = [len(rows_k) for rows_k in rows]
    assert np.std(sizes[True]) < np.std(sizes[False])
    assert str(PARTITIONS["dirichlet"](self_balancing=True)) == "dirichlet(0.5), self-balancing"


def test_partitions_import_no_large_library():
    code = (
        "import sys, numpy as np\n"
        "from fedlearn.data.partition import *\n"
        "for kind in (Iid, Dirichlet, DirichletEqual, Pathological):\n"
        "    partition_rows(kind(num_clients=2), np.arange(40) % 4)\n"
        "assert not {'flwr_datasets', 'datasets', 'pandas', 'scipy', 'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


def federated(assignment, *, y=LABELS, task="multiclass", **settings):
    return from_arrays(np.arange(len(y))[:, None], y, assignment=assignment, task=task, **settings)


def test_train_and_test_divide_each_clients_rows():
    data = federated(np.arange(400) % 4, test_share=0.25)
    for client in data.clients:
        both = np.concatenate([data.train(client).x, data.test(client).x]).ravel()
        assert sorted(both.tolist()) == list(range(client, 400, 4))
        assert len(data.test(client)) == 25


def test_targets_travel_with_their_rows():
    data = federated(np.arange(400) % 4)
    for part in (data.train(2), data.test(2)):
        assert np.array_equal(part.x.ravel().astype(int) % 10, part.y)
        assert part.x.dtype == np.float32
        assert part.y.dtype == np.int64


def test_held_out_classes_keep_their_share_within_one_example():
    y = np.repeat([0, 1, 2], [50, 30, 20])
    for seed in range(20):
        mask = held_out(y, 0.3, np.random.default_rng(seed))
        assert mask.sum() == 30
        assert np.abs(np.bincount(y[mask], minlength=3) - [15, 9, 6]).max() <= 1


@pytest.mark.parametrize(("num_examples", "num_test"), [(0, 0), (1, 0), (2, 1), (3, 2)])
def test_a_client_always_keeps_an_example_to_train_on(num_examples, num_test):
    for seed in range(20):
        assert held_out(np.zeros(num_examples), 0.9, np.random.default_rng(seed)).sum() == num_test


def test_an_empty_client_stays_a_client():
    data = federated(np.where(np.arange(400) < 200, 0, 2))
    assert list(data.clients) == [0, 1, 2]
    assert len(data.train(1)) == len(data.test(1)) == 0
    assert data.train(1).x.shape == (0, 1)


def test_a_clients_split_does_not_depend_on_the_others():
    alone = federated([np.arange(40)])
    among = federated([np.arange(40), np.arange(40, 400)])
    assert np.array_equal(alone.test(0).x, among.test(0).x)


def test_nothing_is_held_out_on_request():
    assert len(federated(np.zeros(400, int), test_share=0).test(0)) == 0


def test_a_regression_keeps_real_targets():
    data = federated(np.zeros(5, int), y=np.linspace(0, 1, 5), task="regression")
    assert data.train(0).y.dtype == np.float32
    assert data.num_classes == 1


@pytest.mark.parametrize(
    ("y", "task"), [([0, 2], "binary"), ([0.5, 1], "multiclass"), ([-1, 0], "multiclass"), ([[0], [1]], "binary")]
)
def test_targets_that_do_not_fit_the_task_are_refused(y, task):
    with pytest.raises(DataError):
        federated(np.zeros(2, int), y=np.array(y), task=task)


@pytest.mark.parametrize("assignment", [np.zeros(3, int), np.zeros(400), [np.array([400])], [np.array([-1])], []])
def test_an_assignment_that_does_not_fit_is_refused(assignment):
    with pytest.raises(DataError, match="assignment"):
        federated(assignment)


def test_a_list_of_client_numbers_is_an_assignment():
    x, y = np.eye(4), np.array([0, 1, 0, 1])
    lists, arrays = (
        from_arrays(x, y, assignment=assignment, task="binary") for assignment in ([1, 0, 1, 0], np.array([1, 0, 1, 0]))
    )
    for client in (0, 1):
        assert np.array_equal(lists.train(client).x, arrays.train(client).x)


@pytest.mark.parametrize("share", [-0.1, 1, float("nan"), "a"])
def test_a_test_share_out_of_range_is_named(share):
    with pytest.raises(SettingError, match="test_share"):
        federated(np.zeros(400, int), test_share=share)
