"""Train a module of equinox, and a pair of functions, with the same strategy."""

import equinox as eqx
import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits

import fedlearn
from strategies import fedavg


class Net(eqx.Module):
    """Classify one vector of 64 pixels. The trainer maps the module over the batch."""

    hidden: eqx.nn.Linear
    drop: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.hidden, self.out = eqx.nn.Linear(64, 48, key=first), eqx.nn.Linear(48, 10, key=second)
        self.drop = eqx.nn.Dropout(0.1)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Return one output per class. Each example has its own key in training."""
        return self.out(self.drop(jnp.tanh(self.hidden(x)), key=key))


def init(key: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
    """Draw the parameters of a softmax regression."""
    return {"weight": 0.01 * jax.random.normal(key, (10, x.shape[1])), "bias": jnp.zeros(10)}


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Return one output per class for a batch."""
    return x @ params["weight"].T + params["bias"]


images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
hospitals = {f"site {k}": (images[k::4], labels[k::4]) for k in range(4)}
local = fedlearn.LocalSettings(learning_rate=0.3, batch_size=32)
for model in (Net(jax.random.key(0)), (init, apply)):
    scenario = fedlearn.Scenario.from_datasets(hospitals, model=model, num_classes=10, name="digits")
    result = fedlearn.run(scenario=scenario, strategy=fedavg(), local=local, rounds=5, report=False, show=False)
    print(f"{scenario.model}: {result.trained_model}")
