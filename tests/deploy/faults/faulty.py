"""Strategies of a user that fail on purpose, at the trainer of a node or at the coordinator."""

import errno
import sys
import time
from pathlib import Path

from fedlearn import LocalRule, Strategy, uniform
from fedlearn.core import checkpoint

LIMIT_S = 240.0  # limit of a wait for a file


def wait_for(path):
    until = time.monotonic() + LIMIT_S
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)


def held_node(*, until, client=1):
    """Return FedAvg whose node with this client creates a file when it trains, and waits for another file."""
    here = f"--client {client}" in " ".join(sys.argv)

    def wait(grad, w, w_global):
        if here and not Path(until).exists():
            Path(f"{until}.waiting").touch()
            wait_for(Path(until))
        return grad

    return Strategy(select=uniform(None), local=LocalRule(correct=wait))


def held_coordinator(*, until, after_round=2):
    """Return FedAvg whose coordinator waits for a file after it has saved a round."""
    if "serverapp" in sys.argv[0]:
        save = checkpoint.save

        def waiting(folder, state, *args, **options):
            path = save(folder, state, *args, **options)
            if state.round == after_round:
                wait_for(Path(until))
            return path

        checkpoint.save = waiting
    return Strategy(select=uniform(None))


def slow(*, seconds=0.1):
    """Return FedAvg with a pause in each local step."""

    def wait(grad, w, w_global):
        time.sleep(seconds)
        return grad

    return Strategy(select=uniform(None), local=LocalRule(correct=wait))


def raising(*, client=1):
    """Return FedAvg that raises an error at the node with this client."""
    here = f"--client {client}" in " ".join(sys.argv)

    def fail(grad, w, w_global):
        if here:
            raise RuntimeError("the scanner is switched off")
        return grad

    return Strategy(select=uniform(None), local=LocalRule(correct=fail))


def full(*, from_round=2):
    """Return FedAvg with a coordinator whose disk is full from this round on."""
    if "serverapp" in sys.argv[0]:
        save = checkpoint.save

        def refused(folder, state, *args, **options):
            if state.round >= from_round:
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(folder, state, *args, **options)

        checkpoint.save = refused
    return Strategy(select=uniform(None))
