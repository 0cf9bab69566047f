import os
import tempfile

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# many tests compile the same programs; pytest-xdist's workers share the folder that the first process makes
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="fedlearn-jax-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture(scope="session")
def digits():
    """The 1,797 scikit-learn digits as (x, y): float32 in [0, 1], N x 8 x 8 x 1."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images[..., None] / 16).astype("float32"), bunch.target.astype("int64")
