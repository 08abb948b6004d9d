"""Forward-Forward in settings of its own, for the properties of every rule."""

from functools import partial

import torch

from lightning_bpfree import ForwardForward

RULES = {
    "forward_forward_goodness": ForwardForward,
    "forward_forward_readout": partial(ForwardForward, prediction="readout"),
}
EXCEPTIONS = {
    ("forward_forward_goodness", "several_dataloaders"): "one call of the network a step",
    ("forward_forward_readout", "several_dataloaders"): "one call of the network a step",
    ("forward_forward_goodness", "other_parameters_stay_untouched"): "refuses to train the unused last layer alone",
    ("forward_forward_goodness", "random_streams_move_as_in_a_plain_step"): "its one pass has twice the rows",
}


def next_label(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative labels that do not depend on the rank."""
    return (labels + 1) % 3


LOCAL_RANKS = {
    "goodness": partial(ForwardForward, negatives=next_label),
    "greedy": partial(ForwardForward, negatives=next_label, schedule="greedy"),
    "readout": partial(ForwardForward, negatives=next_label, prediction="readout"),
    "embedding": partial(ForwardForward, negatives=next_label, label="embedding"),
    "peers": partial(ForwardForward, negatives=next_label, peer_normalization=0.03),
}
KILLED = {
    "forward_forward": (partial(ForwardForward, label="embedding", peer_normalization=0.03), {}),
    "readout": (partial(ForwardForward, prediction="readout", negatives="hard", schedule="greedy"), {}),
}
