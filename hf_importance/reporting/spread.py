"""What several seeds say: mean, spread, and the interval in which their mean lies."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

# Student's t, 97.5 %, at 1 to 10 degrees of freedom; beyond them 1.96 + 2.6 / degrees, right to 0.01.
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def standard_error(values: Sequence[float]) -> float:
    """Give the standard error of the mean of two values or more.

    >>> standard_error([1.0, 3.0])
    1.0
    """
    return deviation(values) / len(values) ** 0.5


def deviation(values: Sequence[float]) -> float:
    """Give the standard deviation of two values or more; NaN where one is not finite, for which statistics raises.

    >>> deviation([1.0, 3.0, float("nan")])
    nan
    """
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def mean_and_spread(values: Sequence[float], spread: Callable[[Sequence[float]], float] = deviation) -> str:
    """Give the mean, and by default the standard deviation of several; nothing of none.

    >>> mean_and_spread([0.5]), mean_and_spread([0.5, 0.7]), mean_and_spread([0.5, 0.7], standard_error)
    ('0.5', '0.6 ± 0.14', '0.6 ± 0.1')
    >>> mean_and_spread([0.5, float("nan")])
    'nan'
    """
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4g}"
    return mean if len(values) == 1 or mean == "nan" else f"{mean} ± {spread(values):.2g}"


def interval(values: Sequence[float]) -> float | None:
    """Give half of the 95 % interval of a mean, by Student's t; None of a single value.

    >>> interval([1.0]), round(interval([1.0, 3.0]), 2)
    (None, 12.71)
    """
    degrees = len(values) - 1
    if not degrees:
        return None
    quantile = QUANTILES[degrees - 1] if degrees <= len(QUANTILES) else 1.96 + 2.6 / degrees
    return quantile * standard_error(values)
