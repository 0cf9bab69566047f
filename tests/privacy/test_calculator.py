"""``python -m fedlearn.privacy.calculator`` answers planning questions without a run."""

import subprocess
import sys

import pytest
from needs import needs

from fedlearn.privacy.calculator import PrivacyQuery, main, result_rows, solve

needs("dp_accounting", reason="needs fedlearn[privacy]")


WORDS = ["clients=10000", "cohort=100", "delta=1e-5"]


def test_any_of_the_three_is_found_from_the_other_two(capsys):
    assert main([*WORDS, "rounds=1000", "epsilon=1"]) == 0
    (shown,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("epsilon  "))
    assert float(shown.split()[1]) == pytest.approx(1.0, rel=1e-3)
    asked = {"clients": 10000, "cohort": 100, "delta": 1e-5}
    noise = solve(PrivacyQuery(**asked, rounds=1000, epsilon=1.0)).noise_multiplier
    assert noise == pytest.approx(1.414631, rel=1e-3)
    assert solve(PrivacyQuery(**asked, rounds=1000, noise_multiplier=noise)).epsilon.value == pytest.approx(
        1.0, rel=1e-3
    )
    assert solve(PrivacyQuery(**asked, epsilon=1.8283, noise_multiplier=1.0)).rounds == 1000


def test_sampling_laws_differ_and_the_table_says_which(capsys):
    asked = {"clients": 100, "cohort": 10, "delta": 1e-3, "rounds": 200, "noise_multiplier": 2.0}
    costs = {law: solve(PrivacyQuery(**asked, sampling=law)).epsilon for law in ("poisson", "fixed_size", "none")}
    assert costs["poisson"].rdp == pytest.approx(2.647232, rel=1e-3)
    assert costs["fixed_size"].value == pytest.approx(8.4324, rel=1e-3)
    assert costs["none"].rdp == pytest.approx(49.405968, rel=1e-3)
    rows = dict(result_rows(PrivacyQuery(**asked, sampling="fixed_size")))
    assert rows["adjacency"] == "one client's data replaced"
    assert rows["epsilon"] == "8.43237"
    assert "warning" in dict(result_rows(PrivacyQuery(**(asked | {"delta": 0.01}))))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*WORDS, "rounds=10"], "exactly two of epsilon, noise_multiplier and rounds"),
        ([*WORDS, "rounds=10", "epsilon=1", "noise_multiplier=1"], "without"),
        ([*WORDS, "round=10", "epsilon=1"], "rounds=10"),
        ([*WORDS, "rounds=ten", "epsilon=1"], "a whole number"),
        ([*WORDS, "rounds=10", "epsilon=nan"], "finite number > 0"),
        ([*WORDS, "rounds=10", "noise_multiplier=0"], "finite number > 0"),
        (["clients=10", "cohort=20", "delta=1e-5", "rounds=1", "epsilon=1"], "from 1 to clients=10"),
        (["clients=10", "cohort=2", "delta=1", "rounds=1", "epsilon=1"], "(0, 1)"),
        (["clients=10", "cohort=2", "rounds=1", "epsilon=1"], "delta is missing"),
        ([*WORDS, "epsilon=0.001", "noise_multiplier=0.5"], "the cost of one round"),
    ],
)
def test_a_question_without_an_answer_says_what_to_change(words, says, capsys):
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_the_plot_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs fedlearn[report]")
    picture = tmp_path / "plan.png"
    words = ["clients=100", "cohort=10", "rounds=10", "epsilon=5", "delta=1e-3", "sampling=none"]
    assert main([*words, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


@pytest.mark.process
def test_it_is_a_command():
    asked = [
        sys.executable,
        "-m",
        "fedlearn.privacy.calculator",
        *WORDS,
        "rounds=10",
        "noise_multiplier=4",
        "sampling=none",
    ]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=True)
    assert "noise multiplier   4" in done.stdout
