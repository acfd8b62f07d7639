"""Importance sampling for ``transformers.Trainer``: fine-tuning spends its backward passes where they still matter.

The method (Katharopoulos and Fleuret, 2018, https://arxiv.org/abs/1803.00942) in four lines, each a function that
works without the trainer:

1. score each example of a pool by the norm of its loss's gradient at the logits, one forward pass: :func:`upper_bound`
2. see what sampling by these scores is worth: :func:`estimate_tau`; stay uniform while it is not worth its cost
3. keep a batch of the pool by score, with weights that leave the gradient unbiased: :func:`resample`
4. train on the weighted loss: :class:`ImportanceTrainer`, which is ``Trainer`` to the last bit while step 2 says no
"""

from hf_importance.heads.scores import upper_bound as upper_bound
from hf_importance.samplers.auto import Auto as Auto
from hf_importance.samplers.history import History as History
from hf_importance.samplers.observe import Observe as Observe
from hf_importance.samplers.presample import Presample as Presample
from hf_importance.samplers.sampler import Facts as Facts
from hf_importance.samplers.sampler import Pool as Pool
from hf_importance.samplers.sampler import Sampler as Sampler
from hf_importance.samplers.sampler import Scored as Scored
from hf_importance.samplers.sampler import Visits as Visits
from hf_importance.theory.sampling import resample as resample
from hf_importance.theory.tau import estimate_tau as estimate_tau
from hf_importance.trainer import ImportanceMixin as ImportanceMixin
from hf_importance.trainer import ImportanceTrainer as ImportanceTrainer
from hf_importance.training_args import ImportanceArguments as ImportanceArguments
from hf_importance.training_args import ImportanceTrainingArguments as ImportanceTrainingArguments

__version__ = "0.1.0"
