"""Steps on a device wait for no value of the device, and a mean launches few operations for each row."""

import numpy as np
import pytest

import strategies
from fedlearn import LocalSettings
from fedlearn.algorithm.aggregation import add_rows, divide_total
from fedlearn.core.records import ClientWork, ExampleDP, Examples, Request

torch = pytest.importorskip("torch")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from fedlearn.trainers.torch import TorchTrainer  # noqa: E402

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "is_nonzero")  # reads of the device


class Operations(TorchDispatchMode):
    """Count the operations that a GPU would launch, and find operations that wait for a result."""

    def __init__(self):
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view  # a view launches nothing
        has_mask = "aten.index" in str(function) and _has_bool(args)
        if has_mask or any(name in str(function) for name in WAITS):
            self.waits.append(str(function))
        return function(*args, **kwargs or {})


def _has_bool(value):
    if isinstance(value, torch.Tensor):
        return value.dtype == torch.bool
    return isinstance(value, list | tuple) and any(map(_has_bool, value))


def operations(steps, *, strategy="fedavg", **local):
    rng, sizes = np.random.default_rng(0), [12, 20, 4, 20]
    module = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    trainer = TorchTrainer(module, task="multiclass", batching="vmap")
    settings = LocalSettings(batch_size=4, epochs=steps, learning_rate=0.1, **local)
    rule = getattr(strategies, strategy)().local
    state = {name: np.zeros(trainer.layout.num_parameters, np.float32) for name in rule.client_state}
    broadcast = {name: np.zeros(trainer.layout.num_parameters, np.float32) for name in rule.receives}
    request = Request(round=1, seed=1, params_D=trainer.init(1), local=settings, broadcast=broadcast)
    work = []
    for client, size in enumerate(sizes):
        examples = Examples(rng.normal(size=(size, 5)).astype(np.float32), rng.integers(0, 3, size))
        work.append(ClientWork(client=client, examples=examples, client_state=state))
    trainer.fit(request, rule, work)  # the first use checks the model
    with Operations() as seen:
        trainer.fit(request, rule, work)
    return seen


@pytest.mark.parametrize(
    ("strategy", "local"),
    [
        ("fedavg", {}),
        ("fedavg", {"momentum": 0.9, "weight_decay": 0.01}),
        ("fedavg", {"max_grad_norm": 1.0}),
        ("fedavg", {"micro_batch_size": 2}),
        ("fedavg", {"example_dp": ExampleDP(clip=1.0, noise_multiplier=1.0)}),
        ("fedprox", {}),
        ("scaffold", {}),
    ],
    ids=str,
)
def test_further_steps_wait_for_no_value(strategy, local):
    few, many = operations(1, strategy=strategy, **local), operations(4, strategy=strategy, **local)
    assert many.count > few.count
    assert len(many.waits) == len(few.waits), many.waits


@pytest.mark.parametrize("num_parameters", [10, 2**17 + 5, 2**20])
def test_a_mean_launches_few_operations_and_equals_numpy(num_parameters):
    rng = np.random.default_rng(0)
    rows_KD, weights_K = rng.normal(size=(6, num_parameters)).astype(np.float32), rng.integers(1, 9, 6)
    with Operations() as seen:
        total = add_rows(None, torch.from_numpy(rows_KD), weights_K)
    result = divide_total(total, float(weights_K.sum())).numpy()
    assert seen.count <= 5 + 3 * len(rows_KD)
    np.testing.assert_allclose(
        result, divide_total(add_rows(None, rows_KD, weights_K), float(weights_K.sum())), rtol=1e-6
    )
