"""Robustness of aggregation rules: the final metric of each rule under each poisoning attack.

Shapes: R rules, A attacks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf, open_dict

import strategies
from fedlearn.callbacks import figure_style
from fedlearn.callbacks.formatting import format_metric, relative_path
from fedlearn.callbacks.tables import markdown_table, print_table
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.command_line import DONE
from fedlearn.core.metrics import higher_is_better
from fedlearn.errors import did_you_mean, is_count, is_number, require
from fedlearn.loop.scenario import judge
from fedlearn.loop.training_loop import federate, start
from fedlearn.runner.compose import CONF_DIR
from fedlearn.runner.experiment import build_experiment
from fedlearn.runner.plan import build_plan
from simulations.analysis.analysis_run import AnalysisRun, draw_with_style, save_results

ATTACKS = ("none", "sign_flip", "gaussian", "label_flip", "alie", "inner_product", "min_max", "mimic", "backdoor")
RULES = ("fedavg", "norm_bounding", "fedmedian", "fedtrimmedavg", "rfa", "centered_clipping", "krum", "nnm+krum")
NUM_ROOT_EXAMPLES = 100  # size of the server's root data set, as in the paper on FLTrust
DEFAULTS: Mapping[str, Any] = {"rules": [*RULES], "attacks": [*ATTACKS], "fraction": 0.2, "seeds": 1}
DEFAULT_OVERRIDES = (
    "scenario=digits",
    "partition.alpha=0.3",
    "rounds=50",
    "local.epochs=2",
    "local.learning_rate=0.3",
    "evaluate_every=1000000",
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Result of one rule under one attack, averaged over seeds.

    Attributes:
        rule: name of the aggregation rule.
        attack: name of the poisoning attack.
        metric: name of the main metric.
        value: final value of the metric.
        attack_success: success rate of a backdoor; None for other attacks.
    """

    rule: str
    attack: str
    metric: str
    value: float
    attack_success: float | None


def run_cells(analysis: AnalysisRun) -> list[Cell]:
    """Run each rule under each attack.

    Raises:
        SettingError: A rule or attack is unknown, or a rule does not support this number of malicious clients.
    """
    settings, cells = analysis.settings, []
    rules, attacks, fraction, seeds = (settings[name] for name in ("rules", "attacks", "fraction", "seeds"))
    known = sorted(path.stem for path in (CONF_DIR / "poisoning").glob("*.yaml"))
    parts = [name for rule in rules for name in rule.split("+")]
    for kind, names, options in (("rules", parts, strategies.__all__), ("attacks", attacks, known)):
        for name in names:
            guess = did_you_mean(name, options) or options[0]
            require(name in options, kind, name, f"one of {', '.join(options)}", f"{kind}={guess}")
    require(is_number(fraction, at_least=0, below=0.5), "fraction", fraction, "a share in [0, 0.5)", "fraction=0.2")
    require(is_count(seeds), "seeds", seeds, "a whole number >= 1", "seeds=3")
    cohort_size = analysis.cfg.strategy.get("clients_per_round")
    num_malicious = int(fraction * (cohort_size or _count_clients(analysis)) + 0.5)
    for rule in rules:
        strategy = {**_strategy_settings(rule.split("+"), fraction, num_malicious), "clients_per_round": cohort_size}
        for attack in attacks:
            poisoning = _poisoning_settings(attack, fraction)
            metrics = [_train(analysis.cfg, strategy, poisoning, analysis.plan.seed + i) for i in range(seeds)]
            cells.append(_average(rule, attack, metrics))
            sys.stdout.write(f"{rule:>24}  {attack:<16} {_cell_text(cells[-1])}\n")
            sys.stdout.flush()
    return cells


def _count_clients(analysis: AnalysisRun) -> int:
    experiment = build_experiment(analysis.cfg, analysis.plan)
    experiment.engine.close()
    return len(experiment.scenario.data.clients)


def _poisoning_settings(name: str, fraction: float) -> Any:
    settings = OmegaConf.load(CONF_DIR / "poisoning" / f"{name}.yaml")
    return settings if name == "none" else OmegaConf.merge(settings, {"fraction": fraction, "trusted": [0]})


def _average(rule: str, attack: str, metrics: Sequence[Mapping[str, float]]) -> Cell:
    metric = "accuracy" if "accuracy" in metrics[0] else "rmse"
    successes = [values["attack_success"] for values in metrics if "attack_success" in values]
    value = float(np.mean([values[metric] for values in metrics]))
    success = float(np.mean(successes)) if successes else None
    return Cell(rule=rule, attack=attack, metric=metric, value=value, attack_success=success)


def _train(cfg: DictConfig, strategy: Mapping[str, Any], poisoning: Any, seed: int) -> Mapping[str, float]:
    """Run one experiment without a run folder, and return the pooled metrics of its last evaluation."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.seed, cfg.strategy, cfg.poisoning = seed, dict(strategy), poisoning
    experiment = build_experiment(cfg, build_plan(cfg))
    plan, engine = experiment.plan, experiment.engine
    state = start(plan.strategy, experiment.scenario.trainer.init(seed), engine, seed=seed)
    rule, schedule, evaluate = plan.strategy, plan.schedule, judge(experiment.scenario)
    try:
        *_, last = federate(rule, engine, state, schedule=schedule, local=plan.local, evaluate=evaluate)
    finally:
        engine.close()
    assert last.evaluation is not None
    return last.evaluation.pooled


def _strategy_settings(names: Sequence[str], fraction: float, num_malicious: int) -> dict[str, Any]:
    """Return the settings of a strategy, with the number of malicious clients if it has such an argument.

    For ``nnm+krum``, the settings of ``krum`` are nested in the settings of ``nnm``.
    """
    first, *inner = names
    parameters = inspect.signature(getattr(strategies, first)).parameters
    settings: dict[str, Any] = {"_target_": f"strategies.{first}"}
    settings |= {"num_malicious": num_malicious} if "num_malicious" in parameters else {}
    settings |= {"trim": fraction} if "trim" in parameters else {}
    settings |= {"num_root_examples": NUM_ROOT_EXAMPLES} if "num_root_examples" in parameters else {}
    fix = f"rules={inner[0]}+{first}" if inner else ""
    expected = "a pre-aggregation (nnm, bucketing) before a rule"
    require(not inner or "rule" in parameters, "rules", "+".join(names), expected, fix)
    return settings | ({"rule": _strategy_settings(inner, fraction, num_malicious)} if inner else {})


def _cell_text(cell: Cell) -> str:
    success = "" if cell.attack_success is None else f" ({format_metric('attack_success', cell.attack_success)})"
    return f"{format_metric(cell.metric, cell.value)}{success}"


def table_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """Return a row for each rule: its name, the value under each attack, and the worst value."""
    attacks = list(dict.fromkeys(cell.attack for cell in cells))
    rows = [["rule", *(attack.replace("_", " ") for attack in attacks), "worst"]]
    for rule in dict.fromkeys(cell.rule for cell in cells):
        row = [cell for cell in cells if cell.rule == rule]
        worst = (min if row[0].metric == "accuracy" else max)(cell.value for cell in row)
        rows.append([rule, *(_cell_text(cell) for cell in row), format_metric(row[0].metric, worst)])
    return rows


def _legend(cells: Sequence[Cell]) -> str:
    text = "In brackets: the share of held-out images that the model assigns to the target class of the backdoor."
    return f"\n{text}\n" if any(cell.attack_success is not None for cell in cells) else ""


def run_robustness(analysis: AnalysisRun) -> int:
    """Run all pairs of rule and attack, write table, results and figure, and return the exit code."""
    cells = run_cells(analysis)
    scenario, fraction = analysis.cfg.scenario.get("_target_").rpartition(".")[2], analysis.settings["fraction"]
    title = f"{cells[0].metric.capitalize()} on {scenario} after {analysis.plan.schedule.rounds} rounds, " + (
        f"{100 * fraction:g} % of clients malicious"
    )
    figure = draw_with_style(lambda: plot_robustness([vars(cell) for cell in cells], title))
    rows, legend = table_rows(cells), _legend(cells)
    write_atomically(analysis.folder / "robustness.md", f"**{title}**\n\n{markdown_table(rows)}{legend}")
    save_results(
        analysis, "robustness", {"title": title, "cells": [vars(cell) for cell in cells]}, {"robustness": figure}
    )
    sys.stdout.write(f"\n{title}\n\n")
    print_table(rows)
    sys.stdout.write(f"{legend}\n saved     {relative_path(analysis.folder)}\n")
    return DONE


def plot_robustness(cells: Sequence[Mapping[str, Any]], title: str) -> figure_style.Figure:
    """Draw the metric for each aggregation rule (rows) under each poisoning (columns), with the backdoor success.

    Args:
        cells: one per rule and poisoning, row by row, with ``rule``, ``attack``, ``metric``, ``value`` and
            ``attack_success`` (None without a backdoor).
        title: title of the figure.
    """
    rules, attacks = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("rule", "attack"))
    metric = cells[0]["metric"]
    values = np.array([cell["value"] for cell in cells]).reshape(len(rules), len(attacks))
    figure = figure_style.new_figure(
        max(figure_style.WIDTH_INCHES * 0.7, 1.9 + 0.92 * len(attacks)), 1.5 + 0.42 * len(rules)
    )
    axis = figure.subplots()
    better = higher_is_better(metric)
    low, high = (0.0, 1.0) if metric == "accuracy" else (values.min(), values.max())
    image = axis.imshow(values, cmap="YlGnBu" if better else "YlGnBu_r", vmin=low, vmax=high, aspect="auto")
    axis.set(title=title)
    axis.set_xticks(range(len(attacks)), [attack.replace("_", "\n") for attack in attacks])
    axis.set_yticks(range(len(rules)), rules)
    axis.xaxis.tick_bottom()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for place, cell in enumerate(cells):
        row, column = divmod(place, len(attacks))
        success = cell["attack_success"]
        backdoor = "" if success is None else f"\nattack {format_metric('attack_success', success)}"
        shade = (cell["value"] - low) / max(high - low, 1e-12)
        dark = shade > 0.55 if better else shade < 0.45
        text = f"{format_metric(metric, cell['value'])}{backdoor}"
        axis.text(column, row, text, ha="center", va="center", color="white" if dark else figure_style.TEXT_COLOR)
    bar = figure.colorbar(image, ax=axis, pad=0.015, fraction=0.04, aspect=24)
    bar.outline.set_visible(False)
    bar.set_label(figure_style.metric_name(metric))
    figure_style.format_as_percent(bar.ax.yaxis, metric)
    return figure
