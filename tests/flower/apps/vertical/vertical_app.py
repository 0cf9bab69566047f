from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

app, server = ClientApp(), ServerApp()


@app.query("embed")
def embed(msg: Message, context: Context) -> Message:
    weight = context.state.get("weight", MetricRecord({"value": 1.0}))["value"]
    return Message(RecordDict({"metrics": MetricRecord({"value": weight})}), reply_to=msg)


@app.train("apply_gradients")
def apply_gradients(msg: Message, context: Context) -> Message:
    weight = context.state.get("weight", MetricRecord({"value": 1.0}))["value"]
    context.state["weight"] = MetricRecord({"value": weight - msg.content["gradient"]["value"]})
    return Message(RecordDict(), reply_to=msg)


@server.main()
def main(grid: Grid, context: Context) -> None:
    for _ in range(context.run_config["num-server-rounds"]):
        nodes = list(grid.get_node_ids())
        replies = grid.send_and_receive([Message(RecordDict(), node, "query.embed") for node in nodes])
        values = [reply.content["metrics"]["value"] for reply in replies]
        gradient = RecordDict({"gradient": MetricRecord({"value": 0.5 * sum(values) / len(values)})})
        grid.push_messages([Message(gradient, node, "train.apply_gradients") for node in nodes])  # no reply is pulled
    print("result", round(sum(values) / len(values), 6))
