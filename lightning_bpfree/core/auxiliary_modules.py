"""Modules that a rule adds to the user's network: heads of local losses, embeddings of labels."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_bpfree.core.arguments import PositiveFloat, checked
from lightning_bpfree.core.params import added

Build = Callable[[], nn.Module]
AuxiliaryOptimizer = Literal["adam", "sgd"]

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}


def made(build: Build, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a new module whose initialization depends on ``seed`` alone; no global random stream advances.

    It is in evaluation mode, so its calls draw no random numbers (dropout) and do not mix samples (BatchNorm).

    Args:
        build: makes the module.
        seed: seed of its initialization, which is drawn on the CPU in float32 for any device.
        device: the device to move the module to.
        dtype: the type of its parameters and buffers.

    Examples:
        >>> one, two = (made(lambda: nn.Linear(2, 1), 7, torch.device("cpu")) for _ in range(2))
        >>> torch.equal(one.weight, two.weight)
        True
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _plain_defaults():
        torch.manual_seed(seed)
        module = build()
    return module.to(device, dtype).eval()


@contextlib.contextmanager
def _plain_defaults() -> Iterator[None]:
    default = torch.get_default_dtype()  # Lightning changes it under true half and double precision
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)


class AuxiliaryModules:
    """Modules that a rule creates lazily, trains itself, and saves with its own state.

    They are not part of the user's module: neither its state dict nor its optimizer includes them. A rule requests a
    module when the shapes are known (:meth:`get`), adds gradients after each micro-batch (:meth:`add_gradients`), and
    steps when the user's optimizer does (:meth:`step`, from ``on_before_optimizer_step``). Its ``rule_state`` and
    ``load_rule_state`` use :meth:`state_dict` and :meth:`load_state_dict`. Loaded state is kept until its module is
    created.

    Args:
        optimizer: ``"adam"``, or ``"sgd"`` with momentum 0.9; one for each module.
        lr: learning rate, > 0.

    Raises:
        ValueError: for an unknown optimizer, or a learning rate that is not positive.

    Examples:
        >>> own = AuxiliaryModules("sgd", lr=0.5)
        >>> scale = own.get("scale", lambda: nn.Linear(1, 1, bias=False), seed=0, device=torch.device("cpu"))
        >>> before = scale.weight.item()
        >>> own.add_gradients("scale", [torch.tensor([[1.0]])])
        >>> own.add_gradients("scale", [torch.tensor([[3.0]])])  # another micro-batch
        >>> own.step()
        >>> round(before - scale.weight.item(), 4)  # the learning rate times the mean
        1.0
    """

    @checked
    def __init__(self, optimizer: AuxiliaryOptimizer = "adam", lr: PositiveFloat = 1e-3) -> None:
        self.optimizer, self.lr = optimizer, lr
        self._modules: dict[str, nn.Module] = {}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._sums: dict[str, tuple[list[Tensor | None], int]] = {}
        self._saved: dict[str, dict[str, Any]] = {}
        self._proposed: dict[str, Sequence[Tensor | None]] = {}

    def configure(self, optimizer: AuxiliaryOptimizer, lr: float) -> None:
        """Change the optimizer or learning rate, also for existing modules; their parameters do not change."""
        if (optimizer, lr) == (self.optimizer, self.lr):
            return
        if optimizer != self.optimizer:
            self._optimizers.clear()
            self._saved = {key: {**saved, "optimizer": None} for key, saved in self._saved.items()}
        self.optimizer, self.lr = optimizer, lr
        for made_already in self._optimizers.values():
            for group in made_already.param_groups:
                group["lr"] = lr

    def __contains__(self, key: str) -> bool:
        return key in self._modules

    def __getitem__(self, key: str) -> nn.Module:
        return self._modules[key]

    def get(
        self, key: str, build: Build, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> nn.Module:
        """Return the module called ``key``, created at the first call from loaded state, or else from ``seed``.

        Args:
            key: its name.
            build: makes a new one.
            seed: seed of its initialization; equal on all ranks, so that their modules are equal.
            device: where it is needed; an existing module moves there with the state of its optimizer.
            dtype: the type of its parameters.

        Raises:
            ValueError: if the loaded state does not fit the module that ``build`` makes.
        """
        module = self._modules.get(key)
        if module is not None and _is_on(module, device, dtype):
            return module
        if module is not None:
            self._saved[key] = self._state_of(key)
        saved = self._saved.get(key)
        with torch.inference_mode(False):  # it may be asked for while Lightning validates, and is to be trained later
            module = made(build, seed, device, dtype)
            start = module.state_dict() if saved is None else saved["module"]
            start = {name: tensor.clone() for name, tensor in start.items()}
        try:
            module.load_state_dict(start)
        except RuntimeError as error:
            raise ValueError(
                f"The checkpoint's {key} does not fit the one that is made now: resume with the arguments that the "
                f"checkpoint was made with. {error}"
            ) from error
        self._modules[key] = module
        self._optimizers.pop(key, None)
        self._saved.pop(key, None)
        if saved is not None and saved["optimizer"] is not None:
            self._optimizer_of(key).load_state_dict(copy.deepcopy(saved["optimizer"]))
        return module

    def add_gradients(self, key: str, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one micro-batch, in the order of the module's parameters; None counts as zero."""
        total, times = self._sums.get(key, ([None] * len(gradients), 0))
        self._sums[key] = [added(a, b) for a, b in zip(total, gradients, strict=True)], times + 1

    def propose(self, key: str, gradients: Sequence[Tensor | None]) -> None:
        """Keep gradients of a micro-batch until :meth:`settle`: another rank may cause the batch to be skipped."""
        self._proposed[key] = gradients

    def settle(self, succeeded: bool) -> None:
        """Add the proposed gradients, or drop them."""
        for key, gradients in self._proposed.items() if succeeded else ():
            self.add_gradients(key, gradients)
        self._proposed.clear()

    def step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Step the modules that have gradients with the mean gradient, and clear the gradients.

        Args:
            reduce: averages a tensor over ranks; None on one rank.
        """
        for key, (total, times) in self._sums.items():
            parameters = list(self._modules[key].parameters())
            means = [None if g is None else (g / times).to(p.dtype) for p, g in zip(parameters, total, strict=True)]
            if reduce is not None:  # before anything is left out: ranks wait for each other
                means = [None if mean is None else reduce(mean) for mean in means]
            if any(mean is not None and not bool(torch.isfinite(mean).all()) for mean in means):
                continue  # as a gradient scaler leaves out such a step of the user's parameters
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.grad = mean
            self._optimizer_of(key).step()
            self._optimizer_of(key).zero_grad()
        self._sums.clear()

    def _optimizer_of(self, key: str) -> torch.optim.Optimizer:
        if key not in self._optimizers:
            self._optimizers[key] = _OPTIMIZERS[self.optimizer](self._modules[key].parameters(), lr=self.lr)
        return self._optimizers[key]

    def _state_of(self, key: str) -> dict[str, Any]:
        optimizer = self._optimizers.get(key)
        return {
            "module": {name: tensor.detach().clone() for name, tensor in self._modules[key].state_dict().items()},
            "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all modules and of their optimizers' states, in tensors, numbers, lists and dicts.

        Gradients that have not been applied are not included, as Lightning does not save the user's either.
        """
        return {**self._saved, **{key: self._state_of(key) for key in self._modules}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; modules receive it when they are next requested."""
        for held in (self._modules, self._optimizers, self._sums, self._proposed):
            held.clear()
        self._saved = dict(state)


def _is_on(module: nn.Module, device: torch.device, dtype: torch.dtype) -> bool:
    first = next(iter(module.parameters()), None)
    return first is None or (first.device == device and first.dtype == dtype)
