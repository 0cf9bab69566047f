"""Assign each test to exactly one layer, by the frameworks and processes that it starts.

The row with the longest path applies; a mark on the test takes precedence over the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

NAMES = ("unit", "framework", "process", "cli", "docs")
WITH_DOCTESTS = ("fedlearn", "simulations", "strategies")  # packages with doctests

TABLE = {
    **dict.fromkeys(WITH_DOCTESTS, "unit"),
    "fedlearn/testing": "framework",
    "tests": "unit",
    "tests/callbacks/test_figure_style": "framework",
    "tests/callbacks/test_run_files": "process",
    "tests/cli": "cli",
    "tests/contracts": "framework",
    "tests/docs": "docs",
    "tests/data/test_hugging_face": "framework",
    "tests/data/test_partition": "framework",
    "tests/deploy/test_processes": "process",
    "tests/deploy/test_chaos": "process",
    "tests/deploy/test_fault_table": "process",
    "tests/deploy/test_deployment": "process",
    "tests/deploy/test_pretrained_models": "process",
    "tests/deploy/test_containers": "docs",
    "tests/deploy/test_run_log": "framework",
    "tests/deploy/test_sites_of_a_deployment": "process",
    "tests/deploy/test_rehearse": "process",
    "tests/deploy/test_operators_page": "docs",
    "tests/deploy/test_submit": "cli",
    "tests/deploy/node_side/test_data_files": "process",
    "tests/deploy/node_side/test_messenger": "framework",
    "tests/deploy/test_supervision": "process",
    "tests/deploy/test_trainer": "process",
    "tests/protocol/test_grid_client": "framework",
    "tests/protocol/test_polling": "framework",
    "tests/engines": "framework",
    "tests/trainers/test_batching": "process",
    "tests/loop/test_virtual_clock": "unit",
    "tests/engines/test_flower_engine": "process",
    "tests/engines/test_ray_engine": "process",
    "tests/engines/test_streaming": "process",
    "tests/flower": "framework",
    "tests/flower/test_flower_from_the_command_line": "cli",
    "tests/protocol/test_secagg_exchange": "unit",
    "tests/privacy/test_audit": "framework",
    "tests/privacy/test_mutants": "process",
    "tests/privacy/test_privacy_readme": "docs",
    "tests/simulations": "framework",
    "tests/simulations/test_privacy_attack": "cli",
    "tests/simulations/test_audit": "cli",
    "tests/runner/test_baselines": "unit",
    "tests/runner/test_framework": "framework",
    "tests/runner/test_python_run": "framework",
    "tests/runner/test_trained_model": "framework",
    "tests/runner/tuning/test_tune": "framework",
    "tests/simulations/test_compare": "unit",
    "tests/simulations/test_data": "unit",
    "tests/simulations/test_privacy_utility": "cli",
    "tests/simulations/test_report": "cli",
    "tests/simulations/test_robustness": "cli",
    "tests/simulations/test_run_benchmark": "framework",
    "tests/simulations/test_scale_benchmark": "process",
    "tests/simulations/test_secagg_benchmark": "cli",
    "tests/strategies/test_heterogeneity": "framework",
    "tests/strategies/test_local_steps": "framework",
    "tests/strategies/test_moon": "framework",
    "tests/trainers/test_optimizer_averaging": "framework",
    "tests/strategies/test_personalization": "framework",
    "tests/test_architecture": "process",
    "tests/test_public_api": "process",
    "tests/test_typed_package": "process",
    "tests/test_wheel": "cli",
    "tests/web/test_watch": "cli",
    "tests/trainers/test_buffers": "framework",
    "tests/algorithm/test_server_optimizers": "framework",
    "tests/test_readme": "docs",
    "tests/test_pages": "docs",
    "tests/test_prose": "docs",
    "tests/robust/test_poisoning": "framework",
    "tests/robust/test_robust_aggregation": "framework",
    "tests/strategies/test_robust_rules": "framework",
    "tests/robust/test_root_dataset": "framework",
    "tests/trainers": "framework",
}


# these start clusters and federations of many processes; a small machine has memory for one at a time
CROWDED = (
    "tests/deploy/test_chaos",
    "tests/deploy/test_fault_table",
    "tests/deploy/test_deployment",
    "tests/deploy/test_rehearse",
    "tests/deploy/test_sites_of_a_deployment",
    "tests/deploy/test_trainer",
    "tests/engines/test_flower_engine",
    "tests/engines/test_ray_engine",
    "tests/simulations/test_benchmarks",
    "tests/test_readme",
    "tests/trainers/test_batching",
)

SLOW_CASES = {
    line
    for line in Path(__file__).with_name("slow_cases.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
}
FRAMEWORKS = {"torch", "jax", "flwr", "ray", "opacus", "flax"}
STARTS = {"subprocess.Popen", "os.fork", "os.posix_spawn"}  # names of the events of Python's audit hooks
started: list[str] = []
sys.addaudithook(lambda event, args: started.append(f"{event} {args[:1]}") if event in STARTS else None)


@pytest.fixture(autouse=True)
def a_unit_starts_nothing(request):
    """Fail a test of the layer ``unit`` that first loads a framework, or starts a process."""
    loaded, began = FRAMEWORKS & sys.modules.keys(), len(started)
    yield
    if request.node.get_closest_marker("unit"):
        new = [*sorted((FRAMEWORKS & sys.modules.keys()) - loaded), *started[began:]]
        assert not new, f"a test of the layer unit loaded or started {new}"


def pytest_configure(config):
    stale = [
        row for row in (*TABLE, *CROWDED) if not any((config.rootpath / f"{row}{end}").exists() for end in ("", ".py"))
    ]
    if stale:
        raise pytest.UsageError(f"rows of tests/support/layers.py without a file: {', '.join(stale)}")
    config.pluginmanager.register(Layers(config.rootpath), "layers of the tests")


class Layers:
    """Marks tests, and skips files without a test of the requested layer."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def layer_of(self, path: Path) -> str | None:
        """Return the layer of a file in the table, or None."""
        if not path.is_relative_to(self.root):
            return None
        words = path.relative_to(self.root).with_suffix("").parts
        rows = ("/".join(words[:length]) for length in range(len(words), 0, -1))
        return next((TABLE[row] for row in rows if row in TABLE), None)

    def pytest_ignore_collect(self, collection_path, config):
        if collection_path.suffix != ".py" or not collection_path.is_relative_to(self.root):
            return None
        text = collection_path.read_text(encoding="utf-8")
        if collection_path.relative_to(self.root).parts[0] in WITH_DOCTESTS and ">>>" not in text:
            return True
        wanted = config.option.markexpr
        others = wanted in NAMES and self.layer_of(collection_path) not in (wanted, None)
        return True if others and f"mark.{wanted}" not in text else None

    def pytest_itemcollected(self, item):
        if item.nodeid in SLOW_CASES:
            item.add_marker("slow")
        layer = self.layer_of(item.path)
        if layer and not any(item.get_closest_marker(name) for name in NAMES):
            item.add_marker(layer)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        wrong = [item.nodeid for item in items if len({m.name for m in item.iter_markers() if m.name in NAMES}) != 1]
        if wrong:
            raise pytest.UsageError(
                "tests without exactly one layer (tests/support/layers.py):\n  " + "\n  ".join(wrong)
            )
        if "slow" not in config.option.markexpr:  # -m "slow or not slow" runs all
            config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
            items[:] = [item for item in items if not item.get_closest_marker("slow")]
        # crowded and long ones first, so that no process of pytest-xdist has to run them alone at the end
        items.sort(key=lambda item: next(NAMES[::-1].index(name) for name in NAMES if item.get_closest_marker(name)))
        items.sort(key=lambda item: self.group_of(item.path) != "crowded")

    def group_of(self, path: Path) -> str:
        """Return the name of the tests that pytest-xdist runs in one process: a file, or all crowded ones."""
        name = path.relative_to(self.root).with_suffix("").as_posix() if path.is_relative_to(self.root) else str(path)
        return "crowded" if name in CROWDED else name

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config, log):
        from xdist.scheduler import LoadScopeScheduling

        class ByGroup(LoadScopeScheduling):
            def _split_scope(_, nodeid):  # noqa: N805
                return self.group_of(self.root / nodeid.partition("::")[0])

        return ByGroup(config, log)
