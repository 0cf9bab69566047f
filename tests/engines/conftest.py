"""A Flower `Grid` in this process with real node services, for faults that a network does not produce on demand."""

import sys
import threading
import time
import uuid
from dataclasses import replace
from types import SimpleNamespace

import pytest

LIMIT_S = 120.0  # limit of waits that should be short
PROBLEM = """
from fedlearn.core.layout import default_initial_parameters
from fedlearn import Scenario
from fedlearn.testing import LinearTrainer, linear_problem
from fedlearn.testing.networks import HiddenLayerTrainer
from fedlearn.testing.problems import class_problem


def linear(*, num_features=3, num_clients=4, seed=0):
    data = linear_problem(num_clients=num_clients, num_features=num_features, seed=seed)
    return Scenario(name="linear", data=data, trainer=LinearTrainer(num_features), model=f"linear {num_features}-1")


class Spoilt(LinearTrainer):
    def __init__(self, num_features, how):
        super().__init__(num_features)
        self.how = how

    def fit(self, order, rule, work):
        if self.how == "raises" and work[0].client == 1:
            raise RuntimeError("the scanner is offline")
        return super().fit(order, rule, work)


def normed(*, seed=0):
    from torch import nn

    from fedlearn.trainers.torch import TorchTrainer

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(1), nn.Linear(3, 1)

        def forward(self, x):
            return self.out(self.norm(x[:, None])[:, 0])

    trainer = TorchTrainer(Net(), task="regression", initial=default_initial_parameters)
    return Scenario(name="normed", data=linear_problem(num_clients=4), trainer=trainer, model="norm 3-1")


def classes(*, seed=0):
    data = class_problem(num_clients=4)
    return Scenario(name="classes", data=data, trainer=HiddenLayerTrainer(3, 3), model="hidden 3-4-3")


def torch_classes(*, seed=0):
    from torch import nn

    from fedlearn.trainers.torch import TorchTrainer

    trainer = TorchTrainer(nn.Linear(3, 3), task="multiclass", initial=default_initial_parameters)
    return Scenario(name="classes", data=class_problem(num_clients=4), trainer=trainer, model="linear 3-3")


def several_inputs(*, seed=0):
    import numpy as np
    import torch
    from torch import nn

    from fedlearn import from_arrays
    from fedlearn.trainers.torch import TorchTrainer

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(20, 3), nn.Linear(5, 1)

        def forward(self, ids, mask, numbers):
            mean = (self.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return self.out(torch.cat([torch.tanh(mean), numbers], 1))

    rng = np.random.default_rng(seed)
    mask, numbers = rng.random((48, 7)) > 0.3, rng.normal(size=(48, 2))
    mask[:, 0] = True
    x = {"ids": rng.integers(0, 20, (48, 7)), "mask": mask, "numbers": numbers}
    y = (numbers[:, 0] > 0).astype(np.int64)
    data = from_arrays(x, y, assignment=np.arange(48) % 4, task="binary", seed=1)
    trainer = TorchTrainer(Net(), task="binary", initial=default_initial_parameters)
    return Scenario(name="several_inputs", data=data, trainer=trainer, model="words and numbers")


def spoilt(*, how, num_features=3):
    data = linear_problem(num_clients=4, num_features=num_features)
    return Scenario(name="linear", data=data, trainer=Spoilt(num_features, how), model="linear")
"""


class FakeGrid:
    """A `Grid` whose nodes are functions from request bytes to response bytes. Each message has its own thread.

    Attributes:
        nodes: functions by node id; a node that is None never responds.
        gates: events by node id; the responses of a node are held back until its event is set.
    """

    def __init__(self, nodes):
        self.nodes = dict(nodes)
        self.lock = threading.Lock()
        self.inbox = {}
        self.twice = False
        self.gates = {}

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            name = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = name
            ids.append(name)
            if self.nodes.get(message.metadata.dst_node_id) is not None:
                threading.Thread(target=self._carry, args=(message, name), daemon=True).start()
        return ids

    def _carry(self, message, name):
        from flwr.app import Error, Message

        from fedlearn.protocol.grid_client import from_record_dict, to_record_dict

        node = message.metadata.dst_node_id
        gate = self.gates.get(node)
        if gate and not gate.wait(LIMIT_S):
            return
        try:
            reply = Message(to_record_dict(self.nodes[node](from_record_dict(message.content))), reply_to=message)
        except Exception as error:
            reply = Message(Error(code=0, reason=f"{type(error)}:<'{error}'>"), reply_to=message)
        with self.lock:
            self.inbox.setdefault(name, []).extend([reply] * (2 if self.twice else 1))

    def shut(self, node):
        """Hold back the responses of a node; return the event that releases them."""
        self.gates[node] = threading.Event()
        return self.gates[node]

    def until_arrived(self):
        """Wait until a response is available that was not pulled."""
        until = time.monotonic() + LIMIT_S
        while not any(self.inbox.values()):
            assert time.monotonic() < until, "no response has arrived"
            time.sleep(0.005)

    def pull_messages(self, ids):
        with self.lock:
            wanted = list(ids) + ([name for name in self.inbox if name not in ids] if self.twice else [])
            return [self.inbox[name].pop(0) for name in wanted if self.inbox.get(name)]


@pytest.fixture
def problem(tmp_path, monkeypatch):
    """Create a module of small scenarios, importable as ``site_problem``."""
    (tmp_path / "site_problem.py").write_text(PROBLEM)
    monkeypatch.syspath_prepend(tmp_path)
    yield "site_problem"
    sys.modules.pop("site_problem", None)


@pytest.fixture
def identity(monkeypatch):
    """Give this process an identity, without which Flower creates no messages."""
    from flwr.supercore.task_identity import TaskIdentity

    for name, value in (("_task_id", 1), ("_run_id", 1), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


@pytest.fixture
def federation(problem, identity, tmp_path):
    """Return a function that builds an engine, a grid and node services.

    Its arguments are ``scenario``, ``strategy``, ``clients``, ``policy``, ``words`` (further settings), ``masking`` and
    arguments of the engine.
    """
    from fedlearn.deploy.node_side.client_states import ClientStates
    from fedlearn.deploy.node_side.experiment import NodeConfig
    from fedlearn.deploy.node_side.masking_keys import MaskingKeys, derive_public_key
    from fedlearn.deploy.node_side.policy import Policy
    from fedlearn.deploy.node_side.reveal import Reveal
    from fedlearn.deploy.node_side.service import NodeService
    from fedlearn.engines.deployed import DeployedEngine
    from fedlearn.protocol.sites import RunSites
    from fedlearn.runner.registry import installed_registry

    grids = []
    current = {
        name: f"{problem}.{name}"
        for name in ("linear", "normed", "classes", "torch_classes", "several_inputs", "spoilt")
    }
    names = ("fedavg", "fedprox", "fedadam", "scaffold", "fedper", "fedrep", "ditto", "qfedavg", "afl", "ifca", "oort")
    names += ("fedasync", "fedbuff", "fedala", "fedamp", "fedcm", "feddecorr", "fedgkd", "fedntd", "fedsam", "fedspeed")
    names += ("proxskip", "fednova")

    def make(
        *,
        scenario="linear",
        strategy="fedavg",
        clients=((0, 1), (2, 3)),
        policy=None,
        words=None,
        masking=False,
        **settings,
    ):
        accepts = {"scenarios": {name: {} for name in current}, "strategies": {name: {} for name in names}}
        accepts |= {"builders": {"scenario": current}, "reveal": Reveal(min_test_examples=1), **(policy or {})}
        secrets = [bytes([7 + number]) * 32 for number in range(len(clients))]
        known = frozenset(map(derive_public_key, secrets))
        sites = {}
        for number, here in enumerate(clients):
            memories = ClientStates(tmp_path / f"memory{number}")
            keys = MaskingKeys(secrets[number], known) if masking else None
            config = NodeConfig(clients=tuple(here), masking_keys=keys)
            sites[101 + number] = NodeService(config, Policy(**accepts), memories)
        grid = FakeGrid({node: site.respond_to_bytes for node, site in sites.items()})
        grids.append(grid)
        scenario_words = {"name": scenario, **((words or {}).get("scenario", {}))}
        strategy_words = {"name": strategy, **((words or {}).get("strategy", {}))}
        given = {"scenario": scenario_words, "strategy": strategy_words}
        given |= {group: words[group] for group in ("compress", "buffers") if group in (words or {})}
        registry = installed_registry().with_builders(accepts["builders"])
        built = {**given, **{group: registry.resolve(group, given[group]) for group in given if group != "buffers"}}
        settings = {
            "run": "test-run",
            "sites": RunSites(min_sites=len(sites)),
            "join_timeout": LIMIT_S,
            "deadline": LIMIT_S,
            **settings,
        }

        def restart(node, config=None, policy=None):
            """Start a node again with changed settings of its operator."""
            old = sites[node]
            changed = {"config": replace(old.config, **(config or {})), "policy": replace(old.policy, **(policy or {}))}
            sites[node] = NodeService(**changed, client_states=old.client_states)
            grid.nodes[node] = sites[node].respond_to_bytes

        return SimpleNamespace(
            restart=restart,
            engine=DeployedEngine(grid, given, **settings),
            grid=grid,
            sites=sites,
            order=given,  # names and values, as nodes receive them
            settings=built,  # the same with builders, for a simulation
            allow=(problem,),
        )

    yield make
    for grid in grids:
        for gate in grid.gates.values():
            gate.set()
