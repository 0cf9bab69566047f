"""Frozen affine layers have the outputs and gradients of torch, and are themselves again afterwards."""

from contextlib import suppress

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from fedlearn.trainers.torch.compat import fast_linear  # noqa: E402
from fedlearn.trainers.torch.frozen_layers import FrozenLayers  # noqa: E402

needs_one_dnn = pytest.mark.skipif(fast_linear is None, reason="torch has no oneDNN here")


class Conv1D(nn.Module):
    """Have the transposed weight of GPT-2 in transformers."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def network():
    torch.manual_seed(0)
    parts = nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12, bias=False), nn.Tanh(), Conv1D(8, 12), nn.Tanh()
    return nn.Sequential(*(part.requires_grad_(False) for part in parts), nn.Linear(8, 3))


def gradients(module, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), [x, *module[-1].parameters()])


@needs_one_dnn
@pytest.mark.parametrize("shape", [(6,), (1, 6), (5, 6), (2, 5, 6), (0, 6)], ids=str)
def test_outputs_and_gradients_are_the_ones_of_torch(shape):
    module, x = network(), torch.randn(shape)
    frozen = FrozenLayers(module, "cpu")
    outputs, expected = module(x), gradients(module, x)
    with frozen.using():
        assert [("forward" in vars(part)) for part in module] == [True, False, True, False, True, False, False]
        assert torch.allclose(module(x), outputs, atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gradients(module, x), expected, strict=True))
    assert not any("forward" in vars(part) for part in module)
    assert torch.equal(module(x), outputs)


@needs_one_dnn
def test_rows_of_other_strides_are_right():
    module, x = network(), torch.randn(6, 5).t()
    with FrozenLayers(module, "cpu").using():
        fast = module(x)
    assert torch.allclose(fast, module(x), atol=1e-5)


@needs_one_dnn
def test_low_precision_keeps_the_products_of_torch():
    module, x = network(), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x)
        with FrozenLayers(module, "cpu").using():
            assert torch.equal(module(x), expected)


def test_layers_that_train_and_other_types_do_not_change():
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6).double().requires_grad_(False), nn.LayerNorm(6))
    module[2].requires_grad_(False)
    with FrozenLayers(module, "cpu").using():
        assert not any("forward" in vars(part) for part in module)


@needs_one_dnn
def test_a_second_use_and_an_error_leave_nothing():
    module = network()
    frozen = FrozenLayers(module, "cpu")
    with suppress(RuntimeError), frozen.using():
        with frozen.using():
            pass
        assert "forward" in vars(module[0])
        raise RuntimeError
    assert not any("forward" in vars(part) for part in module)
