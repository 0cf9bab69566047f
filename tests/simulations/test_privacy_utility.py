from __future__ import annotations

import pytest
from needs import needs

from fedlearn.runner.start import main as run
from simulations.analysis.privacy_utility import group_by_epsilon, read_points
from simulations.privacy_utility import main

needs("torch")
needs("dp_accounting")


WORDS = ["-m", "scenario=digits", "partition.num_clients=2", "partition=iid", "rounds=2", "report=false", "num_jobs=1"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Run a sweep of two values of epsilon, two seeds, and a run without privacy."""
    folder = tmp_path_factory.mktemp("sweep")
    private = ["privacy=example", "privacy.epsilon=1,8", "seed=1,2", "local.batch_size=256"]
    assert run([*WORDS, *private, f"hydra.sweep.dir={folder / 'private'}"]) == 0
    assert run([*WORDS, "seed=1,2", f"hydra.sweep.dir={folder / 'bare'}"]) == 0
    return folder


@pytest.mark.slow
def test_every_run_of_a_sweep_is_a_point_and_seeds_belong_together(sweep):
    grouped = group_by_epsilon(read_points([sweep]))
    private, bare = grouped["digits · fedavg · example"], grouped["digits · fedavg · no protection"]
    assert sorted(private) == [1, 8]
    assert {len(values) for values in private.values()} == {2}
    assert list(bare) == [None]
    assert all(0 <= value <= 1 for values in [*private.values(), *bare.values()] for value in values)


@pytest.mark.slow
def test_the_command_draws_a_picture_and_prints_a_table(sweep, capsys):
    assert main([str(sweep)]) == 0
    assert (sweep / "privacy_utility.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "no protection" in shown
    assert len([line for line in shown.splitlines() if line.startswith("digits")]) == 3


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "has no finished run" in capsys.readouterr().err
