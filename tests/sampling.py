"""Sampling tests with a stated error: counts against an exact law, means against an exact expectation."""

from __future__ import annotations

import numpy as np

from jaxalign import tree
from jaxalign.types import Completions


def index_of(t: tree.Tree, completions: Completions) -> np.ndarray:
    """The tree's number of each response, in the completions' leading shape."""
    tokens, mask = (x.reshape(-1, t.horizon) for x in (completions.tokens, completions.mask))
    return np.asarray(tree.response_index(t, tokens, mask)).reshape(completions.tokens.shape[:-1])


def chi_square(index: np.ndarray, law: np.ndarray) -> float:
    """Pearson's statistic of draws [n] against law [M]; cells expected less than 5 times are one cell."""
    expected = len(index) * np.asarray(law, np.float64) / np.sum(law)
    count = np.bincount(index, minlength=len(expected)).astype(float)
    rare = expected < 5
    if rare.any():
        count, expected = (np.append(x[~rare], x[rare].sum()) for x in (count, expected))
    return float(((count - expected) ** 2 / np.where(expected == 0, 1, expected)).sum())


def assert_mean(found: np.ndarray, expected: np.ndarray | float, *, errors: float = 5.0) -> None:
    """The mean over the first axis is the expected one, within `errors` standard errors (5: 6e-7 per number)."""
    found = np.asarray(found, np.float64)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - np.asarray(expected)) <= errors * error + 1e-6).all()
