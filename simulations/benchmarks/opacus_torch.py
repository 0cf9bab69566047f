"""DP-SGD with Opacus as its users write it: a private engine, optimiser and loader, anew for each client and round.

Shapes: D parameters laid flat, N examples of one client.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from opacus import PrivacyEngine
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

from simulations.benchmarks.models_torch import module
from simulations.benchmarks.synthetic import examples_of
from simulations.benchmarks.workloads import Workload


def build_client_fit(workload: Workload) -> Callable[[np.ndarray, int, np.ndarray], np.ndarray]:
    """``(params_D, client, order_N) -> its new params_D``."""
    torch.set_num_threads(1)
    dp, local = workload.example_dp, workload.local
    assert dp is not None

    def fit(params_D: np.ndarray, client: int, order_N: np.ndarray) -> np.ndarray:
        model = module(workload).train()
        vector_to_parameters(torch.from_numpy(params_D.copy()), model.parameters())
        own = examples_of(workload, client)
        loader = DataLoader(TensorDataset(torch.from_numpy(own.x), torch.from_numpy(own.y)), local.batch_size)
        model, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=local.learning_rate),
            data_loader=loader,
            noise_multiplier=dp.noise_multiplier,
            max_grad_norm=dp.clip,
        )
        for x_B, y_B in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x_B), y_B).backward()
            optimizer.step()
        return parameters_to_vector(model.parameters()).detach().numpy()

    return fit
