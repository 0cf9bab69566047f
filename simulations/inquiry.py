"""What audits and attacks share: words of their own beside the simulator's, a folder, numbers and a page in it."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlearn.checkpoint import write_atomically
from fedlearn.config import Plan, plan
from fedlearn.errors import FedlearnError, require
from fedlearn.targets import BuildError, refuse_unknown
from simulations import figures
from simulations.exits import exit_code
from simulations.folder import at_work, claim
from simulations.interrupt import terminate_as_interrupt
from simulations.overrides import Job, UsageError, compose
from simulations.recipe import write_recipe
from simulations.report import DOTS_PER_INCH, data_uri, template
from simulations.run import arguments, set_environment

PAGE = "report.html"
ENGINES = ("serial", "vector")


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """What was asked for.

    Attributes:
        cfg: the simulator's settings.
        plan: of these.
        own: the settings that the simulator does not have.
        folder: for the results.
        command: that asked.
    """

    cfg: DictConfig
    plan: Plan
    own: Mapping[str, Any]
    folder: Path
    command: str


def command(
    words: Sequence[str] | None,
    *,
    name: str,
    usage: str,
    defaults: Mapping[str, Any],
    preset: Sequence[str] = (),
    body: Callable[[Inquiry], int],
) -> int:
    """Run a command whose words are the simulator's and ``name.setting=value``; the exit code.

    Args:
        words: of the command line; None takes them from there.
        name: of the command.
        usage: what ``--help`` says.
        defaults: the settings that only this command has.
        preset: words of the simulator that hold unless the user says otherwise.
        body: what the command does, in the folder that it was given.
    """
    given = list(sys.argv[1:] if words is None else words)
    if {"-h", "--help"} & set(given):
        sys.stdout.write(usage)
        return 0
    terminate_as_interrupt()
    own = [word for word in given if word.startswith(f"{name}.")]
    args = arguments([word for word in given if word not in own and not word.startswith("kind=")])

    def act() -> int:
        settings = _settings(name, own, defaults)
        job, chosen = _composed(args, name, preset)
        _require_engine(job.cfg)
        planned = plan(job.cfg)
        set_environment(job.cfg)
        claimed = claim(job.folder, chosen=chosen)
        again = shlex.join(["python", "-m", f"simulations.{name}", *given])
        try:
            with at_work(claimed.path):
                write_recipe(claimed.path, job.cfg)
                return body(Inquiry(cfg=job.cfg, plan=planned, own=settings, folder=claimed.path, command=again))
        except BuildError:  # its traceback is in the log
            raise
        except (FedlearnError, KeyboardInterrupt):
            claimed.give_up()
            raise

    return exit_code(act)


def save(asked: Inquiry, name: str, found: Mapping[str, Any], drawn: Mapping[str, figures.Figure]) -> None:
    """Write ``name.json`` and each figure as a PNG."""
    write_atomically(asked.folder / f"{name}.json", json.dumps(found, indent=2) + "\n")
    for title, figure in drawn.items():
        figure.savefig(asked.folder / f"{title}.png", dpi=DOTS_PER_INCH, facecolor="white")


def page(
    asked: Inquiry,
    *,
    title: str,
    verdict: str,
    alarm: bool,
    rows: Sequence[tuple[str, str]],
    table: Sequence[Sequence[str]],
    captions: Mapping[str, str],
) -> Path:
    """Write ``report.html``: the verdict, what was asked, the numbers, the figures, and the command.

    Args:
        asked: the inquiry.
        title: of the page.
        verdict: a sentence or two.
        alarm: whether it is bad news.
        rows: (what, how much) of the settings.
        table: of numbers; its first row heads the columns.
        captions: of the figures, by the names that they were saved under.
    """
    images = {name: data_uri(asked.folder / f"{name}.png") for name in captions}
    text = template("inquiry.html").render(
        title=title,
        verdict=verdict,
        alarm=alarm,
        rows=rows,
        table=table,
        images=images,
        captions=captions,
        command=asked.command,
    )
    write_atomically(asked.folder / PAGE, text)
    return asked.folder / PAGE


def styled(draw: Callable[[], figures.Figure]) -> figures.Figure:
    """A figure in the look of the report's."""
    with figures.style():
        figure = draw()
        figure.canvas.draw()  # text takes its look when it is drawn
        return figure


def _settings(name: str, words: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    try:
        given = OmegaConf.to_container(OmegaConf.from_dotlist([word.partition(".")[2] for word in words]))
    except Exception as error:  # whatever YAML has against a value
        fix = f"{name}.{next(iter(defaults))}=..."
        raise UsageError(f"{' '.join(words)} cannot be read: {error}\n  try       {fix}") from error
    assert isinstance(given, dict)
    refuse_unknown({str(key): value for key, value in given.items()}, list(defaults), name)
    return {**defaults, **{str(key): value for key, value in given.items()}}


def _require_engine(cfg: DictConfig) -> None:
    engine = str(cfg.engine.get("_target_")).rpartition(".")[2]
    expected = "serial or vector: what is put among the clients lives in this process"
    require(engine in ENGINES, "engine", engine, expected, "engine=vector")


def _composed(args: Namespace, name: str, preset: Sequence[str]) -> tuple[Job, bool]:
    """The settings, and whether the user chose the folder."""
    if args.multirun:
        raise UsageError(f"-m sweeps runs, not what simulations.{name} does\n  try       one after another")
    said = {word.lstrip("+").partition("=")[0] for word in args.overrides}
    presets = [] if args.config_path else [word for word in preset if word.partition("=")[0] not in said]
    chosen = "hydra.run.dir" in said
    folder = [] if chosen else [f"hydra.run.dir=outputs/{name}/${{run_name}}/${{now:%Y-%m-%d_%H-%M-%S}}"]
    args.overrides = [*presets, *folder, *args.overrides]
    return compose(args)[0], chosen
