"""What a fit leaves behind, and the plain fit that must leave behind the same."""

from __future__ import annotations

import collections
import copy
import math
import random
import types
import warnings
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Gradients = dict[str, Tensor]

# Kept by torch, Lightning and torchmetrics for themselves.
_OTHERS = {
    "_trainer", "_fabric", "_parameters", "_buffers", "_modules", "_hparams", "_hparams_initial", "_device", "_dtype",
    "_flat_weights", "_metric_attributes", "_jit_is_scripting", "_param_requires_grad_state", "_compiler_ctx",
    "_non_persistent_buffers_set", "prepare_data_per_node", "_log_hyperparams", "_is_full_backward_hook",
    "_torchdynamo_wrapper_id",
}  # fmt: skip


def picture(value: Any, seen: dict[int, Any] | None = None) -> Any:  # noqa: C901  # one line a kind
    """Return plain values that are equal if, and only if, two objects hold the same."""
    seen = {} if seen is None else seen
    if is_lazy(value):
        return "not made yet"
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy()) if value.dtype != object else value.tolist()
    if isinstance(value, bool | int | float | complex | str | bytes | type(None) | torch.dtype | torch.device):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state().clone()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType | type):
        return getattr(value, "__qualname__", type(value).__name__)
    if id(value) in seen:
        return "seen"
    seen[id(value)] = value  # alive, so that no other object gets its id
    if isinstance(value, dict):
        return {str(key): picture(item, seen) for key, item in value.items()}
    if isinstance(value, list | tuple | collections.deque):
        return [picture(item, seen) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, nn.Module):
        return _module(value, seen)
    package = type(value).__module__.partition(".")[0]
    if hasattr(value, "__dict__") and package not in ("torch", "lightning", "numpy", "transformers", "weakref"):
        return {type(value).__name__: picture(vars(value), seen)}
    return type(value).__name__


def _module(module: nn.Module, seen: dict[int, Any]) -> Any:
    own = {key: item for key, item in vars(module).items() if key not in _OTHERS}
    hooks = {key: len(own.pop(key)) for key in list(own) if "hooks" in key and isinstance(own[key], dict)}
    registered = {
        key: picture(value, seen)
        for registry in (module._parameters, module._buffers, module._modules)
        for key, value in registry.items()
    }
    frozen = [key for key, p in module._parameters.items() if p is not None and not p.requires_grad]
    return {**picture(own, seen), **registered, "frozen": frozen, "hooks": hooks}


def difference(a: Any, b: Any, digits: float, where: str = "") -> str:
    """Return where two pictures differ, or an empty string; ``digits`` 0 is bit for bit, infinite looks at shapes."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return "" if _alike(a, b, digits) else f"{where}: {str(a)[:99]} is not {str(b)[:99]}"
    if isinstance(a, float) and isinstance(b, float):
        same = a == b or a != a != b or math.isinf(digits) or math.isclose(a, b, rel_tol=digits, abs_tol=digits)
        return "" if same else f"{where}: {a} is not {b}"
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: {sorted(a.keys() ^ b.keys())} is in one alone"
        parts = (difference(a[key], b[key], digits, f"{where}.{key}") for key in a)
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return f"{where}: {len(a)} elements, not {len(b)}"
        parts = (difference(p, q, digits, f"{where}[{i}]") for i, (p, q) in enumerate(zip(a, b, strict=True)))
    else:
        return "" if a == b else f"{where}: {str(a)[:99]} is not {str(b)[:99]}"
    return next(filter(None, parts), "")


def _alike(a: Tensor, b: Tensor, digits: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if math.isinf(digits) or a.is_sparse:
        return True
    if digits == 0 or not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    return torch.allclose(a, b, rtol=digits, atol=digits, equal_nan=True)


class Heard(Logger):
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    name, version = "heard", ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        own = {key: float(value) for key, value in metrics.items() if not key.startswith("bpfree/")}
        if own.keys() - {"epoch"}:
            self.lines.append((step, own))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class Watch(pl.Callback):
    """Keeps losses and gradients, as they are behind the backward pass and before the optimizer's step.

    Args:
        given: gradients of another fit, which this one takes in place of its own.
    """

    def __init__(self, given: Watch | None = None) -> None:
        self.given = given
        self.losses: list[Any] = []
        self.after_backward: list[Gradients] = []
        self.before_step: list[Gradients] = []
        self.own: list[Gradients] = []  # before those of another fit took their place
        self.batches: list[int] = []  # of each backward pass
        self.started = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.started += 1

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.own.append(gradients_of(pl_module))
        self.batches.append(self.started)
        self._exchange(pl_module, self.after_backward, "after_backward")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self._exchange(pl_module, self.before_step, "before_step")

    def _exchange(self, module: pl.LightningModule, kept: list[Gradients], name: str) -> None:
        if self.given is None:
            kept.append(gradients_of(module))
            return
        theirs = getattr(self.given, name)
        kept.append(theirs[len(kept)] if len(kept) < len(theirs) else {})
        for key, parameter in module.named_parameters():
            found = kept[-1].get(key)
            parameter.grad = None if found is None else found.clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.losses.append(None if loss is None else float(loss))


def gradients_of(module: nn.Module) -> Gradients:
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def fitted(module: Any, callbacks: Iterable[pl.Callback], **settings: Any) -> tuple[pl.Trainer, Heard]:
    """Fit on the CPU, silently, in float64."""
    heard = Heard()
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "precision": "64-true",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": heard,
        **module.settings,
        **settings,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning and torch mind about such modules
        trainer = pl.Trainer(callbacks=list(callbacks), **options)
        trainer.fit(module)
    return trainer, heard


def started(kind: type[Any]) -> Any:
    """Return a new module, with all global streams at their start."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind()


def left(module: Any, trainer: pl.Trainer, heard: Heard, watch: Watch) -> dict[str, Any]:
    """Return all that a fit has left behind: on the module, in metrics, loggers, random streams and optimizers."""
    return {
        "draw": [torch.rand(()), random.random(), np.random.rand()],
        "losses": watch.losses,
        "logged": [[step, line] for step, line in heard.lines],
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("bpfree/")},
        "steps": [trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx],
        "module": picture(module),
        "optimizers": [picture(copy.deepcopy(o.state_dict())) for o in trainer.optimizers],
    }
