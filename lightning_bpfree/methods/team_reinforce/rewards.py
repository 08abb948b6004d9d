"""Rewards of a team: one number for every draw of every sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_bpfree.core.arguments import checked
from lightning_bpfree.core.labels import LabelsOf, labels_of
from lightning_bpfree.core.network.network_call import RefusedError
from lightning_bpfree.core.step import NonFiniteLossError, Step
from lightning_bpfree.methods.team_reinforce.training_pass import TeamPass
from lightning_bpfree.methods.team_reinforce.units.stochastic import Softmax

RewardOf = Callable[[Any, Tensor], Tensor]
Reward = Literal["class", "loss", "module", "step"] | RewardOf


class Rewards:
    """Finds the reward of a pass.

    Args:
        reward: where it comes from; see :class:`~lightning_bpfree.TeamReinforce`.
        labels: takes the labels out of a batch that is not a pair.
    """

    @checked
    def __init__(self, reward: Reward, labels: LabelsOf | None) -> None:
        self.reward, self.labels = reward, labels

    def __call__(self, step: Step, work: TeamPass) -> tuple[Tensor, Tensor | None]:
        """Return the rewards, ``(M, B)``, and their derivative by the output where that is not drawn.

        Raises:
            NonFiniteLossError: if one of them is NaN or infinite.
        """
        last, drawn = work.layers[-1], work.team.output is not None
        output = last.value if drawn else last.potential.detach().requires_grad_()
        with torch.enable_grad():
            rewards = self._found(step, work, output)
        rows = len(last.potential)
        if not isinstance(rewards, Tensor) or rewards.shape not in ((rows,), (rows, 1)):
            what = f"shape {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else type(rewards).__name__
            raise RefusedError(
                f"reward: found {what}; give one number per row of the action, ({rows},): row m * B + b is draw m "
                f"of sample b, for {work.num_samples} draws of {rows // work.num_samples} samples."
            )
        rewards = rewards.reshape(-1).float() if not rewards.is_floating_point() else rewards.reshape(-1)
        by_output = None
        if not drawn:
            by_output = self._derivative(rewards, output)
        rewards = rewards.detach().to(last.potential.device)
        if self.reward != "class" and not bool(torch.isfinite(rewards).all()):
            worst = int((~torch.isfinite(rewards)).nonzero()[0])
            raise NonFiniteLossError(None, float(rewards[worst]), what=f"the reward of row {worst}")
        return rewards.view(work.num_samples, -1), by_output

    def _derivative(self, rewards: Tensor, output: Tensor) -> Tensor:
        if not rewards.requires_grad:
            raise MisconfigurationException(
                "TeamReinforce(output=None): the last layer learns by the derivative of the reward, but the reward has "
                "no graph to the output. Draw an action, output='softmax', or give a reward that is differentiable."
            )
        return torch.autograd.grad(rewards.sum(), output)[0]

    def _found(self, step: Step, work: TeamPass, output: Tensor) -> Any:
        if self.reward in ("class", "loss"):
            return self._of_labels(step, work, output)
        if self.reward == "step":
            return _returned(step, "reward")
        batch = step.args[0] if step.args else None
        action = output.argmax(-1) if isinstance(work.team.output, Softmax) else output
        if callable(self.reward):
            return self.reward(batch, action)
        own: Any = getattr(step.module, "reward", None)
        if not callable(own):
            raise MisconfigurationException(
                f"TeamReinforce(reward='module'): {type(step.module).__name__} has no method reward(batch, action); "
                "define it, or pass such a function as reward=...."
            )
        return own(batch, action)

    def _of_labels(self, step: Step, work: TeamPass, output: Tensor) -> Tensor:
        rows, classes = len(output) // work.num_samples, output.shape[-1]
        if output.dim() != 2 or (self.reward == "class" and not isinstance(work.team.output, Softmax)):
            raise MisconfigurationException(
                f"TeamReinforce(reward={self.reward!r}) needs scores of classes, (B, C), and for 'class' an output "
                f"that is drawn by softmax; the network returns {tuple(output.shape)}. Pass a function, reward=...."
            )
        labels = labels_of(step.args[0] if step.args else None, rows, classes, self.labels, work.labels)
        labels = labels if work.num_samples == 1 else labels.repeat(work.num_samples)
        if self.reward == "loss":
            return -F.cross_entropy(output, labels, reduction="none")
        return 2.0 * output.gather(1, labels[:, None])[:, 0] - 1.0  # the output is one-hot


def _returned(step: Step, key: str) -> Tensor:
    """Return what the training step returned beside its loss."""
    output = step.output
    if not isinstance(output, Mapping) or key not in output:
        raise MisconfigurationException(
            f"TeamReinforce(reward='step'): the training step must return a dict with 'loss', 'action' and 'reward'; "
            f"{key!r} is missing."
        )
    value: Tensor = output[key]
    return value


def take_action(step: Step, work: TeamPass) -> None:
    """Use the action that the training step chose and returned as the action to learn from.

    Raises:
        MisconfigurationException: if there is none, or it does not fit the output.
    """
    last, action = work.layers[-1], _returned(step, "action")
    if isinstance(last.unit, Softmax):
        if action.shape != last.potential.shape[:1] or action.is_floating_point():
            raise MisconfigurationException(
                f"TeamReinforce(reward='step'): the action has shape {tuple(action.shape)} and type {action.dtype}; "
                f"give whole numbers of shape ({len(last.potential)},), one per row of the network's output."
            )
        value = F.one_hot(action.long(), last.potential.shape[-1]).to(
            torch.promote_types(last.potential.dtype, torch.float32)
        )
    else:
        value = action.reshape(last.potential.shape).to(torch.promote_types(last.potential.dtype, torch.float32))
    last.value, last.drawn = value, None


def chance_of_labels(scores: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the probability of each row's label, ``(B,)``, under softmax scores ``(B, C)``.

    Examples:
        >>> chance_of_labels(torch.zeros(1, 4), torch.tensor([2]), 1.0)
        tensor([0.2500])
    """
    return torch.softmax(scores.float() / temperature, -1).gather(1, labels[:, None])[:, 0]
