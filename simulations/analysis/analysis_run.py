"""Shared parts of audits, attacks and robustness runs: their settings, folder, results as JSON, and report page."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedlearn.callbacks import figure_style
from fedlearn.callbacks.figure_style import DOTS_PER_INCH, share_of_page
from fedlearn.callbacks.report import data_uri, load_template
from fedlearn.core.checkpoint import write_atomically
from fedlearn.core.command_line import UsageError, command_parser, exit_code, take_settings, terminate_as_interrupt
from fedlearn.errors import FedlearnError
from fedlearn.runner.builders import BuildError
from fedlearn.runner.compat import command_line_parser
from fedlearn.runner.compose import Job, compose
from fedlearn.runner.dry_run import refuse_dry_run
from fedlearn.runner.engines import require_in_process
from fedlearn.runner.environment import set_environment
from fedlearn.runner.plan import Plan, build_plan
from fedlearn.runner.run_config import write_run_config
from fedlearn.runner.run_folder import locked_run_folder, reserve_run_folder
from fedlearn.runner.start import parse_args

REPORT_FILE = "report.html"


@dataclass(frozen=True, kw_only=True)
class AnalysisRun:
    """Settings and folder of one analysis, such as an audit or an attack.

    Attributes:
        cfg: settings of the simulation.
        plan: plan of the simulation.
        settings: settings that only this command has.
        folder: folder for the results.
        command_line: command that repeats the analysis.
    """

    cfg: DictConfig
    plan: Plan
    settings: Mapping[str, Any]
    folder: Path
    command_line: str


def run_analysis_command(
    argv: Sequence[str] | None,
    *,
    name: str,
    usage: str,
    defaults: Mapping[str, Any],
    default_overrides: Sequence[str] = (),
    action: Callable[[AnalysisRun], int],
) -> int:
    """Run a command with the settings of the simulation and settings that only this command has.

    Args:
        argv: arguments of the command line; None uses the arguments of this process.
        name: name of the command, and of its folder in ``outputs``.
        usage: text of ``--help``.
        defaults: default values of the settings that only this command has, by full name.
        default_overrides: overrides of the simulation that apply unless the user sets them.
        action: function that runs the analysis; it receives the settings and the folder, and returns an exit code.

    Returns:
        The exit code.
    """
    parser = command_parser(f"simulations.{name}", usage, passes_on=command_line_parser())
    arguments = list(sys.argv[1:] if argv is None else argv)

    def analyze() -> int:
        _, rest = parser.parse_known_args(arguments)
        changes, overrides = take_settings(rest, defaults)
        settings = {key.rpartition(".")[2]: value for key, value in {**defaults, **changes}.items()}
        job, chosen = _compose(parse_args(overrides), name, default_overrides)
        plan = build_plan(job.cfg)
        reason = f"simulations.{name} changes the clients and reads their updates"
        require_in_process(job.cfg.engine, "engine", job.cfg.engine["_target_"], reason, "engine=vector")
        set_environment(job.cfg.get("framework"))
        folder = reserve_run_folder(job.folder, chosen=chosen)
        command = shlex.join(["python", "-m", f"simulations.{name}", *arguments])
        try:
            with locked_run_folder(folder.path):
                write_run_config(folder.path, job.cfg)
                return action(
                    AnalysisRun(cfg=job.cfg, plan=plan, settings=settings, folder=folder.path, command_line=command)
                )
        except BuildError:  # keep the folder: its log has the traceback
            raise
        except (FedlearnError, KeyboardInterrupt):
            folder.discard()
            raise

    terminate_as_interrupt()
    return exit_code(analyze)


def save_results(
    analysis: AnalysisRun, name: str, results: Mapping[str, Any], named_figures: Mapping[str, figure_style.Figure]
) -> None:
    """Write ``name.json``, and each figure as a PNG file."""
    write_atomically(analysis.folder / f"{name}.json", json.dumps(results, indent=2) + "\n")
    for title, figure in named_figures.items():
        figure.savefig(analysis.folder / f"{title}.png", dpi=DOTS_PER_INCH, facecolor="white")


def write_report_page(
    analysis: AnalysisRun,
    *,
    title: str,
    verdict: str,
    is_alarm: bool,
    rows: Sequence[tuple[str, str]],
    table: Sequence[Sequence[str]],
    captions: Mapping[str, str],
) -> Path:
    """Write ``report.html`` with verdict, settings, numbers, figures and command, and return its path.

    Args:
        analysis: settings and folder.
        title: title of the page.
        verdict: one or two sentences.
        is_alarm: True if the verdict is a failure.
        rows: name and value of each setting.
        table: numbers; the first row has the column names.
        captions: captions of the figures, by file name without suffix.
    """
    images = {name: data_uri(analysis.folder / f"{name}.png") for name in captions}
    text = load_template("analysis.html").render(
        title=title,
        verdict=verdict,
        alarm=is_alarm,
        rows=rows,
        table=table,
        images=images,
        widths={name: share_of_page(analysis.folder / f"{name}.png") for name in captions},
        captions=captions,
        command=analysis.command_line,
    )
    write_atomically(analysis.folder / REPORT_FILE, text)
    return analysis.folder / REPORT_FILE


def draw_with_style(draw: Callable[[], figure_style.Figure]) -> figure_style.Figure:
    """Return the figure of ``draw``, in the style of reports."""
    with figure_style.style():
        figure = draw()
        figure.canvas.draw()  # the style of text is set when it is drawn
        return figure


def _applies(preset: str, typed: Collection[str]) -> bool:
    """Return True if the user did not replace a preset. A scenario replaces the presets of the partition."""
    setting = preset.partition("=")[0]
    group = setting.partition(".")[0]
    replaced = {setting, group, *(("scenario", "experiment") if group == "partition" else ())}
    return not replaced & set(typed)


def _compose(args: Namespace, name: str, preset: Sequence[str]) -> tuple[Job, bool]:
    """Return the settings, and True if the user chose the folder."""
    if args.multirun:
        raise UsageError(
            f"-m is not possible with simulations.{name}\n"
            "  expected  one value per setting\n  advice    several commands, one after another"
        )
    typed = {override.lstrip("+").partition("=")[0] for override in args.overrides}
    presets = [] if args.config_path else [override for override in preset if _applies(override, typed)]
    chosen = "hydra.run.dir" in typed
    folder = [] if chosen else [f"hydra.run.dir=outputs/{name}/${{run_name}}/${{now:%Y-%m-%d_%H-%M-%S}}"]
    args.overrides = [*presets, *folder, *args.overrides]
    job = compose(args)[0]
    refuse_dry_run(job.cfg, f"simulations.{name}")
    return job, chosen
