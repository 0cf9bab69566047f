import numpy as np
import pytest

from fedlearn import Context, Layout, SettingError, adaptive, chain, sgd
from fedlearn.algorithm import from_optax

LAYOUT = Layout.from_shapes([("w", (6,))])
CONTEXT = Context(round=1, seed=0)
DELTAS = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)


def steps_of(server, deltas=DELTAS):
    """Return the steps of a server optimizer for a sequence of updates."""
    memory, steps = server.init(LAYOUT), []
    for delta_D in deltas:
        step_D, memory = server.update(delta_D, memory, CONTEXT)
        steps.append(np.asarray(step_D))
    return np.stack(steps)


def test_plain_server_sgd_takes_the_update_as_it_is():
    assert np.array_equal(steps_of(sgd()), DELTAS)


@pytest.mark.parametrize(("learning_rate", "momentum"), [(1.0, 0.9), (0.3, 0.5), (2.0, 0.0)])
def test_server_momentum_is_optax_sgd_and_torch_sgd(learning_rate, momentum):
    optax = pytest.importorskip("optax")
    torch = pytest.importorskip("torch")
    ours = steps_of(sgd(learning_rate, momentum=momentum))
    assert np.allclose(ours, steps_of(from_optax(optax.sgd(learning_rate, momentum))), atol=1e-6)
    w = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=learning_rate, momentum=momentum)
    for delta_D in DELTAS:
        w.grad = -torch.from_numpy(delta_D)
        optimizer.step()
    assert np.allclose(ours.sum(axis=0), w.detach().numpy(), atol=1e-4)


def reference_steps(second_moment, deltas, *, learning_rate, beta1, tau):
    """Compute the steps of Reddi et al. 2021, Algorithm 2, in float64."""
    x, m, v = np.zeros(6), np.zeros(6), np.full(6, tau**2)
    path = []
    for delta in deltas.astype(np.float64):
        m = beta1 * m + (1 - beta1) * delta
        v = second_moment(v, delta)
        x = x + learning_rate * m / (np.sqrt(v) + tau)
        path.append(x)
    return np.stack(path)


@pytest.mark.parametrize(
    ("name", "second_moment"),
    [
        ("fedadam", lambda v, d: 0.95 * v + 0.05 * d**2),
        ("fedyogi", lambda v, d: v - 0.05 * d**2 * np.sign(v - d**2)),
        ("fedadagrad", lambda v, d: v + d**2),
    ],
)
def test_adaptive_strategies_follow_algorithm_2(name, second_moment):
    import strategies

    settings = {"learning_rate": 0.1, "beta1": 0.8, "tau": 0.01}
    current = settings if name == "fedadagrad" else {**settings, "beta2": 0.95}
    path = np.cumsum(steps_of(getattr(strategies, name)(**current).server).astype(np.float64), axis=0)
    assert np.allclose(path, reference_steps(second_moment, DELTAS, **settings), atol=1e-5)


def test_adam_without_bias_correction_is_optax_adam_once_the_correction_is_taken_out():
    optax = pytest.importorskip("optax")
    import strategies

    beta1, beta2, tau = 0.9, 0.99, 1e-12
    ours = steps_of(strategies.fedadam(learning_rate=1.0, beta1=beta1, beta2=beta2, tau=tau).server)
    theirs = steps_of(from_optax(optax.scale_by_adam(beta1, beta2, eps=0.0)))
    t = np.arange(1, 21)[:, None]
    assert np.allclose(ours, -theirs * (1 - beta1**t) / np.sqrt(1 - beta2**t), rtol=1e-4)


def test_any_optax_optimiser_serves_and_its_state_survives_a_checkpoint():
    optax = pytest.importorskip("optax")
    server = from_optax(optax.yogi(1e-2))
    memory, steps = server.init(LAYOUT), []
    for delta_D in DELTAS:
        memory = {name: np.array(v) for name, v in memory.items()}
        step_D, memory = server.update(delta_D, memory, CONTEXT)
        steps.append(step_D)
    assert np.array_equal(np.stack(steps), steps_of(server))


def test_server_optimisers_give_the_same_on_torch_and_jax_arrays():
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    for server in (sgd(0.5, momentum=0.9), adaptive(lambda v, d: v + d**2, learning_rate=0.1, beta1=0.9, tau=1e-3)):
        for convert in (torch.from_numpy, jnp.asarray):
            assert np.allclose(steps_of(server, [convert(d) for d in DELTAS]), steps_of(server), atol=1e-5)


def test_chained_transforms_act_in_order_and_keep_their_own_memory():
    both = chain(sgd(2.0, momentum=0.5), sgd(3.0, momentum=0.25))
    first, memory = sgd(2.0, momentum=0.5), both.init(LAYOUT)
    assert sorted(memory) == ["0.v", "1.v"]
    assert np.allclose(steps_of(both), steps_of(sgd(3.0, momentum=0.25), steps_of(first)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: sgd(-1),
        lambda: sgd(float("nan")),
        lambda: sgd(1.0, momentum=1.0),
        lambda: adaptive(lambda v, d: v, learning_rate=0.1, beta1=0.9, tau=0.0),
        lambda: adaptive(lambda v, d: v, learning_rate=0.1, beta1=1.0, tau=1e-3),
    ],
)
def test_server_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError):
        wrong()
