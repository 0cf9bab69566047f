"""Log a run to MLflow with a new model in its registry, and load this model from MLflow."""

from pathlib import Path

import mlflow
from sklearn.datasets import load_digits

import fedlearn
from fedlearn.callbacks.mlflow import MLflow
from strategies import fedprox

uri = f"sqlite:///{Path('mlflow.db').resolve()}"
tracker = MLflow(tracking_uri=uri, experiment="digits", registered_model="digits")
result = fedlearn.run("digits", fedprox(mu=0.1), rounds=3, callbacks=[tracker], show=False)

client = mlflow.MlflowClient(tracking_uri=uri)
(run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
print(f"{run.info.run_name}: accuracy {run.data.metrics['test/accuracy']:.1%} after {run.data.params['rounds']} rounds")
print("files:", ", ".join(sorted(item.path for item in client.list_artifacts(run.info.run_id))))
mlflow.set_tracking_uri(uri)
model = mlflow.pyfunc.load_model("models:/digits/1")
images = load_digits().data[:5].reshape(-1, 8, 8, 1) / 16
print("version 1 of the model predicts", *model.predict(images.astype("float32")))
