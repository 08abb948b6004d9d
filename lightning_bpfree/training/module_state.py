"""The state of a module that every step of a rule needs."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_bpfree.core.forward_ad import compiled_parts
from lightning_bpfree.core.params import ParameterSlots, Slot
from lightning_bpfree.core.replay.backward_only import BackwardOnly, names_hooks
from lightning_bpfree.core.replay.batch import BatchCopies
from lightning_bpfree.core.replay.computed_types import ComputedTypes
from lightning_bpfree.core.replay.held_state import Generators, HeldState
from lightning_bpfree.core.replay.iterators import Iterators
from lightning_bpfree.core.replay.object_graph import Found, Place, is_generator, walk
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.core.replay.rehearsal import Writes, needs_graph, uninitialized
from lightning_bpfree.core.replay.replay import Replay
from lightning_bpfree.core.replay.tensor_copies import TensorCopies, buffer_places
from lightning_bpfree.core.replay.uncounted import uncounted

_LOUD: tuple[str, ...] = ("log", "log_dict")
_SMALL = 1 << 20  # bytes of a tensor that is copied for each evaluation, whether or not a step is known to write to it


def _say_nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


class SilencedLogging:
    """A context in which a module, and LightningModules within it, log nothing.

    ``self.log`` does nothing, however it is reached (``super().log``, a method reference from before the fit), and
    ``self.logger`` discards everything.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> module = BoringModel()
        >>> with SilencedLogging(module)():
        ...     module.log("loss", 0.0)
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.loud = [part for part in module.modules() if isinstance(part, pl.LightningModule) or part is module]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Return the context in which nothing is logged."""
        saved = [{key: part.__dict__[key] for key in _LOUD if key in part.__dict__} for part in self.loud]
        for part in self.loud:
            part.__dict__.update(log=_say_nothing, log_dict=_say_nothing)
        try:
            with _silent_trainer(self.module.__dict__.get("_trainer")):
                yield
        finally:
            for part, own in zip(self.loud, saved, strict=True):
                for key in _LOUD:
                    part.__dict__.pop(key, None)
                part.__dict__.update(own)


@contextlib.contextmanager
def _silent_trainer(trainer: Any) -> Iterator[None]:
    results = getattr(trainer, "_results", None)
    if results is None:
        yield
        return
    loggers = trainer.loggers
    results.log = _say_nothing
    if loggers:
        trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        results.__dict__.pop("log", None)
        if loggers:
            trainer.loggers = loggers


class ModuleState:
    """The parts of a module that every step needs, found by walking its attributes.

    Args:
        module: the module.
        params: patterns of the parameters that a rule trains.
        others: further objects that a training step may change, such as the datamodule.
        optimizers: optimizers from whose parameter groups a training step may read the weights.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        params: str | Sequence[str] | None,
        others: Iterable[Any] = (),
        optimizers: Iterable[Any] = (),
    ) -> None:
        self.module, self.params, self._others, self._optimizers = module, params, list(others), list(optimizers)
        self.quiet, self.streams = SilencedLogging(module), RandomStreams([module.device])
        self.needs_graph = False
        self.writes_batch = False
        self.backward_only: dict[str, bool] = {}
        self.computed_in: torch.dtype | None = None
        self.written: set[str] = set()
        self._moving: set[int] = set()
        self._steps, self._next_rehearsal = 0, 1
        self._new_things = False
        self._look()

    def _look(self) -> None:
        self.slots = ParameterSlots(self.module, self.params)
        if self._optimizers:
            self.slots.restrict_to(self._moved_by_optimizers)
        self.found = walk(self.module, [*self._others, *_generators_of(self.module)])
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            self.found.parameters.extend(Place(group["params"], index) for index in range(len(group["params"])))
        # Groups that the step adds, for a head that is born in it, are added once.
        self.found.containers.extend(optimizer.param_groups for optimizer in self._optimizers)
        known = {id(slot.parameter) for slot in (*self.slots, *self.slots.rest)}
        self.outside = [place for place in self._parameter_places() if id(place.get()) not in known]
        self.slots.add_places(self.found.modules, self.found.parameters)
        self.held = HeldState(self.found)
        self.buffers = TensorCopies(self._copied_places())
        modules = self.found.modules
        self._registries = [d for module in modules for d in (module._parameters, module._modules)]
        self._buffer_names = [module._buffers for module in modules]
        self._parts = self._parts_now()
        self._new_things = False

    def _parameter_places(self) -> list[Place]:
        registered = [Place(m._parameters, key) for m in self.found.modules for key in m._parameters]
        return [place for place in (*registered, *self.found.parameters) if place.get() is not None]

    def _copied_places(self) -> list[Place]:
        plain = [p for p in self.found.tensors if p.get().nbytes <= _SMALL or id(p.get()) in self._moving]
        arrays = [p for p in self.found.arrays if p.get().nbytes <= _SMALL or id(p.get()) in self._moving]
        frozen = [
            Place(owner._parameters, key)
            for slot in self._frozen()
            if slot.name in self.written
            for owner, key in slot.places
        ]
        outside = [p for p in self.outside if id(p.get()) in self._moving]
        return [*buffer_places(self.found.modules), *plain, *arrays, *frozen, *outside]

    def _frozen(self) -> list[Slot]:
        trained = {slot.name for slot in self.slots.trainable()}
        return [*self.slots.rest, *(slot for slot in self.slots if slot.name not in trained)]

    def _moved_by_optimizers(self) -> set[int]:
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        # A callback that moves parameters of the module by itself says so on them.
        own = {id(p) for p in self.module.parameters() if getattr(p, "moved_by_callback", False)}
        return own | {id(parameter) for group in groups for parameter in group["params"]}

    def _parts_now(self) -> list[Any]:
        """Return parameters, submodules and names of buffers, of which each tells whether it has changed by itself."""
        return [*chain(*(registry.values() for registry in self._registries)), *chain(*self._buffer_names)]

    def refresh(self) -> bool:
        """Search again if the module's parts have changed since the last search; return whether they had."""
        now, then = self._parts_now(), self._parts
        same = len(now) == len(then) and all(map(operator.is_, now, then))
        if same and not self._new_things and not self._gone():
            return False
        self._look()
        return True

    def _gone(self) -> bool:
        """Whether something is no longer where it was found: a list was emptied, an attribute deleted."""
        try:
            for place in chain(self.found.tensors, self.found.arrays, self.found.iterators, self.outside):
                place.get()
        except (LookupError, TypeError):
            return True
        return False

    def replay(self) -> Replay:
        """Return an object that restores all state between the evaluations of one step."""
        iterators = self._iterators()

        def finished(before: list[Any], after: list[Any]) -> None:
            self._new_things |= self.held.differs(after[1], before[1])
            for part in iterators:
                part.settle()

        return Replay([self.streams, self.held, *iterators], self.buffers, finished)

    # --- rehearsal ---

    def rehearsal_due(self) -> bool:
        """Whether to rehearse the next step: the first, 4th, 16th, 64th and so on, since steps may change."""
        self._steps += 1
        due = self._steps == self._next_rehearsal
        if due:
            self._next_rehearsal *= 4
        return due

    def rehearse(self, evaluate: Callable[..., Any], batch: BatchCopies, *, copied: bool = True) -> None:
        """Evaluate the step once without side effects, to find what it writes to and whether it computes gradients.

        This initializes lazy layers.

        Args:
            evaluate: the step.
            batch: its arguments.
            copied: whether to copy trained parameters, to find and undo writes that bypass tensor version counters.
        """
        lazy = uninitialized(self.module)
        if lazy:
            held = HeldState(_without(self.found, lazy))
            self._evaluated_aside(evaluate, batch, held)
            for layer in lazy:  # whose statistics have counted this evaluation
                getattr(layer, "reset_running_stats", _say_nothing)()
            self._look()
        trained = [(slot.name, slot.parameter) for slot in [*self.slots, *self.slots.rest]]
        large = [(f"held {i}", p.get()) for i, p in enumerate(self.found.tensors) if p.get().nbytes > _SMALL]
        large += [(f"outside {i}", p.get()) for i, p in enumerate(self.outside)]
        arrays = [p for p in self.found.arrays if p.get().nbytes > _SMALL]
        copies = [p.get().copy() for p in arrays]
        uncopied = () if copied else {slot.name for slot in self.slots.trainable()}
        with Writes([*cast("list[tuple[str, Tensor]]", trained), *large], uncopied) as writes:
            self._evaluated_aside(evaluate, batch, self.held)
        self.written |= writes.found
        self._moving |= {id(tensor) for name, tensor in large if name in writes.found}
        for place, copy in zip(arrays, copies, strict=True):
            if (place.get() != copy).any():
                place.get()[...] = copy
                self._moving.add(id(place.get()))
        batch.always = self.writes_batch = self.writes_batch or batch.was_written()
        self.buffers = TensorCopies(self._copied_places())

    def _evaluated_aside(self, evaluate: Callable[..., Any], batch: BatchCopies, held: HeldState) -> None:
        def evaluated() -> None:
            args, kwargs = batch.watched()
            replay.rewind()
            with self.buffers.copies(), self.quiet(), uncounted():
                evaluate(*args, **kwargs)

        replay = Replay([self.streams, held, *self._iterators()], self.buffers)
        try:
            with BackwardOnly() as watch, self._types_watched() as types:
                self.needs_graph |= needs_graph(evaluated)
                if not self.needs_graph and names_hooks(self._code()):  # perhaps behind `if x.requires_grad`
                    with torch.enable_grad():
                        evaluated()
            self.backward_only.update(watch.found)
            self.computed_in = self.computed_in if types is None or types.coarsest is None else types.coarsest
        finally:
            replay.finish()

    def _types_watched(self) -> contextlib.AbstractContextManager[ComputedTypes | None]:
        # Compiled code would be compiled again for a context of its own.
        compiled = getattr(self.module, "_compiler_ctx", None) is not None or compiled_parts(self.module)
        return contextlib.nullcontext() if compiled else ComputedTypes()

    def _code(self) -> list[Any]:
        kinds = {kind for part in self.found.modules for kind in type(part).__mro__}
        own = [kind for kind in kinds if not kind.__module__.startswith(("torch.", "lightning.", "pytorch_lightning."))]
        methods = [self.module.training_step, *(method for kind in own for method in vars(kind).values())]
        return [getattr(method, "__func__", method) for method in methods]

    def _iterators(self) -> list[Iterators]:
        if not self.found.iterators:
            return []
        return [Iterators(self.found.iterators, [self.streams, Generators(self.found.generators)])]

    def written_and_trained(self) -> list[str]:
        """Return the names of trained parameters that the training step writes to."""
        return [slot.name for slot in self.slots.trainable() if slot.name in self.written]


def _without(found: Found, lazy: Sequence[nn.Module]) -> Found:
    hidden = {id(module) for module in lazy}
    return found._replace(modules=[module for module in found.modules if id(module) not in hidden])


def _generators_of(module: pl.LightningModule) -> list[Any]:
    """Return the random generators that the training step knows as variables of its file, or from around it."""
    function = getattr(module.training_step, "__func__", module.training_step)
    code, variables = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    named = [variables[name] for name in getattr(code, "co_names", ()) if name in variables]
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            named.append(cell.cell_contents)
    return [value for value in named if is_generator(value)]
