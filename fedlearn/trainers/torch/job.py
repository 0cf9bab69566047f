"""Describe the training of a block of clients in PyTorch.

Shapes: K clients in a block, D parameters, S local steps, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedlearn.algorithm.local_rule import PREVIOUS_MODEL, LocalRule
from fedlearn.core.records import ClientWork, LocalSettings, Request
from fedlearn.core.schedules import shares_rates
from fedlearn.trainers.torch.optimizers import is_elementwise


@dataclass(frozen=True, kw_only=True)
class Job:
    """The training of one block of clients, and the tensors that the clients share."""

    request: Request
    rule: LocalRule
    work: Sequence[ClientWork]
    plan_KSB: np.ndarray
    steps_K: np.ndarray
    global_D: torch.Tensor
    broadcast: Mapping[str, torch.Tensor]
    counts_KC: torch.Tensor | None
    weights_KC: torch.Tensor | None  # class weights
    rates_KS: np.ndarray | None  # learning rates of all steps; None if they are constant

    @property
    def local(self) -> LocalSettings:
        """Return the settings of local training of the request."""
        return self.request.local

    @property
    def changes_loss(self) -> bool:
        """True if the rule or the settings change the loss of the task."""
        return self.rule.has_custom_loss or self.local.changes_loss

    def rates(self, k: int) -> Sequence[float]:
        """Return the learning rates of the steps of a client."""
        num_steps = int(self.steps_K[k])
        return [self.local.learning_rate] * num_steps if self.rates_KS is None else self.rates_KS[k].tolist()

    def block_rates(self, group: slice) -> Sequence[float]:
        """Return the learning rates of the steps of a group of clients that step together."""
        num_steps = int(self.steps_K[group].max())
        if self.rates_KS is None:
            return [self.local.learning_rate] * num_steps
        return self.rates_KS[group, :num_steps].max(axis=0).tolist()

    @property
    def can_step_together(self) -> bool:
        """True if one optimizer can take the steps of all clients of a block."""
        return (
            is_elementwise(self.local)
            and not self.rule.optimizer_state
            and not (self.rule.frozen_parameters and self.local.example_dp)
            and (self.rates_KS is None or shares_rates(self.rates_KS, self.steps_K))
        )

    @property
    def can_step_jointly(self) -> bool:
        """True if one pass can have rows of several clients: each client has the gradient of the plain loss."""
        has_plain_gradient = self.rule.gradient is None and self.local.example_dp is None and not self.changes_loss
        return self.can_step_together and has_plain_gradient

    def start(self, work: ClientWork) -> torch.Tensor:
        """Return the parameters from which a client starts."""
        return self.global_D if work.start_D is None else torch.as_tensor(work.start_D, device=self.global_D.device)

    def state_of(self, work: ClientWork) -> dict[str, torch.Tensor]:
        """Return the client state of the local rule, vectors ``(D,)`` by name."""
        device = self.global_D.device
        return {name: torch.as_tensor(work.client_state[name], device=device) for name in self.rule.client_state}

    def vectors(self, work: ClientWork) -> dict[str, torch.Tensor]:
        """Return the vectors ``(D,)`` of the local rule: global model, client state, broadcast values."""
        return {"w_global": self.global_D, **self.rule_vectors(work)}

    def rule_vectors(self, work: ClientWork) -> dict[str, torch.Tensor]:
        """Return client state and broadcast values of the local rule, vectors ``(D,)`` by name."""
        return {**self.state_of(work), **self.broadcast}

    def penalty_state(self, work: ClientWork) -> dict[str, torch.Tensor]:
        """Return copies of the client state for the penalty. The alignment of memory can change the last bit."""
        state = {name: v_D.clone() for name, v_D in self.state_of(work).items()}
        if not self.rule.previous_model:
            return state
        previous_D = torch.as_tensor(work.client_state[PREVIOUS_MODEL], device=self.global_D.device)
        return {**state, "w_previous": previous_D.clone()}
