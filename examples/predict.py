"""Train on the files of two hospitals, delete them, and predict new patients with the trained model."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import fedlearn
from simulations.run import main as run

rng = np.random.default_rng(0)

with TemporaryDirectory() as temporary:
    folder = Path(temporary)
    (folder / "data").mkdir()
    for hospital in ("north", "south"):
        age, smoker = rng.normal(60, 10, 200), rng.choice(["yes", "no"], 200)
        ill = np.where(age + 10 * (smoker == "yes") + rng.normal(0, 5, 200) > 65, "ill", "healthy")
        rows = [f"{a:.0f},{s},{y}" for a, s, y in zip(age, smoker, ill, strict=True)]
        (folder / f"data/{hospital}.csv").write_text("\n".join(["age,smoker,disease", *rows, ""]))

    settings = ["scenario=folder", f"scenario.path={folder / 'data'}", "scenario.target=disease"]
    run([*settings, "rounds=10", "local.learning_rate=0.1", "report=false", f"hydra.run.dir={folder / 'run'}"])
    shutil.rmtree(folder / "data")

    model = fedlearn.load(folder / "run")
    patients = {"age": [45, 75], "smoker": ["no", "yes"]}
    print(model)
    print("classes:", model.classes)
    print("predictions:", model.predict(patients))
    print("probabilities:", model.predict_proba(patients).round(2))
    print("module:", model.module)
