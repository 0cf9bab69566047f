"""Find sentences that break the language rules of the project, in code, settings and pages.

``python tests/support/prose.py [PATH ...]`` lists each finding as ``path:line: rule: sentence``. With ``--counts`` it
prints the number of findings of each rule and folder.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = ("fedlearn", "strategies", "simulations", "tests", "examples", "docs", "conf")
PAGES = ("README.md", "README.zh.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "AGENTS.md")
SUFFIXES = (".py", ".yaml", ".yml", ".toml", ".md")
SKIPPED_FOLDERS = {"__pycache__", "_build", "generated"}
MAX_WORDS = 25
MIN_DOCSTRING_WORDS = 5

CLAUSE_WORDS = "what|who|whom|whoever|whose|of|how(?!-to)|where|whether|which|whatever|whichever|wherever"
STARTS_WITH_CLAUSE = re.compile(rf"^\W*({CLAUSE_WORDS})\b", re.IGNORECASE)
NOUN_CLAUSE = re.compile(
    r"\b(what|whoever|whatever|whichever)\b|\b(of|for|to|by|from|with) (who|whom|how)\b|(?<!^)\bthose (of|that|who)\b",
    re.IGNORECASE,
)
BANNED_PHRASES = re.compile(
    r"\b(likewise|onlookers?|parcels?|(?<!moreau )envelopes?|thereof|hence|nobody|nothing else|tells?|told|"
    r"lets? out|goes? on|so many|as it were|let go of|hold(s|ing)? .{0,30} to (what|being)|lies? at|lay(s|ing)? at|"
    r"aloft|in the place of|none but|save that|be it)\b",
    re.IGNORECASE,
)
VERBS = frozenset(Path(__file__).with_name("verbs.txt").read_text().split())
SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+(?=[A-Z`\"'*(\[])|(?<=[.!?]) +(?=[a-z]\w+ [a-z])| \. ")
SECTION = re.compile(
    r"^\s*\*{0,2}(Args|Returns|Raises|Attributes|Guarantees|Yields|References?|Example|Examples|Note)\*{0,2}:\*{0,2}"
)
SPAN = re.compile(r"``[^`]*``|`[^`]*`")


class Text(NamedTuple):
    """A piece of prose: path, line of its start, kind and content."""

    path: str
    line: int
    kind: str
    content: str


class Finding(NamedTuple):
    """A sentence that breaks a rule."""

    path: str
    line: int
    rule: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.sentence}"


def findings(paths: Iterable[Path]) -> Iterator[Finding]:
    """Yield all findings in these files."""
    for path in paths:
        for text in texts(path):
            yield from findings_in(text)


def texts(path: Path) -> Iterator[Text]:
    """Yield the prose of a Python, YAML or Markdown file."""
    if path.suffix not in SUFFIXES:
        return
    name, content = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path), path.read_text()
    if path.suffix == ".py":
        yield from _python_texts(name, content)
    elif path.suffix in (".yaml", ".yml", ".toml"):
        yield from _setting_comments(name, content)
    elif path.suffix == ".md":
        yield from _page_texts(name, content)


def findings_in(text: Text) -> Iterator[Finding]:
    """Yield the rules that one text breaks."""
    if text.kind.startswith("docstring"):
        yield from _docstring_findings(text)
    for paragraph in _paragraphs(text.content):
        for sentence in SENTENCE_END.split(paragraph):
            for rule in broken_rules(sentence):
                yield Finding(text.path, text.line, rule, sentence.strip())


def broken_rules(sentence: str) -> list[str]:
    """Return the names of the rules that a sentence breaks.

    >>> broken_rules("Whoever is late is a failure.")
    ['clause-start', 'noun-clause']
    >>> broken_rules("Clients that miss the deadline are recorded as failures.")
    []
    """
    plain = SPAN.sub("x", sentence).strip()
    rules = ["clause-start"] if STARTS_WITH_CLAUSE.match(plain) else []
    rules += ["noun-clause"] if NOUN_CLAUSE.search(plain) else []
    rules += ["banned-phrase"] if BANNED_PHRASES.search(plain) else []
    words = [word for word in plain.split() if re.search(r"\w", word)]
    return rules + (["long-sentence"] if len(words) > MAX_WORDS else [])


def _docstring_findings(text: Text) -> Iterator[Finding]:
    summary = text.content.strip().split("\n\n")[0].replace("\n", " ").strip()
    words = re.findall(r"[\w'-]+", SPAN.sub("x", summary))
    if text.kind == "docstring function" and (not words or words[0].lower() not in VERBS):
        yield Finding(text.path, text.line, "no-verb", summary)
    if text.kind != "docstring private" and len(re.findall(r"[\w'-]+", text.content)) < MIN_DOCSTRING_WORDS:
        yield Finding(text.path, text.line, "short-docstring", summary)


def _paragraphs(content: str) -> Iterator[str]:
    """Yield paragraphs without doctests, indented code and section heads; each argument is a paragraph."""
    lines: list[str] = []
    for line in [*content.splitlines(), ""]:
        bare = line.strip()
        starts = bool(re.match(r"^([\w*, `]+: |[-*|] |\d+\. |#)", bare)) or bool(SECTION.match(bare))
        if (not bare or bare.startswith((">>>", "...")) or starts) and lines:
            yield " ".join(lines)
            lines = []
        if bare and not bare.startswith((">>>", "...")):
            lines.append(re.sub(r"^([-*] |\d+\. |#+ )", "", SECTION.sub("", bare)).strip())


def _python_texts(name: str, content: str) -> Iterator[Text]:
    tree = ast.parse(content)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and not (name.startswith("tests/") and isinstance(node, ast.Module)):
                kind = "function" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else "other"
                kind = "other" if _is_property(node) else kind
                yield Text(name, getattr(node, "lineno", 1), f"docstring {kind}", docstring)
        elif isinstance(node, ast.Call | ast.Raise):
            yield from _messages(name, node)
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(noqa|type:|mypy:|pragma|!)", token.string):
            yield Text(name, token.start[0], "comment", token.string.lstrip("# ").split("# noqa")[0])


def _is_property(node: ast.AST) -> bool:
    decorators = getattr(node, "decorator_list", [])
    return any("property" in ast.unparse(decorator) for decorator in decorators)


MESSAGE_CALLS = (
    "require",
    "SettingError",
    "DataError",
    "FedlearnError",
    "add_argument",
    "write_line",
    "warning",
    "error",
    "info",
    "warn",
)


def _messages(name: str, node: ast.Call | ast.Raise) -> Iterator[Text]:
    """Yield the strings of errors, help texts and log lines."""
    call = node.exc if isinstance(node, ast.Raise) else node
    if not isinstance(call, ast.Call):
        return
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if not (isinstance(node, ast.Raise) or function in MESSAGE_CALLS):
        return
    for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
        content = _string(argument)
        if content and " " in content:
            yield Text(name, argument.lineno, "message", content)


def _string(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
    return ""


def _setting_comments(name: str, content: str) -> Iterator[Text]:
    for number, line in enumerate(content.splitlines(), start=1):
        match = re.search(r"(?:^|\s)#\s+(?!@package)(.*)$", line)
        if match:
            yield Text(name, number, "comment", match[1])


def _page_texts(name: str, content: str) -> Iterator[Text]:
    """Yield paragraphs of a page, without code blocks and tables' frames."""
    lines, start, in_code = [], 1, False
    for number, line in enumerate([*content.splitlines(), ""], start=1):
        fence = line.lstrip().startswith("```")
        in_code ^= fence
        if line.strip() and not in_code and not fence and not line.startswith("    "):
            start = number if not lines else start
            lines += (
                [" . ".join(cell for cell in line.strip().strip("|").split("|"))] if line.startswith("|") else [line]
            )
            if not line.startswith("|"):
                continue
        if lines:
            yield Text(name, start, "page", "\n".join(lines))
            lines = []


def project_files() -> list[Path]:
    """Return all files with prose, in order of their names."""
    found = [ROOT / page for page in PAGES if (ROOT / page).exists()]
    for folder in SOURCES:
        found += files_in(ROOT / folder)
    return sorted(found)


def files_in(folder: Path) -> list[Path]:
    """Return the files with prose below a folder, without generated ones."""
    found = (path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    return sorted(path for path in found if not SKIPPED_FOLDERS & set(path.parts))


def counts(found: Iterable[Finding]) -> dict[str, Counter[str]]:
    """Return the number of findings of each rule, by the folder at the second level."""
    table: dict[str, Counter[str]] = {}
    for finding in found:
        table.setdefault(_area(finding.path), Counter())[finding.rule] += 1
    return table


def _area(path: str) -> str:
    parts = Path(path).parts
    depth = 2 if parts[0] in ("fedlearn", "simulations") and len(parts) > 2 else 1
    return "/".join(parts[:depth])


def main() -> int:
    """List the findings; return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--counts", action="store_true", help="print numbers by folder and rule")
    options = parser.parse_args()
    chosen: list[Path] = []
    for path in options.paths:
        chosen += files_in(path.resolve()) if path.is_dir() else [path.resolve()]
    found = list(findings(chosen or project_files()))
    if options.counts:
        for area, numbers in sorted(counts(found).items()):
            sys.stdout.write(f"{area:32} {sum(numbers.values()):5}  {dict(sorted(numbers.items()))}\n")
    sys.stdout.write("".join(f"{finding}\n" for finding in found if not options.counts))
    sys.stdout.write(f"{len(found)} findings\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
