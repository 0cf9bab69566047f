import gc
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import types

import layers
import leftovers
import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# many tests compile the same programs; pytest-xdist's workers share the folder that the first process makes
CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="fedlearn-jax-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE or "")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# a process of pytest-xdist has a core of its own: threads that wait for each other would keep the others from theirs
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

# in the background of a shell Ctrl-C is ignored, by children too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.pluginmanager.register(leftovers)
    config.pluginmanager.register(layers)


def pytest_unconfigure(config):
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument: an archive holds the time, and pytest-xdist wants fixed names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
    """What JAX has compiled for one file is in memory no longer than that file's tests; on disk it stays."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def digits():
    """The 1,797 scikit-learn digits as (x, y): float32 in [0, 1], N x 8 x 8 x 1."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images[..., None] / 16).astype("float32"), bunch.target.astype("int64")


@pytest.fixture
def byzfl():
    """ByzFL's rules and attacks alone: the package's own import wants torchvision to load, which they do not use."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None:
        pytest.skip("needs byzfl (pip install --no-deps byzfl)")
    added = {"byzfl": types.ModuleType("byzfl")}
    added["byzfl"].__path__ = list(spec.submodule_search_locations)
    sys.modules.update(added)
    from byzfl.aggregators import aggregators, preaggregators
    from byzfl.attacks import attacks

    yield types.SimpleNamespace(rules=aggregators, mixing=preaggregators, attacks=attacks)
    for name in [name for name in sys.modules if name.partition(".")[0] == "byzfl"]:
        del sys.modules[name]
