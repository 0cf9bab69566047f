"""Unmodified Flower apps run in this process as they do in Flower."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed")
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from fedlearn import SettingError
from fedlearn.flower import run as command
from fedlearn.flower.in_process_grid import InProcessGrid

RAISED, GONE = 2, 3  # Flower's codes: the ClientApp raised an error; the message does not exist any more


def records(*values, **config):
    """Return a model with one array, and settings."""
    arrays = ArrayRecord([np.array(values, np.float32)])
    return RecordDict({"arrays": arrays, "config": ConfigRecord(config)})


def values_of(message):
    return message.content["arrays"].to_numpy_ndarrays()[0].tolist()


@pytest.fixture
def client():
    app = ClientApp()

    @app.train()
    def train(message, context):
        seen = context.state.get("seen", MetricRecord({"times": 0}))
        context.state["seen"] = MetricRecord({"times": seen["times"] + 1})
        partition = context.node_config["partition-id"]
        if message.content["config"].get("fails") == partition:
            context.state["seen"]["times"] = 99
            raise ValueError("disk gone")
        seconds = message.content["config"].get("seconds", 0)
        time.sleep(seconds)
        kept = {"num-examples": partition + 1, "times": seen["times"] + 1}
        kept["of"] = context.node_config["num-partitions"]
        current = ArrayRecord(
            [values + np.float32(partition) for values in message.content["arrays"].to_numpy_ndarrays()]
        )
        return Message(RecordDict({"arrays": current, "metrics": MetricRecord(kept)}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}), reply_to=message)

    @app.query("name")
    def name(message, context):
        config = ConfigRecord({"node": context.node_id, "asked": context.run_config["question"]})
        return Message(RecordDict({"config": config}), reply_to=message)

    return app


def to_all(grid, kind="train", content=None, **settings):
    content = content or records(1.0)
    return [Message(content, node, kind, **settings) for node in grid.get_node_ids()]


def test_a_server_app_runs_rounds_of_a_stock_strategy(client):
    server, found = ServerApp(), []

    @server.main()
    def main(grid, context):
        strategy = FedAvg(fraction_train=0.5, min_train_nodes=2)
        found.append(strategy.start(grid, ArrayRecord([np.zeros(3, np.float32)]), num_rounds=3))

    grid = InProcessGrid(client, 4)
    server(grid=grid, context=Context(1, 0, {}, RecordDict(), {}))
    assert found[0].arrays.to_numpy_ndarrays()[0].shape == (3,)
    assert found[0].evaluate_metrics_clientapp[3] == {"loss": 0.5}
    assert grid.outcomes == {"response": 3 * (2 + 4)}


def test_nodes_know_their_partition_and_keep_their_state(client):
    grid = InProcessGrid(client, 3, run_config={"question": "who"})
    first, second = (list(grid.send_and_receive(to_all(grid))) for _ in range(2))
    assert [values_of(reply) for reply in first] == [[1.0], [2.0], [3.0]]
    assert [reply.content["metrics"]["times"] for reply in first] == [1, 1, 1]
    assert [reply.content["metrics"]["times"] for reply in second] == [2, 2, 2]
    assert {reply.content["metrics"]["of"] for reply in second} == {3}
    names = list(grid.send_and_receive(to_all(grid, "query.name")))
    assert [reply.content["config"]["node"] for reply in names] == list(grid.get_node_ids())
    assert {reply.content["config"]["asked"] for reply in names} == {"who"}
    assert [reply.metadata.src_node_id for reply in names] == list(grid.get_node_ids())


def test_what_a_client_app_raises_becomes_an_error_reply_and_its_node_stays_as_it_was(client):
    grid = InProcessGrid(client, 3)
    list(grid.send_and_receive(to_all(grid)))
    replies = list(grid.send_and_receive(to_all(grid, content=records(1.0, fails=1))))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == RAISED
    assert "disk gone" in replies[1].error.reason
    assert "ClientAppException" in replies[1].error.reason
    assert "ValueError: disk gone" in grid.first_error
    after = list(grid.send_and_receive(to_all(grid)))
    assert [reply.content["metrics"]["times"] for reply in after] == [3, 2, 3]


def test_an_error_reads_as_it_does_in_flowers_own_simulation(client):
    from flwr.clientapp.client_app import ClientAppException

    grid = InProcessGrid(client, 1)
    (reply,) = grid.send_and_receive(to_all(grid, content=records(1.0, fails=0)))
    error = ClientAppException("disk gone")
    assert reply.error.reason == str(type(error)) + ":<'" + str(error) + "'>"


def test_an_unknown_action_and_no_reply_at_all_are_errors_too(client):
    @client.train("nothing")
    def nothing(message, context):
        return None

    grid = InProcessGrid(client, 1)
    for kind, reason in (("train.absent", "No train function"), ("train.nothing", "returned NoneType")):
        (reply,) = grid.send_and_receive(to_all(grid, kind))
        assert (reply.error.code, reason in reply.error.reason) == (RAISED, True)


def test_the_run_configuration_must_stay_as_it_is(client):
    @client.train("meddle")
    def meddle(message, context):
        context.run_config["question"] = "other"
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(client, 1, run_config={"question": "who"})
    (reply,) = grid.send_and_receive(to_all(grid, "train.meddle"))
    assert "run_config" in reply.error.reason
    (reply,) = grid.send_and_receive(to_all(grid, "query.name"))
    assert reply.content["config"]["asked"] == "who"


def test_apps_share_nothing_that_can_be_changed():
    app, seen = ClientApp(), []

    @app.train()
    def train(message, context):
        content = message.content
        seen.append(content)
        content["config"]["numbers"].append(3)
        content["arrays"].clear()
        context.state["mine"] = MetricRecord({"x": [1]})
        reply = Message(RecordDict({"metrics": MetricRecord({"x": [1, 2]})}), reply_to=message)
        seen.append(reply.content)
        return reply

    grid, content = InProcessGrid(app, 2), records(1.0, numbers=[1, 2])
    for _ in range(2):
        replies = list(grid.send_and_receive(to_all(grid, content=content)))
    assert content["config"]["numbers"] == [1, 2]
    assert len(content["arrays"]) == 1
    replies[0].content["metrics"]["x"].append(9)
    assert [given["metrics"]["x"] for given in seen[1::2]] == [[1, 2]] * 4
    ids = grid.push_messages(to_all(grid, content=content))
    content["config"]["numbers"].append(7)  # after it was sent
    list(grid.pull_messages(ids))
    assert seen[-2]["config"]["numbers"] == [1, 2, 3]


def test_waiting_ends_and_what_was_late_can_be_pulled(client):
    grid, content = InProcessGrid(client, 3), records(1.0, seconds=0.15)
    ids = list(grid.push_messages(to_all(grid, content=content)))
    assert not grid.outcomes  # no app has handled a message yet
    got = list(grid.pull_messages(ids))
    assert [values_of(reply) for reply in got] == [[1.0]]
    late = list(grid.send_and_receive(to_all(grid, content=content), timeout=0.2))
    assert 1 <= len(late) < 3
    assert len(list(grid.pull_messages(ids[1:2]))) == 1


def test_expired_messages_unknown_nodes_and_replies_pulled_before_are_answered_by_errors(client, caplog):
    grid = InProcessGrid(client, 2)
    ids = list(grid.push_messages(to_all(grid, ttl=0.05)))
    time.sleep(0.1)
    replies = list(grid.pull_messages(ids))
    assert [reply.error.code for reply in replies] == [GONE, GONE]
    assert {reply.metadata.reply_to_message_id for reply in replies} == set(ids)
    again = list(grid.pull_messages(ids))
    assert [reply.error.code for reply in again] == [GONE, GONE]
    with caplog.at_level(logging.ERROR):
        assert list(grid.send_and_receive([Message(records(1.0), 99, "train")])) == []
    assert "no node 99" in caplog.text


@pytest.mark.parametrize("num_nodes", [0, -1, 1.5, True])
def test_a_number_of_nodes_out_of_range_is_refused(client, num_nodes):
    with pytest.raises(SettingError, match="num_nodes"):
        InProcessGrid(client, num_nodes)


def test_a_million_nodes_cost_nothing_until_they_are_written_to(client):
    grid = InProcessGrid(client, 1_000_000)
    (reply,) = grid.send_and_receive([Message(records(0.0), grid.get_node_ids()[-1], "train")])
    assert values_of(reply) == [999_999.0]


def test_apps_of_the_old_kind_run_too():
    from flwr.client import NumPyClient
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg as OldFedAvg

    class Old(NumPyClient):
        def __init__(self, partition):
            self.partition = partition

        def fit(self, parameters, config):
            return [parameters[0] + self.partition], 1, {}

    ends = []

    def server_fn(context):
        start = OldFedAvg(
            fraction_evaluate=0.0,
            initial_parameters=ndarrays_to_parameters([np.zeros(2, np.float32)]),
            evaluate_fn=lambda round, arrays, config: ends.append(arrays[0].tolist()),
        )
        return ServerAppComponents(strategy=start, config=ServerConfig(num_rounds=2))

    client = ClientApp(client_fn=lambda context: Old(context.node_config["partition-id"]).to_client())
    grid = InProcessGrid(client, 3)
    ServerApp(server_fn=server_fn)(grid=grid, context=Context(1, 0, {}, RecordDict(), {}))
    assert np.allclose(ends, [[0, 0], [1, 1], [2, 2]])


# the command

PROJECT = """
[project]
name = "small"
version = "1.0.0"
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "{module}:server"
clientapp = "{module}:{client}"
[tool.flwr.app.config]
num-server-rounds = 2
model.width = 4
"""
CODE = """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

client, server, number = ClientApp(), ServerApp(), 3


@client.train()
def train(message, context):
    if context.run_config["model.width"] == 13:
        raise ValueError("unlucky width")
    own = [w + np.float32(context.node_config["partition-id"]) for w in message.content["arrays"].to_numpy_ndarrays()]
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord(own), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid, context):
    width = context.run_config["model.width"]
    if width == 0:
        raise RuntimeError("no width at all")
    if width == 1:
        raise KeyboardInterrupt
    start = ArrayRecord([np.zeros(width, np.float32)])
    result = FedAvg(fraction_evaluate=0.0).start(grid, start, num_rounds=context.run_config["num-server-rounds"])
    print("model", result.arrays.to_numpy_ndarrays()[0].round(3).tolist())
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a function that writes a folder with an app, in a module with a unique name."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(module=f"app_{tmp_path.name}", client="client", code=CODE, text=PROJECT):
        (tmp_path / f"{module}.py").write_text(code)
        (tmp_path / "pyproject.toml").write_text(text.format(module=module, client=client))
        return str(tmp_path)

    return make


def test_the_command_runs_an_app_and_prints_what_it_prints(project, tmp_path):
    words = [project(), "num_nodes=5", "num-server-rounds=3", "model.width=2"]
    done = subprocess.run(
        [sys.executable, "-m", "fedlearn.flower.run", *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "model [6.0, 6.0]" in done.stdout
    assert "5 nodes, 15 responses, 0 errors" in done.stderr


@pytest.mark.parametrize(
    ("word", "code", "shown"),
    [
        ("num_nodes=0", 2, "num_nodes is 0"),
        ("num_nodes=many", 2, "num_nodes is many"),
        ("num-server-round=3", 2, "num-server-rounds=3"),
        ("model.width", 2, "key=value"),
        ("model.width=0", 3, "no width at all"),
        ("model.width=13", 3, "unlucky width"),
        ("model.width=1", 130, "stopped"),
    ],
)
def test_the_exit_code_and_the_message_say_what_went_wrong(project, capsys, word, code, shown):
    assert command.main([project(), word]) == code
    assert shown in capsys.readouterr().err


def test_an_app_that_cannot_be_used_is_told_with_the_reason(project, tmp_path, capsys):
    def shown(*words):
        assert command.main(words) == 2
        return capsys.readouterr().err

    assert "no such folder" in shown(str(tmp_path / "absent"))
    assert "no pyproject.toml" in shown(str(tmp_path))
    assert "lacks 'tool'" in shown(project(text="[project]\nname = 'x'\n"))
    assert "cannot be read" in shown(project(text="[project\n"))
    assert "no attribute 'absent'" in shown(project(client="absent"))
    assert "is a int, expected a ClientApp" in shown(project(client="number"))
    assert "No module named 'not_there'" in shown(project(module="broken_app", code="import not_there"))
    assert "broken_app.py, line 1" in shown(project(module="broken_app", code="import not_there"))
