"""Every strategy of ours keeps the contract, on a NumPy problem and in both frameworks."""

import inspect

import numpy as np
import pytest

import strategies
from fedlearn import Examples, FederatedData
from fedlearn.testing import check_strategy
from simulations import models

BUILDERS = [getattr(strategies, name) for name in strategies.__all__]
VARIANTS = [{}, {"clients_per_round": 3}, {"weighting": "equal"}]
SMALL = {"keeps": "out.bias"}  # of a model of one layer


def taken(builder, settings):
    """Those of the settings that there are for this strategy."""
    return {name: settings[name] for name in settings.keys() & inspect.signature(builder).parameters.keys()}


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_every_strategy_keeps_the_contract(builder, settings):
    if not settings.keys() <= inspect.signature(builder).parameters.keys():
        pytest.skip("no such setting")
    check_strategy(builder(**settings, **taken(builder, SMALL)))


@pytest.fixture(scope="module", params=["torch", "jax"])
def problem(request, digits):
    pytest.importorskip(request.param)
    x, y = digits
    ends = np.cumsum([12, 40, 25, 33, 8, 20])
    clients = [Examples(x[a:b], y[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    data = FederatedData(
        task="multiclass", num_classes=10, clients=range(6), train=clients.__getitem__, test=clients.__getitem__
    )
    return data, models.trainer("mlp", data, input_shape=(8, 8, 1), framework=request.param)[0]


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_every_strategy_keeps_the_contract_in_both_frameworks(builder, problem):
    data, trainer = problem
    check_strategy(builder(**taken(builder, {"clients_per_round": 4, "keeps": "out.*"})), data=data, trainer=trainer)
