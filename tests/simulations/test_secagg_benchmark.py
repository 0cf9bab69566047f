import pytest

pytest.importorskip("Crypto", reason="secure aggregation needs the extra privacy")
from simulations.benchmarks import secagg


def test_a_round_is_measured_stage_by_stage_and_its_sum_checked(capsys):
    assert secagg.main(["clients=7", "length=300", "dropouts=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = [line.split()[0] for line in lines[3:]]
    assert stages == ["advertise", "share", "mask", "confirm", "open", "all"]
    costs = secagg.rehearse(clients=7, length=300, dropouts=1)
    assert [len(seconds) for seconds in costs.client.values()] == [7, 7, 6, 6, 5]
    assert costs.up[secagg.ServerStage.MASK][0] > 4 * 300


@pytest.mark.parametrize("words", [["cohort=3"], ["clients=1"], ["length=big"], ["clients=9", "dropouts=3"]])
def test_a_bad_setting_is_told(words, capsys):
    assert secagg.main(words) == 2
    assert "expected" in capsys.readouterr().err


def test_help_answers(capsys):
    assert secagg.main(["--help"]) == 0
    assert "dropouts=5" in capsys.readouterr().out
