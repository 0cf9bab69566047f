"""A node service over patients whose records are known, for attacks on its answers."""

import numpy as np

from fedlearn import Scenario
from fedlearn.core import Examples, LocalSettings, Request
from fedlearn.core.federated_data import FederatedData
from fedlearn.core.serialization import Payload
from fedlearn.deploy.node_side.client_states import ClientStates
from fedlearn.deploy.node_side.experiment import NodeConfig
from fedlearn.deploy.node_side.policy import Policy
from fedlearn.deploy.node_side.service import NodeService
from fedlearn.privacy.mechanisms.base import Population
from fedlearn.protocol.messages import NodeRequest, RequestKind
from fedlearn.protocol.training_order import pack_order
from fedlearn.testing import LinearTrainer
from strategies import fedavg

NUM_FEATURES, NUM_TEST = 4, 40
SETTINGS = {"scenario": {"name": "heart"}, "strategy": {"name": "fedavg"}}


class Clinic:
    """A node of two clients with patients, and requests of a coordinator to it.

    Args:
        folder: folder of the node's files.
        policy: keys of the node's policy.
        strategy: strategy of the requests.
        mechanism: privacy mechanism of the requests; None for none.
        task: task of the scenario.
    """

    def __init__(self, folder, *, policy=None, strategy=None, mechanism=None, task="binary"):
        rng = np.random.default_rng(1)
        x = rng.normal(size=(2, NUM_TEST, NUM_FEATURES)).astype(np.float32)
        y = (x[..., 0] + rng.normal(size=x.shape[:2]) > 0).astype(np.int64)
        self.test = {0: Examples(x[0], y[0]), 1: Examples(x[1], y[1])}
        self.train = {client: Examples(each.x[:10], each.y[:10]) for client, each in self.test.items()}
        data = FederatedData(
            task=task,
            num_classes=2 if task == "binary" else 1,
            clients=range(2),
            train=lambda client: self.train[client],
            test=lambda client: self.test[client],
        )
        self.trainer = LinearTrainer(NUM_FEATURES)
        self.scenario_value = Scenario(name="clinic", data=data, trainer=self.trainer, model="linear")
        self.strategy_value, self.mechanism = strategy or fedavg(weighting="equal"), mechanism
        self.local = LocalSettings(batch_size=1000)
        self.folder, self.policy = folder, policy or {}
        self.restart()

    def restart(self, **changes):
        """Start the node again, with changed keys of its policy."""
        self.policy = {**self.policy, **changes}
        accepted = {"scenarios": {"heart": {}}, "strategies": {"fedavg": {}}, **self.policy}
        self.node = NodeService(NodeConfig(clients=(0, 1)), Policy(**accepted), ClientStates(self.folder))
        self.node.builder = self

    def scenario(self, settings):
        """Return the scenario of the node, in place of its `ExperimentBuilder`."""
        return self.scenario_value

    def strategy(self, settings, scenario, local):
        """Return the strategy with its mechanism, in place of the node's `ExperimentBuilder`."""
        if self.mechanism is None:
            return self.strategy_value, local
        return self.mechanism.protect(self.strategy_value, local, Population(clients=range(2), rounds=9))

    def forget_changed_data(self):
        """Forget nothing, because the data are in no file."""

    def data_digest(self):
        """Return no digest, because the data are in no file."""
        return ""

    def request(self, kind, **changes):
        fields = {"kind": kind, "run": "run", "round": 1, "id": "1", "settings": SETTINGS}
        if kind != RequestKind.HELLO:
            fields |= {"clients": (0, 1), "layout": self.trainer.layout.digest}
        if kind == RequestKind.INIT:
            fields["content"] = Payload(metadata={"seed": 1})
        return NodeRequest(**{**fields, **changes})

    def hello(self, **changes):
        return self.node.respond(self.request(RequestKind.HELLO, **changes))

    def init(self, **changes):
        return self.node.respond(self.request(RequestKind.INIT, **changes))

    def fit(self, params_D=None, *, seed=1, round=1, **changes):
        params_D = np.zeros(NUM_FEATURES + 1, np.float32) if params_D is None else params_D
        order = Request(round=round, seed=seed, params_D=params_D, local=self.local)
        changes = {"shared": pack_order(order), "state_rounds": (0, 0), **changes}
        return self.node.respond(self.request(RequestKind.FIT, round=round, **changes))

    def evaluate(self, params_D=None, **changes):
        params_D = np.zeros(NUM_FEATURES + 1, np.float32) if params_D is None else params_D
        return self.node.respond(
            self.request(RequestKind.EVALUATE, **{"shared": Payload(arrays={"params": params_D}), **changes})
        )


def model(value):
    """Return parameters of the model of a clinic."""
    return np.full(NUM_FEATURES + 1, value, np.float32)
