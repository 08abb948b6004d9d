"""Training rules for any LightningModule: with, around and without backprop.

>>> import lightning_bpfree as bpf
>>> bpf.ForwardGradient(num_directions=4).num_directions
4
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_bpfree.public import *  # noqa: F403
from lightning_bpfree.core.directions import Directions as Directions
from lightning_bpfree.core.step import Estimate as Estimate
from lightning_bpfree.core.step import Step as Step
from lightning_bpfree.methods.backprop.rule import Backprop as Backprop
from lightning_bpfree.methods.concept_backprop.callback import ConceptBackprop as ConceptBackprop
from lightning_bpfree.methods.concept_backprop.change import ChangeSettings as ChangeSettings
from lightning_bpfree.methods.concept_backprop.concepts import Concept as Concept
from lightning_bpfree.methods.concept_backprop.discrete import CategoryChange as CategoryChange
from lightning_bpfree.methods.concept_backprop.discrete import TokenChange as TokenChange
from lightning_bpfree.methods.concept_backprop.parameterizations import AdditiveChange as AdditiveChange
from lightning_bpfree.methods.concept_backprop.parameterizations import GridChange as GridChange
from lightning_bpfree.methods.concept_backprop.parameterizations import LatentChange as LatentChange
from lightning_bpfree.methods.concept_backprop.probe import ProbeSettings as ProbeSettings
from lightning_bpfree.methods.deep_ensemble.callback import DeepEnsemble as DeepEnsemble
from lightning_bpfree.methods.deep_ensemble.combining.exported import EnsembleModule as EnsembleModule
from lightning_bpfree.methods.diffusion_adjoint.callback import DiffusionAdjoint as DiffusionAdjoint
from lightning_bpfree.methods.diffusion_adjoint.fine_tuning import RewardFineTuning as RewardFineTuning
from lightning_bpfree.methods.diffusion_adjoint.pipeline_sampler import PipelineSampler as PipelineSampler
from lightning_bpfree.methods.diffusion_adjoint.sampler import DiffusionSampler as DiffusionSampler
from lightning_bpfree.methods.diffusion_adjoint.schedules import DiscreteVP as DiscreteVP
from lightning_bpfree.methods.diffusion_adjoint.schedules import FlowMatching as FlowMatching
from lightning_bpfree.methods.diffusion_adjoint.schedules import LinearVP as LinearVP
from lightning_bpfree.methods.direct_feedback_alignment.rule import (
    DirectFeedbackAlignment as DirectFeedbackAlignment,
)
from lightning_bpfree.methods.evolution_strategy.rule import EvolutionStrategy as EvolutionStrategy
from lightning_bpfree.methods.evolution_strategy.search.des import DES as DES
from lightning_bpfree.methods.evolution_strategy.search.openai_es import OpenAIES as OpenAIES
from lightning_bpfree.methods.evolution_strategy.search.pgpe import PGPE as PGPE
from lightning_bpfree.methods.evolution_strategy.search.sep_cma_es import SepCMAES as SepCMAES
from lightning_bpfree.methods.evolution_strategy.search.snes import SNES as SNES
from lightning_bpfree.methods.forward_forward.rule import ForwardForward as ForwardForward
from lightning_bpfree.methods.forward_gradient.local_loss import LocalLoss as LocalLoss
from lightning_bpfree.methods.forward_gradient.rule import ForwardGradient as ForwardGradient
from lightning_bpfree.methods.learnable_architecture.callback import (
    LearnableArchitecture as LearnableArchitecture,
)
from lightning_bpfree.methods.learnable_architecture.continuous.ccnn import CCNN as CCNN
from lightning_bpfree.methods.learnable_architecture.continuous.convolution import ContinuousConv as ContinuousConv
from lightning_bpfree.methods.learnable_architecture.continuous.striding import DiffStride as DiffStride
from lightning_bpfree.methods.learnable_architecture.continuous.striding import FrequencyCrop as FrequencyCrop
from lightning_bpfree.methods.lottery_ticket.callback import LotteryTicket as LotteryTicket
from lightning_bpfree.methods.lottery_ticket.ticket import Ticket as Ticket
from lightning_bpfree.methods.reversible_recompute.callback import ReversibleRecompute as ReversibleRecompute
from lightning_bpfree.methods.reversible_recompute.conversion import FunctionChangedWarning as FunctionChangedWarning
from lightning_bpfree.methods.reversible_recompute.conversion import convert_to_reversible as convert_to_reversible
from lightning_bpfree.methods.reversible_recompute.coupling import ReversibleBlock as ReversibleBlock
from lightning_bpfree.methods.reversible_recompute.models.builders import reversible_hiera as reversible_hiera
from lightning_bpfree.methods.reversible_recompute.models.builders import reversible_roberta as reversible_roberta
from lightning_bpfree.methods.reversible_recompute.models.builders import reversible_swin as reversible_swin
from lightning_bpfree.methods.reversible_recompute.models.builders import reversible_vit as reversible_vit
from lightning_bpfree.methods.reversible_recompute.models.builders import set_schedule as set_schedule
from lightning_bpfree.methods.reversible_recompute.models.mvit import ReversibleMViT as ReversibleMViT
from lightning_bpfree.methods.reversible_recompute.recomputation import ReconstructionError as ReconstructionError
from lightning_bpfree.methods.reversible_recompute.sequential import ReversibleSequential as ReversibleSequential
from lightning_bpfree.methods.reversible_recompute.stream_fusion import StreamFusion as StreamFusion
from lightning_bpfree.methods.team_reinforce.credit import StraightThrough as StraightThrough
from lightning_bpfree.methods.team_reinforce.credit import WeightMax as WeightMax
from lightning_bpfree.methods.team_reinforce.map_propagation import MapPropagation as MapPropagation
from lightning_bpfree.methods.team_reinforce.rule import TeamReinforce as TeamReinforce
from lightning_bpfree.methods.team_reinforce.units.lateral import Boltzmann as Boltzmann
from lightning_bpfree.methods.team_reinforce.units.lateral import Recurrent as Recurrent
from lightning_bpfree.methods.team_reinforce.units.stochastic import Bernoulli as Bernoulli
from lightning_bpfree.methods.team_reinforce.units.stochastic import Gaussian as Gaussian
from lightning_bpfree.methods.team_reinforce.units.stochastic import Softmax as Softmax
from lightning_bpfree.methods.zeroth_order.rule import ZerothOrder as ZerothOrder
from lightning_bpfree.training.gradient_alignment import GradientAlignment as GradientAlignment
from lightning_bpfree.training.network_rule import NetworkRule as NetworkRule
from lightning_bpfree.training.scalar_sync import ScalarSyncStrategy as ScalarSyncStrategy
from lightning_bpfree.training.training_rule import TrainingRule as TrainingRule

__version__ = "0.1.0"

if not TYPE_CHECKING:  # type checkers would take any name for granted

    def __getattr__(name: str) -> Any:
        """Return a public name.

        The first use imports all of them, with torch and Lightning. A bare import of the package takes milliseconds, so
        that ``bpfree --version`` and ``bpfree recipes list`` answer at once.
        """
        if not name.startswith("_"):
            exported = _exported()
            globals().update(exported)
            if name in exported:
                return exported[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Return all public names."""
        return sorted([*_exported(), "__version__"])

    def _exported() -> dict[str, Any]:
        public = import_module(f"{__name__}.public")
        return {name: value for name, value in vars(public).items() if not name.startswith("_")}
