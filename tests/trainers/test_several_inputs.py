"""Models with several inputs train alike in torch and JAX, in all engines, and with DP-SGD."""

import itertools
from collections import Counter

import numpy as np
import pytest

import fedlearn
from fedlearn import LocalSettings, Scenario, Schedule, SettingError, federate, from_arrays, serial, start, vector
from fedlearn.core.inputs import join_inputs, split_inputs
from fedlearn.core.records import ExampleDP, Examples
from fedlearn.errors import DataError
from strategies import fedavg

torch = pytest.importorskip("torch")
nn = torch.nn

RNG = np.random.default_rng(0)
IDS, MASK = RNG.integers(2**40, 2**40 + 20, (48, 7)), RNG.random((48, 7)) > 0.3
MASK[:, 0] = True
NUMBERS = RNG.normal(size=(48, 2))
Y = (NUMBERS[:, 0] > 0).astype(np.int64)
X = {"ids": IDS, "mask": MASK, "numbers": NUMBERS}
DATA = from_arrays(X, Y, assignment=np.arange(48) % 3, task="binary", seed=1)
FIRST = 2**40  # float32 has no room for such a number, so an id must keep its type


class Net(nn.Module):
    """Divide by the number of real tokens: a batch padded with zeros would have infinite gradients."""

    def __init__(self, *, mix=False):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out, self.mix = nn.Embedding(20, 5), nn.Linear(7, 1), mix

    def forward(self, ids, mask, numbers):
        total = (self.words(ids - FIRST) * mask[..., None]).sum(1)
        mean = total.mean(0) + 0 * total if self.mix else total / mask.sum(1, keepdim=True)
        return {"hidden": mean, "logits": self.out(torch.cat([torch.tanh(mean), numbers], 1))}


def small_ids(data):
    """Return the data with ids that fit into 32 bits, which JAX has by default."""
    parts = [data.train(client) for client in data.clients]
    few = [Examples({**split_inputs(part.x), "ids": split_inputs(part.x)["ids"] - FIRST}, part.y) for part in parts]
    x, y = np.concatenate([part.x for part in few]), np.concatenate([part.y for part in few])
    rows = np.cumsum([0, *map(len, few)])
    return from_arrays(
        split_inputs(x), y, assignment=[np.arange(a, b) for a, b in itertools.pairwise(rows)], task="binary",
        test_share=0,
    )  # fmt: skip


def trained(trainer, data=DATA, first_D=None, *, engine=vector, private=False, **settings):
    running = engine(data, trainer)
    state = start(fedavg(), trainer.init(1) if first_D is None else first_D, running, seed=1)
    dp = ExampleDP(clip=0.5, noise_multiplier=0.0) if private else None
    local = LocalSettings(epochs=2, batch_size=5, learning_rate=0.1, example_dp=dp, **settings)
    for round in federate(fedavg(), running, state, schedule=Schedule(rounds=2), local=local):
        assert not round.failures, round.failures[0]
        state = round.state
    return np.asarray(state.params_D)


def torch_trainer(**options):
    return fedlearn.TorchTrainer(Net(), task="binary", **options)


def test_inputs_in_one_array_keep_names_types_and_values():
    x = DATA.train(0).x
    assert {name: (part.dtype.name, part.shape[1:]) for name, part in split_inputs(x).items()} == {
        "ids": ("int64", (7,)), "mask": ("bool", (7,)), "numbers": ("float32", (2,)),
    }  # fmt: skip
    found = Counter(row.tobytes() for client in DATA.clients for side in (DATA.train, DATA.test)
                    for row in split_inputs(side(client).x)["ids"])  # fmt: skip
    assert found == Counter(row.tobytes() for row in IDS)
    assert isinstance(split_inputs(join_inputs((IDS, NUMBERS))), tuple)


def test_all_engines_and_forms_of_inputs_train_equal_models():
    final_D = trained(torch_trainer(), engine=serial)
    assert np.abs(final_D - torch_trainer().init(1)).max() > 0.01
    np.testing.assert_array_equal(trained(torch_trainer()), final_D)
    np.testing.assert_allclose(trained(torch_trainer().with_batching("vmap")), final_D, atol=1e-5)
    np.testing.assert_allclose(trained(torch_trainer(), micro_batch_size=2), final_D, atol=1e-5)
    pairs = from_arrays(tuple(X.values()), Y, assignment=np.arange(48) % 3, task="binary", seed=1)
    np.testing.assert_array_equal(trained(torch_trainer(), pairs), final_D)
    run = torch_trainer(forward=lambda module, x: module(x["ids"], x["mask"], x["numbers"])["logits"])
    np.testing.assert_array_equal(trained(run), final_D)


@pytest.mark.slow
def test_worker_processes_train_equal_models():
    def pool(data, trainer):
        return vector(data, trainer, batching="process_pool")

    np.testing.assert_array_equal(trained(torch_trainer(), engine=pool), trained(torch_trainer()))


def test_dp_sgd_clips_the_gradient_of_each_example():
    trainer, examples = torch_trainer(), DATA.train(0)
    trainer.batching = "map"
    from fedlearn.algorithm.local_rule import plain_training
    from fedlearn.core.records import ClientWork, Request

    dp = ExampleDP(clip=0.05, noise_multiplier=0.0)
    local = LocalSettings(steps=1, batch_size=len(examples), learning_rate=1.0, example_dp=dp)
    request = Request(round=1, seed=1, params_D=trainer.init(1), local=local)
    delta_D = np.asarray(trainer.fit(request, plain_training, [ClientWork(client=0, examples=examples)]).delta_KD)[0]
    net, parts = trainer.network(trainer.init(1)), split_inputs(examples.x)
    total = {name: torch.zeros_like(leaf) for name, leaf in net.named_parameters()}
    for n in range(len(examples)):
        logit = net(**{name: torch.from_numpy(part[n : n + 1]) for name, part in parts.items()})["logits"][:, 0]
        loss = nn.functional.binary_cross_entropy_with_logits(logit, torch.tensor([float(examples.y[n])]))
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        for leaf, g in zip(total.values(), gradients, strict=True):
            leaf += g * min(1.0, 0.05 / float(norm))
    expected_D = -trainer.layout.pack({name: (leaf / len(examples)).numpy() for name, leaf in total.items()})
    np.testing.assert_allclose(delta_D, expected_D, atol=1e-6)


def test_dp_sgd_refuses_a_model_that_mixes_the_examples_of_a_batch():
    with pytest.raises(SettingError, match="mixes the examples of a batch"):
        fedlearn.TorchTrainer(Net(mix=True), task="binary").check_example_dp(
            request_of(LocalSettings(example_dp=ExampleDP())), DATA.train(0)
        )


def request_of(local):
    from fedlearn.core.records import Request

    return Request(round=1, seed=1, params_D=torch_trainer().init(1), local=local)


def linen_net():
    linen, jnp = pytest.importorskip("flax.linen"), pytest.importorskip("jax.numpy")

    class Linen(linen.Module):
        @linen.compact
        def __call__(self, ids, mask, numbers):
            total = (linen.Embed(20, 5, name="words")(ids) * mask[..., None]).sum(1)
            mean = total / mask.sum(1, keepdims=True)
            return linen.Dense(1, name="out")(jnp.concatenate([jnp.tanh(mean), numbers], 1))

    return Linen()


def test_a_file_of_a_model_names_only_inputs_of_numbers():
    from fedlearn.data.input_parts import parts_from_json, parts_of, parts_to_json

    parts = parts_of(DATA.train(0).x)
    assert parts_from_json(parts_to_json(parts)) == parts
    for bad in ([], {"a b": [[2], "int64"]}, {"ids": [[-1], "int64"]}, {"ids": [[2], "object"]}, {"ids": [2, "int64"]},
                {f"x{n}": [[1], "int64"] for n in range(100)}):  # fmt: skip
        with pytest.raises(ValueError, match=r"inputs? "):
            parts_from_json(bad)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"private": True}, {"micro_batch_size": 2}])
def test_torch_and_jax_train_equal_models(settings):
    class Small(Net):
        def forward(self, ids, mask, numbers):
            return super().forward(ids + FIRST, mask, numbers)

    data = small_ids(DATA)
    mine = fedlearn.JaxTrainer(linen_net(), task="binary", input_shape=data.train(0).x.dtype)
    other = fedlearn.TorchTrainer(Small(), task="binary")
    assert mine.layout == other.layout
    first_D = other.init(1)
    np.testing.assert_allclose(trained(mine, data, first_D, **settings), trained(other, data, **settings), atol=1e-5)
    x = split_inputs(data.train(0).x)
    np.testing.assert_allclose(mine.predict(first_D, x), other.predict(first_D, x), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_conformance_kit_accepts_several_inputs(framework):
    from fedlearn.testing import check_trainer

    data = small_ids(DATA) if framework == "jax" else DATA
    form = data.train(0).x.dtype
    build = {"torch": torch_trainer, "jax": lambda: fedlearn.JaxTrainer(linen_net(), task="binary", input_shape=form)}
    check_trainer(build[framework](), [data.train(client) for client in data.clients])


@pytest.mark.slow
def test_the_conformance_kit_accepts_a_scenario_with_several_inputs():
    from fedlearn.testing import check_scenario

    def texts(*, seed=1):
        data = from_arrays(X, Y, assignment=np.arange(48) % 3, task="binary", seed=seed)
        return Scenario(name="texts", data=data, trainer=torch_trainer())

    check_scenario(texts)


class Items(torch.utils.data.Dataset):
    def __init__(self, *, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(Y)

    def __getitem__(self, index):
        x = {"ids": torch.from_numpy(IDS[index]), "mask": MASK[index], "numbers": NUMBERS[index]}
        return (x, int(Y[index])) if self.pairs else {**x, "ill": int(Y[index])}


def frame():
    return pytest.importorskip("pandas").DataFrame({**{name: list(part) for name, part in X.items()}, "ill": Y})


def of_hugging_face():
    columns = {**{name: part.tolist() for name, part in X.items()}, "ill": Y.tolist()}
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


KINDS = {
    "arrays": (lambda: (X, Y), {}),
    "pairs": (lambda: Items(pairs=True), {}),
    "mappings": (lambda: Items(pairs=False), {"target": "ill"}),
    "frame": (frame, {"target": "ill"}),
    "hugging_face": (of_hugging_face, {"target": "ill"}),
    "collate": (lambda: Items(pairs=True), {"collate": torch.utils.data.default_collate}),
}


SLOW = ("frame", "hugging_face")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in KINDS]
)
def test_each_kind_of_data_set_gives_the_same_inputs(kind):
    build, options = KINDS[kind]
    found = Scenario.from_datasets({"north": build()}, model=Net(), task="binary", **options).data.train(0)
    wanted = Scenario.from_datasets({"north": (X, Y)}, model=Net(), task="binary").data.train(0)
    np.testing.assert_array_equal(found.x, wanted.x)
    assert found.x.dtype == wanted.x.dtype
    np.testing.assert_array_equal(found.y, wanted.y)


WRONG = {
    "lengths": (lambda: ({**X, "mask": MASK[:5]}, Y), {}, "different numbers of examples"),
    "no name": (lambda: ({"ids of": IDS}, Y), {}, "names of the arguments of the model"),
    "texts": (lambda: ({"ids": np.array(["a"] * 48)}, Y), {}, "an array of numbers per input"),
    "no target": (lambda: Items(pairs=False), {}, "target='ill'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_refused_at_the_door(name):
    build, options, part = WRONG[name]
    with pytest.raises(DataError) as caught:
        Scenario.from_datasets({"north": build()}, model=Net(), task="binary", **options)
    assert part in str(caught.value)
    assert "client north" in str(caught.value)


def test_a_model_with_other_names_is_refused_with_the_names_of_its_arguments():
    with pytest.raises(SettingError, match="ids, mask, numbers") as caught:
        torch_trainer().check_model(Examples({"ids": IDS, "words": MASK}, Y))
    assert "forward=lambda module, inputs" in caught.value.fix


def test_a_run_is_saved_loaded_and_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenario = Scenario.from_datasets({"north": (X, Y), "south": (X, Y)}, model=Net(), task="binary")
    options = {"scenario": scenario, "strategy": fedavg(), "report": False}
    result = fedlearn.run(rounds=2, **options)
    model = fedlearn.load(result.folder, trainer=scenario.trainer)
    np.testing.assert_array_equal(model.predict_proba(X), result.predict_proba(X))
    assert type(result.model) is Net
    from simulations.analysis.export import _WRITERS

    with pytest.raises(SettingError, match="several inputs") as caught:
        _WRITERS["onnx"](model, tmp_path / "model.onnx")
    assert caught.value.fix == "format=torch"
    for bad, part in (({"ids": IDS}, "the inputs ids"), ({**X, "numbers": NUMBERS[:, :1]}, "shape (1,)"), (IDS, "one")):
        with pytest.raises(DataError) as caught:
            model.predict(bad)
        assert part in str(caught.value)
        assert "model.predict({'ids': ids, 'mask': mask, 'numbers': numbers})" in str(caught.value)
