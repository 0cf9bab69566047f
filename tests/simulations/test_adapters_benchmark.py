"""The benchmarks of adapters: each program trains the same clients, and roles have held-out texts of their own."""

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
from simulations.benchmarks import adapters, roles

SMALL = {"varied": True, "width": 16, "depth": 2, "tuned": 2, "clients": 3, "steps": 1, "precision": "float32"}


def test_a_row_has_the_times_of_all_programs_and_the_difference_of_the_updates(capsys):
    sizes = [word for name, size in SMALL.items() if name != "varied" for word in (f"--{name}", str(size))]
    assert adapters.main(["--shapes", "2x8", "--varied", "--repeat", "1", *sizes]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["shape", "layers", "peft", "alone"]
    assert row.split()[:4] == ["2x8", "2", "of", "2"]


def test_a_plain_loop_gives_the_updates_of_fedlearn():
    from simulations.benchmarks.adapters_torch import Cohort

    cohort = Cohort(batch=4, length=8, cores=1, **SMALL)
    plain, alone, joint = (cohort.programs[name]() for name in adapters.PROGRAMS)
    assert np.abs(plain).max() > 1e-4
    assert np.allclose(plain, alone, atol=1e-5)
    assert np.allclose(alone, joint, atol=1e-5)


@pytest.mark.parametrize("shape", ["8", "0x8", "8x", "axb"])
def test_a_wrong_shape_is_refused(shape, capsys):
    assert adapters.main(["--shapes", shape]) == 2
    assert f"--shapes is {shape}" in capsys.readouterr().err


TEXTS = {f"{play}/{role}": "a line of text\n" * size for play in roles.PLAYS for role, size in (("A", 200), ("B", 60))}


def test_the_last_texts_of_the_longest_roles_are_held_out():
    chosen = roles.longest_roles({**TEXTS, "hamlet/HAMLET": "to be\n" * 900}, 1)
    assert sorted(chosen) == [f"{play}/A" for play in sorted(roles.PLAYS)]
    rows = list(roles.rows_of(chosen, 2000))
    for role in chosen:
        parts = [part for name, _, part in rows if name == role]
        assert parts == sorted(parts, reverse=True)
        assert parts.count("test") == round(roles.TEST_SHARE * len(parts))
    assert all(240 <= len(text.replace("\n", "")) < 260 for _, text, _ in rows)
