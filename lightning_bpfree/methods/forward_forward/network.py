"""The forward pass of a network that is trained by goodness, which returns the score of every label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bpfree.core.auxiliary_modules import AuxiliaryModules
from lightning_bpfree.core.block_hooks import block_hooks, cut_off, entering
from lightning_bpfree.core.blocks import Cut
from lightning_bpfree.core.forward_override import ForwardOverride
from lightning_bpfree.core.network.network_call import Call, RefusedError
from lightning_bpfree.methods.forward_forward.goodness import goodness, rescaled
from lightning_bpfree.methods.forward_forward.label_embedding import LabelEmbedding
from lightning_bpfree.methods.forward_forward.negatives import overlaid
from lightning_bpfree.methods.forward_forward.output_kind import OutputKinds
from lightning_bpfree.methods.forward_forward.settings import GoodnessSettings
from lightning_bpfree.training.record import Record

TrainingPass = Callable[["GoodnessNetwork", Tensor, "Call"], Any]

EMBEDDING = "label_embedding"
ROWS_AT_ONCE = 8192  # of the labels folded into the batch: enough to fill a device, little enough to fit


class _LastBlockReached(Exception):  # noqa: N818  # no error: it leaves a forward pass whose rest is not needed
    pass


class _Embedding:
    """Makes the label embedding when the shape of what enters the first block is known."""

    def __init__(self, own: AuxiliaryModules, num_classes: int, record: Record | None) -> None:
        self.own, self.num_classes, self.record = own, num_classes, record

    def __call__(self, x: Tensor) -> LabelEmbedding:
        if not x.is_floating_point():
            raise RefusedError(
                f"label='embedding': the first block gets {x.dtype}, to which nothing can be added. Put the token "
                "embedding and the layer behind it into one block, blocks=[['embeddings', 'layers.0'], 'layers.1'], "
                "with names of modules in a list: the label is added between the two. Or pass a function (inputs, "
                "labels) -> inputs as label."
            )
        build = partial(LabelEmbedding, self.num_classes, x.shape[1:])
        seed = 0 if self.record is None else self.record.seed or 0
        module = self.own.get(EMBEDDING, build, seed, x.device)
        assert isinstance(module, LabelEmbedding)
        return module


class GoodnessNetwork(ForwardOverride):
    """Replaces ``network.forward``: returns scores of shape ``(B, num_classes)``.

    Args:
        network: the network.
        parts: its blocks, and the readout.
        settings: how it is read.
        own: holds the label embedding, if there is one.
        record: holds the seed that initializes the embedding.
    """

    rule = "ForwardForward"

    def __init__(
        self,
        network: nn.Module,
        parts: Cut,
        settings: GoodnessSettings,
        own: AuxiliaryModules | None = None,
        record: Record | None = None,
    ) -> None:
        super().__init__(network)
        self.network, self.parts, self.settings = network, parts, settings
        self.num_classes = settings.num_classes or _last_width(network, parts)
        self.label_embedding = None if own is None else _Embedding(own, self.num_classes, record)
        self._kinds = OutputKinds(network)
        self.training_pass: TrainingPass | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network returns, with scores by goodness or readout in it."""
        inputs, call = Call.of(self.network, args, kwargs)
        if self.training_pass is not None:
            return self.training_pass(self, inputs, call)
        if self.settings.prediction == "readout":
            return self.readout(inputs, call)
        return self.as_output(inputs, call, self.goodness_of_labels(inputs, call))

    def as_output(self, inputs: Tensor, call: Call, scores: Tensor) -> Any:
        """Return scores by goodness in the form in which the network returns its own."""
        return self._kinds.filled(self.original, inputs, call, scores)

    def readout(self, inputs: Tensor, call: Call) -> Any:
        """Return the network's output, made of the last block's activities under the neutral label."""
        last = len(self.parts.blocks) - 1

        def leave(index: int, activity: Tensor) -> Tensor:
            return rescaled(cut_off(activity), self.settings.length) if index == last else cut_off(activity)

        return self.run(self.labeled(inputs, None), None, call, leave)

    def goodness_of_labels(self, inputs: Tensor, call: Call) -> Tensor:
        """Return the goodness, summed over blocks, of the inputs with each label; labels are folded into the batch."""
        columns = []
        for labels in _chunks(self.num_classes, max(1, ROWS_AT_ONCE // max(1, len(inputs)))):
            rows = torch.arange(labels.start, labels.stop, device=inputs.device).repeat_interleave(len(inputs))
            folded = self.labeled(inputs.repeat(len(labels), *[1] * (inputs.dim() - 1)), rows)
            found = self.goodness_of_rows(folded, rows, call.times(len(inputs), len(labels)))
            columns.append(self.total(found).view(len(labels), len(inputs)))
        return torch.cat(columns).T

    def goodness_of_rows(self, folded: Tensor, rows: Tensor, call: Call) -> list[Tensor]:
        """Return the goodness in every block of inputs with their labels."""
        found: list[Tensor] = []

        def leave(index: int, activity: Tensor) -> Tensor:
            self.check_rows(index, activity, len(folded))
            found.append(goodness(activity, self.settings.goodness))
            return activity

        self.run(folded, rows, call, leave, stop_behind=len(self.parts.blocks) - 1)
        return found

    def check_rows(self, index: int, activity: Tensor, rows: int) -> None:
        """Refuse activities whose first dimension does not count the samples."""
        if len(activity) != rows:
            raise RefusedError(
                f"ForwardForward: block {self.parts.blocks[index].name} gives {tuple(activity.shape)} for {rows} "
                "samples; their number must come first: set batch_first=True, or let the block end elsewhere (blocks=)."
            )

    def total(self, found: Sequence[Tensor]) -> Tensor:
        """Return the sum over the blocks that count."""
        return torch.stack(list(found[self.settings.first_block :])).sum(0)

    def labeled(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """Return the inputs with labels in them (None: the neutral one), where labels come in with the input."""
        label = self.settings.label
        if callable(label):
            return label(inputs, labels)
        return overlaid(inputs, labels, self.num_classes) if label == "overlay" else inputs

    def run(
        self,
        inputs: Tensor,
        labels: Tensor | None,
        call: Call,
        leave: Callable[[int, Tensor], Tensor],
        *,
        stop_behind: int | None = None,
        entered: Callable[[int, Tensor], None] = lambda _index, _x: None,
    ) -> Any:
        """Run the network's own forward pass, with inputs of blocks cut off and rescaled.

        Args:
            inputs: with labels in them.
            labels: labels of the rows, for an embedding; None for the neutral label.
            call: further arguments of the network.
            leave: what becomes of a block's output.
            stop_behind: stop the pass after this block, and return None.
            entered: sees what enters a block before it is cut off.
        """
        waits = False  # for the output of a token embedding

        def enter(index: int, x: Tensor) -> Tensor:
            nonlocal waits
            entered(index, x)
            x = rescaled(cut_off(x), self.settings.length)
            if index or self.label_embedding is None:
                return x
            waits = not x.is_floating_point() and len(self.parts.blocks[0].modules) > 1
            return x if waits else self.label_embedding(x)(x, labels)

        def behind_tokens(x: Tensor) -> Tensor:
            if not waits or self.label_embedding is None:
                return x
            labeled: Tensor = self.label_embedding(x)(x, labels)
            return labeled

        def left(index: int, activity: Tensor) -> Tensor:
            made = leave(index, activity)
            if index == stop_behind:
                raise _LastBlockReached
            return made

        second = self.parts.blocks[0].modules[1:2]
        with block_hooks(self.parts.blocks, enter=enter, leave=left) as ran, entering(second, behind_tokens):
            try:
                args, kwargs = call.around(inputs)
                output = self.original(*args, **kwargs)
            except _LastBlockReached:
                output = None
        expected = list(range(len(self.parts.blocks) if stop_behind is None else stop_behind + 1))
        if ran != expected:
            order = ", ".join(self.parts.blocks[index].name for index in ran) or "none"
            raise RefusedError(
                f"The forward pass of {type(self.network).__name__} runs its blocks in the order {order}, not as they "
                f"were listed ({', '.join(block.name for block in self.parts.blocks)}). List them in the order in "
                "which they run."
            )
        return output

    def own_parameters(self) -> list[Tensor]:
        """Return what the rule trains in addition to the network: the label embedding, once it exists."""
        if self.label_embedding is None or EMBEDDING not in self.label_embedding.own:
            return []
        return list(self.label_embedding.own[EMBEDDING].parameters())

    def cost(self) -> float:
        """Return the cost of a training step in forward passes, from the sizes of the weights."""
        sizes = [[part.weight.numel() for part in _weighted(block.modules)] for block in self.parts.blocks]
        total = sum(map(sum, sizes)) or 1
        # Two samples forward, and as much for gradients of weights; gradients of activities only within blocks.
        passes = 4.0 + 2.0 * sum(sum(block[1:]) for block in sizes) / total
        if self.settings.prediction == "readout":
            return passes + 1.0
        return passes + (self.num_classes if self.settings.negatives == "hard" else 0.0)


def _weighted(modules: Sequence[nn.Module]) -> list[Any]:
    parts = [part for module in modules for part in module.modules()]
    return [part for part in parts if isinstance(getattr(part, "weight", None), Tensor) and part.weight.dim() > 1]  # type: ignore[operator]


def _last_width(network: nn.Module, parts: Cut) -> int:
    """Return the width of the layer that makes the scores: one registered behind the last block, or the last of all."""
    told = getattr(getattr(network, "config", None), "num_labels", None)  # transformers' models
    if isinstance(told, int) and told > 1:
        return told
    parts_in_order = list(network.modules())
    last = parts.blocks[-1].modules[-1]
    linear = [part for part in parts_in_order if isinstance(getattr(part, "out_features", None), int)]
    in_blocks = {id(part) for block in parts.blocks for top in block.modules for part in top.modules()}
    after = {id(part) for part in parts_in_order[parts_in_order.index(last) + 1 :]} - in_blocks
    behind = [part for part in linear if id(part) in after]
    widths = {int(part.out_features) for part in behind or linear[-1:]}  # type: ignore[arg-type]
    if len(widths) == 1:
        return widths.pop()
    raise RefusedError(
        f"num_classes: {type(network).__name__} has linear layers of widths {sorted(widths)} at its end; pass the "
        "number of labels."
        if widths
        else f"num_classes: {type(network).__name__} has no linear layer at its end; pass the number of labels."
    )


def _chunks(num: int, size: int) -> Iterator[range]:
    for start in range(0, num, size):
        yield range(start, min(start + size, num))
