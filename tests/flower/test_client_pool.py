"""Clients in several processes give the results of clients in one process."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("flwr", reason="the extra flower is not installed")

from fedlearn import SettingError
from fedlearn.flower import run as command
from fedlearn.flower.app_settings import Federation, RunSettings, parse_settings, read_federation
from fedlearn.flower.client_pool import ClientPool, ClientSource

PROJECT = """
[tool.flwr.app]
publisher = "x"
[tool.flwr.app.components]
serverapp = "pooled_app:server"
clientapp = "pooled_app:client"
[tool.flwr.app.config]
out = "none"
seconds = 0.0
fails = ""
"""
APP = """
import json, os, time
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()


@client.train()
def train(message, context):
    time.sleep(context.run_config["seconds"])
    partition, number = context.node_config["partition-id"], message.content["c"]["number"]
    if context.run_config["fails"] == f"{partition}.{number}":
        os._exit(1)
    before = context.state["seen"]["numbers"] if "seen" in context.state else []
    context.state["seen"] = ConfigRecord({"numbers": [*before, number]})
    reply = ConfigRecord({"seen": context.state["seen"]["numbers"], "pid": os.getpid(), "partition": partition})
    return Message(RecordDict({"c": reply}), reply_to=message)


@server.main()
def main(grid, context):
    nodes = list(grid.get_node_ids())
    messages = [
        Message(RecordDict({"c": ConfigRecord({"number": number})}), node, "train")
        for number in range(3)
        for node in nodes
    ]
    replies = list(grid.send_and_receive(messages))
    content = [dict(reply.content["c"]) if reply.has_content() else reply.error.reason for reply in replies]
    with open(context.run_config["out"], "w") as out:
        json.dump(content, out)
"""


@pytest.fixture
def app(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "pooled_app.py").write_text(APP)

    def run(*settings):
        out = tmp_path / "out.json"
        code = command.main([str(tmp_path), "num_nodes=3", f'out="{out}"', *settings])
        return code, json.loads(out.read_text())

    return run


def without_pid(content):
    return [{key: value for key, value in each.items() if key != "pid"} for each in content]


@pytest.mark.slow
def test_results_states_and_order_do_not_depend_on_the_number_of_processes(app):
    code, here = app()
    assert (code, {each["pid"] for each in here}) == (0, {os.getpid()})
    code, there = app("workers=2", "seconds=0.2")
    assert code == 0
    assert without_pid(there) == without_pid(here)
    assert [each["seen"] for each in there[-3:]] == [[0, 1, 2]] * 3
    pids = {each["pid"] for each in there}
    assert len(pids) == 2
    assert os.getpid() not in pids


@pytest.mark.slow
def test_a_process_that_ends_fails_its_messages_only_and_is_replaced(app, capsys):
    code, content = app("workers=2", 'fails="1.1"')
    lost = [each for each in content if isinstance(each, str)]
    assert code == command.PARTLY_FAILED
    assert lost == ["the process of the ClientApp ended"]
    assert [each["seen"] for each in content[-3:]] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert "the process of the ClientApp ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_cpus", "workers", "expected"),
    [(None, None, 1), (1, None, 4), (2, None, 2), (3, None, 1), (8, None, 1), (0.5, None, 8), (1, 3, 3), (None, 2, 2)],
)
def test_the_apps_cores_of_a_client_choose_the_number_of_processes(monkeypatch, tmp_path, num_cpus, workers, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    source = ClientSource(tmp_path / "pyproject.toml", "app:client")
    app = command.FlowerApp(
        server=None, client=None, config={}, federation=Federation(num_cpus=num_cpus), source=source
    )
    pool = command._client_pool(app, 100, RunSettings(workers=workers))
    assert (pool.num_workers if pool else 1) == expected
    few = command._client_pool(app, 2, RunSettings(workers=workers))
    assert (few.num_workers if few else 1) == min(2, expected)


def test_the_cores_of_a_client_are_read_from_the_federation():
    options = {"num-supernodes": 10, "backend": {"name": "ray", "client-resources": {"num-cpus": 2, "num-gpus": 0.5}}}
    federation = read_federation({"federations": {"default": "local", "local": {"options": options}}})
    assert (federation.num_nodes, federation.num_cpus) == (10, 2)
    assert federation.unused == ("options.backend.client-resources.num-gpus", "options.backend.name")


@pytest.mark.parametrize("value", [0, -1, "two", float("nan"), True])
def test_cores_that_are_no_number_are_refused(value):
    options = {"backend": {"client-resources": {"num-cpus": value}}}
    with pytest.raises(SettingError, match=r"client-resources\.num-cpus"):
        read_federation({"federations": {"default": "local", "local": {"options": options}}})


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_workers_that_are_no_count_are_refused(value):
    with pytest.raises(SettingError, match="workers"):
        parse_settings([f"workers={value}"])


def test_a_pool_starts_no_process_before_its_first_message(tmp_path):
    pool = ClientPool(ClientSource(tmp_path / "none", "none:none"), 2, 1)
    assert not any(executor._processes for executor in pool._executors)
    pool.close()
