"""Run the programs that Flower starts for a run, and build the app of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedlearn.flower.compat.names import FLOWER


def run_superexec(arguments: Sequence[str], executor: Any) -> None:
    """Run Flower's SuperExec with another way to start programs.

    Args:
        arguments: arguments of ``flower-superexec``.
        executor: result of `executor`.
    """
    FLOWER.verify("superexec")
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec import run_superexec as loop

    loop.get_executor = lambda *args, **settings: executor
    sys.argv = ["flower-superexec", *arguments]
    flower_superexec()


def executor(launch: Callable[[Any], None], reconcile: Callable[[], None]) -> Any:
    """Return an executor for Flower's SuperExec.

    Args:
        launch: starts the program for one message; its argument is Flower's description of the program.
        reconcile: called before each poll for messages.
    """
    FLOWER.verify("superexec")
    from flwr.supercore.superexec.executor import LaunchResult
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor

    class Executor(SubprocessExecutor):
        def launch(self, spec: Any) -> LaunchResult:
            launch(spec)
            return LaunchResult.accepted()

        def reconcile(self) -> None:
            reconcile()

    return Executor()


def run_serverapp(arguments: Sequence[str], token: str) -> None:
    """Run Flower's process for a ServerApp; the token is not an argument of the process.

    Args:
        arguments: further arguments of ``flwr-serverapp``.
        token: token of the run.
    """
    FLOWER.verify("server app")
    from flwr.superlink.cli import flwr_serverapp

    sys.argv = ["flwr-serverapp", *arguments, "--token", token]  # this does not change the command line in /proc
    flwr_serverapp()


def serverapp_arguments(spec: Any) -> list[str]:
    """Return the arguments of ``flwr-serverapp`` for Flower's description of a run, without the token.

    Raises:
        ValueError: The description is not of a ServerApp.
    """
    FLOWER.verify("server app")
    from flwr.supercore.constant import TaskType

    if spec.task_type != TaskType.SERVER_APP:
        raise ValueError(f"this coordinator starts no programs of type {spec.task_type}")
    arguments = ["--runtime-api-address", spec.runtime_api_address, "--parent-pid", str(spec.parent_pid)]
    return [*arguments, "--root-certificates", str(spec.root_certificates_path)]


def app_bundle(files: Mapping[str, bytes]) -> tuple[bytes, Callable[[str], Any]]:
    """Build an app bundle (FAB).

    Args:
        files: path in the bundle -> content.

    Returns:
        The bundle as bytes, and a function that returns Flower's record of it for a digest.
    """
    FLOWER.verify("bundle")
    from flwr.cli.build import build_fab_from_files
    from flwr.supercore.fab import Fab

    content, _ = build_fab_from_files(dict(files))
    return content, lambda digest: Fab(digest, content, {})
