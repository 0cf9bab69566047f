"""Let two of ten clients send the negated update, and compare the mean with a robust rule."""

from sklearn.datasets import load_digits
from torch import nn

import fedlearn
from fedlearn.engines import ByzantineEngine
from fedlearn.robust.poisoning import draw_malicious_clients, sign_flip
from strategies import fedavg, krum

images, labels = load_digits(return_X_y=True)
data = fedlearn.from_arrays(images / 16, labels, assignment=[i % 10 for i in range(len(labels))], task="multiclass")
trainer = fedlearn.TorchTrainer(nn.Linear(64, 10), task="multiclass")
evaluate = fedlearn.judge(fedlearn.Scenario(name="digits", data=data, trainer=trainer))
poisoning = sign_flip(fraction=0.2)
malicious = draw_malicious_clients(poisoning, data.clients, seed=1)

for name, strategy in {"mean": fedavg(), "Krum": krum(num_malicious=2)}.items():
    engine = ByzantineEngine(fedlearn.vector(data, trainer), poisoning, malicious)
    *_, last = fedlearn.federate(
        strategy,
        engine,
        fedlearn.start(strategy, trainer.init(1), engine, seed=1),
        schedule=fedlearn.Schedule(rounds=10),
        local=fedlearn.LocalSettings(learning_rate=0.5),
        evaluate=evaluate,
    )
    print(f"{name:5} {last.evaluation.pooled['accuracy']:.1%} with {len(malicious)} malicious clients")
