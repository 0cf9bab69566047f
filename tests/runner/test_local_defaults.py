"""Defaults of local training: chosen by model and inputs, stated, and always replaced by the settings of the user."""

import numpy as np
import pytest

from fedlearn.algorithm.local_rule import LocalRule
from fedlearn.loop.local_defaults import LocalDefaults
from fedlearn.runner.local_defaults import automatic_settings, describe_training, resolve_auto
from fedlearn.runner.local_training import build_local
from simulations.scenarios.folder_defaults import folder_defaults

AUTO = {"optimizer": "auto", "learning_rate": "auto", "max_grad_norm": "auto"}
PLAIN = LocalRule()


def resolved(scenario, rule=PLAIN, *, clips_examples=False, **local):
    settings = {**AUTO, **local}
    values = resolve_auto(settings, folder_defaults(scenario), rule=rule, clips_examples=clips_examples)
    return build_local(values, allow=[])


def test_defaults_follow_from_model_and_inputs():
    assert resolved({"model": "mlp"}).optimizer == "adam"
    assert resolved({"model": "linear"}).optimizer == "sgd"
    assert resolved({"model": "mlp", "text": "comment"}).learning_rate < resolved({"model": "mlp"}).learning_rate
    assert resolved({"model": {"_target_": "my.Net"}}).learning_rate < resolved({"model": "mlp"}).learning_rate
    assert resolved({"model": "mlp"}).max_grad_norm == 1.0


@pytest.mark.parametrize("value", [{"optimizer": "rmsprop"}, {"learning_rate": 0.5}, {"max_grad_norm": None}], ids=str)
def test_a_setting_of_the_user_replaces_the_default(value):
    local = resolved({"model": "mlp"}, **value)
    (name,) = value
    assert getattr(local, name) == value[name]


def test_the_learning_rate_follows_from_the_optimizer():
    assert resolved({"model": "mlp"}, optimizer="sgd").learning_rate == 0.1
    for optimizer in ("adamw", {"name": "adam", "eps": 1e-6}, {"_target_": "torch.optim.RAdam"}):
        values = resolve_auto({**AUTO, "optimizer": optimizer}, folder_defaults({}), rule=PLAIN, clips_examples=False)
        assert values["learning_rate"] == 0.01


def test_a_default_never_conflicts_with_strategy_privacy_or_momentum():
    assert resolved({"model": "mlp"}, LocalRule(requires_sgd=True)).optimizer == "sgd"
    assert resolved({"model": "mlp"}, clips_examples=True).max_grad_norm is None
    assert resolved({"model": "mlp"}, momentum=0.9).optimizer == "sgd"


def test_without_defaults_of_a_scenario_the_values_are_the_ones_of_the_library():
    local = build_local(resolve_auto(AUTO, LocalDefaults(), rule=PLAIN, clips_examples=False), allow=[])
    assert (local.optimizer, local.learning_rate, local.max_grad_norm) == ("sgd", 0.1, None)


def test_the_header_names_values_and_source_of_the_defaults():
    settings, defaults = {**AUTO, "learning_rate": 0.02}, folder_defaults({"model": "mlp", "text": "comment"})
    local = build_local(resolve_auto(settings, defaults, rule=PLAIN, clips_examples=False), allow=[])
    text = describe_training(local, automatic_settings(settings), defaults)
    assert text.startswith("adam, learning rate 0.02, gradient norm at most 1 (defaults for mlp of texts:")
    assert "local.optimizer" in text
    assert "local.learning_rate" not in text
    assert describe_training(local, automatic_settings({"optimizer": "adam"}), defaults) == ""


@pytest.mark.framework
def test_a_regression_with_correlated_columns_does_not_diverge(tmp_path):
    """Compare with the settings of the library, which have no bound on the gradient: training diverges."""
    pytest.importorskip("torch")
    import strategies
    from fedlearn import LocalSettings, Schedule, federate, serial, start
    from fedlearn.errors import TooManyFailures
    from fedlearn.loop.scenario import judge
    from simulations.scenarios.folder import folder

    rng = np.random.default_rng(1)
    common_N1 = rng.normal(size=(300, 1))
    x = common_N1 + 0.3 * rng.normal(size=(300, 60))
    y = 1000 + 50 * common_N1[:, 0] + rng.normal(size=300)
    rows = [",".join(map(str, (*row, value))) for row, value in zip(x, y, strict=True)]
    (tmp_path / "table.csv").write_text("\n".join([",".join([*(f"x{i}" for i in range(60)), "y"]), *rows]))
    scenario = folder(path=tmp_path / "table.csv", target="y", partition="iid")

    def error_after(local):
        strategy, engine = strategies.fedavg(), serial(scenario.data, scenario.trainer)
        state, schedule = (
            start(strategy, scenario.trainer.init(1), engine, seed=1),
            Schedule(rounds=10, max_failures=0.99),
        )
        run = federate(strategy, engine, state, schedule=schedule, local=local, evaluate=judge(scenario))
        try:
            return [done.evaluation.pooled["rmse"] for done in run][-1]
        except TooManyFailures:
            return np.inf

    assert error_after(resolved({"model": "mlp"})) < np.std(y)
    assert error_after(LocalSettings()) > 100 * np.std(y)
