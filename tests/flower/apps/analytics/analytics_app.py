import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

app, server = ClientApp(), ServerApp()


@app.query()
def query(msg: Message, context: Context) -> Message:
    values = np.arange(6) * (context.node_config["partition-id"] + 1)
    counts, _ = np.histogram(values, bins=context.run_config["bins"], range=(0, 30))
    return Message(RecordDict({"counts": MetricRecord({"counts": counts.tolist()})}), reply_to=msg)


@server.main()
def main(grid: Grid, context: Context) -> None:
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages, timeout=60)
    print("result", np.sum([reply.content["counts"]["counts"] for reply in replies], axis=0).tolist())
