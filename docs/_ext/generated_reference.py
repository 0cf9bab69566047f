"""Write the reference pages from the code: the API from docstrings, the settings from ``conf/``, and the commands.

The pages are written into ``docs/reference/generated/`` before Sphinx reads the sources. Git ignores that folder.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from simulations.cli import MODULES

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "docs" / "reference" / "generated"
NAMESPACES = (
    "fedlearn",
    "fedlearn.algorithm",
    "fedlearn.robust",
    "fedlearn.compression",
    "fedlearn.privacy",
    "fedlearn.data",
    "fedlearn.trainers",
    "fedlearn.engines",
    "fedlearn.loop",
    "fedlearn.callbacks",
    "fedlearn.core",
    "fedlearn.flower",
    "fedlearn.testing",
    "fedlearn.extend",
    "strategies",
)


def setup(app: Any) -> dict[str, bool]:
    """Register the writer of the pages with Sphinx."""
    app.connect("builder-inited", lambda _: write_pages())
    return {"parallel_read_safe": True}


def write_pages() -> None:
    """Write all pages; a page that did not change keeps its time stamp."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    pages = {
        **dict(api_pages()),
        "settings.md": settings_page(ROOT / "conf"),
        "commands.md": commands_page(),
        "examples.md": examples_page(),
        **{path.name: path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.ipynb")},
    }
    for path in OUTPUT.iterdir():
        if path.name not in pages:
            path.unlink()
    for name, content in pages.items():
        path = OUTPUT / name
        if not path.exists() or path.read_text() != content:
            path.write_text(content)


# --- API ---------------------------------------------------------------------------------------------------------


def api_pages() -> Iterator[tuple[str, str]]:
    """Yield a page for each namespace, and the table of contents of them."""
    home: dict[int, str] = {}
    names = []
    for namespace in NAMESPACES:
        if importlib.util.find_spec(namespace) is None:
            continue
        module = importlib.import_module(namespace)
        if public := sorted(getattr(module, "__all__", [])):
            page = f"api_{namespace.replace('.', '_')}.md"
            names.append(page.removesuffix(".md"))
            yield page, api_page(namespace, module, public, home)
    yield "api.md", "# Python API\n\n```{toctree}\n:maxdepth: 1\n\n" + "\n".join(names) + "\n```\n"


def api_page(namespace: str, module: Any, names: list[str], home: dict[int, str]) -> str:
    """Return the page of one namespace. An object is described once, on the page of its first namespace."""
    summary = (inspect.getdoc(module) or "").strip()
    parts = [f"# {namespace}\n", summary, ""]
    for name in names:
        value = getattr(module, name)
        full = f"{namespace}.{name}"
        if _identity(value) in home:
            parts += [f"## {name}\n", f"The same object as {{py:obj}}`{home[_identity(value)]}`.", ""]
            continue
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        home[_identity(value)] = full
        directive = "autoclass" if inspect.isclass(value) else "autofunction"
        options = ["   :members:"] if inspect.isclass(value) and "Error" not in name else []
        parts += [f"## {name}\n", "```{eval-rst}", f".. {directive}:: {full}", *options, "```", ""]
    return "\n".join(parts)


def _identity(value: Any) -> int:
    return id(value)


# --- settings ----------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """A line of a YAML file: key, default and comment."""

    key: str
    default: str
    comment: str


def settings_page(folder: Path) -> str:
    """Return the page of all groups, options, keys and defaults in a folder of settings."""
    parts = [
        "# Settings\n",
        "Settings are written as `key=value` on the command line. A group is chosen with `group=option`.\n",
    ]
    parts += ["## Top-level settings\n", *_table(settings_of((folder / "config.yaml").read_text()))]
    for group in sorted(path for path in folder.iterdir() if path.is_dir()):
        parts += [f"## Group `{group.name}`\n"]
        for option in sorted(group.glob("*.yaml")):
            content = option.read_text()
            parts += [f"### `{group.name}={option.stem}`\n", head_comment(content), ""]
            parts += _table(settings_of(content))
    return "\n".join(parts) + "\n"


def head_comment(content: str) -> str:
    """Return the comment at the head of a YAML file, without Hydra's package line."""
    lines = []
    for line in content.splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def settings_of(content: str) -> list[Setting]:
    """Return the settings in a YAML text; nested keys are joined by dots."""
    found: list[Setting] = []
    stack: list[tuple[int, str]] = []
    skipped: int | None = None
    for line in content.splitlines():
        match = re.match(r"^(\s*)([\w/@]+):(?:\s+([^#]*?))?\s*(?:#\s*(.*))?$", line)
        if not match:
            continue
        indent, key, default, comment = len(match[1]), match[2], match[3] or "", match[4] or ""
        if skipped is not None and indent > skipped:
            continue
        skipped = indent if key in ("defaults", "hydra") else None
        stack = [pair for pair in stack if pair[0] < indent]
        name = ".".join([part for _, part in stack] + [key])
        stack.append((indent, key))
        if skipped is None and key != "_target_" and (default or comment):
            found.append(Setting(name, default.strip(), comment))
    return found


def _table(settings: list[Setting]) -> list[str]:
    if not settings:
        return []
    rows = [f"| `{s.key}` | {f'`{s.default}`' if s.default else ''} | {_cell(s.comment)} |" for s in settings]
    return ["| setting | default | meaning |", "|---|---|---|", *rows, ""]


def _cell(text: str) -> str:
    text = re.sub(r"(?<!\w)(_\w+_)(?!\w)", r"`\1`", text)  # not emphasis
    return text.replace("|", r"\|").replace("<", "&lt;")


# --- examples ----------------------------------------------------------------------------------------------------


def examples_page() -> str:
    """Return the page with all example scripts, and the table of contents of the notebooks."""
    folder = ROOT / "examples"
    notebooks = "\n".join(path.stem for path in sorted(folder.glob("*.ipynb")))
    parts = ["# Examples\n", "```{toctree}", notebooks, "```", ""]
    for path in sorted(folder.glob("*.py")):
        summary = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        parts += [f"## {path.name}\n", summary, "", f"```{{literalinclude}} ../../../examples/{path.name}", "```", ""]
    return "\n".join(parts)


# --- commands ----------------------------------------------------------------------------------------------------


def commands_page() -> str:
    """Return the page with the help text of each command, as the command prints it."""
    running = [(name, module, _start_help(module)) for name, module in MODULES.items()]
    parts = ["# Commands\n"]
    for name, module, process in running:
        output, _ = process.communicate(timeout=120)
        parts += [
            f"## fedlearn {name}\n",
            f"The same as `python -m {module}`.\n",
            "```text",
            output.rstrip(),
            "```",
            "",
        ]
    return "\n".join(parts)


def _start_help(module: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
