r"""Which examples of a pool are kept, and how much each of them counts.

A pool of ``B`` scored examples goes in; ``n`` indices and their importance weights come out. Whatever the scores are,
the weighted mean over the kept examples has the pool's mean as its expectation, so a stale or a wrong score costs
variance and never correctness. Two schemes (DESIGN: section 5):

- ``"systematic"``: without replacement, fixed size, inclusion probabilities proportional to the scores. The default.
- ``"multinomial"``: with replacement, as the paper's Algorithm 1 has it.

Notation: ``B`` examples in the pool, ``n`` of them kept, :math:`\hat G_i` = ``scores``, :math:`g_i` =
``probabilities``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Resampling = Literal["systematic", "multinomial"]


def inclusion_probabilities(scores: Tensor, size: int, counts: Tensor | None = None) -> Tensor:
    r"""Probability of each example to be among the ``size`` kept ones, proportional to its score and at most 1.

    ``min(1, c * scores)`` with ``c`` such that they sum to ``size``. Examples that would pass 1 are certain, and the
    rest of the mass is spread over the others. Where fewer than ``size`` examples have a positive score, these are
    certain and the remaining places are drawn uniformly from the others.

    Args:
        scores: Importance of each example, non-negative, any positive scale; shape ``(B,)``.
        size: How many are kept, in ``[1, B]``.
        counts: How many examples have each score, ``>= 0``, shape ``(B,)``; None: one each. ``size`` is at most their
            sum then.

    Returns:
        Of one example of each score: shape ``(B,)``, float64, in ``[0, 1]``, over all examples summing to ``size``.

    Raises:
        ValueError: ``scores`` is not a vector, is empty, or holds a negative or non-finite entry; ``size`` is out of
            range.

    Reference:
        Tillé, Sampling Algorithms, 2006, section 2.10 (inclusion probabilities proportional to a size variable).

    >>> inclusion_probabilities(torch.tensor([1.0, 1.0, 2.0]), 2)
    tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    >>> inclusion_probabilities(torch.tensor([0.0, 0.0, 5.0]), 2)
    tensor([0.5000, 0.5000, 1.0000], dtype=torch.float64)
    """
    scores = _checked(scores)
    numbers = torch.ones_like(scores) if counts is None else counts.double()
    examples = len(scores) if counts is None else int(counts.sum())
    if not 1 <= size <= examples:
        raise ValueError(f"size must lie between 1 and the {examples} scores, but it is {size}.")
    ordered, order = scores.sort(descending=True)
    numbers = numbers[order]
    # remaining[k]: the mass left when the k largest are certain. The smallest k that leaves no probability above 1 is
    # right: one more certain example than needed would take more than its share.
    remaining = (ordered * numbers).flip(0).cumsum(0).flip(0)
    before = numbers.cumsum(0) - numbers  # examples that are certain when the k largest scores are
    count = int(((size - before) * ordered > remaining).sum())
    if count == len(scores):
        return torch.ones_like(scores)
    places = size - before[count]
    if remaining[count] > 0:
        rest = ordered * (places / remaining[count])
    else:
        # Only examples without a score are left for the remaining places.
        rest = torch.full_like(ordered, float(places / (examples - before[count]).clamp(min=1)))
    rest = rest.clamp(max=1.0)
    rest[:count] = 1.0
    return torch.empty_like(rest).scatter_(0, order, rest)


def systematic_draw(probabilities: Tensor, order: Tensor, offset: Tensor | float) -> Tensor:
    """Draw by one comb of unit spacing over the cumulated inclusion probabilities.

    Args:
        probabilities: Inclusion probability of each example, in ``[0, 1]``, with an integer sum ``n``; shape ``(B,)``.
        order: Permutation in which the examples are cumulated, shape ``(B,)``. A random one makes the draw
            independent of the order of the pool.
        offset: Position of the comb's first tooth, in ``[0, 1)``.

    Returns:
        Indices of the ``n`` drawn examples, shape ``(n,)``, without repeats.
    """
    cumulated = probabilities[order].cumsum(0)
    size = int(cumulated[-1].round())
    teeth = torch.arange(size, dtype=cumulated.dtype, device=cumulated.device) + offset
    # The sum is n up to rounding; scaled to n exactly, the last tooth cannot fall behind the last example.
    position = torch.searchsorted(cumulated * (size / cumulated[-1]), teeth, right=True)
    return order[position.clamp(max=len(order) - 1)]


def resample(
    scores: Tensor, size: int, method: Resampling = "systematic", generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""Keep ``size`` examples of a pool by importance, with the weights that undo the preference.

    For any per-example quantity ``x`` of shape ``(B,)``, with ``index, weight = resample(scores, n)``::

        E[(weight * x[index]).mean()] = x.mean()

    provided that ``x`` is zero where the score is zero (a score of zero says that there is no gradient).

    Args:
        scores: Importance of each example, non-negative, any positive scale; shape ``(B,)``. All zero: drawn
            uniformly.
        size: How many to keep, ``n >= 1``; at most ``B`` for ``"systematic"``.
        method: ``"systematic"``, without replacement, weights ``n / (B * pi)`` (Horvitz and Thompson, 1952), or
            ``"multinomial"``, with replacement, weights ``1 / (B * g)`` (the paper's Algorithm 1).
        generator: Source of randomness, on the device of ``scores``. The global one where None.

    Returns:
        Indices into the pool, int64, shape ``(n,)``, and importance weights, float64, positive, shape ``(n,)``.

    Raises:
        ValueError: ``scores`` is not a vector, is empty, or holds a negative or non-finite entry; ``size`` is out of
            range; ``method`` is unknown.

    Reference:
        Katharopoulos and Fleuret, 2018, https://arxiv.org/abs/1803.00942, Algorithm 1, lines 6 to 8.

    >>> index, weight = resample(torch.ones(4), 2, generator=torch.Generator().manual_seed(0))
    >>> weight
    tensor([1., 1.], dtype=torch.float64)
    """
    scores = _checked(scores)
    if method == "systematic":
        inclusion = inclusion_probabilities(scores, size)
        order = torch.randperm(len(scores), generator=generator, device=scores.device)
        offset = torch.rand((), generator=generator, dtype=torch.float64, device=scores.device)
        index = systematic_draw(inclusion, order, offset)
        return index, size / (len(scores) * inclusion[index])
    if method == "multinomial":
        if size < 1:
            raise ValueError(f"size must be at least 1, but it is {size}.")
        total = scores.sum()
        probabilities = scores / total if total > 0 else torch.full_like(scores, 1 / len(scores))
        index = torch.multinomial(probabilities, size, replacement=True, generator=generator)
        return index, 1 / (len(scores) * probabilities[index])
    raise ValueError(f"resampling must be 'systematic' or 'multinomial', but it is {method!r}.")


def exponent_of(step: int, steps: int, bias: float, until: float) -> float:
    """Give the power that a step's weights are raised to: ``bias``, and 1 once the share ``until`` of the run is over.

    >>> [exponent_of(step, 4, 0.5, 0.75) for step in range(4)], exponent_of(9, 4, 0.5, 1.0)
    ([0.5, 0.5, 0.5, 1.0], 0.5)
    """
    return bias if until == 1 or step < until * steps else 1.0


def bias_weights(weights: Tensor, exponent: float, normalise: bool = False) -> Tensor:
    r"""Raise the importance weights of a step to a power, and rescale them: a bias that favours what is drawn more.

    :math:`\hat w_i = c\, w_i^k`. As the authors rescale, ``c`` is such that
    :math:`\sum \hat w_i \hat G_i = \sum w_i \hat G_i` with :math:`\hat G_i \propto 1 / w_i`: the summed score of the
    step, so about its length, stays. Below 1 examples of a high score, drawn more, are not counted less by as much:
    hard examples weigh more in what is descended, which may train faster, or better, and converges elsewhere.

    Normalised, ``c`` makes their mean 1: the step is a weighted mean of its examples (a ratio estimator). At ``k = 1``
    its expectation is off by O(1/n), and the noise that every example has in common, such as how many easy ones the
    draw happened to stand for, goes.

    Args:
        weights: Importance weights of one optimizer step, positive, shape ``(n,)``.
        exponent: ``k``, in ``[0, 1]``.
        normalise: Whether the result has the mean 1, in place of the authors' rescaling.

    Returns:
        Shape ``(n,)``; ``weights`` itself at 1 where not normalised, equal weights at 0.

    Reference:
        ``BiasedReweightingPolicy`` in the authors' https://github.com/idiap/importance-sampling; Hesterberg, Weighted
        average importance sampling and defensive mixture distributions, 1995 (the ratio estimator).

    >>> bias_weights(torch.tensor([0.5, 2.0]), 0.0)
    tensor([0.8000, 0.8000])
    >>> bias_weights(torch.tensor([0.5, 2.0]), 1.0, normalise=True)
    tensor([0.4000, 1.6000])
    """
    if exponent == 1 and not normalise:
        return weights
    raised = weights**exponent
    if normalise:
        return raised / raised.mean()
    return raised * (len(weights) / (raised / weights).sum())


def effective_sample_size(weights: Tensor) -> float:
    """Number of equally weighted examples that a weighted batch is worth, ``(Σw)² / Σw²``, in ``[1, n]``.

    Reference:
        Kish, Survey Sampling, 1965, section 11.7.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 2.0]))
    2.66...
    """
    return float(weights.sum() ** 2 / weights.square().sum())


def _checked(scores: Tensor) -> Tensor:
    """Give ``scores`` as float64, scaled to a largest entry of 1 so that no sum over them can overflow."""
    if scores.dim() != 1 or len(scores) == 0:
        raise ValueError(f"scores must be a vector with at least one entry, but their shape is {tuple(scores.shape)}.")
    scores = scores.double()
    if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()):
        raise ValueError("scores must be finite and non-negative, but at least one is not.")
    largest = scores.max()
    return scores / largest if largest > 0 else scores
