"""Write the curves of two strategies for TensorBoard. The command ``tensorboard --logdir tracked`` shows them."""

from pathlib import Path

import fedlearn
from fedlearn.callbacks.tensorboard import TensorBoard
from strategies import fedavg, fedprox

for name, strategy in {"fedavg": fedavg(), "fedprox": fedprox(mu=0.1)}.items():
    folder = Path("tracked") / name
    result = fedlearn.run("digits", strategy, rounds=5, callbacks=[TensorBoard()], folder=folder, show=False)
    print(result, "->", sorted(path.name.partition(".")[0] for path in (folder / "tensorboard").iterdir()))
