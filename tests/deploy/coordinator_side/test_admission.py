"""A node gets the clients and the weight that the operator gave its key, and never those of another node."""

import json
from dataclasses import replace

import pytest
from sample_messages import MEMBER

from fedlearn.core.serialization import WireError
from fedlearn.deploy.client_ids import parse_client_ids
from fedlearn.deploy.coordinator_side.admission import CLIENTS_FILE, MAX_CLIENTS, Admission, write_nodes
from fedlearn.deploy.node_bindings import BindingError, parse_node, read_bindings, write_bindings
from fedlearn.errors import SettingError
from fedlearn.protocol.membership import Membership

KEYS = {1: ("north", b"key of north"), 2: ("south", b"key of south"), 3: ("stranger", b"key of a stranger")}


def member(node_id, clients, num_examples=100):
    counts, names = dict.fromkeys(clients, num_examples), {client: f"c{client}" for client in clients}
    return replace(MEMBER, num_examples=counts, names=names, masking_key="", node_id=node_id)


@pytest.fixture
def admission(tmp_path):
    write_nodes(tmp_path, KEYS)
    return Admission(tmp_path, tmp_path / "nodes.yaml")


def bind(admission, *nodes):
    write_bindings(admission.bindings, dict(map(parse_node, nodes)))


@pytest.mark.parametrize(
    ("clients", "count", "reason"),
    [
        ([0, 1, 2], 5000, None),
        ([1], 1, None),
        ([0, 1, 2, 3], 100, r"node north describes clients \[3\], but it has clients 0-2"),
        ([7], 100, r"describes clients \[7\]"),
        ([0], 5001, "client 0 of node north reports 5001 examples, expected at most 5000"),
    ],
)
def test_a_node_with_an_entry_has_these_clients_and_this_weight_at_most(admission, clients, count, reason):
    bind(admission, "north=0-2:5000", "south=3")
    if reason is None:
        admission.check(member(1, clients, count))
    else:
        with pytest.raises(WireError, match=reason):
            admission.check(member(1, clients, count))
    assert not (admission.state / CLIENTS_FILE).exists()


def test_clients_without_an_entry_belong_to_the_first_key_also_after_a_restart(admission):
    admission.check(member(1, [0, 1]))
    restarted = Admission(admission.state, admission.bindings)
    for clients in ([0], [1, 5], [5, 0]):
        with pytest.raises(WireError, match="which belongs to node north"):
            restarted.check(member(3, clients))
    restarted.check(member(1, [0, 1]))
    restarted.check(member(1, [1]))  # e.g. a client of the node has no data for this scenario
    with pytest.raises(WireError, match=r"node north describes clients \[2\]"):
        restarted.check(member(1, [0, 1, 2]))


def test_another_key_with_the_same_name_is_another_node(admission):
    admission.check(member(1, [0, 1]))
    write_nodes(admission.state, {4: ("north", b"another key")})
    with pytest.raises(WireError, match="client 0, which belongs to node north"):
        admission.check(member(4, [0]))


def test_an_entry_goes_before_the_first_use(admission):
    admission.check(member(3, [0, 1]))  # the stranger is first
    bind(admission, "north=0-2")
    admission.check(member(1, [0, 1, 2]))
    with pytest.raises(WireError, match="client 0, which belongs to node north"):
        admission.check(member(3, [0, 1]))


def test_a_node_without_an_entry_has_few_clients_and_a_bounded_weight(admission):
    with pytest.raises(WireError, match=f"expected at most {MAX_CLIENTS}"):
        admission.check(member(3, range(MAX_CLIENTS + 1)))
    with pytest.raises(WireError, match="reports 1000001 examples"):
        admission.check(member(3, [0], 1_000_001))
    with pytest.raises(WireError, match="a connected node has no key in"):
        admission.check(member(9, [5]))


def test_clients_are_stored_as_text_that_an_operator_can_read(admission):
    admission.check(member(1, [0, 1, 5]))
    assert [*json.loads((admission.state / CLIENTS_FILE).read_text()).values()] == [["north", "0-1,5"]]


def test_a_membership_refuses_a_node_that_may_not_have_its_clients(admission):
    bind(admission, "north=0", "south=1")
    membership = Membership(admission.check)
    membership.admit(member(1, [0]))
    with pytest.raises(WireError, match=r"node stranger describes client 1, which belongs to node south"):
        membership.admit(member(3, [1]))
    assert [*membership.present] == [1]


def test_the_weight_of_a_client_does_not_change_during_a_run():
    membership = Membership()
    membership.admit(member(1, [0]))
    membership.remove_except([])
    with pytest.raises(WireError, match="client 0 had 100 examples when this run started, and now it has 101"):
        membership.admit(member(1, [0], 101))
    membership.admit(replace(member(1, [0]), node_id=8))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("north=", "is not an id"),
        ("north=1-0", "not a range"),
        ("north=0,0", "an id twice"),
        ("north=0-99999999", "not a range of at most"),
        ("north=-1", "is not an id"),
        ("north=0:0", "max_examples is 0"),
        ("north=0:many", "invalid literal"),
        ("../north=0", "letters, digits"),
    ],
)
def test_a_node_that_cannot_be_read_is_refused(text, reason):
    with pytest.raises(SettingError, match=reason):
        parse_node(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('north: {"clients": "0-2"}\nsouth: {"clients": "2"}', "nodes north and south both have client 2"),
        ("north: 0-2", "cannot be read"),
        ('north: {"clients": 0, "weight": 3}', "unknown keys"),
        ("- north", "cannot be read"),
        ("north: {", "cannot be read"),
        ("north: !!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_admits_nobody(admission, text, reason):
    admission.bindings.write_text(text)
    with pytest.raises(BindingError, match=reason):
        read_bindings(admission.bindings)
    with pytest.raises(WireError, match=reason):
        admission.check(member(1, [0]))


def test_an_entry_that_an_operator_wrote_by_hand_is_read(tmp_path):
    (tmp_path / "nodes.yaml").write_text("north: {clients: 0-2}\nsouth: {clients: 7, max_examples: 10}\n")
    bindings = read_bindings(tmp_path / "nodes.yaml")
    assert (bindings["north"].clients, bindings["south"].clients) == ((0, 1, 2), (7,))
    assert parse_client_ids("7,0-2") == (0, 1, 2, 7)


def test_a_node_cannot_join_with_the_masking_key_of_another(admission, tmp_path):
    identities = tmp_path / "masking.pub"
    identities.write_text(f"{b'n'.hex() * 32} north\n{b's'.hex() * 32} south\n")
    checked = Admission(admission.state, admission.bindings, identities)
    checked.check(replace(member(1, [0]), masking_key=b"n".hex() * 32))
    checked.check(member(2, [1]))
    with pytest.raises(WireError, match=r"the masking key of node south is not its key in masking\.pub"):
        checked.check(replace(member(2, [1]), masking_key=b"n".hex() * 32))
