"""MOON: definitions and claims of the paper, in both frameworks and in all engines."""

from functools import partial

import numpy as np
import pytest

import strategies
from fedlearn import (
    Examples,
    FederatedData,
    LocalSettings,
    Schedule,
    SettingError,
    Strategy,
    everyone,
    federate,
    serial,
    start,
    vector,
)
from fedlearn.algorithm.local_rule import PREVIOUS_MODEL, LocalRule
from fedlearn.algorithm.strategy import CompositionError
from fedlearn.core import ClientWork, Request
from fedlearn.core.records import ExampleDP
from fedlearn.loop.local_training import train
from fedlearn.privacy.mechanisms import central, example
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.testing import LinearTrainer, check_strategy, linear_problem
from simulations import models

LOCAL = LocalSettings(epochs=2, batch_size=8, learning_rate=0.1)
FRAMEWORKS = ("torch", "jax")


@pytest.fixture(scope="module")
def data(digits):
    """Return four clients of uneven size, each with two or three of the digits only."""
    x, y = digits
    clients = []
    for k, size in enumerate((20, 33, 27, 40)):
        rows = np.flatnonzero(np.isin(y[:1200], [2 * k, 2 * k + 1, 9]))[:size]
        clients.append(Examples(x[rows], y[rows]))
    return FederatedData(
        task="multiclass", num_classes=10, clients=range(4), train=clients.__getitem__, test=clients.__getitem__
    )


def trainer_of(data, framework="torch", *, model="mlp"):
    for name in FRAMEWORKS if framework == "mixed" else (framework,):
        pytest.importorskip(name)
    return models.build_trainer(model, data, input_shape=(8, 8, 1), framework=framework)[0]


def end(strategy, engine, *, rounds=3):
    state = start(strategy, engine.trainer.init(1), engine, seed=1)
    *_, last = federate(strategy, engine, state, schedule=Schedule(rounds=rounds), local=LOCAL)
    engine.close()
    return last


def local_model(trainer, data, rule, *, model_D, last_D, client=0, **settings):
    """Return the model of a client that trains from ``model_D`` with the previous model ``last_D``."""
    order = Request(round=1, seed=1, params_D=model_D, local=LocalSettings(batch_size=8, learning_rate=0.1, **settings))
    work = ClientWork(client=client, examples=data.train(client), client_state={PREVIOUS_MODEL: last_D})
    return model_D + np.asarray(trainer.fit(order, rule, [work]).delta_KD)[0]


def features(data, params_D, x):
    """Return the inputs of the last layer of the MLP."""
    import torch

    net = trainer_of(data).network(params_D)
    with torch.no_grad():
        return torch.nn.functional.elu(net.hidden_0(torch.from_numpy(x).flatten(1)))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_step_is_along_the_gradient_of_the_paper_s_loss(data, framework, model):
    """Compare with the paper's code: cross-entropy over two similarities, with copies of the network."""
    trainer = trainer_of(data, framework, model=model)
    import torch

    from fedlearn.trainers.batching import batch_plans

    twin, mu, tau = trainer_of(data, model=model), 5.0, 0.5
    global_D, last_D = trainer.init(1), trainer.init(2)
    found_D = local_model(
        trainer, data, strategies.moon(mu=mu, tau=tau).local, model_D=global_D, last_D=last_D, steps=1
    )

    order = Request(round=1, seed=1, params_D=global_D, local=LocalSettings(batch_size=8, learning_rate=0.1, steps=1))
    rows = batch_plans(order, np.array([0]), np.array([20]))[0][0, 0]
    x, y = (torch.from_numpy(part[rows]) for part in (data.train(0).x, data.train(0).y))
    nets, seen = [twin.network(v_D) for v_D in (global_D, global_D, last_D)], []
    for net in nets:
        net.out.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    outputs, _, _ = (net(x) for net in nets)
    cosine = torch.nn.CosineSimilarity(dim=-1)
    z, z_global, z_last = seen[0], seen[1].detach(), seen[2].detach()
    logits = torch.stack([cosine(z, z_global), cosine(z, z_last)], dim=1) / tau
    cross_entropy = torch.nn.functional.cross_entropy
    loss = cross_entropy(outputs, y) + mu * cross_entropy(logits, torch.zeros(len(y), dtype=torch.long))
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in nets[0].named_parameters()}
    assert np.allclose(found_D - global_D, -0.1 * trainer.layout.pack(gradients), atol=1e-6)


WAYS = {
    "mlp": {"torch": ("map", "vmap"), "jax": ("map", "vmap"), "mixed": ("map",)},
    "cnn": {"torch": ("vmap",), "jax": ("map",)},
}


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_it_is_the_same_in_both_frameworks_however_clients_are_trained(data, model):
    strategy = strategies.moon(mu=5.0)
    alone_D = end(strategy, serial(data, trainer_of(data, model=model))).state.params_D
    for framework, ways in WAYS[model].items():
        trainer = trainer_of(data, framework, model=model)
        for batching in ways:
            together_D = end(strategy, vector(data, trainer, batching=batching)).state.params_D
            exact = framework == "torch" and batching == "map"
            assert np.allclose(together_D, alone_D, rtol=0, atol=0 if exact else 1e-5), (framework, batching)


def test_processes_that_share_a_block_give_the_same_bits(data):
    strategy, trainer = strategies.moon(mu=5.0), trainer_of(data)
    engines = (serial, partial(vector, batching="process_pool"))
    item, several = (end(strategy, engine(data, trainer)) for engine in engines)
    assert np.array_equal(item.state.params_D, several.state.params_D)


def test_a_client_s_first_round_is_federated_averaging_s_and_no_later_one_is(data):
    def params(strategy, rounds):
        return end(strategy, serial(data, trainer_of(data)), rounds=rounds).state.params_D

    assert np.allclose(params(strategies.moon(), 1), params(strategies.fedavg(), 1), atol=1e-7)
    assert np.abs(params(strategies.moon(), 2) - params(strategies.fedavg(), 2)).max() > 1e-3
    assert np.array_equal(params(strategies.moon(mu=0), 2), params(strategies.fedavg(), 2))


def test_a_client_compares_with_the_model_that_its_own_last_round_ended_with(data):
    """Check that other clients' rounds in between do not matter, and that the previous model stays at the client."""
    trainer, strategy = trainer_of(data), strategies.moon(clients_per_round=2)
    engine = serial(data, trainer)
    state, ended = start(strategy, trainer.init(1), engine, seed=1), {}
    for done in federate(strategy, engine, state, schedule=Schedule(rounds=4), local=LOCAL):
        for client in done.cohort:
            rule, last_D = strategy.local, ended.get(client, state.params_D)
            order = Request(round=done.number, seed=1, params_D=state.params_D, local=LOCAL)
            work = ClientWork(client=client, examples=data.train(client), client_state={PREVIOUS_MODEL: last_D})
            ended[client] = state.params_D + trainer.fit(order, rule, [work]).delta_KD[0]
        state = done.state
        assert done.bytes_up == 2 * 4 * trainer.layout.num_parameters
        assert all(
            np.array_equal(memory[PREVIOUS_MODEL], ended[client]) for client, memory in engine.client_states.items()
        )
    assert len(ended) >= 3, "some clients were not in each cohort"


def test_representations_come_closer_to_the_global_model_s_than_to_the_last_one_s(data, digits):
    """Check digits that the client does not have. Plain training returns to the previous representations."""
    trainer, x = trainer_of(data), digits[0][1200:]
    engine = serial(data, trainer)
    model_D = end(strategies.moon(mu=0.1), engine).state.params_D
    last_D = engine.client_states[0][PREVIOUS_MODEL]
    z_global, z_last = (features(data, v_D, x) for v_D in (model_D, last_D))

    def closer(mu):
        """Return the mean of sim(z, z_glob) - sim(z, z_prev)."""
        import torch

        rule = strategies.moon(mu=mu).local
        z = features(data, local_model(trainer, data, rule, model_D=model_D, last_D=last_D, epochs=10), x)
        return float((torch.cosine_similarity(z, z_global) - torch.cosine_similarity(z, z_last)).mean())

    without, some, much = closer(0), closer(1.0), closer(5.0)
    assert without < 0 < some < much
    assert some > without + 0.2


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_model_without_features_is_refused_by_name(data, framework):
    trainer = trainer_of(data, framework, model="linear")
    with pytest.raises(SettingError, match=r"ends in one affine map .* of features that it learns"):
        local_model(trainer, data, strategies.moon().local, model_D=trainer.init(1), last_D=trainer.init(1))


def test_other_layers_at_the_end_are_refused_in_both_frameworks(data):
    torch, nn = pytest.importorskip("torch"), pytest.importorskip("flax.linen")
    from fedlearn.trainers.jax import JaxTrainer
    from fedlearn.trainers.torch import TorchTrainer

    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return 2 * nn.Dense(10)(nn.Dense(5)(x.reshape(len(x), -1)))

    layers = [torch.nn.Flatten(), torch.nn.Linear(64, 5), torch.nn.Linear(5, 10), torch.nn.Softplus()]
    scaled = JaxTrainer(Scaled(), task="multiclass", input_shape=(8, 8, 1))
    for trainer in (TorchTrainer(torch.nn.Sequential(*layers), task="multiclass"), scaled):
        with pytest.raises(SettingError, match="features"):
            local_model(trainer, data, strategies.moon().local, model_D=trainer.init(1), last_D=trainer.init(1))


def test_a_trainer_that_has_no_features_says_so():
    with pytest.raises(Exception, match="penalty in the loss"):
        check_strategy(strategies.moon(), data=linear_problem(), trainer=LinearTrainer(3))


def test_other_models_are_run_only_where_a_rule_asks_for_them(data):
    """Check that other strategies do not pay for the additional models."""
    trainer, runs = trainer_of(data), []
    trainer.check_model(data.train(0))
    trainer.module.register_forward_hook(lambda module, inputs, output: runs.append(len(output)))
    for strategy, times in ((strategies.fedavg(), 1), (strategies.moon(), 3)):
        runs.clear()
        local_model(trainer, data, strategy.local, model_D=trainer.init(1), last_D=trainer.init(2), epochs=1)
        assert runs == [size for size in (8, 8, 4) for _ in range(times)]
        assert all(not part._forward_hooks for part in trainer.module.children())


def test_the_models_it_compares_with_are_in_evaluation_mode(digits):
    torch = pytest.importorskip("torch")
    from fedlearn.trainers.torch import TorchTrainer

    modes = []

    class Noted(torch.nn.Dropout):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5), Noted(0.5), torch.nn.Linear(5, 10))
    trainer = TorchTrainer(net, task="multiclass")
    data = FederatedData(
        task="multiclass", num_classes=10, clients=range(1), train=lambda k: Examples(digits[0][:16], digits[1][:16]),
        test=None,
    )  # fmt: skip
    trainer.check_model(data.train(0))
    modes.clear()
    local_model(trainer, data, strategies.moon().local, model_D=trainer.init(1), last_D=trainer.init(2), epochs=1)
    assert modes == [True, False, False] * 2


def test_noise_on_updates_goes_with_it_and_noise_on_examples_gradients_is_refused(data):
    strategy = strategies.moon(weighting="equal")
    with pytest.raises(CompositionError, match="gradients of the loss of the task"):
        example(noise_multiplier=1.0).validate(strategy, LOCAL)
    order = Request(round=1, seed=1, params_D=trainer_of(data).init(1), local=LocalSettings(example_dp=ExampleDP()))
    with pytest.raises(SettingError, match=r"local\.example_dp"):
        train(trainer_of(data), strategy.local, order, [])
    mechanism = central(noise_multiplier=1.0)
    mechanism.validate(strategy, LOCAL)
    population = Population(clients=data.clients, rounds=2)
    private, _ = mechanism.protect(strategy, LOCAL, population)
    engine = serial(data, trainer_of(data))
    assert np.isfinite(end(private, engine, rounds=2).state.params_D).all()
    assert set(engine.client_states[0]) == {PREVIOUS_MODEL}


@pytest.mark.parametrize(("setting", "value"), [("mu", -1.0), ("tau", 0.0), ("tau", float("nan"))])
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(SettingError, match=setting):
        strategies.moon(**{setting: value})


def test_the_kit_finds_a_penalty_that_is_not_one_number_per_example(data):
    broken = Strategy(select=everyone(), local=LocalRule(penalty=lambda batch, w_global: 0 * batch.features))
    with pytest.raises(AssertionError, match="one number per example"):
        check_strategy(broken, data=data, trainer=trainer_of(data))
