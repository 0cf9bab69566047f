"""Write the report of a run from the files of its run folder: ``report.html``, one file that is readable offline.

``python -m simulations.report RUN`` writes it again.
"""

from __future__ import annotations

import base64
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlearn.callbacks import report_question, report_tables
from fedlearn.callbacks.base import Callback
from fedlearn.callbacks.data_check import report_section
from fedlearn.callbacks.figure_style import metric_name, share_of_page
from fedlearn.callbacks.model_card import write_model_card
from fedlearn.callbacks.privacy_text import privacy_paragraph
from fedlearn.callbacks.report_figures import captions, draw_figures, font_warnings
from fedlearn.callbacks.run_info import RunInfo
from fedlearn.callbacks.run_results import RunResults, read_run
from fedlearn.core.checkpoint import write_atomically
from fedlearn.errors import MissingExtra, require

log = logging.getLogger(__name__)


class Report(Callback):
    """Write ``report.html``, its figures and ``model_card.md`` at the end of a run. A stopped run has none of them.

    An error of the report is logged and is not a failure of the callback, because the run folder has all data.

    Args:
        enabled: False writes no report; True and ``auto`` (default) write it. A sweep replaces ``auto`` by False.
    """

    def __init__(self, *, enabled: bool | str = "auto") -> None:
        is_valid = isinstance(enabled, bool) or enabled == "auto"
        require(is_valid, "enabled", enabled, "true, false or auto", "enabled=true")
        self._enabled = bool(enabled)
        self._folder = Path()

    def on_start(self, run: RunInfo) -> None:
        """Remember the run folder for the report."""
        self._folder = run.folder

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Write the report, unless the run was stopped."""
        if not self._enabled or summary["status"] == "stopped":
            return
        try:
            write_report(self._folder)
        except Exception as error:
            log.exception("the report cannot be written")
            reason = error if isinstance(error, MissingExtra) else f"see {self._folder}/run.log"
            sys.stderr.write(f" no report: {reason}\n")


def write_report(folder: Path) -> Path:
    """Write ``model_card.md``, draw ``figures/*.png`` and write ``report.html`` from the files of a run folder.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: the folder is not a run folder.
        MissingExtra: matplotlib or Jinja2 is not installed.
    """
    folder = Path(folder)
    run = read_run(folder)
    write_model_card(folder)
    paths = draw_figures(run, folder / "figures")
    page = load_template("report.html").render(
        title=_title(run),
        run=run,
        **_first_screen(run),
        facts=report_tables.headline_rows(run),
        results=report_tables.metric_rows(run),
        classes=report_question.class_rows(run),
        importance=report_question.importance_rows(run),
        subgroups=report_question.subgroup_rows(run),
        failures=report_tables.failure_rows(run),
        baselines=run.baselines,
        privacy=report_tables.privacy_rows(run),
        reached=report_tables.time_to_target_rows(run),
        main=metric_name(run.main_metric),
        metric=metric_name(run.main_metric, inline=True),
        data_check=report_section(folder),
        captions=captions(run),
        images={name: data_uri(path) for name, path in paths.items()},
        widths={name: share_of_page(path) for name, path in paths.items()},
    )
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def _first_screen(run: RunResults) -> dict[str, Any]:
    return {
        "question": report_question.question(run),
        "about": report_question.question_rows(run),
        "sites": report_question.site_rows(run),
        "main_result": report_question.main_result(run),
        "clinical": report_question.clinical_rows(run),
        "warnings": [*(run.summary.get("warnings") or []), *font_warnings(run)],
        "privacy_text": privacy_paragraph(run.summary.get("privacy"), is_simulation=bool(run.partition)),
    }


def _title(run: RunResults) -> str:
    names = [run.summary.get("scenario", ""), run.summary.get("strategy", "")]
    return " · ".join(name for name in names if name) or "run"


def load_template(name: str) -> Any:
    """Return a Jinja2 template from the folder ``templates`` of this package.

    Raises:
        MissingExtra: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as missing:
        raise MissingExtra("report.html", "report") from missing
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(name)


def data_uri(path: Path) -> str:
    """Return a PNG file as a ``data:`` address, which embeds it in a page."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
