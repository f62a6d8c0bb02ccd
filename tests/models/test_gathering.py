"""LanguageModel.gather: when matrices that are split over fsdp are put together; programs: tests/on_tokens.py."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import _devices
from jaxalign.models import gathering
from jaxalign.types import Array
from tests.conftest import tiny_lm

SPLIT, SHARED = (types.SimpleNamespace(shape=shape) for shape in ({"data": 2, "fsdp": 4}, {"data": 8}))


@pytest.mark.parametrize("gather", gathering.GATHERS)
def test_only_weights_that_are_split_over_fsdp_are_put_together(gather):
    for mesh in (None, SHARED):
        assert not gathering.is_in_turn(gather, mesh, lambda: 1)


def test_auto_goes_by_a_quarter_of_an_accelerators_memory(monkeypatch):
    def found(gather: str) -> bool:
        return gathering.is_in_turn(gather, SPLIT, lambda: 100)

    assert found("auto")  # of a CPU, whose memory is not the run's own
    for memory, in_turn in ((399, True), (400, False)):
        monkeypatch.setattr(_devices, "memory", lambda memory=memory: memory)
        assert [found(gather) for gather in gathering.GATHERS] == [in_turn, False, True]


def test_a_weight_that_is_not_trained_costs_no_product_in_a_gradient():
    w, x = jnp.arange(6.0).reshape(2, 3), jnp.arange(4.0).reshape(2, 2)

    def of(tied: bool, w: Array, x: Array) -> Array:
        w, x = gathering.in_turn(w, x) if tied else (w, x)
        return jnp.sin(x @ w).sum()

    for argnums, products in ((0, 2), (1, 2), ((0, 1), 3)):
        plain, tied = (jax.grad(functools.partial(of, tied), argnums) for tied in (False, True))
        jax.tree.map(np.testing.assert_array_equal, tied(w, x), plain(w, x))
        assert str(jax.make_jaxpr(tied)(w, x)).count("dot_general") == products
    second = [jax.hessian(functools.partial(of, tied), (0, 1))(w, x) for tied in (False, True)]
    jax.tree.map(np.testing.assert_allclose, *second)


def test_gather_is_one_of_three():
    lm, _ = tiny_lm(0)
    assert lm.gather == "auto"
    with pytest.raises(ValueError, match=r"^gather: expected one of \('auto', 'ahead', 'in_turn'\), found 'never'"):
        dataclasses.replace(lm, gather="never")
