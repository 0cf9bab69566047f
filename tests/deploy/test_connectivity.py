"""Addresses of a coordinator: accepted forms, and advice for each other form."""

import re

import pytest

from fedlearn.deploy.connectivity import ConnectionProblem, is_final, parse_address

WRONG = {
    "https://localhost:8100": ("localhost:8100", "without https://"),
    "http://host:80/": ("host:80", "without https://"),
    "grpc://user:word@host:1": ("host:1", "without https://"),
    "https://host": ("host:8000", "without https://"),
    "https://[::1]:8443": ("'[::1]:8443'", "without https://"),
    "host:8000/health": ("host:8000", "without a path"),
    "host": ("host:8000", "a port from 1"),
    "host:": ("host:8000", "a port from 1"),
    "host:0": ("host:8000", "a port from 1"),
    "host:70000": ("host:8000", "a port from 1"),
    "host:²": ("host:8000", "a port from 1"),
    "-h:1": ("localhost:8000", "host:port"),
    "a b:1": ("localhost:8000", "host:port"),
    "a\n\x1b[2J:1": ("localhost:8000", "host:port"),
    "": ("localhost:8000", "host:port"),
}


@pytest.mark.parametrize("address", WRONG, ids=repr)
def test_a_wrong_form_is_named_with_an_address_that_works(address):
    nearest, reason = WRONG[address]
    with pytest.raises(ConnectionProblem, match=f"is not an address\n.*{reason}") as caught:
        parse_address(address)
    assert str(caught.value).splitlines()[2] == f"  try       --coordinator {nearest}"
    assert is_final(caught.value)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", str(caught.value))
    parse_address(nearest.strip("'"))


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("localhost:8000", ("localhost", 8000)),
        ("coordinator.example.org:443", ("coordinator.example.org", 443)),
        ("kliniken-köln.example:1", ("kliniken-köln.example", 1)),
        ("10.0.0.1:80", ("10.0.0.1", 80)),
        ("[2001:db8::1]:8000", ("2001:db8::1", 8000)),
        ("[fe80::1%eth0]:8000", ("fe80::1%eth0", 8000)),
        ("::1:8000", ("::1", 8000)),
    ],
)
def test_names_and_addresses_of_both_kinds_are_accepted(address, parts):
    assert parse_address(address) == parts
