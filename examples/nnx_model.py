"""Train a module of flax.nnx with batch norm and dropout, and get it back with the trained weights."""

import jax
from flax import nnx
from sklearn.datasets import load_digits

import fedlearn
from strategies import fedavg


class Net(nnx.Module):
    """Classify vectors of 64 pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 48, rngs=rngs)
        self.norm = nnx.BatchNorm(48, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(48, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return one output per class."""
        return self.out(self.drop(jax.nn.relu(self.norm(self.hidden(x)))))


images, labels = load_digits(return_X_y=True)
images = (images / 16).astype("float32")
hospitals = {f"site {k}": (images[k::4], labels[k::4]) for k in range(4)}
scenario = fedlearn.Scenario.from_datasets(hospitals, model=Net(nnx.Rngs(0)), num_classes=10, name="digits")

result = fedlearn.run(
    scenario=scenario,
    strategy=fedavg(),
    buffers="average",  # the server averages the statistics of the batch norm
    local=fedlearn.LocalSettings(learning_rate=0.1, batch_size=32),
    rounds=5,
    report=False,
)
net = result.model  # a module of nnx, in evaluation mode
accuracy = (net(images).argmax(1) == labels).mean()
print(f"accuracy of the module on all images: {accuracy:.1%}")
