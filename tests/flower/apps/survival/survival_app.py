from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

app, server = ClientApp(), ServerApp()


@app.query()
def query(msg: Message, context: Context) -> Message:
    partition = context.node_config["partition-id"]
    if partition >= 3:
        raise ValueError(f"no data for partition {partition}")
    events = [partition + step for step in range(context.run_config["num-events"])]
    return Message(RecordDict({"events": MetricRecord({"times": events})}), reply_to=msg)


@server.main()
def main(grid: Grid, context: Context) -> None:
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])
    times = sorted(time for reply in replies if reply.has_content() for time in reply.content["events"]["times"])
    print("result", times)
