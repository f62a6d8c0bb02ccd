"""Scatters whose places a compiler counts in one number, as XLA's deterministic ones on a GPU do.

What is past the end of a row then is the beginning of the next. An interpreter does such a compiler's arithmetic here.
"""

from __future__ import annotations

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import _arrays, _devices, mdp
from jaxalign.models import cache as caches


def _flat(operand, index, update, dims) -> np.ndarray:
    """A scatter of windows that are single places, or whole trailing axes, whose places are counted in one number."""
    assert dims.operand_batching_dims == ()
    count = len(dims.scatter_dims_to_operand_dims)
    assert dims.scatter_dims_to_operand_dims == dims.inserted_window_dims == tuple(range(count))
    found, sizes = np.array(operand), operand.shape[:count]
    flat = found.reshape(-1, *operand.shape[count:])
    stride = np.array([int(np.prod(sizes[i + 1 :])) for i in range(count)])
    updates = np.reshape(update, (-1, *operand.shape[count:]))
    for place, new in reversed(list(zip(index.reshape(-1, count), updates, strict=True))):  # no order is promised
        number = int(place @ stride)
        if 0 <= number < len(flat):
            flat[number] = new
    return found


def _run(jaxpr, consts, *args):
    """Evaluates a program with such scatters."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def value(atom):
        return atom.val if isinstance(atom, jax.extend.core.Literal) else known[atom]

    for eqn in jaxpr.eqns:
        given = [value(atom) for atom in eqn.invars]
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name == "scatter":
            out = [_flat(*(np.asarray(x) for x in given), eqn.params["dimension_numbers"])]
        elif inner is not None:
            out = _run(inner.jaxpr, inner.consts, *given)
        else:
            out = eqn.primitive.bind(*given, **eqn.params)
            out = out if eqn.primitive.multiple_results else [out]
        known.update(zip(eqn.outvars, out, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _flattened(function, *args):
    closed = jax.make_jaxpr(function)(*args)
    return _run(closed.jaxpr, closed.consts, *jax.tree.leaves(args))


TOKENS = jnp.array([[1, 2, 3, 9], [4, 5, 9, 9], [6, 7, 8, 1]])
REAL = jnp.array([[True, True, True, False], [True, True, False, False], [True, True, True, True]])


def _cases():
    rng = np.random.default_rng(0)
    cache = jnp.asarray(rng.normal(size=(3, 2, 4, 5)))
    one, three = jnp.asarray(rng.normal(size=(3, 2, 5))), jnp.asarray(rng.normal(size=(3, 2, 3, 5)))
    state = mdp.State(TOKENS, jnp.array([3, 2, 2]), jnp.array([1, 1, 1]), jnp.array([True, False, True]))
    return {
        "a prompt's padding": (lambda: mdp.compact(TOKENS[:, ::-1], REAL[:, ::-1])),
        "rows that are done": (lambda: mdp.transition(state, jnp.array([5, 6, 7]), eos_ids=(), max_new_tokens=3)),
        "a token's keys": (lambda: caches.write_slot(cache, one, jnp.array([4, 1, 4]))),
        "a segment's keys": (lambda: caches.write_segment(cache, three, jnp.array([[1, 2, 4], [4, 4, 4], [0, 4, 4]]))),
        "slots of rows": (lambda: _arrays.write(cache[:, 0], jnp.array([[1, 4], [4, 4], [0, 4]]), cache[:, :, 0])),
    }


@pytest.mark.parametrize("case", _cases())
def test_what_is_past_the_end_of_a_row_is_not_in_the_next(case, monkeypatch):
    expected = jax.tree.leaves(_cases()[case]())
    plain = _flattened(_cases()[case])
    assert any((np.asarray(x) != np.asarray(y)).any() for x, y in zip(plain, expected, strict=True))  # the fault
    monkeypatch.setattr(_devices, "flattens_scatters", lambda: True)
    for found in (_flattened(_cases()[case]), jax.tree.leaves(_cases()[case]())):
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("flags", "backend", "counts"),
    [
        ("--xla_gpu_deterministic_ops=true", "gpu", True),
        ("--xla_other=3 --xla_gpu_deterministic_ops", "gpu", True),
        ("--xla_gpu_exclude_nondeterministic_ops=true", "gpu", True),
        ("--xla_gpu_deterministic_ops=false", "gpu", False),
        ("--xla_gpu_deterministic_ops=true", "cpu", False),
        ("", "gpu", False),
    ],
)
def test_which_compilers_count_so(flags, backend, counts, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(_devices, "backend", lambda: backend)
    assert _devices.flattens_scatters() == counts
