"""Strategies of fedlearn and Flower on the same updates: they agree, or the paper's equation shows the difference.

Shapes: K clients, D parameters laid flat.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed")
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower

import strategies
from fedlearn.flower.in_process_grid import InProcessGrid
from fedlearn.flower.to_flower import to_flower
from fedlearn.robust import select_by_krum, squared_distances

SHAPES = {"out.bias": (3,), "out.weight": (3, 4), "in.weight": (4, 5)}
NUM_CLIENTS = 11
TOLERANCE = 2e-6


def model(rng, scale=1.0):
    return {name: scale * rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def updates_of(round):
    """Return the update of each client in a round; two updates are far from the others."""
    rng = np.random.default_rng((7, round))
    common = model(rng, 0.1)
    updates = [{name: common[name] + leaf for name, leaf in model(rng, 0.02).items()} for _ in range(NUM_CLIENTS)]
    for k in (3, 8):
        updates[k] = model(rng, 5.0)
    return updates


@pytest.fixture(scope="module")
def client():
    app = ClientApp()

    @app.train()
    def train(message, context):
        k, round = context.node_config["partition-id"], message.content["config"]["server-round"]
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        current = {name: arrays[name] + leaf for name, leaf in updates_of(round)[k].items()}
        metrics = MetricRecord({"num-examples": 10 + k, "loss": float(k)})
        record = ArrayRecord({name: as_array(leaf) for name, leaf in current.items()})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    return app


def as_array(leaf):
    return next(iter(ArrayRecord([leaf]).values()))


def model_after(strategy, client, *, rounds=3, before=None):
    """Return the flat global model after some rounds."""
    grid = InProcessGrid(client, NUM_CLIENTS)
    arrays = ArrayRecord({name: as_array(leaf) for name, leaf in model(np.random.default_rng(1)).items()})
    for number in range(1, rounds + 1):
        messages = strategy.configure_train(number, arrays, ConfigRecord(), grid)
        if before:
            before(strategy, number)
        new, _ = strategy.aggregate_train(number, list(grid.send_and_receive(messages)))
        arrays = new
    assert list(arrays) == list(SHAPES)
    return np.concatenate([array.numpy().ravel() for array in arrays.values()])


def max_difference(one_D, other_D):
    return float(np.abs(one_D - other_D).max())


SAME = {
    "fedavg": (strategies.fedavg(), lambda: flower.FedAvg()),
    "fedavgm": (
        strategies.fedavgm(learning_rate=0.5, momentum=0.9),
        lambda: flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
    ),
    "fedmedian": (strategies.fedmedian(), lambda: flower.FedMedian()),
    "fedtrimmedavg": (strategies.fedtrimmedavg(trim=0.2), lambda: flower.FedTrimmedAvg(beta=0.2)),
    "krum": (strategies.krum(num_malicious=2), lambda: flower.Krum(num_malicious_nodes=2)),
    "bulyan without f": (strategies.bulyan(num_malicious=0), lambda: flower.Bulyan(num_malicious_nodes=0)),
}


LONG = ("bulyan without f",)  # Flower computes all pairs of distances in Python


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in SAME])
def test_ours_and_flowers_agree_after_three_rounds(client, name):
    ours, theirs = SAME[name]
    assert max_difference(model_after(to_flower(ours), client), model_after(theirs(), client)) < TOLERANCE


def start_at_tau(strategy, number):
    """Start ``v`` at ``tau^2``, as Algorithm 2 of Reddi et al. does; Flower starts it at zero."""
    if number == 1:
        strategy.v_t = {name: np.full(shape, strategy.tau**2, np.float32) for name, shape in SHAPES.items()}


ADAPTIVE = {
    "fedyogi": (strategies.fedyogi, flower.FedYogi, {"beta1": 0.9, "beta2": 0.99}),
    "fedadagrad": (strategies.fedadagrad, flower.FedAdagrad, {}),
}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_adaptive_ones_agree_once_flowers_second_moment_starts_as_in_the_paper(client, name):
    ours, theirs, betas = ADAPTIVE[name]
    flowers = {key.replace("beta", "beta_"): value for key, value in betas.items()}
    a_D = model_after(to_flower(ours(learning_rate=0.03, tau=0.01, **betas)), client)
    assert (
        max_difference(a_D, model_after(theirs(eta=0.03, tau=0.01, **flowers), client, before=start_at_tau)) < TOLERANCE
    )
    assert max_difference(a_D, model_after(theirs(eta=0.03, tau=0.01, **flowers), client)) > 100 * TOLERANCE


def test_flowers_adam_is_kingmas_whose_correction_the_paper_of_fedadam_does_not_have(client):
    """Compare the learning rates.

    Flower uses ``eta sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1))``; Reddi et al. use ``eta``.
    """
    eta, beta1, beta2 = 0.03, 0.9, 0.99

    def uncorrected(strategy, number):
        start_at_tau(strategy, number)
        strategy.eta = eta * (1 - beta1 ** (number + 1)) / np.sqrt(1 - beta2 ** (number + 1))

    ours_D = model_after(to_flower(strategies.fedadam(learning_rate=eta, beta1=beta1, beta2=beta2, tau=0.01)), client)

    def theirs():
        return flower.FedAdam(eta=eta, beta_1=beta1, beta_2=beta2, tau=0.01)

    assert max_difference(ours_D, model_after(theirs(), client, before=uncorrected)) < TOLERANCE
    assert max_difference(ours_D, model_after(theirs(), client, before=start_at_tau)) > 100 * TOLERANCE


def test_multi_krum_takes_equal_means_where_flowers_weighs_by_examples(client):
    """Compare with Blanchard et al., section 4: ``(1/m) sum`` of the selected updates.

    With weights, a malicious client would choose its own weight.
    """
    ours = strategies.krum(num_malicious=2, num_to_keep=3)
    theirs = flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3)
    ours_D, weighted_D = model_after(to_flower(ours), client), model_after(theirs, client)
    assert max_difference(ours_D, weighted_D) > 100 * TOLERANCE
    equal = flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=3, weighted_by_key="weight")
    assert max_difference(ours_D, model_after(equal, with_equal_weights(client))) < TOLERANCE


def with_equal_weights(client):
    """Return the same client, which also reports an equal weight."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        reply = client(message, context)
        reply.content["metrics"]["weight"] = 1
        return reply

    return app


@pytest.mark.slow
def test_bulyan_chooses_by_krum_again_and_again_where_flowers_takes_the_lowest_scores_at_once(client):
    """Compare with El Mhamdi et al., section 4.

    The set ``S`` is filled by one vector at a time, and the vector leaves the received set.
    """
    chosen = []

    def again_and_again(contents, num_malicious, num_chosen):
        rows = [np.concatenate([a.numpy().ravel() for a in item["arrays"].values()]) for item in contents]
        which = select_by_krum(squared_distances(np.stack(rows)), num_malicious, num_chosen)
        chosen.append({contents[k]["metrics"]["num-examples"] - 10 for k in which})
        return [contents[k] for k in which]

    ours_D = model_after(to_flower(strategies.bulyan(num_malicious=2)), client)
    shown = flower.Bulyan(num_malicious_nodes=2, selection_rule=again_and_again)
    assert max_difference(ours_D, model_after(shown, client)) < TOLERANCE
    assert all(len(which) == 7 and not {3, 8} & which for which in chosen)
    # other honest clients, which are all similar
    assert max_difference(ours_D, model_after(flower.Bulyan(num_malicious_nodes=2), client)) < 0.05


def test_our_mean_of_equal_models_is_exact_where_flowers_is_not():
    threes = ArrayRecord([np.full(5, 3.0, np.float32)])
    app = ClientApp()

    @app.train()
    def train(message, context):
        metrics = MetricRecord({"num-examples": (100, 150, 77)[context.node_config["partition-id"]]})
        return Message(RecordDict({"arrays": threes, "metrics": metrics}), reply_to=message)

    def mean_of(strategy):
        grid = InProcessGrid(app, 3)
        messages = strategy.configure_train(1, ArrayRecord([np.zeros(5, np.float32)]), ConfigRecord(), grid)
        return strategy.aggregate_train(1, list(grid.send_and_receive(messages)))[0].to_numpy_ndarrays()[0]

    assert mean_of(to_flower(strategies.fedavg())).tolist() == [3.0] * 5
    assert mean_of(flower.FedAvg()) == pytest.approx(3.0, abs=1e-5)
