"""Train logistic regression in NumPy, without PyTorch and JAX, with DP-SGD support."""

import numpy as np
from sklearn.datasets import load_breast_cancer

import fedlearn
from fedlearn.testing import check_trainer
from fedlearn.trainers import BaseTrainer
from strategies import fedavg


class LogisticRegression(BaseTrainer):
    """Classify vectors into two classes."""

    supports_dp_sgd = True

    def __init__(self, num_features: int) -> None:
        self.layout = fedlearn.Layout.from_shapes([("out.bias", (1,)), ("out.weight", (1, num_features))])

    def outputs(self, params_D, x):
        """Return one logit per example."""
        return x @ params_D[1:, None] + params_D[0]

    def example_gradients(self, params_D, x, y):
        """Return the loss and the gradient of each example."""
        logit_N = self.outputs(params_D, x)[:, 0].astype(np.float64)
        loss_N = np.logaddexp(0, logit_N) - y * logit_N
        error_N = 1 / (1 + np.exp(-logit_N)) - y
        return loss_N, error_N[:, None] * np.concatenate([np.ones((len(x), 1)), x], axis=1)


x, y = load_breast_cancer(return_X_y=True)
x = (x - x.mean(axis=0)) / x.std(axis=0)
data = fedlearn.from_arrays(x, y, assignment=[i % 5 for i in range(len(y))], task="binary")
trainer = LogisticRegression(30)
check_trainer(trainer, [data.train(client) for client in (0, 1)])
strategy, engine = fedavg(), fedlearn.vector(data, trainer)

for round in fedlearn.federate(
    strategy,
    engine,
    fedlearn.start(strategy, trainer.init(1), engine, seed=1),
    schedule=fedlearn.Schedule(rounds=5),
    local=fedlearn.LocalSettings(learning_rate=0.5),
    evaluate=fedlearn.judge(fedlearn.Scenario(name="tumours", data=data, trainer=trainer)),
):
    print(f"round {round.number}: accuracy {round.evaluation.pooled['accuracy']:.1%}")
