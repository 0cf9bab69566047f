"""Train and predict with PyTorch: the only home of torch in the library.

Shapes: K clients in a block, D parameters laid flat, N examples, S local steps, B batch, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from fedlearn.data.federated import Task
from fedlearn.errors import FedlearnError
from fedlearn.layout import Layout
from fedlearn.local import LocalRule, plain
from fedlearn.records import Array, LocalSettings, Order, Sum, Updates, Work
from fedlearn.seeds import Purpose, integer_seed
from fedlearn.trainers.base import Initial, initial_parameters, plan_of

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (outputs_BC, y_B) -> loss_B

LOSSES: Mapping[Task, Loss] = {
    "binary": lambda outputs, y: F.binary_cross_entropy_with_logits(outputs[:, 0], y.float(), reduction="none"),
    "multiclass": lambda outputs, y: F.cross_entropy(outputs, y, reduction="none"),
    "regression": lambda outputs, y: (outputs[:, 0] - y) ** 2,
}


class TorchTrainer:
    """Trains any plain ``nn.Module``, one client after another, in a loop without a data loader.

    The module's parameters become views of one flat vector and their gradients of another, so that the local rule and
    the optimiser work on ``D`` numbers at once.

    Args:
        module: maps ``(B, ...)`` float32 to ``(B, C)``; parameters with ``requires_grad=False`` stay as they are.
        task: chooses the loss: binary cross-entropy on one logit, cross-entropy, or squared error.
        initial: law of the initial parameters; None is `default_initial`. ``as_given`` keeps the module's own.
        device: ``cpu``, ``cuda:0``, ...
        loss: ``(outputs_BC, y_B) -> loss_B`` instead of the task's.

    Guarantees: the same order gives bit-identical updates, alone or in a block. Torch's global generator is left as
    it was; dropout draws from (seed, round, client).

    Raises:
        FedlearnError: if the module has buffers (batch-norm statistics), which no parameter vector carries.
    """

    framework = "torch"

    def __init__(
        self,
        module: nn.Module,
        *,
        task: Task,
        initial: Initial | Literal["as_given"] | None = None,
        device: str = "cpu",
        loss: Loss | None = None,
    ) -> None:
        buffers = [name for name, _ in module.named_buffers()]
        if buffers:
            raise FedlearnError(
                f"the model has buffers that would not travel: {', '.join(buffers[:3])}\n"
                "  try       GroupNorm or LayerNorm instead of BatchNorm"
            )
        if device == "cpu":
            torch.set_num_threads(1)  # small models: a second thread costs more than it brings
        self.module, self.task, self.device = module.to(device), task, device
        self.loss = loss or LOSSES[task]
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.layout = Layout.of((name, tuple(p.shape)) for name, p in trainable.items())
        given = self.layout.pack({name: p.detach().cpu().numpy() for name, p in trainable.items()})
        self._initial: Initial | None = (lambda layout, rng: given.copy()) if initial == "as_given" else initial
        self._flat = nn.Parameter(torch.from_numpy(given.copy()).to(device))
        self._flat.grad = torch.zeros_like(self._flat)
        self._tie(trainable)

    def _tie(self, trainable: Mapping[str, nn.Parameter]) -> None:
        """Make every parameter and its gradient a view of the flat ones."""
        for leaf in self.layout.leaves:
            own = self.layout.slices[leaf.name]
            trainable[leaf.name].data = self._flat.data[own].view(leaf.shape)
            trainable[leaf.name].grad = self._gradient[own].view(leaf.shape)

    @property
    def _gradient(self) -> torch.Tensor:
        assert self._flat.grad is not None
        return self._flat.grad

    def init(self, seed: int) -> np.ndarray:
        """Initial ``params_D``."""
        return initial_parameters(self.layout, self._initial, seed)

    def fit(self, order: Order, rule: LocalRule, work: Sequence[Work]) -> Updates:
        """Train K clients; see `Trainer.fit`."""
        global_D = self._to_device(order.params_D)
        broadcast = {name: self._to_device(order.broadcast[name]) for name in rule.receives}
        self.module.train()
        delta_KD = torch.empty((len(work), self.layout.num_parameters), device=self.device)
        losses, counts, steps = np.zeros(len(work)), np.zeros(len(work)), np.zeros(len(work), np.int64)
        for k, one in enumerate(work):
            own = {name: self._to_device(one.memory[name]) for name in rule.memory}
            plan_SB = plan_of(order, one)
            with torch.random.fork_rng(devices=self._rng_devices):
                torch.manual_seed(integer_seed(order.seed, Purpose.MODEL, round=order.round, client=one.client))
                losses[k] = self._fit_client(global_D, order.local, rule, one, plan_SB, {**own, **broadcast})
            torch.sub(self._flat.data, global_D, out=delta_KD[k])
            counts[k], steps[k] = (plan_SB >= 0).sum(), len(plan_SB)
        return Updates(
            clients_K=np.array([one.client for one in work], np.int64),
            delta_KD=delta_KD.numpy() if self.device == "cpu" else delta_KD,
            num_examples_K=np.array([len(one.examples) for one in work], np.int64),
            num_steps_K=steps,
            metrics={"loss": Sum(losses, counts)},
        )

    def _fit_client(
        self,
        global_D: torch.Tensor,
        local: LocalSettings,
        rule: LocalRule,
        one: Work,
        plan_SB: np.ndarray,
        vectors: Mapping[str, torch.Tensor],
    ) -> float:
        """Local training from the global model; leaves the result in the flat vector, returns the summed loss."""
        flat_D, gradient_D = self._flat.data, self._gradient
        flat_D.copy_(global_D)
        step = _optimizer(self._flat, local)
        x, y = self._to_device(one.examples.x), self._to_device(one.examples.y)
        total = torch.zeros((), device=self.device)
        for rows in plan_SB:
            batch = torch.from_numpy(rows[rows >= 0]).to(self.device)
            gradient_D.zero_()
            loss_B = self.loss(self.module(x[batch]), y[batch])
            loss_B.mean().backward()
            total += loss_B.detach().sum()
            if rule.correct is not plain.correct:
                gradient_D.copy_(rule.correct(gradient_D, flat_D, global_D, **vectors))
            step()
        return float(total)

    def predict(self, params_D: Array, x: np.ndarray) -> np.ndarray:
        """Outputs ``(N, C)`` in evaluation mode."""
        self._flat.data.copy_(self._to_device(params_D))
        self.module.eval()
        with torch.inference_mode():
            outputs = [self.module(self._to_device(part)) for part in np.array_split(x, max(1, len(x) // 4096))]
        return torch.cat(outputs).cpu().numpy()

    @property
    def _rng_devices(self) -> list[str]:
        return [] if self.device == "cpu" else [self.device]

    def _to_device(self, array: Array) -> torch.Tensor:
        return torch.as_tensor(array, device=self.device)


def _optimizer(flat: nn.Parameter, local: LocalSettings) -> Callable[[], object]:
    """What takes a step on the flat vector, with fresh state."""
    if local.optimizer == "adamw":
        return torch.optim.AdamW([flat], lr=local.learning_rate, weight_decay=local.weight_decay).step
    return _sgd(flat, local)


def _sgd(flat: nn.Parameter, local: LocalSettings) -> Callable[[], object]:
    """``torch.optim.SGD`` for one flat parameter, whose import and bookkeeping cost more than a small model's step."""
    flat_D, velocity_D = flat.data, torch.zeros_like(flat.data) if local.momentum else None

    def step() -> None:
        gradient_D = flat.grad
        assert gradient_D is not None
        if local.weight_decay:
            gradient_D.add_(flat_D, alpha=local.weight_decay)
        if velocity_D is not None:
            gradient_D = velocity_D.mul_(local.momentum).add_(gradient_D)
        flat_D.add_(gradient_D, alpha=-local.learning_rate)

    return step
