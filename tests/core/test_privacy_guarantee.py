"""A guarantee has only the values that its mechanism defines; headers and reports omit the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlearn.callbacks.formatting import NO_GUARANTEE, format_privacy_spent, guarantee_parts, limitation_lines
from fedlearn.callbacks.report_tables import privacy_rows
from fedlearn.callbacks.run_results import RunResults
from fedlearn.core.privacy_guarantee import PrivacyGuarantee, Release
from fedlearn.core.privacy_ledger import Epsilon, Ledger
from fedlearn.errors import SettingError


def laplace(**parts):
    """Return the guarantee of a user's Laplace mechanism, without clip norm and Gaussian noise multiplier."""
    return PrivacyGuarantee(
        **{
            "kind": "laplace",
            "unit": "client",
            "adjacency": "one client more or less",
            "charge": lambda ledger, release: ledger,
            "epsilon_of": lambda ledger: Epsilon(pld=1.0, rdp=1.0),
            "delta": 0.0,
            "settings": {"scale": 2.0},
            **parts,
        }
    )


def results(promise, **spent):
    privacy = {**promise.to_json(), "noise": "from the seed", "epsilon": 1.0, "epsilon_rdp": None, **spent}
    empty = {"history": [], "environment": {}, "clients": [], "partition": {}, "config": ""}
    return RunResults(summary={"privacy": privacy, "final": {}}, **empty), privacy


def test_a_mechanism_without_clip_and_gaussian_noise_has_a_header_and_a_report():
    run, privacy = results(laplace())
    line = " ".join([*guarantee_parts(privacy), *(text for _, text in limitation_lines(privacy))])
    assert "laplace: one client more or less" in line
    assert "clip" not in line
    assert "multiplier" not in line
    assert "delta 0" in line
    assert format_privacy_spent(privacy).startswith("epsilon 1 at delta 0")
    rows = dict(privacy_rows(run))
    assert rows["Mechanism"] == "laplace"
    assert "Noise" not in rows
    assert privacy["scale"] == 2.0


def test_a_mechanism_without_an_epsilon_says_so():
    run, privacy = results(laplace(delta=None, epsilon_of=lambda ledger: None), epsilon=None)
    assert guarantee_parts(privacy)[-1] == NO_GUARANTEE
    assert dict(privacy_rows(run))["Epsilon"] == NO_GUARANTEE


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"unit": "user"}, "unit is user"),
        ({"delta": 1.5}, "delta is 1.5"),
        ({"withheld": frozenset({"x"})}, "withheld"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(parts, named):
    with pytest.raises(SettingError, match=named):
        laplace(**parts)


def test_the_round_that_would_overspend_is_refused_with_the_numbers():
    spent = iter([Epsilon(pld=1.9, rdp=1.9), Epsilon(pld=2.4, rdp=2.4)])
    promise = laplace(max_epsilon=2.0, delta=1e-5, epsilon_of=lambda ledger: next(spent))
    reason = promise.refusal_reason(Ledger(), Release(round=3, clients=(0,)))
    assert "round 3 would bring epsilon to 2.4" in reason
    assert "delta 1e-05" in reason


def test_no_module_reads_the_guarantee_by_string():
    for path in Path(__file__).parents[2].joinpath("fedlearn").rglob("*.py"):
        assert "privacy_guarantee.description" not in path.read_text(encoding="utf-8"), path
