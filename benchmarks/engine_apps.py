"""The ClientApp of benchmarks/engines.py: what it is sent, plus one and its number. A module, so that no engine has to
send the code along."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from medfl.messages import RAW, from_array, to_array

client = ClientApp()


@client.train()
def add(message: Message, context: Context) -> Message:
    """Answers at once, in the form in which it was asked."""
    (name,) = message.content.array_records
    sent = message.content.array_records[name]["x"]
    found = (from_array(sent) if sent.stype == RAW else sent.numpy()) + np.float32(
        1 + int(context.node_config["partition-id"])
    )
    arrays = ArrayRecord()
    arrays["x"] = to_array(found) if sent.stype == RAW else Array(found)
    record = RecordDict({name: arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(record, reply_to=message)
