"""Cells of held-out rows, which are read again for groups of examples."""

import csv

import numpy as np
import pytest

from fedlearn.errors import DataError, SettingError
from fedlearn.runner.evaluation.subgroups import require_subgroups
from simulations.scenarios.folder import folder


def write_rows(path, count=40):
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["site", "age", "region", "relapse"])
        table.writerows(
            [["ab"[k % 2], k, "" if k % 7 == 0 else f"r{k % 3}", "yes" if k % 5 < 2 else "no"] for k in range(count)]
        )
    return path


def build(path):
    return folder(path=path, target="relapse", client="site", ignore=["region"])


def test_cells_belong_to_the_rows_of_the_test_examples(tmp_path):
    scenario = build(write_rows(tmp_path / "rows.csv"))
    columns = scenario.held_out_columns
    assert columns.names == ("site", "age", "relapse", "region")
    ages, regions, sites = (columns.read(name) for name in ("age", "region", "site"))
    for client, name in scenario.data.names.items():
        number = np.array(ages[client], int)
        assert set(sites[client]) == {name}
        assert regions[client].tolist() == [None if k % 7 == 0 else f"r{k % 3}" for k in number]
        expected = (number % 5 < 2).astype(int)
        assert scenario.data.test(client).y.tolist() == expected.tolist()


def test_an_absent_column_and_changed_files_are_refused_at_the_start(tmp_path):
    path = write_rows(tmp_path / "rows.csv")
    scenario = folder(path=path, target="relapse", client="site")
    with pytest.raises(SettingError, match="subgroups is sex"):
        require_subgroups(scenario, ["sex"])
    write_rows(path, count=30)
    with pytest.raises(DataError, match="30 rows, but they had 40 rows"):
        require_subgroups(scenario, ["region"])
