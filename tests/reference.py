"""Slow, obviously right twins of the formulas, in float64 and plain Python where that is clearest."""

import itertools
import math

import torch
from torch import Tensor


def tau(scores: list[float]) -> float:
    """Equation 29 as the paper prints it, with the root: (1 - |g - u|² / |g|²)^(-1/2)."""
    total = sum(scores)
    g = [score / total for score in scores]
    u = 1 / len(g)
    distance = sum((p - u) ** 2 for p in g)
    return (1 - distance / sum(p * p for p in g)) ** -0.5


def inclusion_probabilities(scores: list[float], size: int) -> list[float]:
    """Water-filling one example at a time: while one would pass 1, make the largest certain and share out the rest."""
    certain: set[int] = set()
    while True:
        rest = [i for i in range(len(scores)) if i not in certain]
        total = sum(scores[i] for i in rest)
        left = size - len(certain)
        if total == 0:
            share = dict.fromkeys(rest, left / len(rest)) if rest else {}
        else:
            share = {i: left * scores[i] / total for i in rest}
        over = [i for i in rest if share[i] > 1]
        if not over:
            return [1.0 if i in certain else share[i] for i in range(len(scores))]
        certain.add(max(over, key=lambda i: scores[i]))


def systematic_outcomes(probabilities: list[float], order: list[int]) -> list[tuple[float, list[int]]]:
    """Every outcome of a systematic draw in one order, with its probability: the offset's pieces between two jumps."""
    edges, total = [], 0.0
    for i in order:
        total += probabilities[i]
        edges.append(total)
    jumps = sorted({0.0, 1.0, *(edge - math.floor(edge) for edge in edges)})
    outcomes = []
    for left, right in itertools.pairwise(jumps):
        if right - left < 1e-13:
            continue
        offset = (left + right) / 2
        drawn = []
        for tooth in range(round(total)):
            drawn.append(next(order[k] for k, edge in enumerate(edges) if edge > tooth + offset))
        outcomes.append((right - left, drawn))
    return outcomes


def gain_of_a_draw(scores: list[float], inclusion: list[float]) -> float:
    """Mean square of a score over that of a weighted one, over every order, offset and place of a systematic draw."""
    examples, size = len(scores), round(sum(inclusion))
    orders = list(itertools.permutations(range(examples)))
    drawn = 0.0
    for order in orders:
        for chance, outcome in systematic_outcomes(inclusion, list(order)):
            weighted = [(size / (examples * inclusion[i]) * scores[i]) ** 2 for i in outcome]
            drawn += chance / len(orders) * sum(weighted) / size
    return sum(score**2 for score in scores) / examples / drawn


def forecast(promise: float, steps: list[tuple[float, float, float, float]], window: float) -> float:
    """A promise times how earlier ones were kept: (promise, examples, Σ w s², Σ w² s²) of each step, of 16 if uniform.

    As if promises had been kept for ``window`` examples more.
    """
    count, uniform, promised = 0.0, 0.0, 0.0
    for k, (then, examples, found, drawn) in enumerate(steps):
        since = sum(more for _, more, _, _ in steps[k + 1 :]) / 16
        remembered = (1 - 16 / window) ** since
        count, uniform, promised = (
            count + remembered * examples,
            uniform + remembered * found,
            promised + remembered * then * drawn,
        )
    alike = window * uniform / count
    return promise * (uniform + alike) / (promised + alike)


def multinomial_outcomes(probabilities: list[float], size: int) -> list[tuple[float, list[int]]]:
    """Every outcome of ``size`` draws with replacement, with its probability."""
    outcomes = []
    for drawn in itertools.product(range(len(probabilities)), repeat=size):
        outcomes.append((math.prod(probabilities[i] for i in drawn), list(drawn)))
    return outcomes


def logit_gradient_norms(loss_of_row, logits: Tensor) -> Tensor:
    """One backward pass an example: the norm of its loss's gradient with respect to its own logits, in float64."""
    norms = []
    for i in range(len(logits)):
        row = logits[i].detach().double().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of_row(row, i), row)
        norms.append(gradient.norm())
    return torch.stack(norms)


def inverse_moment(scores: list[float], kept: int) -> float:
    """Sum of score squared over inclusion probability, where ``kept`` of the examples are drawn."""
    inclusion = inclusion_probabilities(scores, kept)
    return sum(score**2 / p for score, p in zip(scores, inclusion, strict=True) if score > 0)


def cheapest_plan(budget: str, size: int, tau: float, kappa: float, largest: int) -> tuple[int, int]:
    """The best pool and number kept among all integers, by trying every pair: pool in (b, largest], kept in [1, b]."""
    best = None
    for pool in range(size + 1, largest + 1):
        for kept in range(1, size + 1):
            cost, variance = kappa * pool + kept, 1 / pool + 1 / (tau**2 * kept)
            if budget == "variance":
                allowed, value = kept == size, cost * variance
            elif budget == "constant_variance":
                allowed, value = variance <= 1 / size * (1 + 1e-12), cost
            else:
                allowed, value = cost <= size * (1 + 1e-12), variance
            if allowed and (best is None or value < best[0] - 1e-12):
                best = (value, pool, kept)
    assert best is not None, "no pair keeps within the budget"
    return best[1:]


def probabilities_by_rank(losses: list[float], pressure: float) -> list[float]:
    """Online batch selection: the i-th largest loss, i from 1, in proportion to exp(-log(s) i / N)."""
    examples = len(losses)
    ranked = sorted(range(examples), key=lambda i: -losses[i])
    mass = {example: math.exp(-math.log(pressure) * i / examples) for i, example in enumerate(ranked, 1)}
    return [mass[i] / sum(mass.values()) for i in range(examples)]


def probabilities_by_priority(losses: list[float], exponent: float, smallest: float) -> list[float]:
    """Proportional prioritisation: (loss + small)^α over their sum; unseen (NaN) as the largest that was seen."""
    largest = max(loss for loss in losses if not math.isnan(loss))
    mass = [((largest if math.isnan(loss) else loss) + smallest) ** exponent for loss in losses]
    return [m / sum(mass) for m in mass]


def priority_weights(probabilities: list[float], drawn: list[int], exponent: float) -> list[float]:
    """(1 / (N p))^β of the examples drawn, over the largest of them."""
    weights = [(1 / (len(probabilities) * probabilities[i])) ** exponent for i in drawn]
    return [w / max(weights) for w in weights]


def biased_weights(weights: list[float], scores: list[float], exponent: float) -> list[float]:
    """w^k, scaled so that the batch's sum of weight times score is what it was, as the authors' code has it."""
    raised = [w**exponent for w in weights]
    scale = math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / math.fsum(
        w * s for w, s in zip(raised, scores, strict=True)
    )
    return [scale * w for w in raised]


def normalised_weights(weights: list[float], exponent: float) -> list[float]:
    """w^k over their mean."""
    raised = [w**exponent for w in weights]
    return [w * len(raised) / math.fsum(raised) for w in raised]


def presampled_gain(pool: int, kept: int, size: int, tau: float) -> float:
    """How much larger a uniform batch than ``size`` has the variance 1/B + 1/(τ² n)."""
    return (1 / size) / (1 / pool + 1 / (tau**2 * kept))
