"""Published methods, for comparison: one paper a file, given as ``sampler=``, never as arguments."""

from hf_importance.samplers.published.info_batch import InfoBatch as InfoBatch
from hf_importance.samplers.published.online_batch_selection import OnlineBatchSelection as OnlineBatchSelection
from hf_importance.samplers.published.prioritized import Prioritized as Prioritized
from hf_importance.samplers.published.rho_loss import RhoLoss as RhoLoss
from hf_importance.samplers.published.rho_loss import irreducible_losses as irreducible_losses
from hf_importance.samplers.published.selective_backprop import SelectiveBackprop as SelectiveBackprop
