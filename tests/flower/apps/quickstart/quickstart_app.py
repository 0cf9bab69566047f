import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app, server = ClientApp(), ServerApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Move the model half of the way to the number of the partition."""
    (weights,) = msg.content["arrays"].to_numpy_ndarrays()
    target = np.full_like(weights, context.node_config["partition-id"])
    moved = weights + np.float32(0.5) * (target - weights)
    metrics = MetricRecord({"num-examples": 10, "train_loss": float(np.square(moved - target).mean())})
    return Message(RecordDict({"arrays": ArrayRecord([moved]), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    (weights,) = msg.content["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 10, "eval_loss": float(np.abs(weights).mean())})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)


@server.main()
def main(grid: Grid, context: Context) -> None:
    start = ArrayRecord([np.zeros(4, np.float32)])
    result = FedAvg().start(grid, start, num_rounds=context.run_config["num-server-rounds"])
    print("result", result.arrays.to_numpy_ndarrays()[0].round(4).tolist(), len(result.evaluate_metrics_clientapp))
