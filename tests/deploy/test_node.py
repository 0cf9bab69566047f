"""The command line of a node, and files of an earlier version in its folder."""

import pytest

from fedlearn.deploy.node import NodeError, build_parser, node_from_args


@pytest.fixture
def parse_node(tmp_path):
    words = ["--coordinator", "localhost:1", "--keys", str(tmp_path), "--state", str(tmp_path / "node")]
    return lambda: node_from_args(build_parser().parse_args([*words, "--policy", "policy.yaml", "--client", "3"]))


def test_what_clients_keep_lies_in_the_nodes_folder(parse_node, tmp_path):
    options = parse_node().trainer_args
    assert options[options.index("--client-states") + 1] == str(tmp_path / "node" / "client_states")


def test_a_folder_of_an_earlier_version_is_not_passed_over(parse_node, tmp_path):
    (tmp_path / "node" / "memory").mkdir(parents=True)
    with pytest.raises(NodeError, match=r"memory is of an earlier version\n.*\n  try       mv .*memory .*states"):
        parse_node()
    (tmp_path / "node" / "memory").rename(tmp_path / "node" / "client_states")
    parse_node()
