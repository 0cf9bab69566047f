"""Strategies that go wrong on purpose, in code of a user's own: a trainer's, or the coordinator's."""

import errno
import sys
import time

from fedlearn import LocalRule, Strategy, checkpoint, uniform


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
