"""The form in which a network returns its scores, for forward passes that stop before its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_bpfree.core.network.network_call import Call, RefusedError, with_scores
from lightning_bpfree.core.replay.held_state import HeldState
from lightning_bpfree.core.replay.object_graph import held_by_hooks, walk
from lightning_bpfree.core.replay.random_streams import RandomStreams
from lightning_bpfree.core.replay.replay import Replay
from lightning_bpfree.core.replay.tensor_copies import Buffers


class OutputKinds:
    """Examples of a network's outputs, without numbers, one for each way of calling it.

    An example comes from one forward pass that leaves no trace.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._examples: dict[Any, Any] = {}

    def filled(self, original: Callable[..., Any], inputs: Tensor, call: Call, scores: Tensor) -> Any:
        """Return scores in the form in which the network returns its own.

        A loss beside them is the cross-entropy of the scores and of the labels that the network was called with; other
        tensors, such as hidden states, are None.

        Args:
            original: the network's own forward pass.
            inputs: inputs of this call.
            call: its further arguments.
            scores: shape ``(B, num_classes)``.

        Raises:
            RefusedError: if the network returns no scores, or numbers beside them that do not follow from these.
        """
        if call.kind not in self._examples:
            self._examples[call.kind] = self._example(original, inputs, call)
        example = self._examples[call.kind]
        return (
            scores
            if isinstance(example, Tensor)
            else with_scores(self.network, example, scores, lambda _: self._loss(scores, call))
        )

    def _example(self, original: Callable[..., Any], inputs: Tensor, call: Call) -> Any:
        args, kwargs = call.around(inputs)
        found = walk(self.network, held_by_hooks(self.network))
        replay = Replay([RandomStreams([inputs.device]), HeldState(found)], Buffers(self.network))
        replay.rewind()
        with torch.no_grad(), replay.aside():
            output = original(*args, **kwargs)
        if torch.is_autocast_enabled(inputs.device.type):
            torch.clear_autocast_cache()  # weights that were cast without a graph would be taken again
        number, nothing = torch.zeros(()), torch.zeros(0, 0)

        def emptied(tensor: Tensor) -> Tensor | None:
            return number if tensor.dim() == 0 and tensor.is_floating_point() else None

        return with_scores(self.network, output, nothing, emptied)

    def _loss(self, scores: Tensor, call: Call) -> Tensor:
        labels = call.labels
        if labels is None or labels.shape != (len(scores),) or labels.is_floating_point():
            raise RefusedError(
                f"ForwardForward(prediction='goodness'): {type(self.network).__name__} returns a number beside its "
                "scores, and the number is not the cross-entropy of labels that it was called with. The rule replaces "
                "the scores by goodness and cannot recompute this number. Compute it in training_step from the scores, "
                "or use prediction='readout'."
            )
        return F.cross_entropy(scores, labels.long())
