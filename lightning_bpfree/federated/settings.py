"""The shared settings of a BAFFLE federation: directions, measurement of the loss along them, and local steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import PositiveFloat, PositiveInt, Range, checked
from lightning_bpfree.core.directions import Directions, Distribution, Generator
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.training.precision import smallest_sigma

NumDirections = Annotated[int, Range(ge=1, le=1 << 16)]
_DATA, _NOISE = 0xDA7A, 0xD1CE  # so that batches, random numbers and directions have seeds of their own


class Baffle:
    """Measures the loss along random directions on every client, and estimates the gradient on the server.

    In a round, the server sends its weights and a seed. A client generates ``K`` directions ``v_k`` from the seed, and
    returns the ``K`` differences ``L(W + sigma v_k) - L(W)`` of its loss, or half of ``L(W + sigma v_k) - L(W - sigma
    v_k)``. The server weights them by the clients' numbers of samples, and regenerates the directions:
    ``mean_k (difference_k / sigma) v_k`` estimates the gradient of the loss smoothed over N(0, sigma^2).

    A local step costs ``1 + K`` forward passes over the batches (forward scheme) or ``2 K`` (central).

    Args:
        num_directions: ``K``, from 1 to 65,536.
        sigma: size of the perturbation, in units of the parameters; at least 3.5e-5 for float32 parameters.
        scheme: ``"forward"`` or ``"central"``; at equal cost, forward has twice the directions.
        directions: ``"gaussian"`` or ``"rademacher"``.
        generator: ``"portable"``: the same directions on every device; ``"device"``: from the device's own generator.
        noise: ``"shared"``: all clients have the same directions, so that sums of the numbers are enough, as in the
            paper and as secure sums require; ``"per_client"``: each has its own, as in the authors' code.
        clip: bound on the absolute coordinates of the estimate, which is scaled down as a whole; None for none.
        local_steps: steps of plain gradient descent that a client takes per round, each with its own directions.
        local_lr: their learning rate.
        batches: random batches of a client's data in each local step; None for all its data.
        chunk_size: directions that are evaluated in one vectorized pass; 1 for one by one, in constant memory.
        perturb: ``"layers"`` perturbs each layer's own parameters while it computes, with no more memory than
            inference; needs ``generator="portable"``, ``chunk_size=1`` and ``local_steps=1``, and parameters that only
            their own layer uses. ``"copy"`` computes with a perturbed copy of the parameters. ``"auto"`` uses layers if
            possible, else a copy.

    Raises:
        ValueError: for arguments out of range.

    Examples:
        >>> Baffle(num_directions=20).forward_passes
        21

    References:
        H. Feng et al., "Does Federated Learning Really Need Backpropagation?", 2023, arXiv 2301.12195.
    """

    @checked
    def __init__(
        self,
        num_directions: NumDirections = 100,
        sigma: PositiveFloat = 1e-4,
        scheme: Literal["forward", "central"] = "forward",
        directions: Distribution = "gaussian",
        generator: Generator = "portable",
        *,
        noise: Literal["shared", "per_client"] = "shared",
        clip: PositiveFloat | None = 0.3,
        local_steps: PositiveInt = 1,
        local_lr: PositiveFloat = 0.01,
        batches: PositiveInt | None = None,
        chunk_size: PositiveInt = 1,
        perturb: Literal["auto", "layers", "copy"] = "auto",
    ) -> None:
        self.num_directions, self.sigma, self.scheme = num_directions, sigma, scheme
        self.directions, self.generator, self.noise, self.clip = directions, generator, noise, clip
        self.local_steps, self.local_lr, self.batches, self.chunk_size = local_steps, local_lr, batches, chunk_size
        self.perturb = perturb
        for name, fits in {"generator": generator == "portable", "chunk_size": chunk_size == 1}.items():
            if perturb == "layers" and not fits:
                raise ValueError(
                    f"Baffle: {name}={getattr(self, name)!r}: perturb='layers' needs generator='portable' and "
                    "chunk_size=1."
                )

    @property
    def forward_passes(self) -> int:
        """Forward passes over a client's batches in a round."""
        return self.local_steps * (2 * self.num_directions if self.scheme == "central" else 1 + self.num_directions)

    @property
    def layerwise(self) -> bool:
        """Whether to perturb layer by layer, if the module allows it."""
        possible = self.generator == "portable" and self.chunk_size == 1 and self.local_steps == 1
        return self.perturb != "copy" and possible

    @property
    def numbers(self) -> int:
        """The number of numbers that a client returns."""
        return self.local_steps * self.num_directions

    def to_plain(self) -> dict[str, Any]:
        """Return the settings as numbers and strings, for ``Baffle(**plain)``."""
        return dict(vars(self))

    def drawn(self, params: Mapping[str, Tensor], seed: int, step: int = 0, client: int | None = None) -> Directions:
        """Return the directions of a local step.

        Args:
            params: named tensors that give the shapes.
            seed: seed of the round.
            step: number of the local step.
            client: number of the client; used only with ``noise="per_client"``.
        """
        own = 0 if self.noise == "shared" or client is None else 1 + client
        seed = mix(seed, step, own) if step or own else seed
        return Directions(params, self.num_directions, seed, self.directions, self.generator)

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Raise ValueError if there is nothing to train, or if sigma is below the rounding error of the parameters."""
        if not params:
            raise ValueError("Baffle: the module has no parameter that requires a gradient: nothing can be trained.")
        for dtype in {tensor.dtype for tensor in params.values()}:
            if self.sigma < smallest_sigma(dtype):
                raise ValueError(
                    f"Baffle: sigma={self.sigma:g}: lost in the rounding of {dtype}: give at least "
                    f"{smallest_sigma(dtype):.1g}, or keep the parameters in float32."
                )

    def fingerprint(self, params: Mapping[str, Tensor], frozen: Mapping[str, Tensor]) -> str:
        """Return a hash of what server and clients must have in common, 32 hexadecimal digits.

        It covers names, shapes and types of the trained parameters, the values of the frozen ones, the settings that
        determine the meaning of the numbers, and the first direction of seed 0, bit for bit.
        """
        told = {key: value for key, value in self.to_plain().items() if key not in ("chunk_size", "perturb")}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
        for name, tensor in params.items():
            digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        for tensor in [*self.drawn(params, 0)[0].values(), *frozen.values()]:
            digest.update(_bytes(tensor))
        return digest.hexdigest()[:32]


def weights_digest(params: Mapping[str, Tensor]) -> str:
    """Return a hash of named tensors, bit for bit, 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in params.items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:32]


def tensor_digest(tensor: Tensor) -> str:
    """Return a hash of a tensor, bit for bit, 32 hexadecimal digits."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()[:32]


def _bytes(tensor: Tensor) -> Any:
    """Return what a hash takes; the tensor's own memory, where that is one piece on the CPU."""
    return tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()


def round_seed(seed: int, number: int) -> int:
    """Return the seed of a round, from the run's seed and the number of the round."""
    return mix(seed, number)


def data_seed(seed: int, client: int, step: int) -> int:
    """Return the seed with which a client draws the samples of a local step."""
    return mix(seed, _DATA, client, step)


def noise_seed(seed: int, client: int, step: int) -> int:
    """Return the seed of the random numbers that a client's training step draws, such as dropout's."""
    return mix(seed, _NOISE, client, step)
