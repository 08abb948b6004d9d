"""A network whose activations are replaced by stochastic units, and its forward pass in training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules
from lightning_bpfree.core.forward_override import ForwardOverride
from lightning_bpfree.core.network.network_call import Call, RefusedError, scores_of, with_scores
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.methods.team_reinforce.layer import Layer, as_input, averaged
from lightning_bpfree.methods.team_reinforce.units.boltzmann_machine import Machine, MachineLayer
from lightning_bpfree.methods.team_reinforce.units.exploration import Exploration
from lightning_bpfree.methods.team_reinforce.units.lateral import Boltzmann, LateralWeights
from lightning_bpfree.methods.team_reinforce.units.stochastic import Softmax, StochasticUnit

Visit = Callable[["Layer"], Tensor]
TrainingPass = Callable[["TeamNetwork", Tensor, Call], Any]


class Acts(Protocol):
    """The units and the output of a team, and how it is evaluated; :class:`TeamSettings` implements it."""

    @property
    def units(self) -> Sequence[StochasticUnit]:
        """One for all layers, or one a layer."""

    @property
    def output(self) -> StochasticUnit | None:
        """The unit that draws the action; None if nothing is drawn."""

    @property
    def exploration(self) -> Exploration:
        """How layers draw."""

    @property
    def evaluation(self) -> str:
        """``"mean"`` or ``"samples"``."""

    @property
    def eval_samples(self) -> int:
        """How many draws the latter averages."""


class UnitLayerOverride(ForwardOverride):
    """Stands in for the forward pass of one activation.

    Args:
        team: the network it belongs to.
        name: name of the activation in the network.
        module: the activation.
    """

    rule = "TeamReinforce"

    def __init__(self, team: TeamNetwork, name: str, module: nn.Module) -> None:
        super().__init__(module)
        self.team, self.name = team, name

    def __call__(self, potential: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the values of the units at these potentials."""
        return self.team.visited(self, potential)


class TeamNetwork(ForwardOverride):
    """Stands in for ``network.forward``: a team of stochastic units, drawn in training and read out in evaluation.

    Args:
        network: the network.
        activations: names and modules whose place the units take.
        settings: what the team is.
        lateral: holds the lateral weights.
        seed: gives the seed of what evaluation draws, which may be known late.
    """

    rule = "TeamReinforce"

    def __init__(
        self,
        network: nn.Module,
        activations: dict[str, nn.Module],
        settings: Acts,
        lateral: AuxiliaryModules,
        seed: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(network)
        self.network, self.settings, self.lateral, self.seed = network, settings, lateral, seed
        self.units, self.output, self.exploration = settings.units, settings.output, settings.exploration
        self.training_pass: TrainingPass | None
        self.generator: torch.Generator | None = None
        self.noted: dict[str, Tensor] | None = None
        """What an evaluation has returned by means and by draws, if that is noted."""
        self.noted_labels: Tensor | None = None
        self.num_weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
        self.sites = [UnitLayerOverride(self, name, module) for name, module in activations.items()]
        self._handles: list[Any] = []
        self._visit: Visit | None = None
        self._layers: list[Layer] = []
        self._linears: dict[int, tuple[nn.Linear, Tensor, Tensor, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy takes along: no pass that is under way, and no generator, which is made when needed."""
        idle: dict[str, Any] = {"generator": None, "noted": None, "_visit": None, "_layers": [], "_linears": {}}
        return {**super().__getstate__(), **idle}

    # --- in the network's place ---

    def set_rule(self, rule: str) -> None:
        """Set the name of the rule, here and in the replaced activations."""
        super().set_rule(rule)
        for site in self.sites:
            site.set_rule(rule)

    def install(self) -> None:
        """Take the place of the forward passes of network and activations."""
        if not self._handles:
            linears = [part for part in self.network.modules() if isinstance(part, nn.Linear)]
            self._handles = [part.register_forward_hook(self._seen) for part in linears]
        super().install()
        for site in self.sites:
            site.install()

    def remove(self) -> None:
        """Give network and activations their own forward passes back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for site in self.sites:
            site.remove()
        super().remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network's callers see."""
        inputs, call = Call.of(self.network, args, kwargs)
        if self.training_pass is not None:
            return self.training_pass(self, inputs, call)
        scores, returned = self._evaluated(inputs, call, self.settings.evaluation)
        if self.noted is not None:
            other = "mean" if self.settings.evaluation == "samples" else "samples"
            self.noted = {self.settings.evaluation: scores, other: self.scores(inputs, call, other)}
            self.noted_labels = call.labels
        return returned

    def as_output(self, returned: Any, scores: Tensor, copies: int) -> Any:
        """Return the network's output for a batch, from its output for concatenated copies of the batch.

        Args:
            returned: by the network.
            scores: what becomes of its scores, ``(B, ...)``.
            copies: how many. Other tensors with a row for each sample are averaged over them, as scores are; a loss
                that the network computes is its mean over all rows anyway.
        """
        if isinstance(returned, Tensor):
            return scores
        rows = copies * len(scores)

        def of_batch(tensor: Tensor) -> Tensor:
            tensor = tensor if scores.requires_grad else tensor.detach()  # a step's own loss trains no part of a team
            if copies == 1 or tensor.shape[:1] != (rows,):
                return tensor
            parts = tensor.view(copies, -1, *tensor.shape[1:])
            return parts.mean(0) if tensor.is_floating_point() else parts[0]

        return with_scores(self.network, returned, scores, of_batch)

    # --- one forward pass ---

    def visited(self, site: UnitLayerOverride, potential: Tensor) -> Tensor:
        """Return the values of units at ``potential``, as the present pass wants them."""
        if self._visit is None:  # an activation on its own, outside of the network's forward pass
            unit = self._unit(site, 0)
            return unit.mean(potential)
        calls = sum(layer.name.partition("#")[0] == site.name for layer in self._layers)
        name = f"{site.name}#{calls + 1}" if calls else site.name
        layer = Layer(name, self._unit(site, len(self._layers)), potential)
        self._notice_linear(layer)
        self._layers.append(layer)
        layer.value = self._visit(layer)
        return layer.value

    def _unit(self, site: UnitLayerOverride, index: int) -> StochasticUnit:
        if isinstance(site.module, StochasticUnit):
            return site.module
        return self.units[index] if 1 < len(self.units) > index else self.units[0]

    def _notice_linear(self, layer: Layer) -> None:
        linear, below, output, version = self._linears.get(id(layer.potential), (None, None, None, None))
        # What has been written into since is no longer what the layer gave.
        if output is layer.potential and output.dim() == 2 and version == _version(output):
            layer.linear, layer.below = linear, below
            layer.chained = bool(self._layers) and below is self._layers[-1].value

    def run(self, inputs: Tensor, call: Call, visit: Visit) -> list[Layer]:
        """Run the network's own forward pass once.

        Args:
            inputs: the first argument of the call.
            call: the further ones.
            visit: gives the value of each layer of units.

        Returns:
            the layers of units in the order in which they ran, and the output behind them, without a value.
        """
        self._visit, self._layers = visit, []
        try:
            args, kwargs = call.around(inputs)
            output = self.original(*args, **kwargs)
            layers = self._layers
            last = Layer("output", self.output or Softmax(), scores_of(self.network, output), returned=output)
            self._notice_linear(last)
        finally:
            self._visit, self._layers, self._linears = None, [], {}
        self._check(layers, len(inputs))
        return [*layers, last]

    def _seen(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Hooks of others may change what a layer computes, and subclasses compute more than a product.
        alone = len(module._forward_hooks) == 1 and not module._forward_pre_hooks
        if self._visit is not None and alone and args and type(module) is nn.Linear and "weight" in module._parameters:
            self._linears[id(output)] = module, args[0], output, _version(output)

    def _check(self, layers: Sequence[Layer], rows: int) -> None:
        if not layers:
            raise RefusedError(
                f"units: none of {', '.join(site.name for site in self.sites)} ran in the network's forward pass."
            )
        for layer in layers:
            if layer.potential.shape[:1] != (rows,):
                raise RefusedError(
                    f"units: {layer.name} gets {tuple(layer.potential.shape)} for {rows} samples; their number must "
                    "come first (batch_first=True). Leave such a unit out by units=..., or keep (samples, ..., width) "
                    "around it."
                )
        if 1 < len(self.units) != len(layers):
            raise RefusedError(
                f"unit: {len(self.units)} units for {len(layers)} layers of units "
                f"({', '.join(layer.name for layer in layers)}): give one, or one for each layer."
            )

    def lateral_weight(self, layer: Layer) -> Tensor | None:
        """Return the lateral weights of a layer; None where its units draw independently."""
        if not self.exploration.has_lateral_weights:
            return None
        if layer.potential.dim() != 2:
            raise RefusedError(
                f"exploration={type(self.exploration).__name__}: {layer.name} has potentials of shape "
                f"{tuple(layer.potential.shape)}, but lateral weights need (B, n). Name other units, or use "
                "exploration='independent'."
            )
        num = layer.potential.shape[1]
        build = partial(LateralWeights, num)
        device = layer.potential.device
        dtype = torch.float64 if layer.potential.dtype == torch.float64 else torch.float32
        module = self.lateral.get(f"lateral/{layer.name}", build, mix(self.seed(), num), device, dtype)
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
        return weight

    def draw(self, layer: Layer, generator: torch.Generator | None, negative_phase: bool) -> Tensor:
        """Draw a layer, note how, and return the values."""
        exploration, weight = self.exploration, self.lateral_weight(layer)
        with torch.autocast(layer.potential.device.type, enabled=False):  # a sampler wants its digits
            layer.drawn = exploration.draw(
                layer.unit, layer.potential, weight, negative_phase=negative_phase, generator=generator
            )
        return as_input(layer, layer.drawn.value)

    def machine(self, layers: Sequence[Layer]) -> Machine:
        """Return the Boltzmann machine over layers of units and the output, the last of ``layers``.

        Raises:
            RefusedError: if there is more than a linear layer between two of them.
        """
        assert isinstance(self.exploration, Boltzmann)
        parts = [MachineLayer(layers[0].unit, lateral=self.lateral_weight(layers[0]))]
        for layer in layers[1:]:
            if layer.linear is None or not layer.chained:
                raise RefusedError(
                    f"Boltzmann(whole_network=True): between {layer.name} and the layer of units before it must be "
                    "one nn.Linear and nothing else. Use Boltzmann() with baseline='per_layer' for other networks."
                )
            weight = layer.linear.weight.detach()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            bias = None if layer.linear.bias is None else layer.linear.bias.detach().to(weight.dtype)
            lateral = None if layer is layers[-1] else self.lateral_weight(layer)
            parts.append(MachineLayer(layer.unit, weight, bias, lateral))
        return Machine(parts, self.exploration)

    # --- evaluation ---

    def scores(self, inputs: Tensor, call: Call, evaluation: str) -> Tensor:
        """Return the output by the units' means, or averaged over draws, ``(B, C)``."""
        return self._evaluated(inputs, call, evaluation)[0]

    def _evaluated(self, inputs: Tensor, call: Call, evaluation: str) -> tuple[Tensor, Any]:
        copies = self.settings.eval_samples if evaluation == "samples" else 1
        call = call.times(len(inputs), copies)
        many = inputs.repeat(copies, *[1] * (inputs.dim() - 1)) if copies > 1 else inputs
        generator = self.evaluation_generator(inputs.device) if evaluation == "samples" else None

        def visit(layer: Layer) -> Tensor:
            if generator is None:
                return self.exploration.mean(layer.unit, layer.potential, self.lateral_weight(layer))
            return self.draw(layer, generator, negative_phase=False)

        layers = self.run(many, call, visit)
        output = self._machine_scores(layers, evaluation) if self.is_one_machine else layers[-1].potential
        scores = averaged(output, copies, self.output)
        return scores, self.as_output(layers[-1].returned, scores, copies)

    @property
    def is_one_machine(self) -> bool:
        """Whether all layers and the output are drawn jointly."""
        return isinstance(self.exploration, Boltzmann) and self.exploration.whole_network

    def _machine_scores(self, layers: list[Layer], evaluation: str) -> Tensor:
        machine, first = self.machine(layers), layers[0].potential
        with torch.autocast(first.device.type, enabled=False):
            first = first.to(machine.dtype)
            if evaluation == "mean":
                values = machine.mean_field(first)
            else:
                values = machine.draw(first, self.evaluation_generator(first.device))
            return machine.potentials(first, values, len(layers) - 1)

    def evaluation_generator(self, device: torch.device) -> torch.Generator:
        """Return the generator of what evaluation draws; its own, so that no other random stream moves."""
        if self.generator is None or self.generator.device != device:
            self.generator = torch.Generator(device).manual_seed(mix(self.seed(), 0x5EED))
        return self.generator


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
