"""Strategies that go wrong on purpose, in code of a user's own: a trainer's, or the coordinator's."""

import errno
import sys
import time
from pathlib import Path

from fedlearn import LocalRule, Strategy, uniform
from fedlearn.core import checkpoint

LIMIT_S = 240.0  # for those who wait for a file


def wait_for(path):
    until = time.monotonic() + LIMIT_S
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)


def held_node(*, until, client=1):
    """FedAvg where the node of this client says that it trains, by a file, and waits for another one."""
    here = f"--client {client}" in " ".join(sys.argv)

    def wait(grad, w, w_global):
        if here and not Path(until).exists():
            Path(f"{until}.waiting").touch()
            wait_for(Path(until))
        return grad

    return Strategy(select=uniform(None), local=LocalRule(correct=wait))


def held_coordinator(*, until, after_round=2):
    """FedAvg on a coordinator that waits for a file once it has saved some round."""
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
    """FedAvg whose every local step takes so much longer."""

    def wait(grad, w, w_global):
        time.sleep(seconds)
        return grad

    return Strategy(select=uniform(None), local=LocalRule(correct=wait))


def raising(*, client=1):
    """FedAvg that fails wherever this client lives."""
    here = f"--client {client}" in " ".join(sys.argv)

    def fail(grad, w, w_global):
        if here:
            raise RuntimeError("the scanner is switched off")
        return grad

    return Strategy(select=uniform(None), local=LocalRule(correct=fail))


def full(*, from_round=2):
    """FedAvg on a coordinator whose disk is full from some round on."""
    if "serverapp" in sys.argv[0]:
        save = checkpoint.save

        def refused(folder, state, *args, **options):
            if state.round >= from_round:
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(folder, state, *args, **options)

        checkpoint.save = refused
    return Strategy(select=uniform(None))
