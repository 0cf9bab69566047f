import contextlib
import ctypes
import gc
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
import types

import browser
import layers
import leftovers
import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# many tests compile the same programs; pytest-xdist's workers share the folder that the first process creates
CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="fedlearn-jax-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE or "")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# each pytest-xdist process has one core: threads that wait for each other would take time from the other processes
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

MAX_MEGABYTES = 1000  # memory of a process above which caches are cleared
# growth since the caches were last cleared: clearing them after each test takes longer than the tests
GROWTH_MEGABYTES = 300
floor = 0.0

# a background job of a shell ignores Ctrl-C, and so do its child processes
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.pluginmanager.register(leftovers)
    config.pluginmanager.register(layers)
    config.pluginmanager.register(browser)


def pytest_unconfigure(config):
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their argument: an archive contains the time, and pytest-xdist needs constant names."""
    return argname if isinstance(val, bytes) else None


def clear_compiled_programs():
    """Clear the programs that JAX has compiled from memory. They stay in the cache on disk."""
    if "jax" not in sys.modules:
        return
    sys.modules["jax"].clear_caches()
    gc.collect()
    with contextlib.suppress(AttributeError):  # some C libraries lack this function
        ctypes.CDLL(None).malloc_trim(0)


def resident_megabytes():
    """Return the resident memory of this process, or 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


@pytest.fixture(scope="module", autouse=True)
def clear_programs_after_each_module():
    yield
    clear_compiled_programs()


@pytest.fixture(autouse=True)
def memory_is_bounded():
    """Clear caches between tests. Modules with many models to compile would fill the memory before they end."""
    yield
    global floor
    if resident_megabytes() > max(MAX_MEGABYTES, floor + GROWTH_MEGABYTES):
        clear_compiled_programs()
        floor = resident_megabytes()


@pytest.fixture(autouse=True)
def process_settings_return():
    """Restore Ctrl-C and the log handlers of the process: a command that runs in a test may change both."""
    interrupt = signal.getsignal(signal.SIGINT)
    yield
    if interrupt is not None:  # None: a library set it in C
        signal.signal(signal.SIGINT, interrupt)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)  # its stream belongs to the ended test


@pytest.fixture(scope="session")
def digits():
    """Return the 1,797 scikit-learn digits as (x, y): float32 in [0, 1], N x 8 x 8 x 1."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images[..., None] / 16).astype("float32"), bunch.target.astype("int64")


@pytest.fixture
def byzfl():
    """Import ByzFL's rules and attacks without the package itself, which needs torchvision."""
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
