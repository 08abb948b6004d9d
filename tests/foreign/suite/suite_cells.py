"""A module under a rule: trained right, refused with its cure, or wrong, which an independent calculation decides."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from suite_oracle import Gradients, Watch, difference, fitted, left, picture, started
from suite_rules import COMPANIONS, ESTIMATORS, RULES
from torch import Tensor, nn

import lightning_bpfree as bpf
from lightning_bpfree.core.blocks import find_network
from lightning_bpfree.core.directions import Directions
from lightning_bpfree.core.params import Params, dot, norm
from lightning_bpfree.core.seeds import mix

RIGHT, REFUSED, WRONG = "right", "refused", "wrong"
# Words of cures: what to do instead, or where.
CURE = re.compile(
    r"\b(use|give|pass|call|take|name|leave|put|return|set|make|write|compute|train|cut|move|register|drop|replace|"
    r"select|keep|choose|add|switch|reinit|remove|raise|blocks=|network=|labels=|needs? none)",
    re.I,
)


class Outcome(NamedTuple):
    """How a cell has ended, and what the error, or the difference, says."""

    kind: str
    said: str = ""


def outcome(kind: type[Any], rule: str) -> Outcome:
    """Train a module under a rule or a companion, and judge what comes of it."""
    if rule in COMPANIONS:
        return _companion(kind, rule)
    module, watch, made = started(kind), Watch(), RULES[rule]()
    before = picture(module)
    try:
        trainer, heard = fitted(module, [made, watch])
    except Exception as error:
        return _refusal(kind, module, before, error, watch)
    found = left(module, trainer, heard, watch)
    if getattr(kind, "beyond_backprop", False):  # no plain fit to compare with
        moved = any(bool(g.any()) for grads in watch.before_step for g in grads.values())
        return Outcome(RIGHT) if moved and rule != "backprop" else Outcome(WRONG, "nothing has moved")
    if rule == "backprop":
        return _compared(found, _plain(kind, None), 0.0)
    if rule in ESTIMATORS:
        plain = Watch(watch)
        expected = _plain(kind, plain)
        if not getattr(kind, "draws_alike", True):
            del found["draw"], expected["draw"]
        said = difference(found, expected, kind.digits) or _estimates(rule, made, module, watch, plain)
        return Outcome(WRONG if said else RIGHT, said)
    return _local(kind, made, module, found, watch)


def _plain(kind: type[Any], watch: Watch | None, **settings: Any) -> dict[str, Any]:
    module, watch = started(kind), Watch() if watch is None else watch
    trainer, heard = fitted(module, [watch], **settings)
    return left(module, trainer, heard, watch)


def _compared(found: Any, expected: Any, digits: float) -> Outcome:
    said = difference(found, expected, digits)
    return Outcome(WRONG if said else RIGHT, said)


def _refusal(kind: type[Any], module: Any, before: Any, error: Exception, watch: Watch) -> Outcome:
    said = f"{type(error).__name__}: {error}"
    try:
        _plain(kind, None)
    except Exception as plain:  # plain Lightning fails too
        same = type(plain) is type(error) and str(plain) == str(error)
        return Outcome(REFUSED if same or isinstance(error, MisconfigurationException) else WRONG, said)
    if not isinstance(error, MisconfigurationException):
        return Outcome(WRONG, said)
    if not CURE.search(str(error)):
        return Outcome(WRONG, f"no cure: {said}")
    if watch.before_step:
        return Outcome(WRONG, f"after {len(watch.before_step)} steps: {said}")
    return (
        Outcome(WRONG, f"leaves {trace}: {said}") if (trace := _left_behind(module, before)) else Outcome(REFUSED, said)
    )


def _left_behind(module: Any, before: Any) -> str:
    """Return what a refused fit has changed of the module, beside moving it to float64."""
    now = picture(module)
    for name in ("training_step", "log", "log_dict"):
        if name in vars(module):
            return name
    if now.keys() != before.keys():
        return str(now.keys() ^ before.keys())
    return difference(_hooks_and_forwards(now), _hooks_and_forwards(before), 0.0)


def _hooks_and_forwards(seen: Any, where: str = "") -> dict[str, Any]:
    if not isinstance(seen, dict):
        return {}
    found = {f"{where}{key}": item for key, item in seen.items() if key in ("hooks", "forward")}
    for key, item in seen.items():
        if key != "hooks":
            found.update(_hooks_and_forwards(item, f"{where}{key}."))
    return found


# --- estimates --------------------------------------------------------------------------------------------------------


def _estimates(rule: str, made: Any, module: Any, watch: Watch, plain: Watch) -> str:
    """Return where an estimate is not what the true gradient of the same batch makes of the rule's directions."""
    differences = rule in ("zeroth_order", "evolution_strategy")
    if not getattr(module, "comparable", True) or (differences and getattr(module, "rough", False)):
        return ""
    padding = _padding_rows(module)
    for i, estimate, truth in zip(watch.batches, watch.after_backward, plain.own, strict=True):
        names = list(estimate)
        if not names or not any(bool(estimate[name].any()) for name in names):
            return f"batch {i}: no estimate"
        whole = {name: truth.get(name, torch.zeros_like(estimate[name])) for name in names}
        whole = {name: g.to_dense() if g.is_sparse else g for name, g in whole.items()}
        expected = _projected(rule, made, whole, i)
        for name in padding.keys() & expected.keys():
            expected[name][padding[name]] = 0.0
        off = norm({name: estimate[name] - expected[name] for name in names})
        # What central differences over sigma = 1e-5, and over 1e-3, neglect: third derivatives of small layers with
        # normalizations; and the rounding of fitness in float32, 1e-7 / 1e-3. Other batches or noise are off by 1.
        allowed = {"zeroth_order": 0.03, "evolution_strategy": 0.1}.get(rule, max(module.digits * 100, 1e-8))
        if not float(off) <= allowed * float(norm(expected) + norm(whole)):
            return f"batch {i}: the estimate is off by {float(off / norm(expected)):.2g} of its size"
    return ""


def _padding_rows(module: nn.Module) -> dict[str, int]:
    """Return the rows of embeddings, tied to nothing else, that stay as they are."""
    tied = {id(p) for part in module.modules() if not isinstance(part, nn.Embedding) for p in part._parameters.values()}
    return {
        f"{name}.weight": part.padding_idx
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding) and part.padding_idx is not None and id(part.weight) not in tied
    }


def _projected(rule: str, made: Any, truth: Params, batch: int) -> Params:
    seed = mix(made.record.seed, batch)
    if rule == "evolution_strategy":
        mean = {name: torch.zeros_like(g) for name, g in truth.items()}
        members = list(bpf.OpenAIES(made.algorithm.sigma, "raw").ask(mean, made.population_size, seed, mirrored=True))
        weight = 1 / (len(members) * made.algorithm.sigma**2)
        return {n: sum(dot(truth, m) * weight * m[n] for m in members) for n in truth}  # type: ignore[misc]
    directions = list(Directions(truth, made.num_directions, seed))
    slopes = [dot(truth, v) / len(directions) for v in directions]
    return {n: sum(s * v[n] for s, v in zip(slopes, directions, strict=True)) for n in truth}  # type: ignore[misc]


# --- rules with losses of their own, and companions -------------------------------------------------------------------


def _local(kind: type[Any], made: Any, module: Any, found: dict[str, Any], watch: Watch) -> Outcome:
    """Look at counts, at what must not move, and at exact gradients behind the blocks."""
    made.uninstall(module) if isinstance(made, bpf.NetworkRule) else None
    plain = Watch(watch)
    expected = _plain(kind, plain)
    for part in ("steps", "logged", "metrics", "module"):
        now = picture(module) if part == "module" else found[part]
        if said := difference(now, expected[part], math.inf, part):
            return Outcome(WRONG, said)
    if not all(bool(p.isfinite().all()) for p in module.parameters()):
        return Outcome(WRONG, "parameters are not finite")
    moved = {n for grads in watch.before_step for n, g in grads.items() if bool(g.any())}
    if not moved:
        return Outcome(WRONG, "nothing has a gradient")
    if isinstance(made, bpf.DirectFeedbackAlignment):
        return _compared(_behind(made, module, watch.after_backward), _behind(made, module, plain.own), kind.digits)
    return Outcome(RIGHT)


def _behind(made: Any, module: nn.Module, found: list[Gradients]) -> list[Any]:
    parts = made.find_parts("net", getattr(module, "net", None) or find_network(module)[1])
    inside = {id(p) for block in parts.blocks for p in block.parameters}
    names = [n for n, p in module.named_parameters() if id(p) not in inside]
    return [{n: grads[n] for n in names if n in grads} for grads in found]


def _companion(kind: type[Any], name: str) -> Outcome:
    judge: Callable[..., Outcome] = _lottery if name == "lottery_ticket" else _reversible
    module, watch = started(kind), Watch()
    before = picture(module)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_epochs": 2, "default_root_dir": folder} if name == "lottery_ticket" else {}
        try:
            companion = COMPANIONS[name]()
            trainer, heard = fitted(module, [companion, watch], **settings)
        except Exception as error:
            return _refusal(kind, module, before, error, watch)
        return judge(kind, companion, module, left(module, trainer, heard, watch), watch)


def _lottery(kind: type[Any], tickets: Any, module: Any, found: Any, watch: Watch) -> Outcome:
    """The first level is a plain fit; in the second, half of the weights are zero and stay so."""
    if [result["level"] for result in tickets.results] != [0, 1]:
        return Outcome(WRONG, f"{len(tickets.results)} levels")
    plain = Watch()
    _plain(kind, plain, max_epochs=1)
    said = difference(watch.losses[: len(plain.losses)], plain.losses, 0.0, "losses of the dense level")
    left_share, total = tickets.results[1]["weights_left"], tickets.results[1]["total"]
    pruned = {name: p for name, p in module.named_parameters() if name in tickets.masks}
    zeros = all(not bool(p[~tickets.masks[name]].any()) for name, p in pruned.items())
    if not zeros or abs(left_share - 0.5) > len(pruned) / total:
        said = said or f"{left_share} of the weights are left; pruned ones are zero: {zeros}"
    return Outcome(WRONG if said else RIGHT, said)


def _reversible(kind: type[Any], callback: Any, module: Any, found: Any, watch: Watch) -> Outcome:
    """Recomputed activations give the gradients of plain autograd through the same stacks."""
    again, other = started(kind), Watch()
    trainer, heard = fitted(
        again,
        [
            bpf.ReversibleRecompute(
                "all",
                "autograd",
            ),
            other,
        ],
    )
    return _compared(found["losses"], left(again, trainer, heard, other)["losses"], max(kind.digits, 1e-8))


def tensors(values: Any) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]
