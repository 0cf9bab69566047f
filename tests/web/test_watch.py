"""The command `watch` serves a folder on loopback, and ends by a signal."""

import re
import signal
import subprocess
import sys

import httpx
import pytest
from run_folders import RunFolder, line

from simulations.watch import main


@pytest.mark.slow
def test_the_command_serves_the_page_until_a_signal(tmp_path):
    RunFolder(tmp_path / "run").add(line(1))
    command = [sys.executable, "-m", "simulations.watch", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == f"watching  {tmp_path}\n"
            address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
            assert "fedlearn" in httpx.get(address).text
            with httpx.stream("GET", f"{address}/events") as response:
                assert any("digits" in text for text in response.iter_lines() if text.startswith("data: "))
                process.send_signal(signal.SIGTERM)  # also while a page is open
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_a_wrong_port_is_named(tmp_path, capsys):
    assert main([str(tmp_path), "--port", "70000"]) == 2
    assert "--port is 70000" in capsys.readouterr().err
