"""Rank correlations of the Gini study."""

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, rankdata, spearmanr

import gini_study


def test_correlations_are_spearmans_and_partial_ones():
    generator = np.random.default_rng(0)
    cause = generator.normal(size=40)
    first, second = (cause + 0.3 * generator.normal(size=40) for _ in range(2))
    assert gini_study.spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert gini_study.spearman(first, second) > 0.8
    # Nothing is left of it when the cause is known; against the formula of partial correlation.
    a, b, c = (rankdata(numbers) for numbers in (first, second, cause))
    ab, ac, bc = (pearsonr(x, y).statistic for x, y in ((a, b), (a, c), (b, c)))
    expected = (ab - ac * bc) / math.sqrt((1 - ac**2) * (1 - bc**2))
    assert gini_study.spearman(first, second, [cause]) == pytest.approx(expected)
    assert abs(expected) < 0.4


def test_a_measure_that_is_the_same_for_all_has_no_correlation():
    assert math.isnan(gini_study.spearman([0.1 + 0.2, 0.3, 0.3], [1.0, 2.0, 3.0]))
