from __future__ import annotations

import numpy as np
import pytest
from needs import needs

from fedlearn.core.metrics import combine_evaluations, evaluate, evaluate_client
from fedlearn.core.records import Predictions
from fedlearn.core.tasks import TASKS
from fedlearn.errors import SettingError

needs("torch")
torchmetrics = pytest.importorskip("torchmetrics")

from fedlearn.trainers.torch.torch_metrics import from_torchmetrics  # noqa: E402


def test_a_metric_of_torchmetrics_leaves_a_node_as_sums():
    kappa = from_torchmetrics("kappa", torchmetrics.CohenKappa(task="multiclass", num_classes=4), higher_is_better=True)
    task, rng = TASKS["multiclass"].with_metrics([kappa]), np.random.default_rng(0)
    parts = [Predictions(client=k, outputs=rng.normal(size=(30, 4)), targets=rng.integers(0, 4, 30)) for k in range(3)]
    expected = evaluate(parts, task=task)
    found = combine_evaluations([evaluate_client(part, task=task) for part in parts], task=task)
    together = [np.concatenate(arrays) for arrays in zip(*((p.outputs, p.targets) for p in parts), strict=True)]
    from sklearn.metrics import cohen_kappa_score

    oracle = cohen_kappa_score(together[1], together[0].argmax(axis=1))
    assert expected.pooled["kappa"] == pytest.approx(oracle, abs=1e-6)
    assert found.pooled["kappa"] == pytest.approx(oracle, abs=1e-6)
    np.testing.assert_array_equal(found.per_client["kappa"], expected.per_client["kappa"])


def test_a_metric_that_keeps_all_outputs_is_refused():
    with pytest.raises(SettingError, match="a sum over examples"):
        from_torchmetrics("auroc", torchmetrics.AUROC(task="binary"))
