"""An ensemble as a plain torch module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_bpfree.core.arguments import NonEmpty, checked
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import disagreement
from lightning_bpfree.methods.deep_ensemble.combining.combination import Combination


class EnsembleModule(nn.Module):
    """The members of an ensemble and their combination, without a Trainer and without this package's callback.

    Calling it returns the ensemble's output in the form of a member's. ``members`` holds the members' networks, each
    with its own weights and activations.

    Args:
        members: the networks, one or more.
        combination: combines their outputs.

    Examples:
        >>> ensemble = EnsembleModule([nn.Linear(3, 2), nn.Linear(3, 2)], Combination())
        >>> ensemble(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    @checked
    def __init__(self, members: Annotated[Sequence[nn.Module], NonEmpty()], combination: Combination) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combination = combination

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the ensemble's output, in the form of a member's."""
        return self.combination.combined(self.outputs(*args, **kwargs))

    def outputs(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return every member's output."""
        return [member(*args, **kwargs) for member in self.members]

    def predictions(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the members' predictions, ``(M, B, ...)``."""
        outputs = self.outputs(*args, **kwargs)
        place = self.combination.place(outputs[0])
        return torch.stack([tree_flatten(output)[0][place] for output in outputs])

    def uncertainty(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the members' disagreement ``(B, ...)``, or their variance if they predict values."""
        predictions = self.predictions(*args, **kwargs)
        if self.combination.task == "regression":
            return predictions.var(0, correction=0)
        return disagreement(self.combination.member_probabilities(predictions))
