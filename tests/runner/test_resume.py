"""Errors for the run folder of another version of fedlearn."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from fedlearn.errors import CheckpointError
from fedlearn.runner.resume import resume
from fedlearn.runner.trained_model import load_trained_model


@pytest.mark.parametrize("read", [resume, load_trained_model])
def test_a_run_of_an_earlier_version_is_refused_before_its_settings_are_read(tmp_path, read):
    (tmp_path / "config.yaml").write_text("strategy:\n  _target_: strategies.gone\n")
    (tmp_path / "checkpoints").mkdir()
    content = save({"params": np.zeros(3, np.float32)}, metadata={"fedlearn": json.dumps({"version": 4})})
    (tmp_path / "checkpoints" / "round_000001.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"(?s)cannot read .*not 4\n  advice    resume with .* new run"):
        read(tmp_path)
