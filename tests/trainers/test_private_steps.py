"""Private local steps of the torch trainer: draws of an example, noise on a grid, and refusals before training."""

import numpy as np
import pytest

from fedlearn import LocalSettings, SettingError
from fedlearn.algorithm import plain_training
from fedlearn.core import ClientWork, Request
from fedlearn.core.noise_grid import grid_step
from fedlearn.core.records import ExampleDP, Examples
from fedlearn.privacy.gaussian_noise import add_gaussian_noise
from fedlearn.trainers.augmentation import Augmentation, AugmentedTrainer

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from fedlearn.trainers.torch import TorchTrainer  # noqa: E402

N, FEATURES, CLASSES, CLIP = 16, 12, 3, 0.01


def examples(num=N, shape=(FEATURES,)):
    rng = np.random.default_rng(0)
    return Examples(rng.normal(size=(num, *shape)).astype(np.float32), rng.integers(0, CLASSES, num))


def without_first(data):
    return Examples(data.x[1:], data.y[1:])


def mlp(*layers):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh(), *layers, nn.Linear(8, CLASSES))


def trainer(*layers, shape=(FEATURES,)):
    module = mlp(*layers)
    module(torch.zeros(2, *shape))
    return TorchTrainer(module, task="multiclass")


def request(built, *, noise_multiplier=0.0, deployed=False, params_D=None, **local):
    dp = ExampleDP(clip=CLIP, noise_multiplier=noise_multiplier)
    settings = LocalSettings(**{"steps": 1, "batch_size": 1000, "learning_rate": 1.0, "example_dp": dp, **local})
    params_D = built.init(1) if params_D is None else params_D
    return Request(round=1, seed=1, params_D=params_D, local=settings, deployed=deployed)


def summed(built, data, *, clients=(0,), **options):
    """Return the sum of the clipped gradients and noise of one step on all examples, ``(K, D)``."""
    work = [ClientWork(client=client, examples=data) for client in clients]
    delta_KD = np.asarray(built.fit(request(built, **options), plain_training, work).delta_KD)
    return -delta_KD.astype(np.float64) * len(data)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.RReLU()], ids=["dropout", "rrelu"])
@pytest.mark.parametrize("deployed", [False, True])
def test_a_removed_example_does_not_change_the_draws_of_the_others(layer, deployed, monkeypatch):
    monkeypatch.setattr("fedlearn.trainers.example_keys.os.urandom", lambda size: bytes(size))
    built, data = trainer(layer), examples()
    moved = summed(built, data, deployed=deployed) - summed(built, without_first(data), deployed=deployed)
    assert np.linalg.norm(moved) <= CLIP * (1 + 1e-4)


def test_draws_of_real_clients_do_not_follow_from_the_seed():
    built, data = trainer(nn.Dropout(0.5)), examples()
    first, second = (summed(built, data, deployed=True) for _ in range(2))
    assert np.linalg.norm(first - second) > CLIP
    again = [summed(built, data) for _ in range(2)]
    assert np.array_equal(*again)


def test_draws_differ_between_steps_rounds_and_clients():
    built, data = trainer(nn.Dropout(0.5)), examples()
    first = summed(built, data, clients=(0, 1))
    assert np.linalg.norm(first[0] - first[1]) > CLIP
    item, two = (summed(built, data, learning_rate=1e-3, steps=steps) * 1e3 for steps in (1, 2))
    assert np.linalg.norm(two - 2 * item) > CLIP  # the parameters hardly change in between


@pytest.mark.parametrize("deployed", [False, True])
def test_a_removed_image_does_not_change_the_augmentation_of_the_others(deployed, monkeypatch):
    monkeypatch.setattr("fedlearn.trainers.example_keys.os.urandom", lambda size: bytes(size))
    shape = (8, 8, 1)
    built, data = AugmentedTrainer(trainer(shape=shape), Augmentation()), examples(shape=shape)
    moved = summed(built, data, deployed=deployed) - summed(built, without_first(data), deployed=deployed)
    assert np.linalg.norm(moved) <= CLIP * (1 + 1e-4)


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("batching", ["map", "vmap"])
def test_noisy_sums_are_multiples_of_the_grid_step(batching, deployed):
    built = trainer().with_batching(batching)
    start = np.zeros_like(built.init(1))  # the update of zeros has no rounding error, and dividing by 16 has none
    sums = summed(built, examples(), clients=(0, 1), noise_multiplier=1.0, deployed=deployed, params_D=start)
    steps = sums / grid_step(CLIP)
    assert np.array_equal(steps, np.rint(steps))
    assert np.abs(steps).max() > 2**19


def test_noise_of_the_server_on_a_torch_array_is_on_the_grid():
    update = torch.linspace(-1, 1, 1000) / 3
    noise = np.random.default_rng(0).standard_normal(1000)
    steps = add_gaussian_noise(update, noise, 0.3).double().numpy() / grid_step(0.3)
    assert np.array_equal(steps, np.rint(steps))


@pytest.mark.parametrize("batching", ["auto", "map"])
def test_models_with_functional_dropout_train_alone_in_large_blocks(batching):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(FEATURES, CLASSES)

        def forward(self, x):
            return self.out(nn.functional.dropout(x, 0.5))

    built = TorchTrainer(Net(), task="multiclass", batching=batching)
    block = summed(built, examples(), clients=range(40))
    assert np.array_equal(block[7:8], summed(built, examples(), clients=(7,)))


def test_a_model_is_refused_before_training():
    built = trainer(nn.BatchNorm1d(8, affine=False, track_running_stats=False))
    with pytest.raises(SettingError, match=r"3 \(BatchNorm1d\) normalizes with statistics of the batch"):
        built.check_example_dp(request(built), examples())


def test_a_check_restores_parameters_and_generators():
    built, state = trainer(nn.Dropout(0.5)), torch.get_rng_state()
    before = [p.clone() for p in built.module.parameters()]
    built.check_example_dp(request(built, params_D=built.init(1)), examples())
    assert all(torch.equal(p, q) for p, q in zip(built.module.parameters(), before, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("num", [1, 2])
def test_a_client_with_few_examples_is_enough(num):
    built = trainer(nn.Dropout(0.5))
    assert np.isfinite(summed(built, examples(num))).all()


def test_examples_that_are_not_finite_are_enough():
    built, data = trainer(), examples()
    data.x[::2] = np.nan
    assert np.isfinite(summed(built, data)).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_transformers_train_alone(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 30, "num_labels": CLASSES}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=2, pad_token_id=0, **sizes)
        whole = transformers.GPT2ForSequenceClassification(config)
    else:
        more = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.BertConfig(hidden_size=8, max_position_embeddings=8, **more, **sizes)
        whole = transformers.BertForSequenceClassification(config)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole = whole

        def forward(self, x):
            return self.whole(x).logits

    rng = np.random.default_rng(0)
    data = Examples(rng.integers(1, 30, (6, 7)), rng.integers(0, CLASSES, 6))
    built = TorchTrainer(Logits(), task="multiclass")
    moved = summed(built, data) - summed(built, without_first(data))
    assert 0 < np.linalg.norm(moved) <= CLIP * (1 + 1e-4)
