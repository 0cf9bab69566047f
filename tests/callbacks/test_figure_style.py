"""Names of all scripts render in figures, and text has one size in all of them."""

import numpy as np
import pytest
from judged import experiment, state_of

from fedlearn.callbacks import evaluation_figures, figures, fonts
from fedlearn.callbacks.figure_style import (
    DOTS_PER_INCH,
    FONT_SIZE,
    WIDTH_INCHES,
    new_figure,
    share_of_page,
    short_name,
    style,
    text_width,
)
from fedlearn.runner.evaluation import evaluate_final_model

mpl = pytest.importorskip("matplotlib", reason="needs the extra 'report'")
pytest.importorskip("matplotlib.backends.backend_agg")

LONG = "广州中山大学附属第一医院心血管内科重症监护病房"


def history(task_metric="accuracy"):
    values = {"loss": 0.5, task_metric: 0.7}
    statistics = {name: {"mean": v, "std": 0.1, "worst10": v} for name, v in values.items()}
    return [{"round": k, "test": values, "clients": statistics, "bytes_up": 99, "clock": 9.0 * k} for k in (1, 2)]


def fast_figures():
    """Yield figures with long Chinese names."""
    clients = [{"client": k, "name": f"{LONG}{k}", "num_examples": 9, "accuracy": 0.5 + 0.1 * k} for k in range(4)]
    partition = {"kind": "labels", "columns": [LONG, "a"], "clients": [{**row, "counts": [4, 5]} for row in clients]}
    yield figures.traffic(history(), "accuracy")
    yield figures.fairness(clients, "accuracy")
    yield figures.partition(partition)
    yield evaluation_figures.confusion(np.eye(3, dtype=int), [f"{LONG}{k}" for k in range(3)])
    given = experiment("binary")
    yield evaluation_figures.curves(evaluate_final_model(given, state_of(given))["curves"])


def other_figures():
    """Yield a figure of each other kind."""
    many = [{"client": k, "name": str(k), "num_examples": 9, "accuracy": k / 60} for k in range(60)]
    yield figures.convergence(history(), "accuracy", {"central": {"test": {"loss": 0.4, "accuracy": 0.8}}})
    yield figures.time_to_accuracy(history(), "accuracy")
    yield figures.fairness(many, "accuracy")
    for count in (2, 12, 20):
        yield evaluation_figures.confusion(np.eye(count, dtype=int), [f"{LONG}{k}" for k in range(count)])
    for task in ("multiclass", "regression"):
        given = experiment(task)
        evaluation = evaluate_final_model(given, state_of(given))
        if task == "regression":
            yield evaluation_figures.residuals(evaluation["residuals"], LONG)
        else:
            yield evaluation_figures.curves(evaluation["curves"])
            yield evaluation_figures.calibration(evaluation["calibration"])


@pytest.mark.parametrize("draw", [fast_figures, pytest.param(other_figures, marks=pytest.mark.slow)])
def test_text_has_one_size_and_stays_inside_in_all_figures(draw):
    with style(LONG):
        for number, figure in enumerate(draw()):
            mpl.backends.backend_agg.FigureCanvasAgg(figure).draw()
            texts = [text for text in figure.findobj(mpl.text.Text) if text.get_text().strip()]
            assert {text.get_fontsize() for text in texts} == {FONT_SIZE}, number
            box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
            assert width <= WIDTH_INCHES
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= -0.02, number


def test_the_width_of_a_figure_is_its_share_of_the_page(tmp_path):
    with style():
        new_figure(0.5 * WIDTH_INCHES, 1).savefig(tmp_path / "half.png", dpi=DOTS_PER_INCH)
    assert share_of_page(tmp_path / "half.png") == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("north", "north"),
        (LONG, "广州中山大学附属第一医院心…"),
        ("x" * 40, "x" * 27 + "…"),
        ("a$b$c", r"a\$b\$c"),
        ("two\nlines\t", "two lines "),
        ("", ""),
    ],
)
def test_names_are_short_and_plain(name, shown):
    assert short_name(name) == shown
    assert text_width(shown.replace("\\", "")) <= 28


def test_a_name_with_dollars_is_no_formula():
    with style():
        clients = [{"client": 0, "name": r"$\frac$ $x^", "num_examples": 9, "accuracy": 0.5}]
        mpl.backends.backend_agg.FigureCanvasAgg(figures.fairness(clients, "accuracy")).draw()


def test_fonts_of_the_machine_complete_the_default_font(monkeypatch, tmp_path):
    glyphs = {fonts._default_font(): "abc", "/a": "上海", "/b": "上", "/c": "x성"}
    monkeypatch.setattr(fonts, "_characters", lambda path: frozenset(map(ord, glyphs[path])))
    monkeypatch.setattr(fonts, "_installed", lambda: iter([("B", "/b"), ("A", "/a"), ("C", "/c")]))
    assert fonts.choose_fonts("abc") == ([fonts.BASE], "")
    assert fonts.choose_fonts("a上") == ([fonts.BASE, "B"], "")
    assert fonts.choose_fonts("上海성 \n") == ([fonts.BASE, "B", "A", "C"], "")
    families, missing = fonts.choose_fonts("海कa")
    assert (families, missing) == ([fonts.BASE, "A"], "क")
    assert "fonts-noto-cjk" in fonts.missing_glyphs_warning(missing)


def test_a_damaged_font_file_has_no_characters(tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert fonts._characters(str(tmp_path / "broken.ttf")) == frozenset()
