"""The paragraph on privacy is true for each mechanism, and for none."""

import math
import re

import pytest

from fedlearn.callbacks.privacy_text import privacy_paragraph
from fedlearn.core.privacy_guarantee import PrivacyGuarantee
from fedlearn.core.privacy_ledger import Ledger
from fedlearn.core.records import LocalSettings
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.privacy.mechanisms.central_dp import central
from fedlearn.privacy.mechanisms.dp_ftrl import ftrl
from fedlearn.privacy.mechanisms.dp_sgd import example
from fedlearn.privacy.mechanisms.local_dp import local
from fedlearn.privacy.mechanisms.secure_aggregation import distributed, secagg
from strategies import fedavg

MECHANISMS = {
    "example": example(noise_multiplier=1.0),
    "central": central(noise_multiplier=1.0),
    "ftrl": ftrl(matrix="tree", noise_multiplier=1.0),
    "local": local(noise_multiplier=1.0),
    "secagg": secagg(),
    "distributed": distributed(noise_multiplier=1.0),
}
POPULATION = Population(clients=range(20), rounds=2, num_examples_of=lambda client: 50)


def paragraph(kind, epsilon=3.0, **changes):
    strategy = fedavg(clients_per_round=10, weighting="equal")
    protected, _ = MECHANISMS[kind].protect(strategy, LocalSettings(), POPULATION)
    privacy = {**protected.privacy_guarantee.to_json(), "epsilon": epsilon, "epsilon_rdp": None, **changes}
    return privacy_paragraph(privacy, is_simulation=False)


@pytest.mark.parametrize("kind", MECHANISMS)
def test_the_paragraph_names_unit_parties_and_limits(kind):
    text, has_epsilon = paragraph(kind), kind != "secagg"
    assert ("one example" in text) == (kind == "example")
    assert ("contribution of one client" in text) == (has_epsilon and kind != "example")
    assert ("and against the coordinator" in text) == (kind in ("example", "local", "distributed"))
    assert ("does not protect against the coordinator" in text) == (kind in ("central", "ftrl"))
    assert ("only sums" in text) == (kind in ("secagg", "distributed"))
    assert ("epsilon 3 at delta 1e-05" in text) == has_epsilon
    assert ("no differential privacy" in text) == (not has_epsilon)
    assert "The protection does not cover: " in text
    assert "evaluation" in text


def test_the_factor_is_the_exponential_of_epsilon_rounded_up():
    for epsilon in (0.1, 1.0, 3.0, 8.0, 20.0):
        factor = float(re.search(r"at most (\S+) times", paragraph("central", epsilon))[1])
        assert math.exp(epsilon) <= factor <= 1.02 * math.exp(epsilon)
    assert "the protection is weak" in paragraph("central", 20.0)
    assert "weak" not in paragraph("central", 8.0)


def test_an_unbounded_epsilon_is_no_guarantee():
    assert "there is no guarantee" in paragraph("central", None)
    assert "at most" not in paragraph("central", None)
    assert "at most 1 times" in paragraph("central", 0.0)


@pytest.mark.parametrize("privacy", [None, {}])
def test_a_run_without_a_mechanism_is_not_called_private(privacy):
    text = privacy_paragraph(privacy, is_simulation=False)
    assert "No privacy mechanism protected this run" in text
    assert "can reveal information" in text
    assert "simulation" not in text
    assert "This run was a simulation" in privacy_paragraph(privacy, is_simulation=True)


def test_a_mechanism_of_the_user_is_described_by_its_attributes():
    guarantee = PrivacyGuarantee(
        kind="mine",
        unit="client",
        adjacency="one client more or less",
        charge=lambda ledger, release: ledger,
        epsilon_of=lambda ledger: None,
        initial_ledger=Ledger(),
        delta=0.0,
        holds_against_server=True,
    )
    text = privacy_paragraph({**guarantee.to_json(), "epsilon": 1.0}, is_simulation=False)
    assert "one client more or less" in text
    assert "against the coordinator" in text
    assert "does not cover" not in text
