"""A node trains each client from the model that the request has for it, and refuses all other contents."""

from dataclasses import replace

import numpy as np
import pytest

import strategies
from fedlearn import Strategy
from fedlearn.core.records import Request
from fedlearn.core.serialization import Payload
from fedlearn.protocol.refusals import RefusalCode
from fedlearn.protocol.training_order import pack_client_models, pack_order
from tests.support.clinic import model

ORDER = Request(round=1, seed=1, params_D=model(0), client_models={0: model(1), 1: model(2)})


def test_each_client_of_a_node_trains_from_its_model(clinic):
    node = clinic(strategy=strategies.fedamp())
    order = replace(ORDER, local=node.local)
    response = node.fit(shared=pack_order(order), content=pack_client_models(order, (0, 1)))
    alone = [
        node.fit(shared=pack_order(order), content=content(model(k + 1)), clients=(k,), state_rounds=(0,))
        for k in (0, 1)
    ]
    updates = [each.content.arrays["delta"] for each in (response, *alone)]
    assert response.refusal is None
    assert np.array_equal(updates[0], np.concatenate(updates[1:]))
    assert not np.array_equal(updates[1], updates[2])


def content(*models):
    return Payload(arrays={"models": np.stack(models)})


FAULTS = {
    "no models": Payload(),
    "one model for two clients": content(model(1)),
    "a third model": content(model(1), model(2), model(3)),
    "a model of another size": Payload(arrays={"models": np.zeros((2, 99), np.float32)}),
    "float64": Payload(arrays={"models": np.zeros((2, len(model(1))))}),
    "infinity": content(model(1), model(np.inf)),
    "another array": Payload(arrays={**content(model(1), model(2)).arrays, "params": model(1)}),
    "metadata": Payload(metadata={"a": 1}, arrays=content(model(1), model(2)).arrays),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_node_refuses_models_that_do_not_fit_its_clients(clinic, fault):
    node = clinic(strategy=strategies.fedamp())
    order = replace(ORDER, local=node.local)
    assert node.fit(shared=pack_order(order), content=fault).refusal.code == RefusalCode.REQUEST


def test_a_request_has_a_model_for_each_client_or_one_for_all_never_both(clinic):
    node = clinic(strategy=strategies.fedamp())
    order = replace(ORDER, local=node.local)
    both = pack_order(replace(order, client_models={}))
    assert node.fit(shared=both, content=pack_client_models(order, (0, 1))).refusal.code == RefusalCode.REQUEST
    assert node.fit(shared=both).refusal.code == RefusalCode.REQUEST


def test_models_of_single_clients_need_a_strategy_that_sends_them(clinic):
    """Refuse them; else a coordinator could train each client on any model beside the evaluated one."""
    node = clinic(strategy=Strategy(select=strategies.fedavg().select))
    order = replace(ORDER, local=node.local)
    response = node.fit(shared=pack_order(order), content=pack_client_models(order, (0, 1)))
    assert response.refusal.code == RefusalCode.REQUEST
    assert node.fit(content=Payload(metadata={"a": 1})).refusal.code == RefusalCode.REQUEST
