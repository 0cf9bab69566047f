"""DP-SGD with Opacus in its documented form: each client and round has a new privacy engine, optimizer and loader.

Shapes: D parameters, N examples of one client.
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
    """Return a function ``(params_D, client, order_N) -> new params_D``."""
    torch.set_num_threads(1)
    dp, local = workload.example_dp, workload.local
    assert dp is not None

    def fit(params_D: np.ndarray, client: int, order_N: np.ndarray) -> np.ndarray:
        model = module(workload).train()
        vector_to_parameters(torch.from_numpy(params_D.copy()), model.parameters())
        examples = examples_of(workload, client)
        dataset = TensorDataset(torch.from_numpy(examples.x), torch.from_numpy(examples.y))
        loader = DataLoader(dataset, local.batch_size)
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
