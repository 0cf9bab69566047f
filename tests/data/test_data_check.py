"""Each kind of fault is flagged when it is planted, and clean tables have few flags."""

from __future__ import annotations

import shlex
from functools import cache

import numpy as np
import pytest
from sklearn import datasets

from fedlearn.advice import assignment
from fedlearn.data.data_check import CheckSettings, DataCheck, check_data
from fedlearn.data.data_check.inspection import inspect_path
from fedlearn.data.data_check.records import FLAG_KINDS
from fedlearn.data.data_check.typed_columns import type_leniently
from fedlearn.data.table_settings import TableSettings
from fedlearn.data.tables import table_from_columns
from fedlearn.data.typed_tables import Reading

NUM_ROWS = 400
SITES = ("lyon", "nice", "paris", "rome")


def clean(num_rows=NUM_ROWS, seed=0):
    """Return columns without a fault, and the site of each row."""
    rng = np.random.default_rng(seed)
    age = rng.normal(60, 12, num_rows).round()
    columns = {
        "age": age,
        "glucose": rng.lognormal(1.7, 0.2, num_rows).round(2),
        "bmi": rng.normal(25, 4, num_rows).round(1),
        "smoker": rng.choice(["never", "former", "current"], num_rows).astype(object),
        "sick": np.where(age + rng.normal(0, 12, num_rows) > 60, "yes", "no").astype(object),
    }
    return columns, np.array(SITES, object)[rng.integers(0, len(SITES), num_rows)]


def check(columns, sites=None, **settings):
    settings = {"targets": ("sick",), **settings}
    typed = type_leniently(table_from_columns(columns), Reading(texts=[settings.get("client")]))
    return check_data(typed, CheckSettings(**settings), source="test", clients_N=sites)


def kinds(result):
    return {(flag.kind, flag.column) for flag in result.flags}


def at(columns, name, mask, change):
    cells = columns[name].copy()
    cells[mask] = change(cells[mask])
    return {**columns, name: cells}


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 40))])
def test_a_clean_table_has_no_flag(seed):
    columns, sites = clean(seed=seed)
    assert check(columns, sites).flags == ()
    assert check(columns).flags == ()


CHANGES_OF_UNIT = {
    "mg/dL": lambda v: v * 18.016,
    "creatinine": lambda v: v * 88.4,
    "lb": lambda v: v * 2.2046,
    "inch": lambda v: v / 2.54,
    "per mille": lambda v: v / 1000,
    "unknown factor": lambda v: v * 4.7,
}


@pytest.mark.parametrize("unit", CHANGES_OF_UNIT)
@pytest.mark.parametrize("num_sites", [1, 2])
def test_another_unit_at_some_sites_is_flagged(unit, num_sites):
    columns, sites = clean()
    wrong = SITES[:num_sites]
    result = check(at(columns, "glucose", np.isin(sites, wrong), CHANGES_OF_UNIT[unit]), sites)
    [flag] = [flag for flag in result.flags if flag.kind == "units"]
    assert flag.column == "glucose"
    assert set(flag.sites) in ({*wrong}, {*SITES} - {*wrong})


@pytest.mark.parametrize("change", [lambda v: v * 1.8 + 32, lambda v: v + 273.15])
def test_another_scale_of_temperature_is_flagged(change):
    columns, sites = clean()
    columns["temperature"] = np.random.default_rng(5).normal(37.2, 0.8, NUM_ROWS).round(1)
    assert check(columns, sites).flags == ()
    result = check(at(columns, "temperature", sites == "nice", change), sites)
    assert kinds(result) == {("units", "temperature")}


@pytest.mark.parametrize("factor", [0.8, 1.25, 1.5])
def test_sites_that_differ_as_sites_do_have_no_flag(factor):
    columns, sites = clean()
    assert not {"units"} & {
        k for k, _ in kinds(check(at(columns, "bmi", sites == "nice", lambda v: v * factor), sites))
    }


SPELLINGS = {"case": "Never", "spaces": "ne ver", "accents": "névér", "typing error": "nevre", "points": "never."}


@pytest.mark.parametrize("name", SPELLINGS)
def test_levels_that_differ_in_spelling_are_flagged(name):
    columns, sites = clean()
    changed = at(columns, "smoker", (sites == "nice") & (columns["smoker"] == "never"), lambda v: SPELLINGS[name])
    assert {("spelling", "smoker"), ("levels by site", "smoker")} <= kinds(check(changed, sites))


@pytest.mark.parametrize(
    "levels",
    [("ward1", "ward2", "ward3"), ("A+", "A-", "0+"), ("type a", "type b"), ("male", "female"), ("10-20", "20-30")],
)
def test_different_levels_are_not_flagged(levels):
    columns, sites = clean()
    columns["smoker"] = np.random.default_rng(1).choice(levels, NUM_ROWS).astype(object)
    assert check(columns, sites).flags == ()


def test_spelling_of_classes_and_clients_is_flagged():
    columns, sites = clean()
    columns = at(columns, "sick", (sites == "rome") & (columns["sick"] == "yes"), lambda v: "Yes")
    columns["site"] = np.where(np.arange(NUM_ROWS) % 7, sites, np.char.upper(sites.astype(str))).astype(object)
    found = kinds(check(columns, columns["site"], client="site"))
    assert {("spelling", "sick"), ("spelling", "site")} <= found


@cache
def planted():
    """Return name -> (columns, sites, expected flag), with one planted fault each."""
    columns, sites = clean()
    rng = np.random.default_rng(2)
    rows = np.arange(NUM_ROWS)
    is_sick = (columns["sick"] == "yes").astype(float)
    few = rows % 50 == 0
    text = np.array([f"{v:g}" for v in columns["age"]], object)
    varied = rng.integers(0, 3, NUM_ROWS)
    repeated = np.concatenate([rows, rows[sites == "nice"][:12]])
    longer = {name: cells[repeated] for name, cells in columns.items()}
    other = np.where(longer["sick"] == "yes", "no", "yes")
    contradicting = {**longer, "sick": np.where(np.arange(len(repeated)) < NUM_ROWS, longer["sick"], other)}
    rare = at(columns, "sick", rows % 20 > 0, lambda v: "no")
    unequal = at(columns, "sick", (sites == "rome") & (rows % 16 > 0), lambda v: "no")

    def plus(name, cells):
        return {**columns, name: np.asarray(cells)}, sites, name

    return {
        "leak as number": ("leakage", *plus("code", is_sick * 2 + 1)),
        "leak as text": ("leakage", *plus("code", np.where(is_sick, "I", "H").astype(object))),
        "leak with errors": ("leakage", *plus("code", np.where(rows % 200 == 0, 1 - is_sick, is_sick))),
        "leak by threshold": ("leakage", *plus("score", is_sick + rng.uniform(0, 0.9, NUM_ROWS))),
        "constant": ("constant", *plus("country", ["FR"] * NUM_ROWS)),
        "constant number": ("constant", *plus("version", np.full(NUM_ROWS, 3e-9))),
        "constant at a site": ("constant at a site", *plus("flag", np.where(sites == "rome", 0, varied))),
        "empty": ("empty column", *plus("note", [""] * NUM_ROWS)),
        "identifier as text": ("identifier", *plus("key", [f"P{i:06d}" for i in rows])),
        "identifier as number": ("identifier", *plus("nr", rng.permutation(NUM_ROWS) + 1000)),
        "long identifier": ("identifier", *plus("mrn", [f"{9000000000000000000 + 7919 * i}" for i in rows])),
        "identifier of persons": ("identifier", *plus("patient_id", rng.integers(1, 300, NUM_ROWS))),
        "date": ("date", *plus("seen", [f"2025-{i % 12 + 1:02d}-{i % 28 + 1:02d}" for i in rows])),
        "date in German": ("date", *plus("seen", [f"{i % 28 + 1:02d}.{i % 12 + 1:02d}.2025" for i in rows])),
        "date as number": ("date", *plus("seen", [20250101 + 100 * (i % 12) + i % 28 for i in rows])),
        "Unix time": ("date", *plus("timestamp", 1.7e9 + 977 * rows)),
        "free text": ("free text", *plus("report", [f"the patient no {i} felt some pain today" for i in rows])),
        "many levels": ("many levels", *plus("icd", [f"K{i % 150}" for i in rows])),
        "marker": ("missing markers", *plus("stage", np.where(few, "unknown", rng.choice(["low", "high"], NUM_ROWS)))),
        "marker in numbers": ("missing markers", *plus("weight", np.where(few, "-", text))),
        "text in numbers": ("not numbers", *plus("weight", np.where(few, "heavy", text))),
        "-999": ("placeholder numbers", *plus("weight", np.where(few, -999, columns["age"]))),
        "9999": ("placeholder numbers", *plus("weight", np.where(few, 9999, columns["age"]))),
        "1e300": ("placeholder numbers", *plus("weight", np.where(rows == 7, 1e300, columns["age"]))),
        "-1": ("placeholder numbers", *plus("weight", np.where(few, -1, columns["age"]))),
        "0": ("placeholder numbers", *plus("pressure", np.where(few, 0, columns["bmi"] + 50))),
        "outlier": ("outliers", *plus("weight", np.where(rows == 7, 5e4, columns["age"]))),
        "missing at a site": ("missing by site", *plus("lab", np.where(sites == "rome", np.nan, columns["bmi"] / 3))),
        "mostly missing": ("missing by site", *plus("lab", np.where(rows % 10, np.nan, columns["bmi"] / 3))),
        "level at a site": ("levels by site", *plus("ward", np.where((sites == "nice") & (rows % 2 == 0), "X", "Y"))),
        "coded level": ("levels by site", *plus("sex", rng.integers(0, 2, NUM_ROWS) + (sites == "nice"))),
        "class at a site": ("classes by site", at(columns, "sick", sites == "rome", lambda v: "no"), sites, "sick"),
        "shares by site": ("imbalance", unequal, sites, "sick"),
        "rare class": ("imbalance", rare, sites, "sick"),
        "small site": ("rows by site", columns, np.where(rows < 3, "mini", "big").astype(object), ""),
        "across sites": ("duplicates across sites", longer, np.append(sites, ["rome"] * 12), ""),
        "inside a site": ("duplicates", longer, np.append(sites, ["nice"] * 12), ""),
        "contradiction": ("contradictions", contradicting, np.append(sites, ["nice"] * 12), ""),
    }


@pytest.mark.parametrize("name", planted())
def test_a_planted_fault_is_flagged(name):
    kind, columns, sites, column = planted()[name]
    result = check(columns, sites)
    assert (kind, column) in kinds(result)
    assert {flag.kind for flag in result.flags} <= {*FLAG_KINDS}
    assert DataCheck.from_json(result.to_json()) == result


def test_all_faults_are_flagged_at_once():
    faults = planted()
    added = [name for name, (_, columns, _, column) in faults.items() if column and column != "sick"]
    columns, sites = clean()
    for name in added:
        columns |= {name: faults[name][1][faults[name][3]]}
    found = {column for _, column in kinds(check(columns, sites))}
    assert {*added} - found <= {"identifier of persons"}  # the name of this column is part of the rule


def test_each_flag_has_advice_that_keeps_earlier_settings():
    columns, sites = clean()
    columns |= {"patient id": np.arange(NUM_ROWS), "old": np.arange(NUM_ROWS)}
    [flag] = check(columns, sites, ignore=("old",)).flags
    assert shlex.split(flag.advice) == ['scenario.ignore=[old,"patient id"]']


@pytest.mark.parametrize("name", ["wine", "breast_cancer", "iris", "diabetes"])
@pytest.mark.parametrize("num_sites", [None, 3])
def test_public_tables_have_no_flag(name, num_sites):
    bunch = getattr(datasets, f"load_{name}")()
    columns = dict(zip(bunch.feature_names, bunch.data.T, strict=True)) | {"y": bunch.target}
    sites = (
        None if num_sites is None else np.random.default_rng(0).integers(0, num_sites, len(bunch.target)).astype(str)
    )
    assert check(columns, sites, targets=("y",)).flags == ()


def test_a_large_table_is_checked_in_a_sample_of_each_site():
    columns, _ = clean(num_rows=60_000)
    sites = np.where(np.arange(60_000) < 150, "small", "large").astype(object)
    result = check(columns, sites)
    assert result.is_sample
    assert result.num_checked < 50_000
    assert result.rows_by_site == {"large": 59_850, "small": 150}
    small = next(site for site in result.columns[0].sites if site.site == "small")
    assert small.num_rows == 150
    assert check(columns, sites, is_sampled=False).num_checked == 60_000


def images(path, *, change=lambda site, array: array):
    """Write images of two sites and two classes, with files named train and test."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for number in range(48):
        site, split, label = SITES[number % 2], ("train", "test")[number // 2 % 2], ("cat", "dog")[number // 4 % 2]
        file = path / site / split / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(change(site, rng.integers(0, 256, (12, 12), dtype=np.uint8))).save(file)
    return path


def as_colour(site, array):
    return np.stack([array] * 2 + [array[::-1]], axis=-1) if site == "nice" else array


def as_tall(site, array):
    return array[:, :9] if site == "nice" else array


def as_deep(site, array):
    return array.astype(np.uint16) * 200 if site == "nice" else array


def copy(path, source, target):
    (path / target).write_bytes((path / source).read_bytes())


IMAGE_FAULTS = {
    "image sizes": lambda path: images(path, change=as_tall),
    "image channels": lambda path: images(path, change=as_colour),
    "image depth": lambda path: images(path, change=as_deep),
    "unreadable": lambda path: (images(path) / "lyon/train/cat/bad.png").write_bytes(b"no image"),
    "duplicates": lambda path: [
        copy(images(path), "lyon/train/cat/0.png", f"lyon/train/cat/c{i}.png") for i in range(3)
    ],
    "duplicates across splits": lambda path: [
        copy(images(path), f"lyon/train/cat/{8 * i}.png", f"lyon/test/cat/c{i}.png") for i in range(3)
    ],
    "duplicates across sites": lambda path: [
        copy(images(path), f"lyon/train/cat/{8 * i}.png", f"nice/train/cat/c{i}.png") for i in range(3)
    ],
    "contradictions": lambda path: [
        copy(images(path), f"lyon/train/cat/{8 * i}.png", f"lyon/train/dog/c{i}.png") for i in range(3)
    ],
}


def test_clean_images_have_no_flag(tmp_path):
    assert inspect_path(str(images(tmp_path)), TableSettings()).check.flags == ()


@pytest.mark.parametrize("kind", IMAGE_FAULTS)
def test_a_planted_fault_of_images_is_flagged(kind, tmp_path):
    IMAGE_FAULTS[kind](tmp_path)
    result = inspect_path(str(tmp_path), TableSettings()).check
    assert kind in {flag.kind for flag in result.flags}
    assert result.unit == "images"


def test_damaged_images_are_listed(tmp_path):
    images(tmp_path)
    for name in ("a.png", "b.png"):
        (tmp_path / "lyon/train/cat" / name).write_bytes(b"no image")
    whole = (tmp_path / "lyon/train/cat/0.png").read_bytes()
    (tmp_path / "lyon/train/cat/cut.png").write_bytes(whole[: len(whole) // 2])
    [flag] = inspect_path(str(tmp_path), TableSettings()).check.flags
    assert flag.rows == tuple(f"lyon/train/cat/{name}.png" for name in ("a", "b", "cut"))
    assert flag.advice == "scenario.skip_damaged=true"


def test_a_declared_class_is_no_marker_and_other_markers_are_counted():
    severity = np.array(["None", "Mild", "NA", "-"] * 30, object)
    table = table_from_columns({"x": np.arange(120) % 7, "severity": severity})
    levels = {"severity": ["None", "Mild", "-"]}
    typed = type_leniently(table, Reading(levels=levels, targets=["severity"]))
    assert typed.markers == {"severity": {"NA": 30}}
    settings = CheckSettings(targets=("severity",), categories=tuple(levels))
    assert {flag.kind for flag in check_data(typed, settings, source="test").flags} == {"missing by site"}


def test_many_flags_of_a_kind_are_shown_as_a_single_flag():
    columns, sites = clean()
    columns |= {f"c{number}": np.full(NUM_ROWS, "x") for number in range(40)}
    result = check(columns, sites, ignore=("age",))
    assert len(result.flags) == 40
    [flag] = result.short_flags
    assert flag.advice == assignment("scenario.ignore", ["age", *(f"c{number}" for number in range(40))])
