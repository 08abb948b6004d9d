"""Any LightningModule and DataModule as a Flower client."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lightning_bpfree.federated.client import BaffleClient
from lightning_bpfree.federated.federation import Federation
from lightning_bpfree.federated.flower.records import (
    ROUND,
    WEIGHTS,
    array_record,
    instructions_of,
    params_of,
    reply_record,
)
from lightning_bpfree.federated.messages import Instructions, Reply
from lightning_bpfree.federated.partition import Partition
from lightning_bpfree.federated.secure_round import masked_reply, words_of
from lightning_bpfree.federated.secure_sum import FixedPoint, Masks, RefusedSumError

STATE = "bpfree"
NO_KEY = "secure sum: it has lost its key"


class Parts(NamedTuple):
    """The parts that a client needs.

    Args:
        module: the module.
        datamodule: provides the data.
        federation: the settings, equal to the server's.
        rounds: number of rounds of the whole run, which determines the noise of a client with privacy.
    """

    module: pl.LightningModule
    datamodule: pl.LightningDataModule
    federation: Federation
    rounds: int


def client_app(
    module: pl.LightningModule, datamodule: pl.LightningDataModule, federation: Federation, rounds: int = 100
) -> ClientApp:
    """Return a ClientApp that answers the rounds of a federation; it computes only forward passes.

    Each node needs a ``partition-id`` in its configuration: the number of its part of the data, from 0.

    Args:
        module: any LightningModule without BatchNorm.
        datamodule: its training set is split over the clients with the same seed everywhere.
        federation: the settings, equal to the server's.
        rounds: number of rounds of the whole run; used only with privacy.

    Examples:
        >>> from lightning_bpfree.demos.data import DigitsDataModule
        >>> from lightning_bpfree.demos.modules import MLP, Classifier
        >>> type(client_app(Classifier(MLP(64, [8], 10)), DigitsDataModule(), Federation())).__name__
        'ClientApp'
    """
    return client_app_from(lambda _: Parts(module, datamodule, federation, rounds))


def client_app_from(parts_of: Callable[[Context], Parts]) -> ClientApp:
    """Return a ClientApp whose parts are created in the client's process.

    Args:
        parts_of: returns the parts, given the context of the node and the run.
    """
    app: Any = ClientApp()
    made: dict[int, _Node] = {}

    def node_of(context: Context) -> _Node:
        number = partition_id(context)
        if number not in made:
            made[number] = _Node(parts_of(context), number)
        return made[number]

    @app.train()  # type: ignore[untyped-decorator]  # of an untyped app
    def train(message: Message, context: Context) -> Message:
        return Message(node_of(context).train(message.content, context.state), reply_to=message)

    @app.query()  # type: ignore[untyped-decorator]  # of an untyped app
    def query(message: Message, context: Context) -> Message:
        return Message(_query(message.content, context.state), reply_to=message)

    return app  # type: ignore[no-any-return]


def partition_id(context: Context) -> int:
    """Return the number of a node's part of the data.

    Raises:
        ValueError: if the node was started without one.
    """
    given = context.node_config.get("partition-id")
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise ValueError(
            f'partition-id={given!r}: start every node with a number of its own from 0: --node-config "partition-id=0".'
        )
    return given


class _Node:
    """A client, and how its state travels between the processes that Flower starts for it."""

    def __init__(self, parts: Parts, number: int) -> None:
        self.federation = parts.federation
        # Several nodes may live in one process, and those in step each have weights.
        module = copy.deepcopy(parts.module) if self._keeps else parts.module
        partition = Partition(
            parts.datamodule,
            self.federation.num_clients,
            self.federation.alpha,
            self.federation.split_seed,
            batch_size=self.federation.batch_size,
        )
        privacy = self.federation.privacy
        noise = 0.0 if privacy is None else privacy.multiplier(parts.rounds)
        self.client = self.federation.client(module, partition, number, noise=noise, memory=True)

    @property
    def _keeps(self) -> bool:
        return self.federation.downlink == "numbers"

    def train(self, record: Any, state: Any) -> Any:
        """Return the answer to a round, as records."""
        instructions, keys = instructions_of(record)
        own = self.client if isinstance(self.client, BaffleClient) and self._keeps else None
        if own is not None:
            _take_back(own, state)
        reply = self.client.answer(instructions)
        if own is not None:
            _keep(own, state)
        if self.federation.secure and not reply.refused:
            reply = self._masked(reply, instructions, keys, state)
        return reply_record(reply)

    def _masked(self, reply: Reply, instructions: Instructions, keys: dict[int, bytes], state: Any) -> Reply:
        try:
            masks = _masks(state)
            words = words_of(reply, FixedPoint(self.federation.step, max(1, len(keys))))
            masked = masked_reply(reply, masks.masked(words, instructions.round, keys))
        except KeyError:
            return Reply(reply.client, reply.round, reply.seed, refused=NO_KEY)
        except ValueError as error:
            return Reply(reply.client, reply.round, reply.seed, refused=f"secure sum: {error}")
        state[STATE]["answered"] = instructions.round
        state[STATE]["clients"], state[STATE]["public"] = list(keys), list(keys.values())
        return masked


def _query(record: Any, state: Any) -> Any:
    """Answer a question of the server that is no round: for a key, or for masks."""
    asked: dict[str, Any] = dict(record[ROUND])
    if asked["what"] == "key":
        masks = Masks(int(asked["client"]))
        kept = {"client": masks.client, "private": masks.private, "session": asked["session"], "answered": 0}
        state[STATE] = ConfigRecord({**dict(state.get(STATE, {})), **kept, "told_round": 0, "told": []})
        return RecordDict({ROUND: ConfigRecord({"public": masks.public, "session": asked["session"]})})
    try:
        if asked["session"] != state[STATE]["session"]:
            raise RefusedSumError(f"session {asked['session']}: this client has a key of another one")
        masks, own = _masks(state), state[STATE]
        keys = dict(zip(own["clients"], own["public"], strict=True))
        told = masks.told_masks(int(asked["round"]), list(asked["survivors"]), keys)
    except (KeyError, ValueError) as error:
        return RecordDict({ROUND: ConfigRecord({"refused": str(error)})})
    state[STATE]["told_round"], state[STATE]["told"] = int(asked["round"]), sorted(asked["survivors"])
    return RecordDict({ROUND: ConfigRecord({"clients": list(told), "seeds": list(told.values())})})


def _masks(state: Any) -> Masks:
    own: Any = state[STATE]
    told = {int(own["told_round"]): list(own["told"])} if own["told_round"] else {}
    return Masks(own["client"], own["private"], answered=own["answered"], told=told)


def _keep(client: BaffleClient, state: Any) -> None:
    """Write the weights of a client in step into the node's state."""
    buffer = io.BytesIO()
    torch.save(client.update_state(), buffer)
    kept: dict[str, Any] = {"round": client.round, "update": buffer.getvalue()}
    state[STATE] = ConfigRecord({**dict(state.get(STATE, {})), **kept})
    state[WEIGHTS] = array_record(client.loss.params)


def _take_back(client: BaffleClient, state: Any) -> None:
    own: Any = state.get(STATE, {})
    if "round" in own and WEIGHTS in state:
        client.load(params_of(state[WEIGHTS]))
        client.round = own["round"]
        client.load_update_state(torch.load(io.BytesIO(own["update"]), weights_only=True))
