"""Who may know whom, and what must stay light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedlearn

ROOT = Path(fedlearn.__file__).parents[1]
HEAVY = (
    "torch",
    "jax",
    "flax",
    "optax",
    "flwr",
    "ray",
    "hydra",
    "omegaconf",
    "rich",
    "sklearn",
    "matplotlib",
    "datasets",
    "dp_accounting",
    "jax_privacy",
    "scipy",
)


NAMESPACES = ("algorithm", "compression", "core", "data", "engines", "extend", "loop", "privacy", "robust", "trainers")
BENCHMARKS = {
    name: [path.relative_to(ROOT).as_posix() for path in (ROOT / "simulations/benchmarks").glob(f"*_{name}.py")]
    for name in ("torch", "jax")
}


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip()


def test_importing_fedlearn_strategies_and_all_namespaces_loads_nothing_heavy():
    modules = ", ".join(["fedlearn", "strategies", *(f"fedlearn.{name}" for name in NAMESPACES)])
    loaded = python(f"import {modules}, sys; dir(fedlearn); print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "[]"


def imports_of(path):
    """(module, names) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def files_that_import(package):
    for folder in ("fedlearn", "strategies", "simulations"):
        for path in (ROOT / folder).rglob("*.py"):
            if any((module or "").split(".")[0] == package for module, _ in imports_of(path)):
                yield path.relative_to(ROOT).as_posix()


def python_files(*folders):
    return [path.relative_to(ROOT).as_posix() for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


MODELS = {
    name: [path.relative_to(ROOT).as_posix() for path in (ROOT / "simulations/models").glob(f"*/{name}.py")]
    for name in ("torch", "jax")
}
TRAINERS = {name: python_files(f"fedlearn/trainers/{name}") for name in ("torch", "jax")}
FLOWER = python_files("fedlearn/flower", "fedlearn/protocol", "fedlearn/deploy", "simulations/benchmarks")
HOMES = {
    "torch": [
        *TRAINERS["torch"],
        *MODELS["torch"],
        "fedlearn/testing/comparison.py",
        "simulations/analysis/export_torch.py",
        *BENCHMARKS["torch"],
    ],
    "opacus": [*TRAINERS["torch"], *BENCHMARKS["torch"]],
    "jax": [
        *TRAINERS["jax"],
        *MODELS["jax"],
        "fedlearn/algorithm/server_optimizers.py",
        "fedlearn/testing/comparison.py",
        *BENCHMARKS["jax"],
    ],
    "flax": [*TRAINERS["jax"], *MODELS["jax"], *BENCHMARKS["jax"]],
    "optax": [*TRAINERS["jax"], *MODELS["jax"], *BENCHMARKS["jax"]],
    "ray": ["fedlearn/engines/ray/cluster.py", "fedlearn/engines/ray/compat.py", "fedlearn/engines/flower.py"],
    "tokenizers": ["simulations/datasets/hashing_tokenizer.py", "simulations/datasets/minilm.py"],
    "flwr_datasets": ["fedlearn/data/hugging_face.py", "fedlearn/data/partition.py"],
    "matplotlib": [
        "fedlearn/callbacks/figures.py",
        "fedlearn/privacy/calculator.py",
        "simulations/benchmarks/picture.py",
    ],
    "dp_accounting": ["fedlearn/privacy/accounting.py"],
    "scipy": ["fedlearn/privacy/accounting.py", "fedlearn/privacy/secagg/discrete_noise.py"],
    "jax_privacy": ["fedlearn/privacy/audit.py", "fedlearn/privacy/mechanisms/dp_ftrl.py"],
    "flwr": [
        "fedlearn/engines/deployed.py",
        "fedlearn/engines/flower.py",
        "fedlearn/engines/flower_simulation.py",
        *FLOWER,
    ],
}


@pytest.mark.parametrize(("package", "homes"), HOMES.items(), ids=HOMES)
def test_a_framework_lives_only_in_its_homes(package, homes):
    assert set(files_that_import(package)) <= set(homes)


def test_hydra_lives_only_in_the_runner_and_applications():
    found = {*files_that_import("hydra"), *files_that_import("omegaconf")}
    homes = ("simulations/", "fedlearn/deploy/", "fedlearn/runner/")
    assert all(path.startswith(homes) for path in found), found


COMPATIBILITY = {  # library -> its module, and packages that it documents
    "flwr": ("fedlearn/flower/compat.py", {"app", "clientapp", "serverapp", "simulation"}),
    "ray": ("fedlearn/engines/ray/compat.py", {"", "exceptions", "util"}),
    "hydra": ("fedlearn/runner/compat.py", {"errors", "types", "utils"}),
    "omegaconf": (None, {"", "errors"}),
}
DOCUMENTED = {"flwr.serverapp.strategy", "flwr.clientapp.mod"}  # below the packages


def names_of_libraries(path):
    """Dotted names of libraries in imports, and in strings that are no documentation."""
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield from re.findall(r"(?:^|(?<=import )|(?<=from ))(?:flwr|ray)\.[\w.]+", node.value)


def is_private(name):
    module, _, imported = name.partition(":")
    library, _, inner = module.partition(".")
    if library not in COMPATIBILITY:
        return False
    public = COMPATIBILITY[library][1]
    deeper = "." in inner and module not in DOCUMENTED
    marked = any(part.startswith("_") for part in [*module.split("."), imported])
    return marked or inner.split(".")[0] not in {"", *public} or deeper


def test_undocumented_names_of_libraries_stand_in_one_module_each():
    for folder in ("fedlearn", "strategies", "simulations"):
        for path in (ROOT / folder).rglob("*.py"):
            own = path.relative_to(ROOT).as_posix()
            found = [name for name in names_of_libraries(path) if is_private(name)]
            assert all(COMPATIBILITY[re.split("[.:]", name)[0]][0] == own for name in found), (own, found)


def test_strategies_use_only_the_public_names_of_fedlearn_and_its_namespaces():
    public = {"fedlearn": fedlearn, **{f"fedlearn.{name}": getattr(fedlearn, name) for name in NAMESPACES}}
    for path in (ROOT / "strategies").glob("*.py"):
        for module, names in imports_of(path):
            known = module in public or module == "numpy" or module.startswith("strategies")
            assert known, f"{path.name} imports {module}"
            assert module not in public or set(names) <= set(public[module].__all__), f"{path.name} imports {names}"


def num_statements(function):
    """Statements of a function and of those inside it, without docstrings."""
    statements = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in statements)


@pytest.mark.parametrize("path", sorted((ROOT / "strategies").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_strategy_is_one_short_function_with_its_reference(path):
    text = path.read_text()
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert path.stem in [function.name for function in functions]
    assert {function.name: num for function in functions if (num := num_statements(function)) > 25} == {}
    assert "arXiv:" in text


def test_no_pickle_and_no_global_seed_anywhere():
    for folder in ("fedlearn", "strategies", "simulations"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not {"pickle", "dill", "cloudpickle", "joblib"} & {module for module, _ in imports_of(path)}, path
            assert "np.random.seed" not in path.read_text(), path
