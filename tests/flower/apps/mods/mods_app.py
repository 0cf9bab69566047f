import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg


def shrink(msg: Message, context: Context, call_next) -> Message:
    """Return the reply with half of each array."""
    reply = call_next(msg, context)
    arrays = [values * np.float32(0.5) for values in reply.content["arrays"].to_numpy_ndarrays()]
    reply.content["arrays"] = ArrayRecord(arrays)
    return reply


app, server = ClientApp(mods=[shrink]), ServerApp()

events = []


@app.lifespan()
def lifespan(context: Context):
    events.append("enter")
    yield
    events.append("exit")


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Move the model half of the way to the number of the partition."""
    (weights,) = msg.content["arrays"].to_numpy_ndarrays()
    target = np.full_like(weights, context.node_config["partition-id"])
    moved = weights + np.float32(0.5) * (target - weights)
    metrics = MetricRecord({"num-examples": 10, "train_loss": float(np.square(moved - target).mean())})
    return Message(RecordDict({"arrays": ArrayRecord([moved]), "metrics": metrics}), reply_to=msg)


@server.main()
def main(grid: Grid, context: Context) -> None:
    result = FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord([np.ones(2, np.float32)]), num_rounds=1)
    print("result", result.arrays.to_numpy_ndarrays()[0].tolist(), events.count("enter"), events.count("exit"))
