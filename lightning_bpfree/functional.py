"""The pure functions behind the rules, for Fabric, plain loops and manual optimization.

>>> import torch
>>> from lightning_bpfree import functional
>>> loss, grads = functional.zeroth_order_gradient(lambda p: p["w"].sum(), {"w": torch.zeros(1)}, num_directions=4)
>>> grads["w"].shape
torch.Size([1])
"""

from lightning_bpfree.core.directions import Directions as Directions
from lightning_bpfree.core.finite_differences import difference_quotients as difference_quotients
from lightning_bpfree.core.forward_ad import directional_derivative as directional_derivative
from lightning_bpfree.core.forward_ad import directional_derivatives as directional_derivatives
from lightning_bpfree.core.forward_ad import supported_kernels as supported_kernels
from lightning_bpfree.core.injection import inject as inject
from lightning_bpfree.methods.concept_backprop.change import change_concept as change_concept
from lightning_bpfree.methods.concept_backprop.detection import collect_activations as collect_activations
from lightning_bpfree.methods.concept_backprop.detection import detect_concepts as detect_concepts
from lightning_bpfree.methods.concept_backprop.flips import flip_concept as flip_concept
from lightning_bpfree.methods.concept_backprop.flips import single_changes as single_changes
from lightning_bpfree.methods.concept_backprop.flips import token_changes as token_changes
from lightning_bpfree.methods.concept_backprop.probe import LinearProbe as LinearProbe
from lightning_bpfree.methods.concept_backprop.probe import fit_probe as fit_probe
from lightning_bpfree.methods.concept_backprop.sensitivity import concept_sensitivity as concept_sensitivity
from lightning_bpfree.methods.concept_backprop.sensitivity import tcav as tcav
from lightning_bpfree.methods.deep_ensemble.bootstrap import bootstrap_rows as bootstrap_rows
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import disagreement as disagreement
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import majority_vote as majority_vote
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import mean_and_variance as mean_and_variance
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import mean_probability as mean_probability
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import mutual_information as mutual_information
from lightning_bpfree.methods.deep_ensemble.combining.aggregation import vote_shares as vote_shares
from lightning_bpfree.methods.deep_ensemble.combining.stacking import cross_fitted as cross_fitted
from lightning_bpfree.methods.deep_ensemble.combining.stacking import stacking_weights as stacking_weights
from lightning_bpfree.methods.evolution_strategy.search.fitness_shaping import shaped as shaped
from lightning_bpfree.methods.forward_gradient.rule import forward_gradient as forward_gradient
from lightning_bpfree.methods.learnable_architecture.continuous.fourier import fourier_resize as fourier_resize
from lightning_bpfree.methods.learnable_architecture.sizes.masks import gaussian_mask as gaussian_mask
from lightning_bpfree.methods.learnable_architecture.sizes.masks import gaussian_root as gaussian_root
from lightning_bpfree.methods.learnable_architecture.sizes.masks import sigmoid_mask as sigmoid_mask
from lightning_bpfree.methods.learnable_architecture.sizes.masks import sigmoid_root as sigmoid_root
from lightning_bpfree.methods.learnable_architecture.tracing.counting import count_macs as count_macs
from lightning_bpfree.methods.lottery_ticket.connectivity import Barrier as Barrier
from lightning_bpfree.methods.lottery_ticket.connectivity import loss_barrier as loss_barrier
from lightning_bpfree.methods.lottery_ticket.connectivity import module_loss as module_loss
from lightning_bpfree.methods.lottery_ticket.masks import Masks as Masks
from lightning_bpfree.methods.lottery_ticket.pruning import magnitude as magnitude
from lightning_bpfree.methods.lottery_ticket.pruning import snip as snip
from lightning_bpfree.methods.lottery_ticket.pruning import snr as snr
from lightning_bpfree.methods.lottery_ticket.pruning import top_masks as top_masks
from lightning_bpfree.methods.team_reinforce.baselines import leave_one_out as leave_one_out
from lightning_bpfree.methods.zeroth_order.rule import zeroth_order_gradient as zeroth_order_gradient
from lightning_bpfree.training.gradient_alignment import cosine as cosine
