"""Eligibility traces: recent scores of every weight in every environment, for the temporal-difference error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_bpfree.core.arguments import FractionBelowOne, checked
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.methods.team_reinforce.credit import Credit, WeightMax
from lightning_bpfree.methods.team_reinforce.layer import Layer
from lightning_bpfree.methods.team_reinforce.map_propagation import MapPropagation
from lightning_bpfree.methods.team_reinforce.segment_gradients import Gradients
from lightning_bpfree.methods.team_reinforce.training_pass import TeamPass


class Traces:
    """Decaying sums of scores times inputs, for each row of the batch: a row is one environment that continues.

    Args:
        decay: of a step, in [0, 1): discount times lambda.

    Raises:
        ValueError: for a decay out of range.
    """

    @checked
    def __init__(self, decay: FractionBelowOne) -> None:
        self.decay = decay
        self.sums: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] | None = None

    def settle(self, succeeded: bool) -> None:
        """Keep what the last step has made of the traces, or go back to what they were before it."""
        if not succeeded and self._before is not None:
            self.sums = self._before
        self._before = None

    def gradients(
        self, work: TeamPass, advantage: Tensor, parameters: Sequence[Tensor], credit: Credit, done: Tensor | None
    ) -> Gradients:
        """Return the gradient by traces, and forget those of environments that are done.

        Args:
            work: the pass.
            advantage: temporal-difference errors, ``(rows,)``.
            parameters: the trained parameters.
            credit: by the whole reward, MAP propagation or Weight Maximization.
            done: which environments start again after this step, ``(rows,)``.
        """
        self._before = dict(self.sums)
        if isinstance(credit, MapPropagation):
            credit.ascend(work)
        by_id: dict[int, Tensor] = {}
        reward = advantage[:, None]
        for index in range(len(work.layers) - 1, -1, -1):
            layer = work.layers[index]
            weight, bias = self._updated(layer)
            eligible = weight * reward[:, :, None]  # of every row, (rows, units, inputs)
            linear = layer.linear
            assert linear is not None
            _add(by_id, linear.weight, eligible.mean(0))
            if linear.bias is not None:
                _add(by_id, linear.bias, (bias * reward).mean(0))
            if isinstance(credit, WeightMax) and index:
                if not layer.chained:
                    raise RefusedError(
                        f"trace_decay with credit='weight_max': between {layer.name} and the units below must be one "
                        "nn.Linear and nothing else. Use credit='reward', or leave trace_decay out."
                    )
                reward = torch.einsum("oi,boi->bi", linear.weight.detach().to(eligible.dtype), eligible)
        if done is not None:
            going_on = (~done).to(advantage.dtype)
            self.sums = {key: total * going_on.view(-1, *[1] * (total.dim() - 1)) for key, total in self.sums.items()}
        return [by_id.get(id(parameter)) for parameter in parameters]

    def _updated(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the traces of a layer's weight, ``(rows, units, inputs)``, and bias, with this step in them."""
        if layer.linear is None or layer.below is None:
            raise RefusedError(
                f"trace_decay: {layer.name} does not get its potentials directly from an nn.Linear; traces of other "
                "layers are not supported. Leave trace_decay out."
            )
        score = layer.score()
        new = {"weight": torch.einsum("bo,bi->boi", score, layer.below.detach().to(score.dtype)), "bias": score}
        for kind, what in new.items():
            key = f"{layer.name}/{kind}"
            old = self.sums.get(key)
            if old is not None and old.shape != what.shape:
                raise RefusedError(
                    f"trace_decay: a batch of {len(what)} rows after one of {len(old)}: every row is an environment "
                    "that continues. Keep the number of rows constant."
                )
            self.sums[key] = what if old is None else what.add(old.to(what), alpha=self.decay)
        return self.sums[f"{layer.name}/weight"], self.sums[f"{layer.name}/bias"]


def _add(sums: dict[int, Tensor], parameter: Tensor, gradient: Tensor) -> None:
    old = sums.get(id(parameter))  # of a layer that runs twice
    sums[id(parameter)] = gradient if old is None else old + gradient
