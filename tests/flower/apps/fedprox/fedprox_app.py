import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedProx

app, server = ClientApp(), ServerApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    (weights,) = msg.content["arrays"].to_numpy_ndarrays()
    mu, moved = msg.content["config"]["proximal-mu"], weights.copy()
    for _ in range(20):
        moved -= np.float32(0.1) * ((moved - 4) + np.float32(mu) * (moved - weights))
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": ArrayRecord([moved]), "metrics": metrics}), reply_to=msg)


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedProx(fraction_evaluate=0.0, proximal_mu=context.run_config["proximal-mu"])
    result = strategy.start(grid, ArrayRecord([np.zeros(1, np.float32)]), num_rounds=1)
    print("result", [round(float(value), 3) for value in result.arrays.to_numpy_ndarrays()[0]])
