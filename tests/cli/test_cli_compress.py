"""Compression on the command line: fewer bytes, a line in the header, and refused combinations."""

from __future__ import annotations

import json

import pytest
from needs import needs

from fedlearn.runner.start import main

needs("torch")

DIGITS = ["scenario=digits", "partition.num_clients=5", "rounds=2"]


def test_updates_are_counted_as_they_are_written_and_the_header_says_how(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*DIGITS, "compress=topk", "compress.share=0.05", f"hydra.run.dir={folder}"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("compress"))
    assert "topk · share 0.05" in line
    summary = json.loads((folder / "summary.json").read_text())
    whole = 4 * summary["num_parameters"] * summary["client_updates"]
    assert 0.05 * whole < summary["bytes_up"] < 0.07 * whole
    assert (folder / "figures" / "traffic.png").stat().st_size > 5_000
    assert "total number of bytes that clients have sent" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compress=topc"], "did you mean compress=topk"),
        (["compress=topk", "compress.share=2.0"], "compress.share is 2.0"),
        (["compress=topk", "strategy=signsgd"], "one compression"),
        (["compress=topk", "privacy=central", "privacy.noise_multiplier=1", "strategy.weighting=equal"], "lengthen"),
        (["compress=half", "privacy=secagg", "strategy.weighting=equal"], "masked updates"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_a_compression_that_cannot_be_is_refused(words, message, tmp_path, capsys):
    if any(word.startswith("privacy") for word in words):
        pytest.importorskip("dp_accounting", reason="needs fedlearn[privacy]")
    folder = tmp_path / "run"
    assert main([*words, f"hydra.run.dir={folder}"]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_noise_at_the_client_may_be_compressed_and_so_may_a_clip_that_nothing_lengthens(tmp_path):
    pytest.importorskip("dp_accounting", reason="needs fedlearn[privacy]")
    local = ["privacy=local", "privacy.noise_multiplier=1", "compress=eden"]
    central = ["privacy=central", "privacy.noise_multiplier=1", "compress=topk", "compress.error_feedback=false"]
    for name, words in (("local", local), ("central", central)):
        common = [*DIGITS, "strategy.weighting=equal", "report=false", f"hydra.run.dir={tmp_path / name}"]
        assert main([*common, *words]) == 0
        assert json.loads((tmp_path / name / "summary.json").read_text())["epsilon"] > 0
