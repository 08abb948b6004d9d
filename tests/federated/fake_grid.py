"""Flower's grid without Flower's processes: messages are handed to client apps in this one, in order."""

from __future__ import annotations

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid


class FakeGrid(Grid):
    """Nodes 101, 102, ... with the partition ids 0, 1, ...; ``spoil(node, reply)`` may change or drop a reply."""

    def __init__(self, client_app, num_nodes, spoil=lambda node, message, reply: reply):
        self.app, self.spoil, self.asked = client_app, spoil, []
        self.contexts = {
            101 + i: Context(
                run_id=1, node_id=101 + i, node_config={"partition-id": i}, state=RecordDict(), run_config={}
            )
            for i in range(num_nodes)
        }

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, group_id=group_id)

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append((node, message.metadata.message_type))
            try:
                reply = self.app(message, self.contexts[node])
            except Exception as error:
                reply = Message(Error(code=0, reason=str(error)), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = node
            reply = self.spoil(node, message, reply)
            if reply is not None:
                replies.append(reply)
        return replies
