"""The callback for TensorBoard writes each metric once per round, also in a resumed run."""

from __future__ import annotations

import struct

import pytest

from fedlearn.callbacks import tensorboard
from fedlearn.runner.start import main
from simulations.resume import main as resume

WORDS = ["scenario=diabetes", "callbacks=[tensorboard]", "report=false", "hydra.run.dir=run"]


def events(folder):
    """Return the events of a folder, in the order of their files."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((folder / tensorboard.FOLDER).iterdir()):
        content = path.read_bytes()
        while content:  # length, checksum, event, checksum
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_a_resumed_run_continues_the_same_curves(here):
    pytest.importorskip("tensorboardX")
    pytest.importorskip("torch")
    assert main([*WORDS, "rounds=2"]) == 0
    assert resume(["run", "rounds=3"]) == 0
    values = [(event.step, value.tag) for event in events(here / "run") for value in event.summary.value]
    assert [step for step, tag in values if tag == "test/loss"] == [1, 2, 3]
    assert (0, "settings/text_summary") in values
    assert [step for step, tag in values if tag == "_hparams_/session_start_info"] == [0, 0]
    assert any(event.session_log.status == 1 and event.step == 3 for event in events(here / "run"))


@pytest.mark.slow
def test_a_run_writes_its_figures_and_its_settings_with_final_metrics(here):
    pytest.importorskip("tensorboardX")
    pytest.importorskip("torch")
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    assert main([*WORDS, "report=true", "rounds=2", "strategy=fedprox"]) == 0
    values = {value.tag: (event.step, value) for event in events(here / "run") for value in event.summary.value}
    images = {tag: found for tag, found in values.items() if tag.startswith("figures/")}
    assert set(images) == {f"figures/{path.stem}" for path in (here / "run" / "figures").iterdir()}
    for step, value in images.values():
        assert step == 2
        assert value.image.encoded_image_string.startswith(b"\x89PNG")
        assert min(value.image.width, value.image.height) > 100
    assert values["report/text_summary"][0] == 2
    content = values["_hparams_/session_start_info"][1].metadata.plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["strategy"].string_value == "fedprox"
    assert settings["strategy.mu"].number_value == 0.1
    experiment = HParamsPluginData.FromString(values["_hparams_/experiment"][1].metadata.plugin_data.content)
    assert {"test/rmse", "test/loss"} <= {info.name.tag for info in experiment.experiment.metric_infos}


def test_a_missing_extra_is_named_before_the_run(here, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    assert main(WORDS) == 2
    assert "pip install 'fedlearn[tensorboard]'" in capsys.readouterr().err
    assert not any(here.iterdir())
