import pytest
from clinic import Clinic

from fedlearn.deploy.node_side.policy import Policy


@pytest.fixture
def clinic(tmp_path, monkeypatch):
    """Return a function that builds a `Clinic`; other tests cover the check of settings."""
    monkeypatch.setattr(Policy, "check_settings", lambda self, settings: None)

    def make(**arguments):
        return Clinic(tmp_path / "states", **arguments)

    return make
