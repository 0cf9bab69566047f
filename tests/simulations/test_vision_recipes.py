"""Recipes of images and of intensive care compose, have existing settings, and state the metric that they reach."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hydra.utils import get_object

from fedlearn.data.partition import partition_rows
from fedlearn.runner.compose import CONF_DIR, compose
from fedlearn.runner.instantiation import build
from fedlearn.runner.start import parse_args

RECIPES = {
    "pneumonia_fedavgm": ("pneumonia", "0.93, and 0.95 with pooled X-rays"),
    "pneumonia_central": ("pneumonia", "The target AUC is 0.95"),
    "icu_mortality_fedavg": ("icu_mortality", "The target AUROC is"),
    "mnist_fedavg": ("mnist", "Published"),
    "mnist_dp_sgd": ("mnist", "Accuracy that Opacus publishes"),
    "fashion_central_dp": ("mnist", "Accuracy (seed 1)"),
    "cifar10_fedadam": ("cifar10", "Published test accuracy"),
    "cifar10_fedavg": ("cifar10", "0.511 (seed 1)"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_composes_and_states_its_number(name):
    scenario, says = RECIPES[name]
    (job,) = compose(parse_args([f"experiment={name}"]))
    chosen = dict(job.cfg.scenario)
    builder = get_object(chosen.pop("_target_"))
    assert builder.__name__ == scenario
    assert chosen.keys() <= inspect.signature(builder).parameters.keys()
    assert says in (CONF_DIR / "experiment" / f"{name}.yaml").read_text()


def test_500_clients_of_cifar10_have_100_images_each():
    (job,) = compose(parse_args(["experiment=cifar10_fedadam"]))
    rows = partition_rows(build(job.cfg.partition, "partition"), np.arange(50_000) % 10)
    assert [len(rows_k) for rows_k in rows] == 500 * [100]
