"""Fork processes from a template, which is a process that has imported libraries.

The processes share the imports of the template. PyTorch and JAX start no threads when they are imported. JAX starts
threads with its first computation, in the forked processes.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

SIGNAL_AT_END_OF_PARENT = 1  # option of prctl


class ProcessTemplate:
    """Fork processes that share the imports of one process.

    Ctrl-C does not reach the template and its processes, because each has a process group. They get SIGTERM when the
    calling process dies.

    Args:
        prepare: function that the template calls first, e.g. to import libraries.
        serve: function of a forked process, which receives its end of a pipe.
    """

    def __init__(self, prepare: Callable[[], object], serve: Callable[[Connection], object]) -> None:
        self._prepare, self._serve = prepare, serve
        self._process: BaseProcess | None = None
        self._requests: socket.socket | None = None

    def fork(self, inherited: Iterable[Connection]) -> Connection:
        """Ask the template for a process, and return this end of its pipe. The first call starts the template.

        The process starts as soon as the template is prepared. If the template has died, the pipe has no other end.

        Args:
            inherited: ends of pipes that the template does not need.
        """
        if self._process is None or not self._process.is_alive():
            self._start(list(inherited))
        assert self._requests is not None
        ours, theirs = multiprocessing.Pipe()
        with theirs, suppress(BrokenPipeError):
            socket.send_fds(self._requests, [b"1"], [theirs.fileno()])
        return ours

    def kill(self) -> None:
        """End the template without its preparation. Its processes end with it."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """Wait for the end of all processes, which end when their pipes are closed, and end the template."""
        if self._process is not None and self._requests is not None:
            self._requests.close()
            self._process.join()
            self._process = None

    def _start(self, inherited: list[Connection]) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(theirs, [ours, *inherited]))
        self._process.start()
        theirs.close()
        self._requests = ours

    def _run(self, requests: socket.socket, inherited: list[socket.socket | Connection]) -> None:
        """Fork a process for each request, until the parent closes the socket. Wait for the end of all processes."""
        _leave_group()
        for other in inherited:  # a pipe that stays open here would not report the end of the parent
            other.close()
        try:
            self._prepare()
            fork = multiprocessing.get_context("fork")
            while handles := socket.recv_fds(requests, 1, 1)[1]:
                with Connection(handles[0]) as pipe:
                    fork.Process(target=self._run_process, args=(requests, pipe)).start()
            for process in multiprocessing.active_children():
                process.join()
        except KeyboardInterrupt:  # the parent died: the processes get SIGTERM when this process ends
            os._exit(1)

    def _run_process(self, requests: socket.socket, pipe: Connection) -> None:
        _leave_group()
        requests.close()
        self._serve(pipe)


def _leave_group() -> None:
    """Put this process into its process group, so that the parent receives Ctrl-C and passes it on."""
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(SIGNAL_AT_END_OF_PARENT, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # the parent died before prctl
        os._exit(1)
