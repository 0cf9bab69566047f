import numpy as np
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp


class Client(NumPyClient):
    def __init__(self, partition):
        self.partition = partition

    def fit(self, parameters, config):
        return [values + np.float32(self.partition) for values in parameters], 10, {}

    def evaluate(self, parameters, config):
        return 0.0, 10, {}


def client_fn(context: Context):
    return Client(context.node_config["partition-id"]).to_client()


app, server = ClientApp(client_fn, mods=[secaggplus_mod]), ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    start = ndarrays_to_parameters([np.zeros(3, np.float32)])
    strategy = FedAvg(initial_parameters=start, fraction_evaluate=0.0, min_available_clients=4, min_fit_clients=4)
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=1), strategy=strategy)
    workflow = DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2))
    workflow(grid, legacy)
    arrays = legacy.state.array_records["parameters"].to_numpy_ndarrays()
    print("result", arrays[0].round(2).tolist())
