"""Write run folders for tests of the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path

HOSTILE = '</script><img src=x onerror="window.attacked=1">\'"&<svg/onload=window.attacked=1>'


def line(round, /, *, metric="accuracy", value=0.5, reason="", **more):
    """Return one line of metrics.jsonl."""
    failures = [{"client": 1, "stage": "node", "reason": reason}] if reason else []
    entry = {
        "round": round,
        "time": f"2026-01-01T00:00:{round % 60:02d}+00:00",
        "train": {"loss": 1 / round},
        "test": {"loss": 2 / round, metric: value},
        "clients": {metric: {"mean": value, "std": 0.1, "worst10": value / 2}},
        "num_updates": 3,
        "failures": failures,
        "bytes_up": 100,
        "bytes_down": 200,
        "seconds": 0.5,
        "epsilon": None,
    }
    return json.dumps(entry | more) + "\n"


class RunFolder:
    """A run folder whose files a test writes."""

    def __init__(self, path: Path, *, rounds: int = 10, scenario: str = "digits", strategy: str = "fedavg") -> None:
        self.path = path
        path.mkdir(parents=True)
        (path / "config.yaml").write_text("strategy: {}\n")
        (path / "run.log").touch()
        header = {"scenario": f"{scenario} · 3 clients", "strategy": strategy, "engine": "serial"}
        environment = {"header": header, "metric": "accuracy", "rounds": rounds}
        (path / "environment.json").write_text(json.dumps(environment))

    def add(self, *lines: str) -> RunFolder:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write("".join(lines))
        return self

    def end(self, status: str = "done", **more) -> RunFolder:
        summary = {"status": status, "scenario": "digits", "strategy": "fedavg", "metric": "accuracy", **more}
        (self.path / "summary.json").write_text(json.dumps(summary))
        return self
