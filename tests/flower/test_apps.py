"""Apps in the style of Flower's examples run unchanged, and what cannot be done is named."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest

pytest.importorskip("flwr", reason="Flower is not installed")
from flower_apps import APPS, EXPECTED, run_app
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.client_manager import SimpleClientManager
from flwr.serverapp import strategy as flower

from fedlearn import SettingError
from fedlearn.flower import node_waits
from fedlearn.flower import run as command
from fedlearn.flower.app_settings import parse_settings, read_federation
from fedlearn.flower.in_process_grid import InProcessGrid
from fedlearn.flower.node_waits import EndlessWait


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_an_app_of_flower_prints_the_result_that_it_must(name):
    code, result, errors = run_app(name)
    assert (code, result) == (EXPECTED[name].code, EXPECTED[name].result), errors


@pytest.fixture
def counting():
    """Return a ClientApp that counts the messages of its node, and returns the counts."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        counts = context.state.get("counts", MetricRecord({"train": 0}))
        context.state["counts"] = MetricRecord({"train": counts["train"] + message.content["by"]["by"]})
        return Message(RecordDict(), reply_to=message)

    @app.query()
    def query(message, context):
        return Message(RecordDict({"counts": context.state["counts"]}), reply_to=message)

    @app.query("exit")
    def leave(message, context):
        sys.exit(3)

    @app.query("config")
    def config(message, context):
        return Message(RecordDict({"config": ConfigRecord(dict(context.node_config))}), reply_to=message)

    return app


def train(grid, by=1, nodes=None):
    content = RecordDict({"by": MetricRecord({"by": by})})
    return grid.push_messages([Message(content, node, "train") for node in nodes or grid.get_node_ids()])


def counts(grid):
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])
    return [reply.content["counts"]["train"] for reply in replies]


def test_a_message_whose_response_is_never_pulled_reaches_its_node_before_the_next_one(counting):
    grid = InProcessGrid(counting, 2)
    for by in (1, 10, 100):
        train(grid, by)
    assert counts(grid) == [111, 111]
    train(grid, 1000, nodes=[2])
    assert counts(grid) == [1111, 111]


def test_messages_that_remain_are_handled_at_the_end_in_the_order_of_sending(counting):
    grid, order = InProcessGrid(counting, 3), []
    original = grid._keep
    grid._keep = lambda message, outcome: (order.append(message.metadata.dst_node_id), original(message, outcome))
    for nodes in ([4], [2], [4, 3]):
        train(grid, nodes=nodes)
    assert not order
    grid.handle_all()
    assert order == [4, 2, 4, 3]
    assert grid.outcomes == {"response": 4}
    grid.handle_all()
    assert grid.outcomes == {"response": 4}


def test_responses_can_be_pulled_in_any_order_and_once(counting):
    grid = InProcessGrid(counting, 1)
    first, second, third = (next(iter(train(grid, by))) for by in (1, 10, 100))
    assert [reply.has_content() for reply in grid.pull_messages([third])] == [True]
    assert [reply.has_content() for reply in grid.pull_messages([first, second])] == [True, True]
    assert [reply.has_error() for reply in grid.pull_messages([first])] == [True]
    assert counts(grid) == [111]


def test_an_expired_message_is_not_handled_and_does_not_stop_the_others(counting):
    grid = InProcessGrid(counting, 1)
    content = RecordDict({"by": MetricRecord({"by": 5})})
    grid.push_messages([Message(content, 2, "train", ttl=0.01)])
    time.sleep(0.02)
    train(grid, 7)
    assert counts(grid) == [7]


def test_an_exit_of_a_client_app_is_an_error_of_one_message(counting):
    grid = InProcessGrid(counting, 2)
    (reply,) = grid.send_and_receive([Message(RecordDict(), 2, "query.exit")])
    assert reply.has_error()
    assert "SystemExit" in grid.first_error


def test_each_node_has_its_configuration(counting):
    grid = InProcessGrid(counting, 2, node_config={"dataset-path": "parts/{partition}", "fast": True})
    replies = grid.send_and_receive([Message(RecordDict(), node, "query.config") for node in grid.get_node_ids()])
    shown = [dict(reply.content["config"]) for reply in replies]
    assert shown[1] == {"partition-id": 1, "num-partitions": 2, "dataset-path": "parts/1", "fast": True}


def test_a_strategy_that_waits_for_more_nodes_ends_with_the_number(counting):
    grid, strategy = InProcessGrid(counting, 2), flower.FedAvg(min_available_nodes=5)
    with pytest.raises(EndlessWait, match=r"num_nodes is 2(.|\n)*at least 5 nodes\n  try       num_nodes=5"):
        list(strategy.configure_train(1, flower.strategy.ArrayRecord(), ConfigRecord(), grid))


@pytest.mark.parametrize("ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_a_wait_of_an_older_app_ends_although_another_thread_asks_for_nodes(counting, ctrl_c):
    manager, previous = SimpleClientManager(), signal.signal(signal.SIGINT, ctrl_c)

    def ask():
        with suppress(EndlessWait):
            while True:  # the first requests may come before the wait starts
                time.sleep(0.1)
                grid.get_node_ids()

    try:
        with node_waits.interruptible_main_thread() as interrupt:
            grid = InProcessGrid(counting, 2, on_endless_wait=interrupt)
            threading.Thread(target=ask, daemon=True).start()
            with pytest.raises(KeyboardInterrupt):
                manager.wait_for(7, timeout=60)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert "num_nodes=7" in str(grid.endless_wait)


def test_a_loop_of_an_app_that_waits_for_nodes_ends(counting, monkeypatch):
    monkeypatch.setattr(node_waits, "MIN_SECONDS", 0.05)
    grid = InProcessGrid(counting, 2)

    def wait():
        while len(list(grid.get_node_ids())) < 3:
            time.sleep(0.02)

    with pytest.raises(EndlessWait, match="num_nodes=4"):
        wait()


def test_asking_for_nodes_often_is_no_wait_if_messages_are_sent(counting, monkeypatch):
    monkeypatch.setattr(node_waits, "MIN_SECONDS", 0.0)
    grid = InProcessGrid(counting, 2)
    for _ in range(20):
        train(grid, nodes=list(grid.get_node_ids()))
        grid.get_node_ids()
    for _ in range(3):  # not one place in a loop
        grid.get_node_ids()
        grid.get_node_ids()


def run_here(monkeypatch, capsys, name, *settings):
    """Run an app in this process. Return the exit code and both outputs."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for handler in logging.getLogger("flwr").handlers:  # its stream is that of the test that imported Flower
        monkeypatch.setattr(handler, "stream", sys.stderr)
    code = command.main([str(APPS / name), *settings])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("settings", "code", "shown"),
    [
        ((), 4, "done, but some messages failed"),
        (("max_failures=0.25",), 0, "done in"),
        (("max_failures=0.2",), 4, "3 responses, 1 errors"),
        (("num_nodes=3",), 0, "3 nodes, 3 responses, 0 errors"),
        (("num-supernodes=3",), 2, "try       num_nodes=3"),
        (("node_config.partition-id=3",), 2, "each node has its own number"),
        (("federation=moon",), 2, "a federation of the app: local-simulation"),
        (("federation=local-simulation", "max_failures=1"), 0, "4 nodes"),
        (("max_failures=2",), 2, "max_failures is 2"),
    ],
)
def test_settings_and_exit_codes(monkeypatch, capsys, settings, code, shown):
    found, _, errors = run_here(monkeypatch, capsys, "survival", *settings)
    assert (found, shown in errors) == (code, True), errors


def test_failing_nodes_have_one_line_each_and_one_traceback(monkeypatch, capsys, caplog):
    _, _, errors = run_here(monkeypatch, capsys, "survival", "num_nodes=6")
    assert len([record for record in caplog.records if "no data for partition" in record.message]) == 3
    assert not any(record.exc_info for record in caplog.records)
    assert errors.count("Traceback") <= 2  # the error and its cause


def test_the_federation_of_an_app_is_read_and_what_has_no_effect_is_named():
    tables = {"default": "big", "big": {"options": {"num-supernodes": 7, "backend": {"name": "ray"}}}}
    federation = read_federation({"federations": tables})
    assert (federation.num_nodes, federation.unused) == (7, ("options.backend.name",))
    assert read_federation({}).num_nodes is None
    assert read_federation({"federations": "broken"}).num_nodes is None
    for number in (0, -1, 2.5, "many", True):
        with pytest.raises(SettingError, match="num-supernodes"):
            read_federation({"federations": {"default": "a", "a": {"options": {"num-supernodes": number}}}})


def test_values_of_nodes_and_apps_are_toml_or_text():
    settings = parse_settings(["node_config.a=1", "node_config.b.c=x y", "lr=0.1", "name=plain", "num_nodes=3"])
    assert settings.node_config == {"a": 1, "b.c": "x y"}
    assert settings.app == {"lr": 0.1, "name": "plain"}


def test_an_app_for_another_flower_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "old_app.py").write_text("from flwr.client.not_here import Client\n")
    components = '[tool.flwr.app.components]\nserverapp = "old_app:s"\nclientapp = "old_app:c"\n'
    (tmp_path / "pyproject.toml").write_text(f'[tool.flwr.app]\nflwr-version-target = "1.29.0"\n{components}')
    assert command.main([str(tmp_path)]) == 2
    assert "the app was written for flwr 1.29.0; installed is flwr" in capsys.readouterr().err
