"""The privacy loss of a tuning, against accountants and formulas that are not those of the project."""

import json
import math

import pytest

from fedlearn.core.privacy_ledger import Event, Ledger
from fedlearn.errors import FedlearnError
from fedlearn.runner.tuning.privacy_total import LEDGER_FILE, Charge, read_charges, total_privacy

DELTA = 1e-5


def _central(noise, rounds, *, is_complete=True, **sampling):
    return Charge(Ledger().charge_federation(Event(noise, **sampling), rounds), is_complete)


def _gaussian_delta(mu, epsilon):
    """Return delta of a Gaussian mechanism with sensitivity ``mu`` times the noise (Balle and Wang 2018, theorem 8)."""

    def normal(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    return normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)


def test_equal_runs_are_composed_like_one_gaussian_release():
    total = total_privacy([_central(2.0, 5), _central(2.0, 5), _central(2.0, 3, is_complete=False)], delta=DELTA)
    mu = math.sqrt(15) / 2
    assert (total.rule, total.num_runs) == ("composition", 3)
    assert _gaussian_delta(mu, total.epsilon) <= DELTA
    assert _gaussian_delta(mu, 0.999 * total.epsilon) > DELTA


def test_sampled_runs_agree_with_the_accountant_of_dp_accounting():
    accounting = pytest.importorskip("dp_accounting")
    from dp_accounting import pld

    total = total_privacy([_central(1.2, 40, sampling="poisson", rate=0.1) for _ in range(4)], delta=DELTA)
    event = accounting.SelfComposedDpEvent(accounting.PoissonSampledDpEvent(0.1, accounting.GaussianDpEvent(1.2)), 160)
    independent = pld.PLDAccountant().compose(event).get_epsilon(DELTA)
    assert total.epsilon == pytest.approx(independent, rel=2e-3)


def test_noise_that_differs_between_runs_is_added():
    runs = [_central(2.0, 5), _central(1.0, 5)]
    total = total_privacy(runs, delta=DELTA)
    apart = [total_privacy([run], delta=DELTA / 2).epsilon for run in runs]
    assert (total.rule, total.epsilon) == ("sum", pytest.approx(sum(apart)))
    assert total.epsilon > total_privacy([_central(1.0, 5), _central(1.0, 5)], delta=DELTA).epsilon - 1


def test_a_client_pays_for_its_own_rounds_in_all_runs():
    event = Event(1.5)
    run = Charge(Ledger().charge_clients({0: (event, 4), 1: (event, 1)}))
    total = total_privacy([run, run], delta=DELTA)
    assert total.epsilon == pytest.approx(total_privacy([_central(1.5, 8)], delta=DELTA).epsilon)


@pytest.mark.parametrize(
    "other",
    [_central(2.0, 4), _central(2.0, 6, is_complete=False), Charge(Ledger().charge_clients({0: (Event(2.0), 5)}))],
)
def test_a_number_of_releases_that_the_search_chose_is_no_composition(other):
    """Add the epsilons, as a search over ``rounds`` needs it."""
    runs = [_central(2.0, 5), _central(2.0, 5), other]
    total = total_privacy(runs, delta=DELTA)
    apart = [total_privacy([run], delta=DELTA / 3).epsilon for run in runs]
    assert (total.rule, total.epsilon) == ("sum", pytest.approx(sum(apart)))


def test_runs_without_releases_cost_nothing():
    assert total_privacy([], delta=DELTA).epsilon == 0
    assert total_privacy([Charge(Ledger())], delta=DELTA).num_runs == 0


def test_ledgers_of_all_folders_are_read_and_a_damaged_one_is_refused(tmp_path):
    for name in ("0_a", "0_a-2", "default"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LEDGER_FILE).write_text(json.dumps(_central(1.0, 2).ledger.to_json()))
    (tmp_path / "default" / "summary.json").write_text('{"status": "done"}')
    assert [charge.is_complete for charge in read_charges(tmp_path)] == [False, False, True]
    (tmp_path / "default" / LEDGER_FILE).write_text("{}")
    with pytest.raises(FedlearnError, match="cannot be read"):
        read_charges(tmp_path)
