import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app, server = ClientApp(), ServerApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    path = context.node_config["dataset-path"]
    metrics = MetricRecord({"num-examples": 1, "length": float(len(path))})
    values = np.full(1, int(path[-1]), np.float32)
    return Message(RecordDict({"arrays": ArrayRecord([values]), "metrics": metrics}), reply_to=msg)


@server.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord([np.zeros(1, np.float32)]), num_rounds=1)
    print("result", result.arrays.to_numpy_ndarrays()[0].tolist(), result.train_metrics_clientapp[1]["length"])
