"""A node or a coordinator that is started twice with one state folder."""

import pytest

from fedlearn.deploy import node
from fedlearn.deploy.state_lock import StateInUse, locked_state


def test_a_second_process_with_the_same_state_is_refused_with_another_folder(tmp_path):
    with (
        locked_state(tmp_path / "node", "node"),
        pytest.raises(StateInUse, match=r"is in use by another node.*\n.*\n  try       --state .*/node-2"),
        locked_state(tmp_path / "node", "node"),
    ):
        pass
    with locked_state(tmp_path / "node", "node"):  # free again
        assert (tmp_path / "node").stat().st_mode & 0o777 == 0o700


def test_a_node_that_is_started_twice_says_so_and_starts_nothing(tmp_path, capsys):
    for name in (node.NODE_KEY, node.CA):
        (tmp_path / name).touch()
    words = ["--coordinator", "localhost:1", "--keys", str(tmp_path), "--state", str(tmp_path / "state")]
    with locked_state(tmp_path / "state", "node"):
        assert node.main([*words, "--socket", str(tmp_path / "s")]) == 2
    assert "is in use by another node, which still runs" in capsys.readouterr().err
    assert not (tmp_path / "state" / "messenger.log").exists()
