"""Closed forms of the statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxalign import metrics, tree


@pytest.mark.parametrize("width", [4, 5, 10, 100])
def test_args_A10_diversity_of_distinct_tokens(width):
    assert metrics.diversity(list(range(width))) == pytest.approx((width - 3) / width, rel=1e-12)


def test_args_A10_short_and_repeated_responses_and_coherence():
    assert metrics.diversity([1]) == 0
    assert metrics.diversity([1] * 50) == pytest.approx(1 / (50 * 49 * 48))
    x = np.random.default_rng(0).normal(size=(3, 8))
    np.testing.assert_allclose(metrics.coherence(x, x), 1, rtol=1e-12)
    np.testing.assert_allclose(metrics.coherence(x, -2 * x), -1, rtol=1e-12)


def test_intervals():
    x = np.arange(10.0)
    mean, half = metrics.mean_interval(x)
    assert mean == 4.5
    assert half == pytest.approx(1.96 * x.std(ddof=1) / math.sqrt(10))
    assert math.isnan(metrics.mean_interval([1.0]).half_width)
    with pytest.raises(ValueError, match="values"):
        metrics.mean_interval([])


def test_best_of_n_bound():
    for n in (1, 2, 10):
        assert metrics.best_of_n_kl_bound(n) == pytest.approx(float(tree.best_of_n_bound(n)), abs=1e-6)
    with pytest.raises(ValueError, match="n:"):
        metrics.best_of_n_kl_bound(0)
