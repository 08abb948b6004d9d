"""Bad arguments of everything public, made from the signatures: what to call, with which arguments, and why it is bad.

A value is bad by what the annotation says, read here a second time and more simply than `core/arguments.py` reads it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import types
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import nn

import lightning_bpfree as bpf
from lightning_bpfree import functional
from lightning_bpfree.methods.concept_backprop.detection import Samples
from lightning_bpfree.methods.deep_ensemble.combining.combination import Combination

MODULES = ["data", "modules", "regression", "multiplexer", "text", "language", "corruption", "transformers_nets"]
MODULES += [
    "tables",
    "pillars",
    "control",
    "actor_critic",
    "diffusion_tasks.digit_diffusion",
    "diffusion_tasks.digit_rewards",
    "concept_tasks.autoencoder",
    "concept_tasks.concepts",
    "concept_tasks.next_byte",
    "concept_tasks.tictactoe",
    "learned_sizes",
]
BUILDERS = "lightning_bpfree.methods.reversible_recompute.models"

# Results, interfaces, warnings and errors: nobody makes them to set something.
NO_INPUT = {
    "Barrier",
    "TrainingRule",
    "NetworkRule",
    "FunctionChangedWarning",
    "ReconstructionError",
    "Step",
    "Estimate",
    "Pixels",
}

SET_INSIDE = {("LanguageModel", "num_classes")}  # arguments of a base class that are not the caller's


def _stack() -> bpf.ReversibleSequential:
    return bpf.ReversibleSequential([_block()])


def _block() -> bpf.ReversibleBlock:
    return bpf.ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 4, norm_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def tiny_pipeline() -> Any:
    from tiny_diffusion import image_pipeline  # diffusers is optional

    return image_pipeline()


W = {"w": torch.ones(2)}

# Good values of arguments that have no default, by owner and name, or by name alone.
GOOD: dict[str, Callable[[], Any]] = {
    "loss_fn": lambda: lambda p: p["w"].sum(),
    "params": lambda: dict(W),
    "direction": lambda: dict(W),
    "directional_derivatives.directions": lambda: {"w": torch.ones(3, 2)},
    "difference_quotients.directions": lambda: functional.Directions(W, 1, 0),
    "sigma": lambda: 0.1,
    "like": lambda: dict(W),
    "num": lambda: 2,
    "seed": lambda: 0,
    "Concept.name": lambda: "c",
    "concepts": lambda: [bpf.Concept("c", key="c")],
    "layers": lambda: "0",
    "autoencoder": lambda: nn.Identity(),
    "embedding": lambda: "0",
    "inputs": lambda: torch.ones(1, 1),
    "probe": lambda: functional.LinearProbe("c", "0", "binary", torch.ones(1), torch.tensor(0.0)),
    "detection": lambda: functional.LinearProbe("c", "0", "binary", torch.ones(1), torch.tensor(0.0)),
    "features": lambda: torch.ones(1, 1),
    "fit_probe.labels": lambda: torch.ones(1),
    "samples": lambda: Samples({}, {}, torch.ones(1), None),
    "neighbours": lambda: lambda x: x[None],
    "feature_above_mean.feature": lambda: 1,
    "board": lambda: torch.eye(2),
    "tokens": lambda: torch.ones(2, dtype=torch.int64),
    "allowed": lambda: torch.ones(2, dtype=torch.int64),
    "LinearProbe.concept": lambda: "c",
    "LinearProbe.layer": lambda: "0",
    "LinearProbe.kind": lambda: "binary",
    "LinearProbe.weight": lambda: torch.ones(1),
    "LinearProbe.bias": lambda: torch.tensor(0.0),
    "change_concept.module": lambda: nn.Sequential(nn.Linear(1, 1)),
    "collect_activations.module": lambda: nn.Sequential(nn.Linear(1, 1)),
    "concept_sensitivity.module": lambda: nn.Sequential(nn.Linear(1, 1)),
    "flip_concept.module": lambda: nn.Sequential(nn.Linear(1, 1)),
    "tcav.module": lambda: nn.Sequential(nn.Linear(1, 1)),
    "supported_kernels.module": lambda: nn.Linear(1, 1),
    "module_loss.module": lambda: nn.Linear(1, 1),
    "inject.loss": lambda: torch.tensor(1.0),
    "parameters": lambda: [torch.zeros(1, requires_grad=True)],
    "gradients": lambda: lambda _: [torch.zeros(1)],
    "snip.gradients": lambda: dict(W),
    "fitness": lambda: torch.rand(4),
    "shaping": lambda: "raw",
    "evaluate": lambda: lambda p: 1.0,
    "a": lambda: dict(W),
    "b": lambda: dict(W),
    "batches": lambda: [torch.ones(1, 1)],
    "module_loss.loss": lambda: lambda net, x: net(x).sum(),
    "Masks.masks": lambda: {"w": torch.tensor([True])},
    "Ticket.masks": lambda: functional.Masks({"w": torch.tensor([True])}),
    "init": lambda: {"w": torch.ones(1)},
    "mean": lambda: dict(W),
    "std": lambda: dict(W),
    "scores": lambda: dict(W),
    "sparsity": lambda: 0.0,
    "rewards": lambda: torch.rand(2, 3),
    "f": lambda: nn.Linear(2, 2),
    "g": lambda: nn.Linear(2, 2),
    "blocks": lambda: [_block()],
    "convert_to_reversible.model": _encoder,
    "set_schedule.model": _stack,
    "schedule": lambda: "autograd",
    "net": lambda: nn.Linear(4, 2),
    "actor": lambda: nn.Linear(4, 2),
    "critic": lambda: nn.Linear(4, 1),
    "in_shape": lambda: (1, 8, 8),
    "denoiser": lambda: nn.Linear(2, 2),
    "DiffusionSampler.schedule": lambda: bpf.DiscreteVP.from_betas(),
    "alphas_cumprod": lambda: [0.9, 0.5],
    "pipe": tiny_pipeline,
    "pipeline": tiny_pipeline,
    "reward": lambda: torch.mean,
    "folder": lambda: "runs",
    "measure": lambda: torch.mean,
    "target": lambda: 1.0,
    "num_classes": lambda: 3,
    "EnsembleModule.members": lambda: [nn.Linear(1, 2)],
    "combination": Combination,
    "bootstrap_rows.samples": lambda: 3,
    "probabilities": lambda: torch.full((2, 3, 4), 0.25),
    "values": lambda: torch.ones(2, 3),
    "outputs": lambda: torch.full((2, 3, 4), 0.25),
    "targets": lambda: torch.zeros(3, dtype=torch.int64),
}


def public() -> dict[str, Callable[..., Any]]:
    """Return all public constructors and functions that take arguments, by name."""
    found: dict[str, Any] = {**dict(inspect.getmembers(bpf)), **vars(functional)}
    for name in MODULES:
        module = importlib.import_module(f"lightning_bpfree.demos.{name}")
        names = getattr(module, "__all__", ["CORRUPTIONS", "Corruption", "chosen_corruption"])
        found.update({n: getattr(module, n) for n in names})
    nets = importlib.import_module("lightning_bpfree.demos.nets")
    found.update({n: v for n, v in vars(nets).items() if n in ("MLP", "SmallCNN", "SmallTransformer")})
    builders = importlib.import_module(f"{BUILDERS}.builders")
    found.update({n: v for n, v in vars(builders).items() if n.startswith("reversible_") or n == "set_schedule"})
    found["ReversibleMViT"] = importlib.import_module(f"{BUILDERS}.mvit").ReversibleMViT
    return {
        name: value
        for name, value in sorted(found.items())
        if not name.startswith("_")
        and name not in NO_INPUT
        and (inspect.isclass(value) or inspect.isfunction(value))
        and getattr(value, "__module__", "").startswith("lightning_bpfree.")
        and takes_arguments(value)
    }


def takes_arguments(target: Callable[..., Any]) -> bool:
    return bool(arguments(target)) if inspect.isclass(target) else name_is_public(target)


def name_is_public(function: Callable[..., Any]) -> bool:
    shown = {*vars(functional), "convert_to_reversible", "set_schedule", "chosen_corruption"}
    return function.__name__ in shown or function.__name__.startswith("reversible_")


@functools.cache
def arguments(target: Callable[..., Any]) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Return parameters and annotations by name, those that ``**settings`` hands on to base classes included."""
    functions = [target]
    if inspect.isclass(target):
        functions = [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
        functions = [f for f in functions if getattr(f, "__module__", "").startswith("lightning_bpfree.")]
    found: dict[str, tuple[inspect.Parameter, Any]] = {}
    for function in functions:
        parameters = inspect.signature(function).parameters
        hints = get_type_hints(function, include_extras=True)
        for name, parameter in parameters.items():
            if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(name, (parameter, hints.get(name, Any)))
            elif is_typeddict(options := getattr(hints.get(name), "__args__", (None,))[0]):
                typed = get_type_hints(options, include_extras=True).items()
                found.update(
                    {key: (inspect.Parameter(key, parameter.KEYWORD_ONLY, default=None), h) for key, h in typed}
                )
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return {n: argument for n, argument in found.items() if (getattr(target, "__name__", ""), n) not in SET_INSIDE}


def good(name: str, target: Callable[..., Any]) -> dict[str, Any]:
    """Return good values of the arguments without a default."""
    needed = [n for n, (p, _) in arguments(target).items() if p.default is p.empty]
    return {n: GOOD.get(f"{name}.{n}", GOOD.get(n, lambda: None))() for n in needed}


# --- bad values -----------------------------------------------------------------------------------------------------

VALUES = [
    "'three'", "'3'", "''", "3", "3.7", "0", "0.0", "-1", "-0.5", "1.0", "1.5", "True", "None", "float('nan')",
    "float('inf')", "[]", "['three', 3]", "[-1]", "{}", "object()", "b'3'", "1j",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One bad argument: of what, which, and the value as an expression."""

    target: str
    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.target}({self.name}={self.value})"


def cases(name: str, target: Callable[..., Any]) -> Iterator[Case]:
    """Yield the bad arguments of one constructor or function."""
    for argument, (_, hint) in arguments(target).items():
        for value in [*VALUES, *misspelt(hint)]:
            if allowed(hint, evaluated(value)) is False:
                yield Case(name, argument, value)
        yield Case(name, argument + argument[-1], "1")  # a keyword that there is not


@functools.cache
def _compiled(value: str) -> types.CodeType:
    return compile(value, "<value>", "eval")


def evaluated(value: str) -> Any:
    return eval(_compiled(value))


def misspelt(hint: Any) -> list[str]:
    words = [choice for part in parts(hint) if get_origin(part) is Literal for choice in get_args(part)]
    return [repr(word[:-2] + word[-1] + word[-2]) for word in words if isinstance(word, str) and word[-1] != word[-2]]


def parts(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [part for option in get_args(hint) for part in parts(option)]
    return [hint]


def allowed(hint: Any, value: Any) -> bool | None:
    """Whether the annotation allows a value; None where this reading cannot tell."""
    said = [_allows(part, value) for part in parts(hint)]
    return True if True in said else None if None in said else False


def _allows(hint: Any, value: Any) -> bool | None:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = _allows(args[0], value)
        return inner and all(value in limit for limit in args[1:])
    if origin is Literal:
        return isinstance(value, str) and value in args
    if hint in (int, float, bool, str, type(None)):
        number = type(value) in (int, float) and math.isfinite(value)
        return number if hint is float else type(value) is hint
    return None if hint is Any else _of_others(hint, origin, args, value)


def _of_others(hint: Any, origin: Any, args: tuple[Any, ...], value: Any) -> bool | None:
    if abc.Callable in (hint, origin):
        return callable(value)
    if origin in (abc.Sequence, list, tuple, abc.Iterable):
        return _lists(origin, args, value)
    if origin in (abc.Mapping, dict):
        return None if value == {} else False
    if origin is type or inspect.isclass(hint):
        return None if getattr(hint, "_is_protocol", False) else False  # no value here is a tensor, module or class
    return None


def _lists(origin: Any, args: tuple[Any, ...], value: Any) -> bool | None:
    if not isinstance(value, list):
        return None if origin is abc.Iterable and value in ({}, b"3") else False
    if origin is tuple and args[-1] is not Ellipsis:
        return False if len(value) != len(args) else None
    said = [allowed(args[0], entry) for entry in value]
    return False if False in said else None if None in said else True
