"""Rules of the architecture: allowed imports, and modules that must load fast."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from layers import SLOW_CASES

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
    "transformers",
    "peft",
    "huggingface_hub",
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
    # array_api_compat loads its part for NumPy on first use
    use = "from array_api_compat import array_namespace; array_namespace(fedlearn.core.records.np.zeros(1))"
    heavy = (*HEAVY, "numpy.f2py")
    loaded = python(f"import {modules}, sys; dir(fedlearn); {use}; print([m for m in {heavy} if m in sys.modules])")
    assert loaded == "[]"


@cache
def imports_of(path):
    """Return (module, names) of each import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
    return found


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
    "tokenizers": ["fedlearn/data/text_tokenizers.py", "fedlearn/data/subword_tokenizer.py", *BENCHMARKS["torch"]],
    "transformers": ["fedlearn/data/subword_tokenizer.py", *TRAINERS["torch"], *BENCHMARKS["torch"]],
    "peft": [*TRAINERS["torch"], *BENCHMARKS["torch"]],
    "huggingface_hub": ["fedlearn/data/pretrained_files.py"],
    "flwr_datasets": ["fedlearn/data/hugging_face.py"],
    "matplotlib": [
        "fedlearn/callbacks/figure_style.py",
        "fedlearn/callbacks/fonts.py",
        "fedlearn/privacy/calculator.py",
        "simulations/benchmarks/picture.py",
    ],
    "dp_accounting": [],
    "scipy": [
        "fedlearn/privacy/accounting.py",
        "fedlearn/privacy/loss_distributions.py",
        "fedlearn/privacy/secagg/discrete_noise.py",
        "fedlearn/testing/mechanisms.py",
    ],
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


COMPATIBILITY = {  # library -> its module or package, and the packages that it documents
    "flwr": ("fedlearn/flower/compat/", {"app", "clientapp", "serverapp", "simulation"}),
    "ray": ("fedlearn/engines/ray/compat.py", {"", "exceptions", "util"}),
    "hydra": ("fedlearn/runner/compat.py", {"errors", "types", "utils"}),
    "omegaconf": (None, {"", "errors"}),
}
DOCUMENTED = {"flwr.serverapp.strategy", "flwr.clientapp.mod"}  # below the packages


def names_of_libraries(path):
    """Yield dotted names of libraries in imports, and in strings outside of docstrings."""
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


def test_slow_cases_name_functions_that_exist():
    for line in sorted(SLOW_CASES):
        path, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), line


def test_undocumented_names_of_libraries_stand_in_one_module_each():
    for folder in ("fedlearn", "strategies", "simulations"):
        for path in (ROOT / folder).rglob("*.py"):
            current = path.relative_to(ROOT).as_posix()
            found = [name for name in names_of_libraries(path) if is_private(name)]
            assert all(current.startswith(COMPATIBILITY[re.split("[.:]", name)[0]][0] or "-") for name in found), (
                current,
                found,
            )


def test_strategies_use_only_the_public_names_of_fedlearn_and_its_namespaces():
    public = {"fedlearn": fedlearn, **{f"fedlearn.{name}": getattr(fedlearn, name) for name in NAMESPACES}}
    for path in (ROOT / "strategies").glob("*.py"):
        for module, names in imports_of(path):
            known = module in public or module == "numpy" or module.startswith("strategies")
            assert known, f"{path.name} imports {module}"
            assert module not in public or set(names) <= set(public[module].__all__), f"{path.name} imports {names}"


def num_statements(function):
    """Count the statements of a function and of its inner functions, without docstrings."""
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


MESSAGE_TYPES = {"NodeRequest", "NodeResponse"}
BYTE_CARRIERS = {"to_record_dict", "to_record_dicts", "from_record_dict", "parts_from_record_dict", "respond_in_parts"}
BYTE_CARRIERS |= {"respond_to_bytes"}
DEPLOYED = (  # one process each
    "fedlearn.engines.deployed",
    "fedlearn.deploy.node_side.messenger",
    "fedlearn.deploy.trainer",
)
TOUCH_A_REQUEST = {  # docs/architecture.md lists them; this set may only shrink
    "fedlearn.protocol.messages",
    "fedlearn.protocol.exchange",
    "fedlearn.protocol.grid_client",
    "fedlearn.deploy.node_side.messenger",
    "fedlearn.deploy.trainer",
    "fedlearn.deploy.node_side.service",
}


def path_of(module):
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


def modules_reachable_from(*modules):
    """Return all modules of fedlearn that these modules import, directly or not, and in functions, too."""
    found, waiting = set(), list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or not module.startswith("fedlearn") or path_of(module) is None:
            continue
        found.add(module)
        for imported, names in imports_of(path_of(module)):
            waiting += [imported, *(f"{imported}.{name}" for name in names)]
    return found


def touches_a_request(source):
    """Return whether a module imports, defines or names the messages to and from a node, or passes their bytes on."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = {alias.name.rpartition(".")[2] for alias in node.names}
            whole_module = "messages" in names and "protocol" in ast.unparse(node)
            if whole_module or names & (MESSAGE_TYPES | BYTE_CARRIERS):
                return True
        named = getattr(node, "attr", getattr(node, "name", getattr(node, "id", None)))
        if not isinstance(node, ast.alias) and named in MESSAGE_TYPES | BYTE_CARRIERS:
            return True
    return False


def test_at_most_six_modules_touch_a_request_between_the_deployed_engine_and_the_trainer():
    modules = modules_reachable_from(*DEPLOYED)
    assert {"fedlearn.engines.secure_round", "fedlearn.loop.client_update", "fedlearn.trainers.base"} <= modules
    touching = {module for module in modules if touches_a_request(path_of(module).read_text())}
    assert touching <= TOUCH_A_REQUEST
    assert len(TOUCH_A_REQUEST) <= 6


def test_the_page_lists_the_modules_that_touch_a_request():
    page = (ROOT / "docs/architecture.md").read_text()
    table = page[page.index("modules touch the request") :].split("\n\n")[1]
    listed = re.findall(r"^\| `([\w/]+)\.py` \|", table, re.MULTILINE)
    assert {"fedlearn." + name.replace("/", ".") for name in listed} == TOUCH_A_REQUEST


@pytest.mark.parametrize(
    "source",
    [
        "from fedlearn.protocol.messages import NodeRequest",
        "from fedlearn.protocol import messages",
        "import fedlearn.protocol.messages",
        "def handle(request: NodeRequest): ...",
        "def answer(data, service): return service.respond_to_bytes(data)",
        "def f():\n    from fedlearn.protocol.grid_client import from_record_dict as read",
    ],
)
def test_the_count_of_modules_sees_each_way_to_touch_a_request(source):
    assert touches_a_request(source)
    assert not touches_a_request("from fedlearn.core.records import Request")


def test_only_its_transport_knows_the_protocol_of_secure_aggregation():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fedlearn").rglob("*.py")
        if any((module or "").startswith("fedlearn.privacy.secagg") for module, _ in imports_of(path))
    }
    outside = {name for name in found if not name.startswith("fedlearn/privacy/")}
    assert outside == {
        "fedlearn/protocol/secagg_exchange.py",  # the messages
        "fedlearn/engines/secure_round.py",  # the coordinator's half
        "fedlearn/deploy/node_side/masked_clients.py",  # the node's half
    }
