"""The page of a coordinator in a browser, over TLS: a person signs in, sees nodes and runs, and signs out."""

import httpx
import pytest
from run_folders import HOSTILE, RunFolder, line

from fedlearn.deploy import keys
from fedlearn.deploy.coordinator_side import web_pages
from fedlearn.deploy.coordinator_side.control_api import NodeState
from fedlearn.deploy.coordinator_side.web_pages import Pages, open_ports

pytestmark = [pytest.mark.process, pytest.mark.slow]


class Control:
    """A coordinator with one node and no run that waits."""

    def __init__(self, address, keys, *, token):
        pass

    def node_states(self):
        return [NodeState(name=HOSTILE, id=1, state="online", since="")]

    def run_states(self):
        return []


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return the address of a page, and the folder of its runs and keys."""
    monkeypatch.setattr(web_pages, "CoordinatorClient", Control)
    keys.create(tmp_path / "keys", ["localhost", "127.0.0.1"], ["north"])
    RunFolder(tmp_path / "runs/run", scenario=HOSTILE, strategy=HOSTILE).add(line(1))
    folders = {"keys": tmp_path / "keys/coordinator", "state": tmp_path, "runs": tmp_path / "runs"}
    pages = Pages(ports=open_ports("127.0.0.1", 0, 0), **folders, address="localhost:1", token="t")
    lines = pages.start("localhost")
    address, metrics = (text.split()[1] for text in lines)
    return address, metrics, tmp_path


def test_a_person_signs_in_sees_nodes_and_runs_and_signs_out(site, page):
    address, metrics, folder = site
    token = (folder / "keys/operator/token").read_text()
    page.open(address)
    page.run("document.getElementById('token').value = 'wrong'; document.forms[0].submit()")
    page.wait("document.body.innerText.includes('The token is wrong.')")
    page.run(f"document.getElementById('token').value = '{token}'; document.forms[0].submit()")
    page.wait("document.querySelectorAll('#run-rows li, #node-rows li').length === 2")
    assert HOSTILE in page.text()
    assert page.run("[window.attacked, document.cookie, location.href]") == [None, "", f"{address}/"]
    assert token not in page.run("document.documentElement.outerHTML")
    RunFolder(folder / "runs/second").add(line(1))
    page.wait("document.querySelectorAll('#run-rows li').length === 2")
    page.run("[...document.forms].at(-1).submit()")
    page.wait("document.getElementById('token') !== null")
    assert [text for text in page.messages if "password" not in text.lower()] == []
    trusted = httpx.create_ssl_context(verify=str(folder / "keys/operator/ca.crt"))
    with httpx.Client(verify=trusted) as client:
        assert client.get(f"{address}/metrics").status_code == 401
        answer = client.get(f"{address}/metrics", headers={"authorization": f"Bearer {token}"})
        assert b"fedlearn_nodes" in answer.content
        assert client.get(address, headers={"host": "evil.example"}).status_code == 421
    assert "fedlearn_run_rounds_total" in httpx.get(metrics).text
