"""Training rules for any LightningModule: with, around and without backprop.

>>> import lightning_bpfree as bpf
>>> bpf.ForwardGradient(num_directions=4).num_directions
4
"""

from lightning_bpfree.callbacks.gradient_alignment import GradientAlignment as GradientAlignment
from lightning_bpfree.callbacks.lottery_ticket import LotteryTicket as LotteryTicket
from lightning_bpfree.callbacks.reversible_recompute import ReversibleRecompute as ReversibleRecompute
from lightning_bpfree.core.search.des import DES as DES
from lightning_bpfree.core.search.openai_es import OpenAIES as OpenAIES
from lightning_bpfree.core.search.pgpe import PGPE as PGPE
from lightning_bpfree.core.search.sep_cma_es import SepCMAES as SepCMAES
from lightning_bpfree.core.search.snes import SNES as SNES
from lightning_bpfree.core.ticket import Ticket as Ticket
from lightning_bpfree.nn.conversion import FunctionChangedWarning as FunctionChangedWarning
from lightning_bpfree.nn.conversion import convert_to_reversible as convert_to_reversible
from lightning_bpfree.nn.coupling import ReversibleBlock as ReversibleBlock
from lightning_bpfree.nn.fusion import StreamFusion as StreamFusion
from lightning_bpfree.nn.lateral import Boltzmann as Boltzmann
from lightning_bpfree.nn.lateral import Recurrent as Recurrent
from lightning_bpfree.nn.local_loss import LocalLoss as LocalLoss
from lightning_bpfree.nn.recomputation import ReconstructionError as ReconstructionError
from lightning_bpfree.nn.reversible import ReversibleSequential as ReversibleSequential
from lightning_bpfree.nn.stochastic import Bernoulli as Bernoulli
from lightning_bpfree.nn.stochastic import Gaussian as Gaussian
from lightning_bpfree.nn.stochastic import Softmax as Softmax
from lightning_bpfree.rules.backprop import Backprop as Backprop
from lightning_bpfree.rules.evolution_strategy import EvolutionStrategy as EvolutionStrategy
from lightning_bpfree.rules.forward_forward import ForwardForward as ForwardForward
from lightning_bpfree.rules.forward_gradient import ForwardGradient as ForwardGradient
from lightning_bpfree.rules.team.credit import StraightThrough as StraightThrough
from lightning_bpfree.rules.team.credit import WeightMax as WeightMax
from lightning_bpfree.rules.team.map_propagation import MapPropagation as MapPropagation
from lightning_bpfree.rules.team_reinforce import TeamReinforce as TeamReinforce
from lightning_bpfree.rules.training_rule import TrainingRule as TrainingRule
from lightning_bpfree.rules.zeroth_order import ZerothOrder as ZerothOrder
from lightning_bpfree.strategies.scalar_sync import ScalarSyncStrategy as ScalarSyncStrategy

__version__ = "0.1.0"
