import numpy as np
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        return [values + np.float32(self.partition) for values in parameters], 10, {}

    def evaluate(self, parameters, config):
        return float(parameters[0].sum()), 10, {"accuracy": 0.5}


def client_fn(context: Context):
    return Client(context.node_config["partition-id"]).to_client()


class Printing(FedAvg):
    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        print("result", server_round, loss)
        return loss, metrics


def server_fn(context: Context):
    start = ndarrays_to_parameters([np.zeros(2, np.float32)])
    strategy = Printing(initial_parameters=start, min_available_clients=4)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(context.run_config["num-server-rounds"]))


app, server = ClientApp(client_fn), ServerApp(server_fn=server_fn)
