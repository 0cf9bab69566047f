"""Write ``model_card.md``: a description of the trained model for people who decide about its use.

The run fills in all that it knows. Intended use, users and contact are blanks for the owner of the model.

Reference: Mitchell et al., *Model Cards for Model Reporting*, FAT* 2019, arXiv:1810.03993.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlearn.callbacks import report_question
from fedlearn.callbacks.figure_style import metric_name
from fedlearn.callbacks.formatting import format_metric, interval_text
from fedlearn.callbacks.privacy_text import privacy_paragraph
from fedlearn.callbacks.run_results import RunResults, read_run
from fedlearn.callbacks.tables import markdown_table
from fedlearn.core.checkpoint import write_atomically

MODEL_CARD_FILE = "model_card.md"
BLANK = "*to be filled in by the owner of the model*"


def write_model_card(folder: Path) -> Path:
    """Write ``model_card.md`` from the files of a run folder, unless the owner has changed it. Return its path.

    Raises:
        DataError: the folder is not a run folder.
    """
    path = folder / MODEL_CARD_FILE
    text = model_card(read_run(folder))
    if path.is_file() and path.read_text(encoding="utf-8").count(BLANK) < text.count(BLANK):
        return path
    write_atomically(path, text)
    return path


def model_card(run: RunResults) -> str:
    """Return the model card as Markdown."""
    names = [run.summary.get("scenario", ""), run.summary.get("strategy", "")]
    title = " · ".join(filter(None, names)) or "run"
    parts = [
        (f"# Model card: {plain(title)}", ""),
        ("## Use", _use()),
        ("## Data", _data(run)),
        ("## Model and training", _pairs(_training_rows(run))),
        ("## Results", _results(run)),
        ("## Limits", _limits(run)),
        ("## Privacy", plain(privacy_paragraph(run.summary.get("privacy"), is_simulation=bool(run.partition))) + "\n"),
        ("## Reproduction", _reproduction(run)),
    ]
    return "\n".join(f"{heading}\n\n{body}".rstrip() + "\n" for heading, body in parts)


def plain(text: str) -> str:
    r"""Return one line of text that is neither HTML nor a link in Markdown.

    >>> plain("<b>[x](http://y)")
    '&lt;b>\\[x](http://y)'
    """
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("[", r"\[")


def _use() -> str:
    labels = ("Intended use", "Users", "Uses that are out of scope", "Owner and contact", "Approved by, on")
    return _pairs([(label, BLANK) for label in labels], is_plain=False)


def _pairs(rows: Sequence[tuple[str, str]], *, is_plain: bool = True) -> str:
    return "".join(f"- **{label}:** {plain(text) if is_plain else text}\n" for label, text in rows if text)


def _table(rows: Sequence[Sequence[str]]) -> str:
    return markdown_table([[plain(cell) for cell in row] for row in rows])


def _data(run: RunResults) -> str:
    shown = ("Data set", "Sites", "Judged on")
    rows = [row for row in report_question.question_rows(run) if row[0] in shown]
    text = _pairs([("Question", report_question.question(run)), *rows])
    sites = report_question.site_rows(run)
    if not sites:
        return text
    body = [(site["name"], site["train"], site["held_out"]) for site in sites]
    return f"{text}\n{_table([('Site', 'Training examples', 'Held-out examples'), *body])}"


def _training_rows(run: RunResults) -> list[tuple[str, str]]:
    header = run.environment.get("header", {})
    labels = {"model": "Model", "strategy": "Strategy", "protect": "Privacy mechanism", "engine": "Engine"}
    rows = [(title, header.get(label, "")) for label, title in labels.items()]
    digest = run.summary.get("parameters_sha256")
    status = f"{run.summary['rounds']:,} ({run.summary['status'].replace('_', ' ')})"
    return [*rows, ("Rounds", status), ("Parameters, SHA-256", digest or "")]


def _results(run: RunResults) -> str:
    constant = run.evaluation.get("constant", {})
    final = {name: {"value": value} for name, value in run.summary["final"].items()}
    estimates = {**final, **run.evaluation.get("metrics", {})}
    head = ("Metric", "Value", "95 % interval", f"Constant prediction: {constant['prediction']}" if constant else "–")
    rows = [
        (
            metric_name(name),
            format_metric(name, estimate["value"]),
            interval_text(name, estimate) or "–",
            format_metric(name, constant["metrics"][name]) if name in constant.get("metrics", {}) else "–",
        )
        for name, estimate in estimates.items()
    ]
    text = _table([head, *rows]) if rows else "The model was not evaluated.\n"
    clinical = [
        (row["name"], row["value"], row["interval"], row["meaning"]) for row in report_question.clinical_rows(run)
    ]
    if clinical:
        text += "\n" + _table([("Figure", "Value", "95 % interval", "Examples"), *clinical])
    groups = [
        (f"{row['column']} = {row['name']}", row["num_examples"], row["metric"], row["value"], row["interval"] or "–")
        for row in report_question.subgroup_rows(run)
    ]
    return text + (
        "\n" + _table([("Group", "Examples", "Metric", "Value", "95 % interval"), *groups]) if groups else ""
    )


def _limits(run: RunResults) -> str:
    missing = run.evaluation.get("missing")
    lines = [
        *(f"Warning: {text}." for text in run.summary.get("warnings") or []),
        f"There are no curves and no calibration: {missing}." if missing else "",
        run.evaluation.get("intervals", ""),
        "" if run.evaluation.get("subgroups") else "The model was not judged on groups of persons.",
        "All values are on held-out examples of the sites of this run. They are not a validation at other sites.",
    ]
    return "".join(f"- {plain(line)}\n" for line in lines if line)


def _reproduction(run: RunResults) -> str:
    packages = run.environment.get("packages", {})
    versions = ", ".join(f"{name} {number}" for name, number in packages.items())
    command = run.environment.get("rerun_command") or run.environment.get("command") or "unknown"
    rows = [
        ("Seed", str(run.summary.get("seed", "unknown"))),
        ("Python", run.environment.get("python", "")),
        ("Packages", versions),
        ("Commit", run.environment.get("git_commit") or ""),
    ]
    return f"{_pairs(rows)}\n```\n{command.replace('```', '')}\n```\n"
