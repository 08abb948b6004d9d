"""One mini-batch of Forward-Forward: positive and negative samples through the blocks, one gradient per block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_bpfree.core.blocks import Block, Cut, is_layer
from lightning_bpfree.core.labels import labels_of
from lightning_bpfree.core.network.network_call import Call, RefusedError, scores_of
from lightning_bpfree.core.params import Params
from lightning_bpfree.core.seeds import mix
from lightning_bpfree.core.step import Step
from lightning_bpfree.methods.forward_forward.goodness import contrast, goodness
from lightning_bpfree.methods.forward_forward.negatives import hard_labels, hybrid_images, wrong_labels
from lightning_bpfree.methods.forward_forward.network import GoodnessNetwork
from lightning_bpfree.methods.forward_forward.settings import GoodnessSettings


class PeerNormalization:
    """Running mean activity of every unit of a block's last layer, and the pull toward the layer's mean.

    Args:
        strength: strength of the pull, >= 0.
        decay: of the running mean.
    """

    def __init__(self, strength: float, decay: float = 0.9) -> None:
        self.strength, self.decay = strength, decay
        self.means: dict[str, Tensor] = {}
        self._proposed: dict[str, Tensor] = {}

    def settle(self, succeeded: bool) -> None:
        """Keep the running means that the last batch has moved, or drop them."""
        if succeeded:
            self.means.update(self._proposed)
        self._proposed.clear()

    def loss(self, block: str, total_input: Tensor, activity: Tensor, units: int) -> Tensor:
        """Return a term whose gradient pulls units that are less active than their peers up, and others down.

        The pull acts on the unit's total input, before its nonlinearity, so that it revives units that are silent.

        Args:
            block: name of the block.
            total_input: what leaves the layer's weights, positive samples.
            activity: of the same samples.
            units: which dimension counts the units.
        """
        units %= activity.dim()
        now = activity.detach().float().mean([d for d in range(activity.dim()) if d != units])
        before = self.means.get(block, torch.full_like(now, 0.5)).to(now.device)
        means = self._proposed[block] = torch.lerp(now, before, self.decay)
        pull = (means.mean() - means).view(-1, *[1] * (total_input.dim() - 1 - units))
        # As in the contrast, the mean is over positive and negative samples.
        return -self.strength * (total_input * pull).sum() / (2 * len(total_input))


def unit_dimension(layer: nn.Module) -> int:
    """Return the dimension of a layer's output that counts its units: channels, or features."""
    return 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1


def first_layer(block: Block) -> nn.Module | None:
    """Return the innermost module of a block with the first weight matrix; None if there is none."""
    parts = (part for top in block.modules for part in top.modules())
    return next((part for part in parts if is_layer(part) and not list(part.children())), None)


def last_layer(block: Block) -> nn.Module:
    """Return the innermost module of a block with the last weight matrix."""
    layers = [part for top in block.modules for part in top.modules() if is_layer(part) and not list(part.children())]
    return layers[-1] if layers else block.modules[-1]


class GoodnessPass:
    """What happens within one training step when the module calls its network.

    Args:
        step: the mini-batch.
        settings: the choice of positive and negative samples, and the goodness.
        trained_blocks: indices of the blocks that learn in this step.
        peers: peer normalization, or None.
        rank: rank of this process; ranks draw different negatives.
    """

    def __init__(
        self,
        step: Step,
        settings: GoodnessSettings,
        trained_blocks: Sequence[int],
        peers: PeerNormalization | None,
        rank: int,
    ) -> None:
        self.step, self.settings, self.trained_blocks, self.peers = step, settings, trained_blocks, peers
        self.names = {id(slot.parameter): slot.name for slot in step.trained}
        self.generator = torch.Generator().manual_seed(mix(step.seed, rank))
        self.gradients: Params = {}
        self.numbers: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}
        self.metrics: dict[str, Tensor] = {}
        self.embedding_gradient: Tensor | None = None
        self.calls = 0

    def __call__(self, network: GoodnessNetwork, inputs: Tensor, call: Call) -> Any:
        """Train the blocks on ``inputs``, and return the network's output to the module."""
        self.calls += 1
        if self.calls > 1:
            raise MisconfigurationException(
                "ForwardForward: the training step calls its network more than once. One call a step is needed: put "
                "the inputs together (torch.cat) and call it once."
            )
        self._refuse_a_graph(0, inputs)
        wanted = self.settings
        needs_labels = wanted.label != "none" or wanted.negatives != "hybrid"
        labels = None
        if needs_labels:
            batch = self.step.args[0] if self.step.args else None
            labels = labels_of(batch, len(inputs), network.num_classes, wanted.labels, call.labels)
        if wanted.prediction == "readout":
            output = network.readout(inputs, call)
            with self.step.aside():
                self._contrast(network, inputs, labels, call, scores_of(network.network, output).detach())
            return output
        return network.as_output(inputs, call, self._contrast(network, inputs, labels, call, None))

    def _contrast(
        self, network: GoodnessNetwork, inputs: Tensor, labels: Tensor | None, call: Call, scores: Tensor | None
    ) -> Tensor:
        wrong, both = self._both(network, inputs, labels, call, scores)
        rows = None if labels is None else torch.cat([labels, labels if wrong is None else wrong])
        found = self._through_blocks(network, both, rows, call.times(len(inputs), 2))
        made = network.total(found) if len(found) > self.settings.first_block else found[-1]
        scores = made.new_zeros(len(inputs), network.num_classes)
        if labels is not None:
            # The labels that were not tried count as goodness 0, the least there is.
            of_positive, of_negative = made.detach().chunk(2)
            if wrong is not None:
                scores.scatter_(1, wrong[:, None], of_negative[:, None])
            scores.scatter_(1, labels[:, None], of_positive[:, None])
        return scores

    def _both(
        self, network: GoodnessNetwork, inputs: Tensor, labels: Tensor | None, call: Call, scores: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Return the wrong labels, if negatives are made by labels, and positive and negative inputs in one batch."""
        negative, wrong = self._negative(network, inputs, labels, call, scores)
        positive = inputs if self.settings.label == "none" else network.labeled(inputs, labels)
        return wrong, torch.cat([positive.detach(), negative.detach()])

    def _negative(
        self, network: GoodnessNetwork, inputs: Tensor, labels: Tensor | None, call: Call, scores: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return negative inputs, and the wrong labels in them, if they are made by labels."""
        if self.settings.negatives == "hybrid":
            return hybrid_images(inputs, self.generator), None
        assert labels is not None
        if callable(self.settings.negatives):
            made = self.settings.negatives(inputs, labels)
            if made.shape == inputs.shape and made.is_floating_point():
                return made, None
            wrong = self._checked(made, labels, network.num_classes)
        elif self.settings.negatives == "hard":
            if scores is None:
                with torch.no_grad(), self.step.aside():
                    scores = network.goodness_of_labels(inputs, call) / self.settings.temperature
                torch.clear_autocast_cache()  # weights that were cast without a graph would be taken again
            wrong = hard_labels(scores.nan_to_num(), labels, self.generator)  # what is not finite is found in the end
        else:
            wrong = wrong_labels(labels, network.num_classes, self.generator)
        return network.labeled(inputs, wrong), wrong

    @staticmethod
    def _checked(made: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        if made.shape != labels.shape or made.is_floating_point():
            raise RefusedError(
                f"negatives: the function returned {made.dtype} of shape {tuple(made.shape)}; it returns wrong labels "
                f"(whole numbers of shape {tuple(labels.shape)}), or inputs of the shape that it was given."
            )
        if bool((made == labels).any()) or int(made.min()) < 0 or int(made.max()) >= num_classes:
            raise RefusedError(
                "negatives: the function returned true labels or labels out of range; a negative sample has a wrong "
                f"label from 0 to {num_classes - 1}."
            )
        return made.to(torch.int64)

    def _through_blocks(self, network: GoodnessNetwork, both: Tensor, rows: Tensor | None, call: Call) -> list[Tensor]:
        found: list[Tensor] = []
        blocks, kind = network.parts.blocks, self.settings.goodness
        total_inputs: dict[int, Tensor] = {}
        handles = [self._listen(index, block, total_inputs) for index, block in enumerate(blocks)] if self.peers else []

        def leave(index: int, activity: Tensor) -> Tensor:
            network.check_rows(index, activity, len(both))
            good = goodness(activity, kind)
            found.append(good.detach())
            self.numbers[f"the goodness of block {blocks[index].name}"] = found[-1]
            if index in self.trained_blocks:
                loss = self._block_loss(blocks[index], index, good, activity, total_inputs.pop(index, None), kind)
                own = network.own_parameters() if index == 0 else []
                self._differentiate(blocks[index], own, loss)
            return activity.detach()

        try:
            last = max(self.trained_blocks, default=len(blocks) - 1)
            network.run(both, rows, call, leave, stop_behind=last, entered=self._refuse_a_graph)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _listen(self, index: int, block: Block, total_inputs: dict[int, Tensor]) -> torch.utils.hooks.RemovableHandle:
        def listen(_module: nn.Module, _args: object, output: Tensor) -> None:
            total_inputs[index] = output

        return last_layer(block).register_forward_hook(listen)

    def _block_loss(
        self, block: Block, index: int, good: Tensor, activity: Tensor, total_input: Tensor | None, kind: str
    ) -> Tensor:
        units = activity[0].numel() if kind == "sum" else 1
        loss = contrast(good, self.settings.threshold * units, self.settings.temperature)
        positive, negative = (part.mean() for part in (good.detach() / units).chunk(2))
        self.metrics |= {f"{index}/loss": loss.detach(), f"{index}/positive": positive, f"{index}/negative": negative}
        if self.peers is not None and total_input is not None:
            shown = activity if activity.dim() == total_input.dim() else total_input.relu()
            ours, seen = (values[: len(values) // 2] for values in (total_input, shown))
            loss = loss + self.peers.loss(block.name, ours, seen, unit_dimension(last_layer(block)))
        self.losses[block.name] = loss.detach()
        return loss

    def _differentiate(self, block: Block, own: list[Tensor], loss: Tensor) -> None:
        """Add the gradient of one block's loss; its graph ends here, and so does its memory."""
        trained = [parameter for parameter in block.parameters if id(parameter) in self.names]
        if not trained + own:
            return
        if trained and not loss.requires_grad:
            raise MisconfigurationException(
                f"ForwardForward: block {block.name} ran without a graph, so nothing in it would learn. Do not run it "
                "under torch.no_grad or in a checkpoint with use_reentrant=True; inside a block, checkpoints with "
                "use_reentrant=False work."
            )
        grads = torch.autograd.grad(loss, [*trained, *own], allow_unused=True)
        for parameter, grad in zip(trained, grads[: len(trained)], strict=True):
            if grad is not None:
                name = self.names[id(parameter)]
                self.gradients[name] = self.gradients[name] + grad if name in self.gradients else grad
        if own:
            self.embedding_gradient = grads[-1]

    def of_the_rest(self, loss: Tensor, parts: Cut) -> Params:
        """Return the exact gradients, of the module's own loss, of parameters in no block."""
        in_blocks = {id(parameter) for block in parts.blocks for parameter in block.parameters}
        rest = [slot for slot in self.step.trained if id(slot.parameter) not in in_blocks]
        if not rest or not loss.requires_grad:
            return {}
        grads = torch.autograd.grad(loss, [slot.parameter for slot in rest], allow_unused=True)
        return {slot.name: grad for slot, grad in zip(rest, grads, strict=True) if grad is not None}

    def _refuse_a_graph(self, index: int, x: Tensor) -> None:
        """Refuse parameters that lie before a block but in none: no loss would reach them."""
        if not x.requires_grad:
            return
        trained = [slot for slot in self.step.trained if slot.name not in self.gradients]
        if not trained:
            return
        grads = torch.autograd.grad(x.sum(), [slot.parameter for slot in trained], allow_unused=True)
        lost = [slot.name for slot, grad in zip(trained, grads, strict=True) if grad is not None]
        if lost:
            raise MisconfigurationException(
                f"ForwardForward: {', '.join(lost)} run before block {index} and are in no block: nothing would train "
                "them. Put them into a block (blocks=[['embed', 'layers.0'], ...]), or leave them out by params=...."
            )
