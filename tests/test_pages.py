"""Every name, path, setting and command in the pages exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlearn.core.command_line import UsageError
from fedlearn.runner.compose import CONF_DIR, compose
from fedlearn.runner.start import parse_args
from simulations.cli import MODULES

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedlearn", "simulations", "strategies")
FOLDERS = (*PACKAGES, "conf", "tests", "docs")
GENERATED = ("_build", "generated")
SITE = sorted(path for path in (ROOT / "docs").rglob("*.md") if not set(GENERATED) & set(path.parts))
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "AGENTS.md",
    "fedlearn/deploy/README.md",
    "fedlearn/privacy/README.md",
    "fedlearn/privacy/secagg/README.md",
    "strategies/README.md",
    *(path.relative_to(ROOT).as_posix() for path in SITE),
)
ABOUT_PEERS = ("docs/explanation/from_pfl_and_fedjax.md",)  # has names of other projects
GROUP_WORDS = {name.split(" ")[0] for name in MODULES}
GROUPS = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir())
FOREIGN = {"FedAvg", "FedMedian", "FedTrimmedAvg", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "SuperLink"}
HYDRA_OPTIONS = {"--config-path", "--config-dir", "--config-name", "--cfg", "--help"}
OTHERS = re.compile(r"--config-dir|\._target_=|is not known|did you mean")  # options of the reader; messages
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b|\bmy_|\.\.\.|\*")  # NAME, my_code, ...: the reader's own


def text_of(page: str) -> str:
    """Return a page. The first column of the changelog's tables contains old names, and is omitted."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"^ *\|[^|]*\|", "|", text, flags=re.MULTILINE) if page == "CHANGELOG.md" else text


def spans(page: str) -> list[str]:
    """Return the code within sentences and tables."""
    without_blocks = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", without_blocks)]


def code_of(page: str) -> list[str]:
    """Return the code within sentences, and the lines of the shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    return [*spans(page), *(line for block in blocks for line in block.replace("\\\n", " ").splitlines())]


@cache
def names_of(path: Path) -> dict[str, ast.AST]:
    """Return the names of a module, and the names of its classes' members as ``Class.name``."""
    names: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names |= dict.fromkeys(bound_names(node), node)
        if isinstance(node, ast.If):  # lazy names
            names |= {name: node for child in node.body for name in bound_names(child)}
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}": node for child in node.body for name in bound_names(child)}
            attributes = (child for child in ast.walk(node) if isinstance(child, ast.Attribute))
            names |= {f"{node.name}.{a.attr}": node for a in attributes if isinstance(a.ctx, ast.Store)}
    return names


def bound_names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.ImportFrom | ast.Import):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def module_of(parts: list[str]) -> tuple[Path | None, list[str]]:
    """Return the file of the longest prefix that is a module, and the rest of the parts."""
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.exists():
                return path, parts[length:]
    return None, parts


@cache
def attributes_of_classes() -> dict[str, set[str]]:
    """Return the attributes of every class in the source, inherited ones included."""
    current: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for name, node in names_of(path).items():
            cls, dot, attribute = name.partition(".")
            if isinstance(node, ast.ClassDef) and (dot or node.name == cls):
                current.setdefault(cls, set()).update({attribute} if dot else set())
                bases.setdefault(cls, set()).update(ast.unparse(base).rpartition(".")[2] for base in node.bases)
    return {cls: current[cls].union(*(current.get(base, set()) for base in bases[cls])) for cls in current}


@cache
def words_of_the_source() -> frozenset[str]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    paths += [*CONF_DIR.rglob("*.yaml"), ROOT / "pyproject.toml", *(ROOT / "tests").rglob("*.py")]
    texts = (path.read_text(encoding="utf-8") for path in paths if path != Path(__file__))
    return frozenset(word for text in texts for word in re.findall(r"\w+", text))


@pytest.mark.parametrize("page", PAGES)
def test_every_dotted_name_is_in_the_source(page):
    missing = []
    for span in code_of(page):
        for dotted in re.findall(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.\w+)+", span):
            path, rest = module_of(dotted.split("."))
            if path is None or (rest and ".".join(rest) not in names_of(path)):
                missing.append(dotted)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_path_is_a_file_or_folder(page):
    is_about_code = page == "docs/architecture.md" or page.startswith("docs/decisions/")
    own_folder = ROOT / "fedlearn" if is_about_code else (ROOT / page).parent
    own_files = re.findall(r"^\*\*(\S+)\*\*$", text_of(page), re.MULTILINE)  # files that the reader writes
    missing = []
    for span in spans(page):
        for path in re.findall(r"(?<![\w:=])[\w./{},-]*(?:\w\.py|\w\.md|/\w+\.yaml|\w/)(?![\w.])", span):
            known = {path.rstrip("/") for path in (*own_files, "model_card.md")}  # the last file is written by runs
            if PLACEHOLDER.search(span) or span.startswith("python") or path in known or "://" in span:
                continue
            if path.endswith("/") and path.partition("/")[0] not in FOLDERS:  # folders of a run or of keys, for example
                continue
            if not any((base / path).exists() for base in (ROOT, own_folder)):
                missing.append(path)
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_attribute_of_a_class_is_there(page):
    classes, missing = attributes_of_classes(), []
    for span in spans(page):
        for cls, attribute in re.findall(r"(?<![\w.])([A-Z]\w*[a-z]\w*)\.([a-z_]\w*)", span):
            if attribute not in classes.get(cls, {attribute}):
                missing.append(f"{cls}.{attribute}")
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ABOUT_PEERS])
def test_every_identifier_is_a_word_of_the_source(page):
    known, missing = words_of_the_source() | FOREIGN, []
    for span in spans(page):
        if re.fullmatch(r"[\w.]+(\([\w, =*]*\))?", span) and not PLACEHOLDER.search(span):
            identifiers = re.findall(r"[a-zA-Z]\w*_\w+|[A-Z]\w*[a-z]\w*[A-Z]\w*", span)
            missing += [name for name in identifiers if name not in known]
    assert not missing


@cache
def options_of_the_source() -> frozenset[str]:
    """Return the options of all commands: the strings in the source that are one."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return frozenset(option for path in paths for option in re.findall(r"[\"'](--[a-z][a-z-]+)", path.read_text()))


@pytest.mark.parametrize("page", PAGES)
def test_every_option_is_one_of_a_command(page):
    known = options_of_the_source() | HYDRA_OPTIONS
    codes = [code for code in code_of(page) if re.match(r"--|python -m (fedlearn|simulations)|fedlearn ", code.strip())]
    named = {option for code in codes for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", code.partition("#")[0])}
    assert named <= known
    if page == "fedlearn/deploy/README.md":
        assert named


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    without_blocks = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_blocks):
        assert "://" in target or (ROOT / page).parent.joinpath(target).exists(), target


def settings_in(page: str) -> Iterator[tuple[str, str]]:
    """Yield each ``group=option`` and ``group.setting=value`` that a page gives."""
    for code in code_of(page):
        for key, value in re.findall(r"(?<![\w.+/-])([a-z_]+(?:\.[a-z_]+)*)=('[^']*'|[^\s'`;]+)", code):
            if key.partition(".")[0] in GROUPS and "..." not in value and not OTHERS.search(code):
                yield key, value.rstrip(",;)").strip("'")


@cache
def options_with(group: str, key: str) -> list[str]:
    """Return the options of a group that have a setting."""
    files = sorted((CONF_DIR / group).glob("*.yaml"))
    contents = ((path.stem, OmegaConf.to_container(OmegaConf.load(path), resolve=False)) for path in files)
    return [name for name, content in contents if key in content.get(group, content)]


@cache
def composes(*words: str) -> bool:
    try:
        return bool(compose(parse_args(words)))
    except (UsageError, OmegaConfBaseException):
        return False


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_composes(page):
    missing = []
    for key, value in dict.fromkeys(settings_in(page)):
        group, _, setting = key.partition(".")
        if not setting:
            options = re.split(r"[|,]", value)
            missing += [f"{group}={option}" for option in options if not is_option(group, option)]
            continue
        options = options_with(group, setting.partition(".")[0])
        choice = [f"{group}={options[0]}"] if options else []
        if not composes(*choice, f"{key}={value.split(',')[0] if '[' not in value and '{' not in value else value}"):
            missing.append(f"{key}={value}")
    assert not missing


def is_option(group: str, option: str) -> bool:
    return bool(PLACEHOLDER.search(option)) or (CONF_DIR / group / f"{option}.yaml").exists()


@pytest.mark.parametrize("page", PAGES)
def test_each_console_command_on_a_page_exists(page):
    for code in code_of(page):
        for typed in re.findall(r"(?:^|&& )fedlearn ((?!--)[\w|-]+(?: [a-z-]+(?= |$))?)", code):
            first, *rest = typed.split(" ")
            for name in first.split("|"):
                assert name in MODULES or " ".join([name, *rest]) in MODULES or name in GROUP_WORDS, (page, typed)
