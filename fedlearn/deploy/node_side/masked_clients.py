"""Respond to the messages of secure aggregation for the clients of a node.

`fedlearn.protocol.secagg_exchange` defines the format of the messages. This module needs the extra ``privacy``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedlearn.algorithm.strategy import Strategy
from fedlearn.core.arrays import as_numpy
from fedlearn.core.records import ClientId, Failure, FailureStage, Updates
from fedlearn.core.serialization import Payload, WireError
from fedlearn.deploy.node_side.client_states import ClientStates
from fedlearn.deploy.node_side.masking_keys import MaskingKeys
from fedlearn.deploy.node_side.required_privacy import RequiredPrivacy
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
        node_clients: ids of all clients of the node, also of those without a message.
        required_privacy: privacy that the node requires.
        client_states: store of the state of each participant between two messages.
        run: name of the run.
        messages: client -> message of the coordinator.
        registered: client -> public key, for the whole cohort; this node trusts all these keys.
        threshold: smallest number of parties whose sum the strategy opens.
        encoding: digest of the settings with which clients encode updates.
    """

    masking_keys: MaskingKeys
    node_clients: Sequence[ClientId]
    required_privacy: RequiredPrivacy
    client_states: ClientStates
    run: str
    messages: Mapping[ClientId, bytes]
    registered: Mapping[ClientId, bytes]
    threshold: int
    encoding: bytes

    @classmethod
    def of(
        cls,
        content: Payload,
        clients: Sequence[ClientId],
        strategy: Strategy,
        *,
        run: str,
        masking_keys: MaskingKeys,
        node_clients: Sequence[ClientId],
        required_privacy: RequiredPrivacy,
        client_states: ClientStates,
    ) -> MaskedClients:
        """Return the participants that the content of a request addresses.

        Raises:
            WireError: The content is malformed, or the strategy does not mask updates.
            FedlearnError: The cohort has a key that this node does not trust, or a key with clients of another node.
        """
        messages, registered = read_mask_request(content, clients)
        guarantee = strategy.privacy_guarantee
        if guarantee is None or guarantee.threshold is None:
            raise WireError("the settings have no secure aggregation; expected privacy=secagg or privacy=distributed")
        return cls(
            masking_keys=masking_keys,
            node_clients=node_clients,
            required_privacy=required_privacy,
            client_states=client_states,
            run=run,
            messages=messages,
            registered=masking_keys.check_registered(registered, node_clients),
            threshold=guarantee.threshold,
            encoding=guarantee.encoding_digest,
        )

    def respond(self, train: Train | None) -> tuple[list[SecAggResponse | Failure], Payload]:
        """Return the result of each client, and the content with the responses of all clients.

        Args:
            train: function that trains a client; None if the messages do not require an update.
        """
        results = []
        for client in self.messages:
            update = train(client) if train else None
            result = update if isinstance(update, Failure) else self._respond(client, update)
            results.append(result)
        responses = {result.client: result.payload for result in results if isinstance(result, SecAggResponse)}
        return results, pack_mask_response(responses)

    def _respond(self, client: ClientId, update: Updates | None) -> SecAggResponse | Failure:
        """Return the response of a client. Its state is saved before the response leaves."""
        load = partial(self.client_states.load_secagg_state, self.run)
        participant = Client(
            Identity(client, self.masking_keys.private_key),
            self.registered,
            state=load(client),
            min_threshold=max(self.required_privacy.min_nodes_in_sum, self.threshold),
            max_colluders=self.required_privacy.max_colluding_nodes,
            encoding=self.encoding,
            run=self.run,
            siblings=lambda: [
                load(other) for other in self.node_clients if other in self.registered and other != client
            ],
        )
        vector = (lambda session: as_numpy(update.delta_KD)[0]) if update is not None else None
        try:
            response = participant.respond(self.messages[client], vector)
        except ProtocolError as error:
            log.warning("client %d refused a message of run %s: %s", client, self.run, error)
            return Failure(client=client, stage=FailureStage.REQUEST, reason=str(error))
        self.client_states.save_secagg_state(self.run, client, participant.state)
        return SecAggResponse(client, response)
