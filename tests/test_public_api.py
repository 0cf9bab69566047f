"""The public names of fedlearn and of its namespaces are few, documented, typed and light to import."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest

import fedlearn
from fedlearn.core.lazy_names import LazyName, lazy_names
from fedlearn.errors import MissingExtra

ROOT = Path(fedlearn.__file__).parents[1]
VERBS = frozenset((ROOT / "tests/support/verbs.txt").read_text().split())
MODULES = [
    "fedlearn",
    *(f"fedlearn.{name}" for name in dir(fedlearn) if find_spec(f"fedlearn.{name}")),
    "fedlearn.callbacks.mlflow",
    "fedlearn.callbacks.tensorboard",
    "fedlearn.callbacks.tracking",
    "fedlearn.core.checkpoint",
    "fedlearn.robust.poisoning",
]
NAMESPACES = [name for name in MODULES if getattr(importlib.import_module(name), "__all__", None)]
LAZY = {
    "JaxTrainer": "fedlearn/trainers/jax/trainer.py",
    "TorchTrainer": "fedlearn/trainers/torch/trainer.py",
    "from_datasets": "fedlearn/data/hugging_face.py",
    "load": "fedlearn/runner/trained_model.py",
    "run": "fedlearn/runner/python_run.py",
}


def public_names():
    for module in [*NAMESPACES, "strategies"]:
        for name in importlib.import_module(module).__all__:
            if name not in LAZY:  # these load frameworks: see the last test
                yield module, name


def test_the_root_has_about_forty_names():
    assert len(fedlearn.__all__) <= 48
    assert len(NAMESPACES) >= 12


@pytest.mark.parametrize("module", NAMESPACES)
def test_a_namespace_is_documented_and_lists_names_that_exist_in_order(module):
    namespace = importlib.import_module(module)
    assert namespace.__doc__
    assert list(namespace.__all__) == sorted(set(namespace.__all__))
    assert set(namespace.__all__) <= set(dir(namespace))


def test_every_public_function_has_a_docstring_that_starts_with_a_verb():
    wrong = []
    for module, name in public_names():
        value = getattr(importlib.import_module(module), name)
        is_ours = getattr(value, "__module__", "").startswith(("fedlearn", "strategies"))
        if not is_ours or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        first = re.match(r"\w+", inspect.getdoc(value) or "")
        if not first or (inspect.isfunction(value) and first.group().lower() not in VERBS):
            wrong.append(f"{value.__module__}.{name}: {(inspect.getdoc(value) or '').splitlines()[:1]}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def names_on_the_page(section):
    page = (ROOT / "docs/api.md").read_text()
    part = page.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([\w.]+)` \|", part, re.MULTILINE)


def test_the_page_lists_exactly_the_public_names():
    groups = [names_on_the_page(section) for section in ("Run", "Write a strategy", "Errors")]
    assert sorted(chain(*groups)) == sorted(fedlearn.__all__)
    assert sorted(names_on_the_page("Namespaces")) == sorted(set(NAMESPACES) - {"fedlearn"} | {"fedlearn.flower"})


def test_a_typing_error_is_answered_with_the_closest_name_or_its_namespace():
    with pytest.raises(AttributeError, match="did you mean 'federate'"):
        _ = fedlearn.federat
    with pytest.raises(AttributeError, match=r"try +fedlearn\.robust\.trimmed_mean"):
        _ = fedlearn.trimmed_mean
    with pytest.raises(AttributeError, match="did you mean 'TorchTrainer'"):
        _ = fedlearn.trainers.TorchTrainr
    assert not hasattr(fedlearn, "__wrapped__")


def test_lazy_names_and_namespaces_are_listed_without_loading_them():
    code = "import fedlearn, sys; print(set(dir(fedlearn)) >= {*fedlearn.__all__, 'robust'}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "False"]


def test_a_lazy_name_without_its_dependency_names_the_extra():
    missing = {"Trainer": LazyName("no_such_framework", "torch"), "broken": LazyName("fedlearn.no_such_module", "jax")}
    get, _ = lazy_names("fedlearn", missing)
    with pytest.raises(MissingExtra, match=r"fedlearn\.Trainer needs(.|\n)*pip install 'fedlearn\[torch\]'"):
        get("Trainer")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        get("broken")


@pytest.mark.parametrize(("name", "path"), LAZY.items())
def test_lazy_names_are_documented_in_their_source(name, path):
    body = ast.parse((ROOT / path).read_text()).body
    node = next(node for node in body if getattr(node, "name", None) == name)
    assert ast.get_docstring(node).split()[0].lower() in VERBS


def python_of(path):
    """Return the Python of an example or of a page."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if path.suffix == ".md" else [text]
    return [block for block in blocks if "fedlearn" in block]


def test_examples_and_pages_import_public_names_only():
    public = {name: [*getattr(importlib.import_module(name), "__all__", ())] for name in MODULES}
    paths = [*(ROOT / "examples").glob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert len(paths) > 10
    wrong = []
    for path in paths:
        for node in (node for block in python_of(path) for node in ast.walk(ast.parse(block))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedlearn":
                names = {alias.name for alias in node.names} - {*public.get(node.module, ())}
                hidden = {name for name in names if f"{node.module}.{name}" not in MODULES}
                wrong += [f"{path.relative_to(ROOT)}: {node.module}.{name}" for name in sorted(hidden)]
    assert not wrong, "\n".join(wrong)
