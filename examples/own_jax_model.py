"""Train a flax module of your own."""

from flax import linen
from sklearn.datasets import load_digits

import fedlearn
from strategies import fedavg


class MLP(linen.Module):
    """Classify vectors with one hidden layer."""

    @linen.compact
    def __call__(self, x):
        """Return one output per class."""
        return linen.Dense(10, name="out")(linen.tanh(linen.Dense(32, name="hidden")(x)))


images, labels = load_digits(return_X_y=True)
data = fedlearn.from_arrays(images / 16, labels, assignment=[i % 6 for i in range(len(labels))], task="multiclass")
trainer = fedlearn.JaxTrainer(MLP(), input_shape=(64,), task="multiclass")
scenario = fedlearn.Scenario(name="digits", data=data, trainer=trainer)
strategy, engine = fedavg(), fedlearn.vector(data, trainer)

for round in fedlearn.federate(
    strategy,
    engine,
    fedlearn.start(strategy, trainer.init(1), engine, seed=1),
    schedule=fedlearn.Schedule(rounds=5),
    local=fedlearn.LocalSettings(learning_rate=0.5),
    evaluate=fedlearn.judge(scenario),
):
    print(f"round {round.number}: accuracy {round.evaluation.pooled['accuracy']:.1%}")
