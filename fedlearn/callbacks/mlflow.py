"""Track a run with MLflow: settings, numbers, report, model, and a version in the model registry."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from fedlearn.advice import quote_value
from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.checkpoints import MODEL_FOLDER
from fedlearn.callbacks.evaluation_file import read_evaluation
from fedlearn.callbacks.run_history import HistoryEntry, history_entry
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.tracking import artifacts, name_of_run, numbers, settings_as_typed, sweep_folder
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.records import Round
from fedlearn.errors import MissingExtra, SettingError, require

__all__ = ["MLflow"]

ID_FILE = "mlflow.json"  # in the run folder, and in the folder of a sweep for its parent run
URI_VARIABLE, EXPERIMENT_VARIABLE = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"
DEFAULT_URI, DEFAULT_EXPERIMENT = "sqlite:///mlflow.db", "fedlearn"
SQLITE = "sqlite:///"
STATUS = {"stopped": "KILLED", "failed": "FAILED"}  # status of the run -> status in MLflow; FINISHED for others
MAX_BATCH, MAX_VALUE, MAX_TAG = 100, 6000, 5000  # limits of MLflow: items per request, characters
LOADER = "fedlearn.runner.mlflow_model"  # MLflow imports it to load a registered model


class MLflow(Callback):
    """Log a run to MLflow. A resumed run continues its MLflow run, and the jobs of a sweep have one parent run.

    In a deployment, the coordinator logs. Its operator selects the server with the variable ``MLFLOW_TRACKING_URI``.

    Args:
        tracking_uri: server, e.g. ``http://host:5000``, or database, e.g. ``sqlite:///mlflow.db``. None uses the
            variable ``MLFLOW_TRACKING_URI``, or else ``sqlite:///mlflow.db`` in the working folder.
        experiment: experiment of MLflow. None uses the variable ``MLFLOW_EXPERIMENT_NAME``, or else ``fedlearn``.
        registered_model: name in the model registry, which gets a version at the end; None registers nothing.
        artifacts: True logs the report, the evaluation and the model at the end; False logs numbers and settings only.
            None is True for a run without a privacy guarantee, and False with one.

    Raises:
        MissingExtra: MLflow is not installed.
        SettingError: a setting is not valid.
    """

    reads_run_files = True
    operator_variables = (URI_VARIABLE,)

    def __init__(
        self,
        *,
        tracking_uri: str | None = None,
        experiment: str | None = None,
        registered_model: str | None = None,
        artifacts: bool | None = None,
    ) -> None:
        if find_spec("mlflow") is None:
            raise MissingExtra("callbacks=[mlflow]", "mlflow")
        for name, value in (("experiment", experiment), ("registered_model", registered_model)):
            is_name = value is None or (isinstance(value, str) and bool(value.strip()))
            require(is_name, name, value, "a name, or null", f"{name}=sepsis")
        require(artifacts in (None, True, False), "artifacts", artifacts, "true, false or null", "artifacts=true")
        is_conflict = registered_model is not None and artifacts is False
        expected = "true or null, because the registry needs the model"
        require(not is_conflict, "artifacts", "false", expected, "artifacts=true")
        _require_no_password(tracking_uri)
        self.tracking_uri, self.experiment = tracking_uri, experiment
        self.registered_model, self.artifacts = registered_model, artifacts
        self._client: Any = None
        self._id = self._parent = ""
        self._last_round = 0

    def on_start(self, run: RunInfo) -> None:
        """Create the MLflow run, or continue it. Log the settings, and the rounds that it lacks."""
        from mlflow import MlflowClient

        self._run = run
        stored = _read(run.folder / ID_FILE)
        uri = self._uri(stored)
        self._require_artifacts()
        self._client = MlflowClient(tracking_uri=uri)
        self._parent = self._parent_run(run, uri)
        if stored:
            self._continue(stored["run_id"])
        else:
            self._create(run, uri)
        self._log_lines([line for line in run.history if line["round"] > self._last_round])

    def on_round(self, round: Round) -> None:
        """Log the numbers of one round. A round that a resumed run repeats is not logged again."""
        if round.number > self._last_round:
            self._log_lines([history_entry(round)])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Log results and files, register the model, and end the MLflow run."""
        status = summary["status"]
        self._set_tags({"fedlearn.status": status, "fedlearn.reason": summary.get("reason") or "-"})
        if status != "stopped" and self._has_artifacts():
            self._log_artifacts()
            if self.registered_model and status != "failed":
                self._register(self.registered_model)
        self._end(STATUS.get(status, "FINISHED"))

    def close(self) -> None:
        """End the MLflow run as failed, if the run ended without a summary."""
        if self._id:
            with suppress(Exception):  # an earlier error of the server was reported already
                self._end("FAILED")

    def _uri(self, stored: Mapping[str, str]) -> str:
        """Return the address of the tracker. A resumed run keeps a database that its settings name relatively."""
        uri = self.tracking_uri or os.environ.get(URI_VARIABLE) or ""
        is_relative = not uri or (uri.startswith(SQLITE) and not uri.startswith(f"{SQLITE}/"))
        if is_relative:
            path = Path((uri or DEFAULT_URI).removeprefix(SQLITE)).resolve()
            return stored.get("tracking_uri") or f"{SQLITE}{path}"
        return uri

    def _has_artifacts(self) -> bool:
        return not self._run.privacy if self.artifacts is None else self.artifacts

    def _require_artifacts(self) -> None:
        if self.registered_model and not self._has_artifacts():
            expected = "true, because the registry needs files of this private run beyond its metrics"
            raise SettingError("callbacks.mlflow.artifacts", "null", expected, "callbacks.mlflow.artifacts=true")

    def _experiment_id(self, uri: str) -> str:
        from mlflow.exceptions import MlflowException

        name = self.experiment or os.environ.get(EXPERIMENT_VARIABLE) or DEFAULT_EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        if found is None:  # files of a database lie beside it
            place = {"artifact_location": str(Path(uri.removeprefix(SQLITE)).parent / "mlruns")}
            with suppress(MlflowException):  # another process has created it
                return str(self._client.create_experiment(name, **(place if uri.startswith(SQLITE) else {})))
            found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def _parent_run(self, run: RunInfo, uri: str) -> str:
        """Return the id of the MLflow run of the sweep; empty without a sweep. The first job creates it."""
        folder = sweep_folder(run)
        if folder is None:
            return ""
        with FileLock(folder / f".{ID_FILE}.lock"):
            stored = _read(folder / ID_FILE)
            if not stored:
                parent = self._client.create_run(self._experiment_id(uri), run_name=folder.name)
                stored = {"run_id": parent.info.run_id}
                _write(folder / ID_FILE, stored)
        return stored["run_id"]

    def _create(self, run: RunInfo, uri: str) -> None:
        parent = {"mlflow.parentRunId": self._parent} if self._parent else {}
        tags = {"fedlearn.folder": str(run.folder), "mlflow.note.content": f"    {run.rerun_command}", **parent}
        created = self._client.create_run(self._experiment_id(uri), run_name=name_of_run(run), tags=_shortened(tags))
        self._id = created.info.run_id
        _write(run.folder / ID_FILE, {"run_id": self._id, **({} if _has_password(uri) else {"tracking_uri": uri})})
        self._log_settings(run)

    def _continue(self, run_id: str) -> None:
        """Continue an MLflow run. Its parameters cannot change, so that new values of settings become tags."""
        data = self._client.get_run(run_id).data
        self._id, self._last_round = run_id, int(data.metrics.get("round", 0))
        self._client.update_run(run_id, status="RUNNING")
        changed = {name: text for name, text in _params(self._run).items() if data.params.get(name) != text}
        self._set_tags({f"fedlearn.resumed.{name}": text for name, text in changed.items()})

    def _log_settings(self, run: RunInfo) -> None:
        from mlflow.entities import Param

        for batch in _batches([Param(name, text) for name, text in _params(run).items()]):
            self._client.log_batch(self._id, params=batch)

    def _log_lines(self, lines: Sequence[HistoryEntry]) -> None:
        values = [
            (name, value, line["round"], _milliseconds(line["time"]))
            for line in lines
            for name, value in numbers(line).items()
        ]
        self._log_values(values)
        self._last_round = max([self._last_round, *(line["round"] for line in lines)])

    def _log_values(self, values: Sequence[tuple[str, float, int, int]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(_plain(name), value, time, step) for name, value, step, time in values]
        for batch in _batches(metrics):
            self._client.log_batch(self._id, metrics=batch)

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for batch in _batches([RunTag(_plain(name), value) for name, value in _shortened(tags).items()]):
            self._client.log_batch(self._id, tags=batch)

    def _log_artifacts(self) -> None:
        estimates = read_evaluation(self._run.folder).get("metrics") or {}
        found = {f"final/{metric}/{name}": value for metric, node in estimates.items() for name, value in node.items()}
        now = int(datetime.now().timestamp() * 1000)
        self._log_values([(name, value, self._last_round, now) for name, value in numbers(found).items()])
        for path in artifacts(self._run.folder):
            if path.name == MODEL_FOLDER:
                self._client.log_artifacts(self._id, str(path), f"{MODEL_FOLDER}/{MODEL_FOLDER}")
                self._client.log_dict(self._id, _model_description(self._id), f"{MODEL_FOLDER}/MLmodel")
            else:
                self._client.log_artifact(self._id, str(path))

    def _register(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        self._client.create_model_version(name, f"runs:/{self._id}/{MODEL_FOLDER}", run_id=self._id)

    def _end(self, status: str) -> None:
        run_id, self._id = self._id, ""
        self._client.set_terminated(run_id, status)
        if self._parent:
            self._client.set_terminated(self._parent, "FINISHED")


def _params(run: RunInfo) -> dict[str, str]:
    """Return name -> text of the settings, as a user types them, within the limits of MLflow."""
    return {_plain(name): quote_value(value)[:MAX_VALUE] for name, value in settings_as_typed(run.config).items()}


def _plain(name: str) -> str:
    """Return a name with the characters that MLflow accepts.

    >>> _plain("test/recall@10")
    'test/recall_10'
    """
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)[:250]


def _shortened(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value[:MAX_TAG] for name, value in tags.items()}


def _milliseconds(time: str) -> int:
    return int(datetime.fromisoformat(time).timestamp() * 1000)


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[start : start + MAX_BATCH] for start in range(0, len(items), MAX_BATCH))


def _model_description(run_id: str) -> dict[str, Any]:
    """Return the file ``MLmodel``, with which ``mlflow.pyfunc.load_model`` loads the model."""
    function = {"loader_module": LOADER, "python_version": platform.python_version()}
    return {"run_id": run_id, "flavors": {"python_function": function}}


def _require_no_password(uri: str | None) -> None:
    expected = f"an address without a password, because config.yaml shows all settings; {URI_VARIABLE} may have one"
    shown = re.sub(r"//.*@", "//...@", uri or "")
    require(not _has_password(uri or ""), "tracking_uri", shown, expected, "tracking_uri=http://127.0.0.1:5000")


def _has_password(uri: str) -> bool:
    try:
        return urlsplit(uri).password is not None
    except ValueError:
        return False


def _read(path: Path) -> dict[str, str]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _write(path: Path, content: Mapping[str, str]) -> None:
    write_atomically(path, json.dumps(content) + "\n")
