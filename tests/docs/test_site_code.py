"""Run the Python code of tutorials, guides and explanations, page by page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"(\*\*\S+\*\*\n+)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_of(page: Path) -> list[str]:
    """Return the Python blocks of a page, without files that other tests write and run."""
    return [code for file, code in BLOCK.findall(page.read_text(encoding="utf-8")) if not file]


PAGES = [
    page for folder in ("tutorials", "how_to", "explanation") for page in (DOCS / folder).glob("*.md") if code_of(page)
]


def test_pages_with_code_exist():
    assert {"own_pytorch_model", "from_pfl_and_fedjax"} <= {page.stem for page in PAGES}


def leave_a_run(folder: Path) -> None:
    """Write the run and the new examples that a page expects in the working folder."""
    from simulations.run import main

    assert main(["scenario=diabetes", "rounds=1", "report=false", "hydra.run.dir=my_run"]) == 0
    names = ["age", "sex", "bmi", "bp", *(f"s{number}" for number in range(1, 7))]
    (folder / "new.csv").write_text(",".join(names) + "\n" + ",".join("0.1" for _ in names) + "\n")


def leave_reviews(folder: Path) -> None:
    """Write the reviews of two clients, and a small model in place of the pretrained one of a page."""
    pytest.importorskip("peft")
    from tiny_models import bert

    bert(folder / "all-minilm-l6-v2", positions=128)
    (folder / "my_reviews").mkdir()
    for client in ("north", "south"):
        rows = [f"a {('good', 'bad')[i % 2]} film {i},{i % 2}" for i in range(8)]
        (folder / "my_reviews" / f"{client}.csv").write_text("\n".join(["review,label", *rows]))


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    if any("my_run" in code for code in code_of(page)):
        leave_a_run(tmp_path)
    if any("my_reviews" in code for code in code_of(page)):
        leave_reviews(tmp_path)
    namespace = {"__name__": f"page_{page.stem}"}
    for code in code_of(page):
        exec(compile(code, str(page), "exec"), namespace)
