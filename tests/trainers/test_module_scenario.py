"""`Scenario.from_datasets` reads data sets of each kind to the same examples, each client on request."""

import numpy as np
import pytest

import fedlearn
from fedlearn import FedlearnError, Scenario, SettingError
from fedlearn.errors import DataError
from strategies import fedavg

torch = pytest.importorskip("torch")
X_N = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
Y_N = (X_N[:, 0] > 0).astype(np.int64)
COLUMNS = {"a": X_N[:, 0], "b": X_N[:, 1], "c": X_N[:, 2], "ill": Y_N}


class MapStyle(torch.utils.data.Dataset):
    def __len__(self):
        return len(Y_N)

    def __getitem__(self, index):
        return torch.from_numpy(X_N[index]), int(Y_N[index])


def frame():
    return pytest.importorskip("pandas").DataFrame(COLUMNS)


def of_hugging_face():
    return pytest.importorskip("datasets").Dataset.from_dict({name: cells.tolist() for name, cells in COLUMNS.items()})


KINDS = {
    "arrays": (lambda: (X_N, Y_N), {}),
    "pairs": (lambda: list(zip(X_N, Y_N, strict=True)), {}),
    "map_style": (MapStyle, {}),
    "function": (lambda: lambda: (X_N, Y_N), {}),
    "frame": (frame, {"target": "ill"}),
    "hugging_face": (of_hugging_face, {"target": "ill"}),
    "collate": (lambda: [{"x": x, "y": y} for x, y in zip(X_N, Y_N, strict=True)], {
        "collate": lambda items: (np.stack([item["x"] for item in items]), [item["y"] for item in items])
    }),
}  # fmt: skip


def scenario(datasets, **options):
    torch.manual_seed(1)
    return Scenario.from_datasets(datasets, **{"model": torch.nn.Linear(3, 1), "task": "binary", **options})


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_set_gives_the_same_examples(kind):
    build, options = KINDS[kind]
    data = scenario({"north": build(), "south": build()}, **options).data
    expected = scenario({"north": (X_N, Y_N), "south": (X_N, Y_N)}).data
    assert data.names == {0: "north", 1: "south"}
    for client in data.clients:
        for side in ("train", "test"):
            found, wanted = getattr(data, side)(client), getattr(expected, side)(client)
            np.testing.assert_array_equal(found.x, wanted.x)
            np.testing.assert_array_equal(found.y, wanted.y)
            assert found.x.dtype == np.float32
    assert len(data.train(0)) == 30


def test_a_client_is_read_only_when_it_is_needed():
    read = []

    def client(number):
        def load():
            read.append(number)
            return X_N, Y_N

        return load

    data = scenario({str(number): client(number) for number in range(200)}, num_classes=2).data
    assert read == [0]  # for the shape of an example
    data.train(150), data.test(150)
    assert read == [0, 150]


def test_a_data_frame_is_predicted_by_the_names_of_its_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = frame().assign(ill=np.where(Y_N > 0, "yes", "no"))
    built = scenario({"north": named, "south": named}, target="ill", classes=["no", "yes"])
    result = fedlearn.run(built, fedavg(), rounds=3, show=False, report=False)
    shuffled = named[["c", "a", "b"]]
    np.testing.assert_array_equal(result.predict(shuffled), result.predict(X_N))
    assert set(result.predict(shuffled)) <= {"no", "yes"}
    with pytest.raises(FedlearnError, match="column b"):
        result.predict(shuffled.drop(columns="b"))


def test_held_out_data_sets_replace_the_split():
    built = scenario({"a": (X_N, Y_N), "b": (X_N, Y_N)}, test={"a": (X_N[:5], Y_N[:5])})
    assert [len(built.data.train(client)) for client in (0, 1)] == [40, 40]
    assert [len(built.data.test(client)) for client in (0, 1)] == [5, 0]


def test_a_flax_module_trains_in_jax(tmp_path, monkeypatch):
    nn = pytest.importorskip("flax.linen")
    monkeypatch.chdir(tmp_path)
    built = Scenario.from_datasets({"a": (X_N, Y_N), "b": (X_N, Y_N)}, model=nn.Dense(1), task="binary")
    assert built.trainer.framework == "jax"
    assert fedlearn.run(built, rounds=1, show=False, report=False).status == "done"


NO_CLASSES = (X_N, Y_N.astype(str))
WRONG = [
    ([1], {}, SettingError, "a mapping from the name of a client"),
    ({}, {}, SettingError, "a mapping from the name of a client"),
    ({"a": (X_N, Y_N)}, {"model": 3}, SettingError, "an nn.Module"),
    ({"a": (X_N, Y_N)}, {"test": {"b": (X_N, Y_N)}}, SettingError, "names of clients"),
    ({"a": (X_N, Y_N)}, {"test_share": 1.0}, SettingError, "test_share"),
    ({"a": (X_N, Y_N[:3])}, {}, DataError, "client a: .*x has 40 examples"),
    ({"a": NO_CLASSES}, {}, DataError, r"classes=\[\.\.\.\]"),
    ({"a": NO_CLASSES}, {"classes": ["0"]}, DataError, "1 names of classes are unknown"),
    ({"a": [({"i": "text"}, 1)]}, {}, DataError, "an array of numbers per input"),
    ({"a": (X_N, Y_N)}, {"model": torch.nn.Linear}, SettingError, "the class Linear"),
    ({"a": (X_N, Y_N)}, {"forward": 3}, SettingError, "forward is 3"),
    ({"a": [(["text"], 1)]}, {}, DataError, "an input holds"),
    ({"a": 7}, {}, DataError, "client a: the data set cannot be read"),
    ({"a": (X_N[:0], Y_N[:0])}, {}, DataError, "no client has training examples"),
]


@pytest.mark.parametrize(("datasets", "options", "kind", "text"), WRONG)
def test_a_wrong_data_set_or_option_is_refused(datasets, options, kind, text):
    with pytest.raises(kind, match=text):
        scenario(datasets, **options)


@pytest.mark.parametrize(("target", "text"), [("il", "no column il"), (None, "no column None")])
def test_a_missing_column_is_named(target, text):
    with pytest.raises(DataError, match=text):
        scenario({"a": frame()}, target=target)
