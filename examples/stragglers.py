"""Compare waiting for all clients with a deadline, on a virtual clock (no real waiting)."""

from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from fedlearn.loop import VirtualClockEngine, lognormal
from strategies import fedavg

images, labels = load_digits(return_X_y=True)
data = fedlearn.from_arrays(images / 16, labels, assignment=[i % 20 for i in range(len(labels))], task="multiclass")
trainer = fedlearn.TorchTrainer(nn.Linear(64, 10), task="multiclass")
evaluate = fedlearn.judge(fedlearn.Scenario(name="digits", data=data, trainer=trainer))

for deadline in (None, 0.6):
    system = lognormal(sigma=1.0, deadline=deadline)
    engine = VirtualClockEngine(fedlearn.vector(data, trainer), system, lambda client: len(data.train(client)))
    strategy = fedavg(clients_per_round=10)
    *_, last = fedlearn.federate(
        strategy,
        engine,
        fedlearn.start(strategy, trainer.init(1), engine, seed=1),
        schedule=fedlearn.Schedule(rounds=20, max_failures=0.9),
        local=fedlearn.LocalSettings(learning_rate=0.5),
        evaluate=evaluate,
    )
    accuracy = last.evaluation.pooled["accuracy"]
    print(f"deadline {deadline}: accuracy {accuracy:.1%} after {last.clock:.0f} virtual seconds")
