"""Messages between server and clients as Flower records; nothing here is ever unpickled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from lightning_bpfree.core.params import Params
from lightning_bpfree.federated.messages import Instructions, Reply, Update

ROUND, WEIGHTS, OPTIMIZER, NUMBERS, KEYS = "round", "weights", "optimizer", "numbers", "keys"


def array_record(params: Params) -> ArrayRecord:
    """Return named tensors as a record of arrays."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in params.items()})


def params_of(record: ArrayRecord) -> Params:
    """Return the named tensors of a record of arrays."""
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}


def to_record(instructions: Instructions, keys: Mapping[int, bytes] | None = None) -> Any:
    """Return instructions as records.

    Args:
        instructions: for one client.
        keys: public keys of all clients of the round, for a secure sum.
    """
    plain: dict[str, Any] = {
        name: getattr(instructions, name)
        for name in ("round", "seed", "client", "fingerprint", "base", "digest", "made")
    }
    record: Any = RecordDict({ROUND: ConfigRecord(plain)})
    if instructions.weights is not None:
        record[WEIGHTS] = array_record(instructions.weights)
        if instructions.optimizer is not None:
            record[OPTIMIZER] = array_record(instructions.optimizer)
    elif instructions.updates:
        record[ROUND]["seeds"] = [update.seed for update in instructions.updates]
        record[ROUND]["sizes"] = [len(update.means) for update in instructions.updates]
        means = torch.cat([update.means.double() for update in instructions.updates])
        record[NUMBERS] = MetricRecord({"means": means.flatten().tolist()})
    if keys is not None:
        record[KEYS] = ConfigRecord({"clients": list(keys), "public": list(keys.values())})
    return record


def instructions_of(record: Any) -> tuple[Instructions, dict[int, bytes]]:
    """Return instructions, and the public keys of the round, from records."""
    plain: dict[str, Any] = dict(record[ROUND])
    seeds, sizes = plain.pop("seeds", []), plain.pop("sizes", [])
    updates = []
    if seeds:
        flat = torch.tensor(record[NUMBERS]["means"], dtype=torch.float64)
        rows = flat.view(sum(sizes), -1).split(sizes)
        updates = [Update(seed, means) for seed, means in zip(seeds, rows, strict=True)]
    weights = params_of(record[WEIGHTS]) if WEIGHTS in record else None
    optimizer = params_of(record[OPTIMIZER]) if OPTIMIZER in record else None
    keys = dict(zip(record[KEYS]["clients"], record[KEYS]["public"], strict=True)) if KEYS in record else {}
    return Instructions(weights=weights, optimizer=optimizer, updates=updates, **plain), keys


def reply_record(reply: Reply) -> Any:
    """Return an answer as records: eight bytes per number, and a few more."""
    plain: dict[str, Any] = {"round": reply.round, "seed": reply.seed}
    if reply.refused:
        return RecordDict({ROUND: ConfigRecord({**plain, "refused": reply.refused})})
    plain["passes"] = float(reply.forward_passes)
    if reply.peak_mib is not None:
        plain["peak_mib"] = float(reply.peak_mib)
    record: Any = RecordDict({ROUND: ConfigRecord(plain)})
    if reply.masked is not None:
        record[ROUND]["masked"] = reply.masked
        return record
    record[ROUND]["num_samples"] = float(reply.num_samples)
    if reply.differences is not None:
        record[NUMBERS] = MetricRecord({"differences": reply.differences.flatten().tolist()})
    if reply.weights is not None:
        record[WEIGHTS] = array_record(reply.weights)
    return record


def reply_of(record: Any, client: int, num_directions: int | None) -> Reply:
    """Return a client's answer; an unreadable one becomes a refusal with the reason.

    Args:
        record: what the client sent, which may be anything.
        client: the client whose node sent it.
        num_directions: ``K``; None where no differences are expected.
    """
    try:
        plain: dict[str, Any] = dict(record[ROUND])
        number, seed = int(plain["round"]), int(plain["seed"])
        if plain.get("refused"):
            return Reply(client, number, seed, refused=str(plain["refused"])[:500])
        masked = plain.get("masked")
        if masked is not None and not isinstance(masked, bytes):
            raise TypeError("masked numbers must be bytes")
        passes, peak = float(plain.get("passes", 0.0)), plain.get("peak_mib")
        return Reply(
            client,
            number,
            seed,
            _differences(record, num_directions),
            float(plain.get("num_samples", 0.0)),
            passes if math.isfinite(passes) and passes >= 0 else 0.0,
            None if peak is None else float(peak),
            masked=masked,
            weights=params_of(record[WEIGHTS]) if WEIGHTS in record else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        return Reply(client, 0, 0, refused=f"its message cannot be read: {type(error).__name__}: {error}"[:500])


def _differences(record: Any, num_directions: int | None) -> torch.Tensor | None:
    if NUMBERS not in record or num_directions is None:
        return None
    flat = torch.tensor([float(number) for number in record[NUMBERS]["differences"]], dtype=torch.float64)
    return flat.view(-1, num_directions) if len(flat) and len(flat) % num_directions == 0 else flat.view(1, -1)
