import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app, server = ClientApp(), ServerApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    (body,) = msg.content["arrays"].to_numpy_ndarrays()
    head = context.state["head"].to_numpy_ndarrays()[0] if "head" in context.state else np.zeros(2, np.float32)
    context.state["head"] = ArrayRecord([head + 1])
    metrics = MetricRecord({"num-examples": 1, "head": float(head.sum())})
    return Message(RecordDict({"arrays": ArrayRecord([body + head.sum()]), "metrics": metrics}), reply_to=msg)


class Custom(FedAvg):
    def configure_train(self, server_round, arrays, config, grid):
        config["lr"] = 0.1 / server_round
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        assert all(reply.has_content() for reply in replies)
        return super().aggregate_train(server_round, replies)


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Custom(fraction_evaluate=0.0)
    start, rounds = ArrayRecord([np.zeros(1, np.float32)]), context.run_config["num-server-rounds"]
    result = strategy.start(grid, start, num_rounds=rounds)
    print("result", result.arrays.to_numpy_ndarrays()[0].tolist(), result.train_metrics_clientapp[rounds]["head"])
