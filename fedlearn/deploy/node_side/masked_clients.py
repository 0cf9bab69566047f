"""Respond to the messages of secure aggregation for the clients of a node.

`fedlearn.protocol.secagg_exchange` defines the format of the messages. This module needs the extra ``privacy``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import ClientId, Failure, FailureStage, Updates
from fedlearn.core.serialization import Payload, WireError
from fedlearn.deploy.node_side.client_states import ClientStates
from fedlearn.deploy.node_side.masking_keys import MaskingKeys
from fedlearn.privacy.secagg.client import Client
from fedlearn.privacy.secagg.crypto import Identity
from fedlearn.privacy.secagg.errors import ProtocolError
from fedlearn.protocol.secagg_exchange import SecAggResponse, pack_mask_response, read_mask_request

Train = Callable[[ClientId], Updates | Failure]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MaskedClients:
    """The clients of a node as participants of secure aggregation.

    Args:
        masking_keys: keys of the node.
        client_states: store of the state of each participant between two messages.
        run: name of the run.
        messages: client -> message of the coordinator.
        registered: client -> public key, for the whole cohort; this node trusts all these keys.
        threshold: smallest number of clients whose sum the strategy opens.
    """

    masking_keys: MaskingKeys
    client_states: ClientStates
    run: str
    messages: Mapping[ClientId, bytes]
    registered: Mapping[ClientId, bytes]
    threshold: int

    @classmethod
    def of(
        cls,
        content: Payload,
        clients: Sequence[ClientId],
        strategy: Strategy,
        *,
        run: str,
        masking_keys: MaskingKeys,
        client_states: ClientStates,
    ) -> MaskedClients:
        """Return the participants that the content of a request addresses.

        Raises:
            WireError: The content is malformed, or the strategy does not mask updates.
            FedlearnError: The cohort has a key that this node does not trust.
        """
        messages, registered = read_mask_request(content, clients)
        threshold = strategy.privacy_guarantee.threshold if strategy.privacy_guarantee else None
        if threshold is None:
            raise WireError("the settings have no secure aggregation; expected privacy=secagg or privacy=distributed")
        return cls(
            masking_keys=masking_keys,
            client_states=client_states,
            run=run,
            messages=messages,
            registered=masking_keys.check_registered(registered),
            threshold=int(threshold),
        )

    def respond(self, train: Train | None, *, min_clients: int) -> tuple[list[SecAggResponse | Failure], Payload]:
        """Return the result of each client, and the content with the responses of all clients.

        Args:
            train: function that trains a client; None if the messages do not require an update.
            min_clients: smallest number of clients in a sum that this node accepts, >= 2.
        """
        results = []
        for client in self.messages:
            update = train(client) if train else None
            result = update if isinstance(update, Failure) else self._respond(client, update, min_clients)
            results.append(result)
        responses = {result.client: result.payload for result in results if isinstance(result, SecAggResponse)}
        return results, pack_mask_response(responses)

    def _respond(self, client: ClientId, update: Updates | None, min_clients: int) -> SecAggResponse | Failure:
        """Return the response of a client. Its state is saved before the response leaves."""
        state = self.client_states.load_secagg_state(self.run, client)
        identity = Identity(client, self.masking_keys.private_key)
        min_threshold = max(min_clients, self.threshold)
        participant = Client(identity, self.registered, state=state, min_threshold=min_threshold)
        vector = (lambda session: as_numpy(update.delta_KD)[0]) if update is not None else None
        try:
            response = participant.respond(self.messages[client], vector)
        except ProtocolError as error:
            log.warning("client %d refused a message of run %s: %s", client, self.run, error)
            return Failure(client=client, stage=FailureStage.REQUEST, reason=str(error))
        self.client_states.save_secagg_state(self.run, client, participant.state)
        return SecAggResponse(client, response)
