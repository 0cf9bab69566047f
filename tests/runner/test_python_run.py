"""`fedlearn.run` gives the same run as the command, with names and objects in any combination."""

import json
from pathlib import Path

import numpy as np
import pytest

import fedlearn
from fedlearn import FedlearnError, LocalSettings, Scenario, SettingError, from_arrays
from fedlearn.callbacks import Callback
from fedlearn.core.command_line import UsageError
from fedlearn.privacy import central
from fedlearn.runner.compat import parse_override
from fedlearn.runner.python_settings import override_texts
from fedlearn.runner.run_result import RunFailed
from fedlearn.runner.start import main
from strategies import fedavg, fedprox

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def my_scenario(loss=None):
    x_N = np.random.default_rng(0).normal(size=(120, 6)).astype(np.float32)
    data = from_arrays(x_N, (x_N[:, 0] > 0).astype(int), assignment=np.arange(120) % 4, task="binary")
    torch.manual_seed(3)
    trainer = fedlearn.TorchTrainer(torch.nn.Linear(6, 1), task="binary", loss=loss)
    return Scenario(name="mine", data=data, trainer=trainer)


def digest(result):
    return result.summary["parameters_sha256"]


QUIET = {"show": False, "report": False}


def test_names_and_objects_give_the_run_of_the_command():
    settings = ["strategy.mu=0.1", "rounds=2", "local.epochs=2", "report=false"]
    assert (
        main(["scenario=digits", "strategy=fedprox", *settings, "hydra.run.dir=typed", "callbacks.console=null"]) == 0
    )
    typed = json.loads(Path("typed/summary.json").read_text())["parameters_sha256"]
    by_name = fedlearn.run("digits", "fedprox", rounds=2, local={"epochs": 2}, settings={"strategy.mu": 0.1}, **QUIET)
    by_object = fedlearn.run("digits", fedprox(mu=0.1), rounds=2, local=LocalSettings(epochs=2), **QUIET)
    assert digest(by_name) == digest(by_object) == typed


def test_a_run_with_objects_resumes_to_the_same_parameters():
    objects = {"scenario": my_scenario(), "strategy": fedprox(mu=0.1), **QUIET}
    whole = fedlearn.run(**objects, rounds=4, folder="whole")
    fedlearn.run(**objects, rounds=2, folder="parts")
    resumed = fedlearn.run(**objects, rounds=4, resume="parts")
    assert digest(resumed) == digest(whole)
    assert resumed.metrics["round"].tolist() == [1, 2, 3, 4]
    with pytest.raises(FedlearnError, match="same object"):
        fedlearn.run(resume="parts", rounds=5, **QUIET)


def test_a_mechanism_as_an_object_protects_as_its_option():
    # in a simulation, noise follows from the seed, so equal settings give equal parameters
    settings = {"strategy.weighting": "equal"}
    by_name = fedlearn.run(
        "digits", rounds=1, privacy="central", settings={**settings, "privacy.noise_multiplier": 2.0}, **QUIET
    )
    by_object = fedlearn.run("digits", rounds=1, privacy=central(noise_multiplier=2.0), settings=settings, **QUIET)
    assert digest(by_name) == digest(by_object)
    assert by_object.summary["epsilon"] == by_name.summary["epsilon"] > 0


def test_the_result_has_model_predictions_metrics_and_figure():
    scenario = my_scenario()
    result = fedlearn.run(scenario, fedavg(), rounds=3, **QUIET)
    x_N = scenario.data.test(0).x
    with torch.no_grad():
        expected_N = result.model(torch.from_numpy(x_N))[:, 0].numpy()
    np.testing.assert_allclose(result.predict_proba(x_N)[:, 1], 1 / (1 + np.exp(-expected_N)), rtol=1e-5)
    assert result.predict(x_N).tolist() == [str(int(value > 0)) for value in expected_N]
    assert result.metrics["accuracy"].iloc[-1] == result.summary["final"]["accuracy"]
    assert len(result.clients) == 4
    assert result.status == "done"
    assert "accuracy" in result._repr_html_()
    assert len(result.plot().axes) == 2
    again = fedlearn.load(result.folder, trainer=scenario.trainer)
    assert again.predict(x_N).tolist() == result.predict(x_N).tolist()
    with pytest.raises(FedlearnError, match=r"trainer=\.\.\."):
        fedlearn.load(result.folder).predict(x_N)


def test_a_callback_sees_each_round_and_can_end_the_run():
    class Stop(Callback):
        def on_round(self, round):
            return "enough" if round.number == 2 else None

    result = fedlearn.run(my_scenario(), fedavg(), rounds=5, callbacks=[Stop()], **QUIET)
    assert (result.status, result.summary["reason"]) == ("early_stopped", "enough")


def test_a_failed_run_raises_with_its_folder():
    def fail(outputs, y):
        if len(outputs) > 9:  # the check before the first round has fewer examples
            raise RuntimeError("no loss today")
        return (outputs[:, 0] - y) ** 2

    with pytest.raises(RunFailed, match="no loss today") as caught:
        fedlearn.run(my_scenario(fail), fedavg(), rounds=2, folder="failed", **QUIET)
    assert (caught.value.folder / "run.log").is_file()


WRONG = [
    ({"scenario": "digitz"}, UsageError, "did you mean scenario=digits"),
    ({"strategy": fedprox}, SettingError, "strategy=fedprox"),
    ({"strategy": 3}, SettingError, "the name of an option"),
    ({"strategy": fedavg(), "cohort": 2}, SettingError, "cohort is 2"),
    ({"strategy": fedavg(), "settings": {"strategy.weighting": "equal"}}, SettingError, "is an object"),
    ({"rouns": 3}, UsageError, "did you mean rounds"),
    ({"rounds": object()}, SettingError, "rounds is object"),
    ({"callbacks": [print]}, SettingError, "callbacks"),
    ({"callbacks": Callback()}, SettingError, "a list of instances"),
    ({"resume": "nothing"}, FedlearnError, "not a run folder"),
    ({"scenario": "digits", "resume": "nothing"}, SettingError, "scenario is digits"),
    ({"folder": "a", "resume": "b"}, SettingError, "resume names the run folder"),
]


@pytest.mark.parametrize(("arguments", "kind", "text"), WRONG)
def test_a_wrong_argument_is_refused_and_leaves_no_folder(arguments, kind, text, tmp_path):
    with pytest.raises(kind, match=text):
        fedlearn.run(**arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "text"), [({"framework": "jax"}, "framework is jax"), ({"engine": "ray"}, "this process only")]
)
def test_a_setting_that_an_object_contains_is_refused(settings, text):
    with pytest.raises(SettingError, match=text):
        fedlearn.run(my_scenario(), **settings)


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -0.5, 1e-9, "a b", "it's", "x\\", "a\\'b", "${seed}", "%a#b", "", "null", "1", "[a]", "é中",
     ["a", 1, None], {"a b": [1, 2]}, {"x": {"y": "z'"}}],
)  # fmt: skip
def test_a_value_keeps_its_meaning_as_an_override(value):
    (text,) = override_texts({"some.setting": value})
    (parsed,) = parse_override(text)
    assert parsed.value == value
