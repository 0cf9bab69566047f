"""Respond to the messages of secure aggregation, for the clients of a node.

`fedlearn.protocol.secagg_exchange` has the format of the messages. The extra ``privacy`` is needed.
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
        client_states: folder with the state of each participant between two messages.
        run: name of the run.
        messages: client -> message of the coordinator.
        registered: client -> public key, of the whole cohort; all keys are trusted by this node.
        threshold: number of clients below which the strategy opens no sum.
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
            WireError: the content is malformed, or the strategy does not mask updates.
            FedlearnError: the cohort has a key that this node does not trust.
        """
        messages, registered = read_mask_request(content, clients)
        threshold = strategy.privacy_guarantee.threshold if strategy.privacy_guarantee else None
        if threshold is None:
            raise WireError("the settings mask no updates; expected privacy=secagg or privacy=distributed")
        return cls(
            masking_keys=masking_keys,
            client_states=client_states,
            run=run,
            messages=messages,
            registered=masking_keys.check_registered(registered),
            threshold=int(threshold),
        )

    def respond(self, train: Train | None, *, min_clients: int) -> tuple[list[SecAggResponse | Failure], Payload]:
        """Return the response of each client to its message, and the content with these responses.

        Args:
            train: function that trains a client, if the messages ask for masked updates.
            min_clients: smallest sum that the node takes part in, >= 2.
        """
        results = []
        for client in self.messages:
            update = train(client) if train else None
            result = update if isinstance(update, Failure) else self._respond(client, update, min_clients)
            results.append(result)
        responses = {result.client: result.payload for result in results if isinstance(result, SecAggResponse)}
        return results, pack_mask_response(responses)

    def _respond(self, client: ClientId, update: Updates | None, min_clients: int) -> SecAggResponse | Failure:
        """Return the response of a client; its state is on disk before the response leaves."""
        state = self.client_states.load_secagg_state(self.run, client)
        identity, least = Identity(client, self.masking_keys.private_key), max(min_clients, self.threshold)
        participant = Client(identity, self.registered, state=state, min_threshold=least)
        vector = (lambda session: as_numpy(update.delta_KD)[0]) if update is not None else None
        try:
            response = participant.respond(self.messages[client], vector)
        except ProtocolError as error:
            log.warning("client %d refused a message of run %s: %s", client, self.run, error)
            return Failure(client=client, stage=FailureStage.REQUEST, reason=str(error))
        self.client_states.save_secagg_state(self.run, client, participant.state)
        return SecAggResponse(client, response)
