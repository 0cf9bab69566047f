"""Carry messages between a coordinator and the trainer of a node: ``python -m fedlearn.deploy.node_side.messenger``.

It takes the place of Flower's SuperNode and of the programs that this starts for each message. The messenger runs no
code from the coordinator, and has no data. It sends the bytes of a request to the Unix socket of the trainer, and
returns the bytes of the response.

A message can be lost with a connection, or with a killed messenger. So the messenger connects anew after each error.
The coordinator then sees a new connection, and repeats the requests of the old one. An answer that cannot be read is
such an error, too: a coordinator cannot end the messenger with malformed bytes.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Error, Message

from fedlearn.core.command_line import DONE, CommandParser, command_parser, run_command
from fedlearn.core.plain_text import plain_line
from fedlearn.deploy.connectivity import explain, read_key_file
from fedlearn.deploy.key_files import CA, NODE_KEY
from fedlearn.deploy.log_format import configure_logging
from fedlearn.deploy.node_side.messenger_state import NOT_ADMITTED, MessengerState
from fedlearn.deploy.node_side.trainer_client import TrainerClient, TrainerUnavailable
from fedlearn.deploy.processes import die_with_parent, return_freed_memory
from fedlearn.flower.compat.fleet import FleetClient, MessageRefused, MissingParts
from fedlearn.flower.compat.messages import identify_as_node
from fedlearn.protocol.grid_client import parts_from_record_dict, to_record_dict
from fedlearn.protocol.messages import MAX_REQUEST_BYTES
from fedlearn.protocol.polling import poll_interval

HEARTBEAT_INTERVAL_S = 10.0  # the coordinator takes a node for disconnected after three of these
CHECK_INTERVAL_S = 2.0  # seconds between two checks of the path to the trainer
MAX_POLL_INTERVAL_S = 6.0  # seconds between two polls of a node without work
MAX_RETRY_INTERVAL_S = 5.0  # seconds between two attempts to connect
RESPONSE_TIMEOUT_S = 60.0  # seconds of attempts to send a response
CLIENT_APP_RAISED_EXCEPTION = 2  # Flower's code of an error
NO_TRAINER = "the trainer of this node does not respond; its messenger has logged the reason"
NOT_RECEIVED = "the message is too large for this node; its messenger has logged the reason"
MAX_TIMEOUT_S = 86400.0  # longest time that a request may take; a coordinator could name any number
CONNECTION_ERRORS = (httpx.HTTPError, MissingParts, OSError)
log = logging.getLogger(__name__)


class NotAdmitted(Exception):
    """Report a coordinator that does not admit the key of this node."""


@dataclass
class Messenger:
    """Pull requests from a coordinator, pass them to the trainer, and push the responses.

    Args:
        fleet: connection to the coordinator.
        trainer: connection to the trainer.
        state: state for the parent process and for the next messenger.
        address: address of the coordinator, for messages.
        sleep: function that waits for a number of seconds.

    Attributes:
        is_connected: True from the activation of the node until an error; a heartbeat at another time would renew the
            last connection, which the coordinator must end.
    """

    fleet: FleetClient
    trainer: TrainerClient
    state: MessengerState
    address: str
    sleep: Callable[[float], None] = time.sleep
    is_connected: bool = field(default=False, init=False)
    _num_failures: int = field(default=0, init=False)  # number of errors since the last answer of the coordinator

    def run(self) -> None:
        """Pass messages on until the process ends.

        Raises:
            NotAdmitted: The coordinator does not admit the key of this node.
        """
        while True:
            try:
                self._connect()
                self._carry_messages()
            except NotAdmitted:
                raise
            except Exception as error:  # also an answer that Flower cannot read
                self._after_error(error)

    def _connect(self) -> None:
        """End the last connection, so that the coordinator knows about its lost messages, and start a new one.

        A node is connected only with a trainer that works.
        """
        last, self.is_connected = self.state.node_id, False
        if last:
            with suppress(httpx.HTTPStatusError):  # the connection has ended
                self.fleet.deactivate(last)
        while problem := self.trainer.problem():
            self.state.report(trainer=problem, coordinator="it waits for the trainer")
            self.sleep(0.5)
        self.state.node_id = self.fleet.activate(1.5 * HEARTBEAT_INTERVAL_S)
        self.is_connected = True
        self.state.save_node_id()
        self.state.report(coordinator="")
        log.info("connected to %s", self.address)

    def _carry_messages(self) -> None:
        start = time.monotonic()
        while True:
            try:
                message = self.fleet.pull(self.state.node_id)
            except MessageRefused as refused:
                message = None
                self._push(_refuse(refused))
            self._num_failures = 0
            if message is None:
                self.sleep(poll_interval(time.monotonic() - start, MAX_POLL_INTERVAL_S, shortest_s=0.1))
                continue
            self._push(self._respond(message))
            start = time.monotonic()

    def _respond(self, message: Message) -> Message:
        identify_as_node(message)
        try:
            timeout_s = _timeout_of(message)
            response = self.trainer.call(parts_from_record_dict(message.content), timeout_s=timeout_s)
            return Message(to_record_dict(response), reply_to=message)
        except TrainerUnavailable as error:  # its text has paths of this node
            log.error("%s", error)
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, NO_TRAINER), reply_to=message)
        except ValueError as error:
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, plain_line(str(error))), reply_to=message)

    def _push(self, response: Message) -> None:
        """Send a response, and repeat it while the coordinator is unreachable, unless the run has ended."""
        ends = time.monotonic() + RESPONSE_TIMEOUT_S
        while True:
            try:
                return self.fleet.push(self.state.node_id, response)
            except httpx.HTTPStatusError as error:
                if error.response.status_code == httpx.codes.FORBIDDEN:
                    return log.info("the run of a response has ended")
                raise
            except (httpx.TransportError, MissingParts):
                if time.monotonic() > ends:
                    raise
                self.sleep(0.5)

    def _after_error(self, error: Exception) -> None:
        """Report an error, and wait before the next attempt.

        Raises:
            NotAdmitted: The coordinator does not admit the key of this node.
        """
        if _status(error) == httpx.codes.FORBIDDEN:  # the run of a message has ended
            return
        if isinstance(error, CONNECTION_ERRORS):
            problem = plain_line(explain(self.address, error).splitlines()[0])
        else:
            problem = f"{self.address} sent an answer that cannot be read ({type(error).__name__})"
        if _status(error) == httpx.codes.PRECONDITION_FAILED:  # Flower does not activate this node
            self._require_admission()
            problem = "the coordinator still has the last connection of this node, or does not know its key yet"
        if _status(error) == httpx.codes.UNAUTHORIZED:
            raise NotAdmitted
        self.state.report(coordinator=problem)
        self._num_failures += 1
        log.warning("%s; trying again", problem)
        self.sleep(min(MAX_RETRY_INTERVAL_S, 0.25 * 2**self._num_failures))

    def _require_admission(self) -> None:
        """Ask whether the coordinator admits the key. A refused activation has the same status for other causes."""
        try:
            self.fleet.heartbeat(self.state.node_id or 1, HEARTBEAT_INTERVAL_S)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                raise NotAdmitted from None
        except Exception as error:
            log.debug("the heartbeat fails, too: %s", type(error).__name__)


class Heartbeat(threading.Thread):
    """Report to the coordinator that the node is connected, and check the path to the trainer.

    Args:
        messenger: messenger of this process.
    """

    def __init__(self, messenger: Messenger) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.messenger, self._sent = messenger, 0.0

    def run(self) -> None:
        """Repeat both until the process ends."""
        while True:
            messenger = self.messenger
            if messenger.is_connected and time.monotonic() - self._sent >= HEARTBEAT_INTERVAL_S:
                with suppress(Exception):  # the messenger itself reports a lost connection
                    messenger.fleet.heartbeat(messenger.state.node_id, 1.5 * HEARTBEAT_INTERVAL_S)
                    self._sent = time.monotonic()
            messenger.state.report(trainer=messenger.trainer.problem())
            time.sleep(CHECK_INTERVAL_S)


def _refuse(refused: MessageRefused) -> Message:
    """Return the response to a message that this node does not receive."""
    log.error("refused a message: %s", refused)
    identify_as_node(refused.head)
    return Message(Error(CLIENT_APP_RAISED_EXCEPTION, NOT_RECEIVED), reply_to=refused.head)


def _timeout_of(message: Message) -> float:
    """Return the seconds that a request may take.

    Raises:
        ValueError: The time to live is not a number > 0.
    """
    seconds = message.metadata.ttl
    if not seconds > 0:
        raise ValueError(f"the time to live of the message is {seconds}, expected > 0")
    return min(seconds, MAX_TIMEOUT_S)


def _status(error: Exception) -> int:
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = command_parser(
        "fedlearn.deploy.node_side.messenger", "Carry messages between a coordinator and the trainer of this node."
    )
    parser.add_argument("--coordinator", required=True, metavar="HOST:PORT", help="address")
    parser.add_argument("--keys", type=Path, required=True, help="folder with the keys of this node")
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket of the trainer")
    parser.add_argument("--state", type=Path, required=True, help="folder for the state of the messenger")
    return parser


def carry_messages(*, coordinator: str, keys: Path, socket: Path, state: Path) -> int:
    """Pass messages on until the process ends, and return its exit code."""
    die_with_parent()
    return_freed_memory()
    configure_logging()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # otherwise each poll logs a line
    certificates, key = read_key_file(keys / CA).encode(), (keys / NODE_KEY).read_bytes()
    fleet = FleetClient(
        coordinator, certificates=certificates, private_key=key, folder=state, max_bytes=MAX_REQUEST_BYTES
    )
    messenger = Messenger(fleet, TrainerClient(socket, state), MessengerState.load(state), coordinator)
    Heartbeat(messenger).start()
    try:
        messenger.run()
    except NotAdmitted:
        log.error("%s does not admit the key of this node", coordinator)
        return NOT_ADMITTED
    return DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 cannot start, 4 the coordinator does not admit the key."""
    return run_command(build_parser(), carry_messages, argv)


if __name__ == "__main__":
    code: Any = main()
    sys.exit(code)
