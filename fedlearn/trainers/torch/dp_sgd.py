"""Sum clipped per-example gradients in PyTorch, in many layers without computing the gradients themselves.

Shapes: B batch, M parameters in all leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fedlearn.core.inputs import join_inputs, map_inputs
from fedlearn.errors import SettingError
from fedlearn.trainers.batching import GOLDEN, mix_bits
from fedlearn.trainers.example_check import refuse
from fedlearn.trainers.example_keys import content_keys
from fedlearn.trainers.torch.chain import DRAWN_SCALE, find_chain
from fedlearn.trainers.torch.chain_shares import ChainShares
from fedlearn.trainers.torch.compat import physical_tensor, with_batch_axis
from fedlearn.trainers.torch.example_draws import ExampleDraws
from fedlearn.trainers.torch.example_graph import LEAVES, separate_graph
from fedlearn.trainers.torch.example_probe import ExampleProbe
from fedlearn.trainers.torch.layer_gradients import Share, is_known, layer_shares, share_of_gradients
from fedlearn.trainers.torch.losses import LOSSES, Loss
from fedlearn.trainers.torch.network import Network, copy_of, first_of, rows_of, with_axis
from fedlearn.trainers.torch.random import restored_generators

MAX_GRADIENT_BYTES = 2**28  # maximum size of the per-example gradients in memory
METHODS = ("graph", "vmap", "gradients", "loop")  # from fast to slow
Sums = tuple[list[torch.Tensor], torch.Tensor]  # sums of the clipped gradients per parameter, losses of the examples


class _UnsuitableError(Exception):
    """A method does not fit a model or a batch, so the next method must compute it."""


class _Call(NamedTuple):
    """One call of a layer in the forward pass."""

    layer: nn.Module
    inputs: torch.Tensor
    version: int  # version of the inputs at the time of the call
    output: GradientEdge
    batch_axis: int = 0  # batch axis of the output


class ClippedGradient:
    """Compute ``(x_B, y_B) -> sum_i g_i min(1, C / |g_i|)``. g_i is the gradient of the loss of example i alone.

    Four methods compute this sum. The first use checks the model on a few examples, and selects the fastest method
    that agrees with the slowest. In each method, the share of example i cannot depend on other examples:

    - ``graph`` runs the model on the batch. The graph of its operations proves that rows stay apart. One backward pass
      gives the gradients of the outputs of all layers. `layer_gradients` computes the sum from them. A chain of linear
      layers needs no autograd for it, and gives the same bits.
    - ``vmap`` does the same for any model, inside ``torch.func.vmap`` over batches of one example.
    - ``gradients`` computes the gradient of each example with ``torch.func``. Models need it that use parameters
      outside their layers, or call a layer twice.
    - ``loop`` runs one example after another. Models need it whose code ``vmap`` refuses.

    Args:
        module: the model.
        loss: ``(outputs_BC, y_B) -> loss_B``.
        leaves: the parameters, in the order of the result.
        clip: L2 bound C on the gradient of each example, > 0.

    *Guarantees*:

    - One more or one fewer example changes the sum by at most C (up to rounding), for any model and example. An example
      whose gradient is not finite adds nothing. In the method ``loop``, the code of a model could keep values of an
      example for the next example. The first use refuses a model that does so on a few examples.
    - Random draws of an example depend on its key only.

    Raises:
        SettingError: The first use shows that the model or the loss mixes the examples of a batch. Other reasons are a
            forward pass that changes the model, and draws outside torch's generator.
    """

    def __init__(self, module: nn.Module, loss: Loss, leaves: Sequence[nn.Parameter], *, clip: float) -> None:
        self.module, self.loss, self.leaves, self.clip = module, loss, list(leaves), clip
        self.method, self.has_draws = "", False
        self._root = nn.Sequential(module) if type(module) in LEAVES else module  # a layer alone has no graph
        trained = set(map(id, self.leaves))
        owners = {
            n: m for n, m in self._root.named_modules() if any(id(p) in trained for p in m.parameters(recurse=False))
        }
        owned = [p for m in owners.values() for p in m.parameters(recurse=False) if p.requires_grad]
        suitable = len(owned) == len(self.leaves) and all(map(is_known, owners.values()))
        self._layers = owners if suitable else {}  # the layers with parameters, if all have a rule
        parts = [part._buffers for part in module.modules()]
        self._buffers = [(buffers, name) for buffers in parts for name, b in buffers.items() if b is not None]
        self._graph: nn.Module | None = None
        chain = find_chain(module, self.leaves) if isinstance(module, Network) else None
        self._by_chain = ChainShares(chain, loss) if chain and str(self.leaves[0].device) == "cpu" else None
        self._equals_chain: dict[int, bool] = {}  # True: all bits equal autograd; by batch size
        self._num_axes = 0
        self._calls: list[_Call] = []

    def prepare(self, x_N: Any, y_N: torch.Tensor, *, synthetic: bool = False) -> None:
        """Check the model on a few examples, and select a method.

        Args:
            x_N: inputs of a client, at least one.
            y_N: labels.
            synthetic: see `fedlearn.trainers.example_check.probe_examples`.
        """
        probe = ExampleProbe(self.module, self.loss, self.leaves)
        with restored_generators(y_N.device):
            probe.check(x_N, y_N, synthetic=synthetic)
            self.has_draws = probe.has_draws
            for method in METHODS:
                self.method = method
                if method == "loop" or (not probe.has_unknown_draws and self._agrees(probe)):
                    return

    def _agrees(self, probe: ExampleProbe) -> bool:
        """Return whether the current method gives the sums of the loop."""
        try:
            return probe.agrees(self)
        except Exception:  # a model may contain any code
            return False

    @torch.no_grad()
    def __call__(self, x_B: Any, y_B: torch.Tensor, *, keys_B: torch.Tensor | None = None, start: int = 0) -> Sums:
        """Return the sum for each parameter, and the losses of the examples that it includes.

        Args:
            x_B: inputs of the batch.
            y_B: labels of the batch.
            keys_B: key of each example for its draws, int64; by default, keys follow from torch's generator.
            start: numbers to skip in the stream of each key.
        """
        if not len(y_B):
            return [torch.zeros_like(leaf) for leaf in self.leaves], y_B.new_zeros(0, dtype=torch.float32)
        if not self.method:
            self.prepare(x_B, y_B)
        if keys_B is None and self.needs_keys:
            keys_B = _keys_from_torch(x_B, y_B)
        before = self._buffer_versions()
        try:
            result = self._sums(x_B, y_B, keys_B, start)
        except SettingError:
            raise
        except Exception:  # another batch can take another path through the code of a model
            if self.method == "loop":
                raise
            self.method, self.has_draws = METHODS[METHODS.index(self.method) + 1], True
            return self(x_B, y_B, keys_B=keys_B, start=start)
        if before != self._buffer_versions():
            raise refuse("a forward pass changes a buffer")
        return result

    def _buffer_versions(self) -> list[tuple[int, int]]:
        """Return identity and version of each buffer, which change if code writes to it."""
        now = [buffers[name] for buffers, name in self._buffers]
        return [(id(buffer), -1 if buffer is None else buffer._version) for buffer in now]

    @property
    def needs_keys(self) -> bool:
        """True if the draws of an example need a key."""
        return self.has_draws or self.method == "loop"

    def _sums(self, x_B: Any, y_B: torch.Tensor, keys_B: torch.Tensor | None, start: int) -> Sums:
        if self.method == "loop":
            return self._by_loop(x_B, y_B, keys_B, start)
        if self.method == "gradients":
            return self._by_gradient(x_B, y_B, keys_B, start)
        shares, loss_B = self._by_layer(x_B, y_B, keys_B, start)
        norm_B = torch.stack([share.squared_norm_B for share in shares]).sum(0).clamp_(min=0).sqrt_()
        if not isfinite(float(norm_B.sum())):
            finite_B = torch.isfinite(norm_B)
            if not finite_B.all():
                return self(
                    rows_of(x_B, finite_B),
                    y_B[finite_B],
                    keys_B=None if keys_B is None else keys_B[finite_B],
                    start=start,
                )
        factor_B = self.clip / norm_B.clamp_(min=self.clip)
        sums: dict[torch.Tensor, torch.Tensor] = {}
        for share in shares:
            sums |= zip(share.parameters, share.weighted_sum(factor_B), strict=True)
        return [sums[leaf] for leaf in self.leaves], loss_B

    def _by_layer(
        self, x_B: Any, y_B: torch.Tensor, keys_B: torch.Tensor | None, start: int
    ) -> tuple[list[Share], torch.Tensor]:
        """Return the shares of all layers, and the losses."""
        if not self._layers:
            raise _UnsuitableError
        by_chain = self._by_chain
        if self.method == "graph" and by_chain is not None and by_chain.fits(x_B):
            size = len(y_B)
            if size not in self._equals_chain:  # the first batch of this size decides
                self._equals_chain[size] = self._compare(by_chain, x_B, y_B)
            if self._equals_chain[size]:
                return by_chain(x_B, y_B)
        return self._by_autograd(x_B, y_B, keys_B, start)

    def _compare(self, by_chain: ChainShares, x_B: torch.Tensor, y_B: torch.Tensor) -> bool:
        """Return whether a chain gives the bits of autograd at random parameters. Zeros would hide a difference."""
        before, generator = [leaf.detach().clone() for leaf in self.leaves], torch.Generator().manual_seed(1)
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.copy_(DRAWN_SCALE * torch.randn(leaf.shape, generator=generator))
        try:
            expected = _values(*self._by_autograd(x_B, y_B, None, 0))
            return all(map(torch.equal, _values(*by_chain(x_B, y_B)), expected))
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list(self.leaves), before)

    def _by_autograd(
        self, x_B: Any, y_B: torch.Tensor, keys_B: torch.Tensor | None, start: int
    ) -> tuple[list[Share], torch.Tensor]:
        """Return the shares of all layers from one backward pass of autograd, and the losses."""
        calls, from_vmap = self._calls, self.method == "vmap"
        calls.clear()
        with self._draws(keys_B, start), torch.enable_grad():
            loss_B = self._losses_in_vmap(x_B, y_B) if from_vmap else self._losses_of_graph(x_B, y_B)
            if not (len(calls) == len(self._layers) == len({c.layer for c in calls}) and all(map(_is_intact, calls))):
                raise _UnsuitableError
            gradients = torch.autograd.grad(loss_B, [call.output for call in calls], torch.ones_like(loss_B))
        shares = [
            layer_shares(call.layer, call.inputs, gradient.movedim(call.batch_axis, 0), from_vmap=from_vmap)
            for call, gradient in zip(calls, gradients, strict=True)
        ]
        calls.clear()
        return [share for parts in shares for share in parts], loss_B.detach()

    def _losses_of_graph(self, x_B: Any, y_B: torch.Tensor) -> torch.Tensor:
        """Return the losses from one pass over the batch, and record the calls of the layers."""
        if not isinstance(x_B, torch.Tensor):
            raise _UnsuitableError
        if self._graph is None:
            self._graph = separate_graph(self._root, x_B, self._record_rows)
            self._num_axes = x_B.ndim
        if self._graph is None or x_B.ndim != self._num_axes:
            raise _UnsuitableError
        outputs_BC = self._graph(x_B)
        if self.loss in LOSSES.values():
            return self.loss(outputs_BC, y_B)
        loss_of: Any = lambda outputs, y: self.loss(outputs[None], y[None]).reshape(())  # noqa: E731
        return torch.func.vmap(loss_of, randomness="different" if self.has_draws else "error")(outputs_BC, y_B)

    def _record_rows(self, name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        layer = self._layers.get(name)
        if layer is not None:  # a gradient edge, because the next layer may change the output in place
            self._calls.append(_Call(layer, inputs, inputs._version, get_gradient_edge(output)))

    def _losses_in_vmap(self, x_B: Any, y_B: torch.Tensor) -> torch.Tensor:
        """Return the losses of the examples, each alone, and record the calls of the layers."""

        def loss_of(x: Any, y: torch.Tensor) -> torch.Tensor:
            record = partial(self._record_alone, first_of(x), len(y_B))
            hooks = [layer.register_forward_hook(record) for layer in self._layers.values()]
            try:
                return self.loss(self.module(with_axis(x)), y[None]).reshape(())
            finally:
                for hook in hooks:
                    hook.remove()

        per_example = torch.func.vmap(loss_of, randomness="different" if self.has_draws else "error")
        losses_B: torch.Tensor = per_example(x_B, y_B)
        return losses_B

    def _record_alone(
        self, x: torch.Tensor, size: int, layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Record a call inside ``vmap``. Give an output that is the same for all examples a batch axis."""
        if len(inputs) != 1:
            raise _UnsuitableError
        whole, replaced = physical_tensor(inputs[0]), None
        inputs_B = inputs[0].expand(size, *inputs[0].shape) if whole is None else whole[0].movedim(whole[1], 0)
        if physical_tensor(output) is None:
            output = replaced = with_batch_axis(output, x, size)
        output_B, axis = physical_tensor(output) or (output, 0)
        self._calls.append(_Call(layer, inputs_B, inputs_B._version, get_gradient_edge(output_B), axis))
        return replaced

    def _by_gradient(self, x_B: Any, y_B: torch.Tensor, keys_B: torch.Tensor | None, start: int) -> Sums:
        """Return the result from the gradient of each example, as many at once as fit in memory."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        leaves = {names[id(leaf)]: leaf.detach() for leaf in self.leaves}

        def loss_of(leaves: dict[str, torch.Tensor], x: Any, y: torch.Tensor) -> torch.Tensor:
            outputs = torch.func.functional_call(self.module, leaves, (with_axis(x),))
            return self.loss(outputs, y[None]).reshape(())

        randomness = "different" if self.has_draws else "error"
        per_example = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0), randomness=randomness)
        total = _Total(self.leaves, self.clip)
        size = max(1, MAX_GRADIENT_BYTES // max(1, 4 * sum(leaf.numel() for leaf in self.leaves)))
        for part in (slice(first, first + size) for first in range(0, len(y_B), size)):
            with self._draws(None if keys_B is None else keys_B[part], start):
                gradients, loss_B = per_example(leaves, rows_of(x_B, part), y_B[part])
            total.add([gradients[name] for name in leaves], loss_B)
        return total.result()

    def _by_loop(self, x_B: Any, y_B: torch.Tensor, keys_B: torch.Tensor | None, start: int) -> Sums:
        """Return the result from one pass per example. The key of an example seeds torch's generator."""
        total = _Total(self.leaves, self.clip)
        seeds = None if keys_B is None else _seeds(keys_B, start)
        with restored_generators(y_B.device):
            for i in range(len(y_B)):
                if seeds is not None:
                    torch.manual_seed(seeds[i])
                with torch.enable_grad():
                    loss = self.loss(self.module(copy_of(rows_of(x_B, slice(i, i + 1)))), y_B[i : i + 1]).reshape(())
                    gradients = torch.autograd.grad(loss, self.leaves, materialize_grads=True)
                total.add([(g.to_dense() if g.is_sparse else g)[None] for g in gradients], loss.detach()[None])
        return total.result()

    def _draws(self, keys_B: torch.Tensor | None, start: int) -> Any:
        return ExampleDraws(keys_B, start=start) if self.has_draws and keys_B is not None else nullcontext()


class _Total:
    """The sum of clipped gradients, added up part by part."""

    def __init__(self, leaves: Sequence[torch.Tensor], clip: float) -> None:
        self.clip, self.sums = clip, [torch.zeros_like(leaf) for leaf in leaves]
        self.losses: list[torch.Tensor] = []

    def add(self, gradients: Sequence[torch.Tensor], loss_B: torch.Tensor) -> None:
        """Add the gradients of some examples, one tensor ``(B, ...)`` per parameter."""
        shares = [share_of_gradients(total, g_B) for total, g_B in zip(self.sums, gradients, strict=True)]
        norm_B = torch.stack([share.squared_norm_B for share in shares]).sum(0).sqrt()
        finite_B = torch.isfinite(norm_B)
        if not finite_B.all():
            return self.add([g_B[finite_B] for g_B in gradients], loss_B[finite_B]) if finite_B.any() else None
        factor_B = self.clip / norm_B.clamp(min=self.clip)
        for total, share in zip(self.sums, shares, strict=True):
            total += share.weighted_sum(factor_B)[0]
        self.losses.append(loss_B)
        return None

    def result(self) -> Sums:
        """Return the sum for each parameter, and the losses of the examples that it includes."""
        losses = torch.cat(self.losses) if self.losses else self.sums[0].new_zeros(0)
        return self.sums, losses


def _values(shares: Sequence[Share], loss_B: torch.Tensor) -> list[torch.Tensor]:
    """Return norms, sums and losses of a batch, with numbers for values that are not finite."""
    factor_B = torch.linspace(0.5, 1, len(loss_B))
    sums = [total for share in shares for total in share.weighted_sum(factor_B)]
    return [values.nan_to_num() for values in (loss_B, *(share.squared_norm_B for share in shares), *sums)]


def _is_intact(call: _Call) -> bool:
    """Return whether no later operation changed the inputs of the layer in place."""
    return call.inputs._version == call.version


def _seeds(keys_B: torch.Tensor, start: int) -> list[int]:
    """Return a seed for each example, which differs between local steps."""
    offset = np.uint64(int(GOLDEN) * (start + 1) % 2**64)
    return mix_bits(keys_B.cpu().numpy().view(np.uint64) + offset).tolist()


def _keys_from_torch(x_B: Any, y_B: torch.Tensor) -> torch.Tensor:
    """Return keys from the content of the examples and from torch's generator."""
    secret = torch.randint(2**62, (4,)).numpy().tobytes()
    x = join_inputs(map_inputs(lambda part: part.cpu().numpy(), x_B))
    return torch.from_numpy(content_keys(x, y_B.cpu().numpy(), secret).view(np.int64)).to(y_B.device)
