"""The laws of a Policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding
from jaxalign._arrays import is_supported, repeat_rows, take_rows
from jaxalign._parts import check_policy_argument
from jaxalign._programs import tells_programs
from jaxalign.prompts import any_prompts
from jaxalign.shapes import LogProbs, ResponseTokens
from jaxalign.testing import _laws, _verified
from jaxalign.testing._laws import PER_PROMPT, assert_same, broken, errors_break
from jaxalign.testing._steps import Compiled, Numbers, numbers, supported_tokens
from jaxalign.types import Array, Params, Policy, Prompts


class Increments(Protocol):
    """What a policy adds to log_prob_ref, before normalisation, at each next token [B,V] after tokens [B,t]."""

    def __call__(self, params: Params, prompts: Prompts, tokens: ResponseTokens) -> LogProbs: ...


@tells_programs
def check_policy(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    *,
    rng: Array | None = None,
    max_new_tokens: int = 4,
    increments: Increments | None = None,
    per_prompt: Sequence[str] = PER_PROMPT,
    gradients: bool = True,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> None:
    """Checks that a Policy keeps laws 1-10, 13 and 18 of `jaxalign.testing` on some prompts.

    The responses it is held to are drawn from its own most probable tokens.

    Args:
      policy: the policy.
      params: its parameters.
      prompts: at least two, of different lengths; five or more find more. A TokenBatch, or a dict that mirrors params.
      rng: the key of init and of each step; key 0 when None.
      max_new_tokens: T >= 3, the length of the responses.
      increments: increments(params, prompts, tokens [B,t]) -> [B,V], what the policy adds to log_prob_ref at each next
        token (law 5): zeros for a base or a truncation. None: only the normalisation is checked.
      per_prompt: names of entries of params, at any depth, that may be one value or one per prompt [B,...] (law 3).
      gradients: False leaves out law 9, for parts that cannot be differentiated.
      rtol, atol: tolerances of all comparisons; loosen them for 16-bit parameters.

    Raises:
      AssertionError: a law does not hold; the message gives its number and name, and what was seen in which row.
      ValueError: arguments that are none: fewer than two prompts, fewer than three tokens, no Policy.
    """
    check_policy_argument("policy", policy)
    if max_new_tokens < 3:
        raise ValueError(f"max_new_tokens: expected at least 3, found {max_new_tokens}")
    prompts = _laws.opened(prompts)
    _laws.assert_hashable("policy", policy)
    run = Compiled(policy, _laws.opened_rng(rng), max_new_tokens)
    close = _Close(rtol, atol)
    tokens = _check_walk(run, params, prompts, close)
    _check_per_prompt(run, params, prompts, tokens, per_prompt, close)
    _check_rows(run, params, prompts, tokens, close, repeat=False)
    expected = run.outputs(params, prompts, tokens)
    _check_forms(run, params, prompts, tokens, expected, per_prompt, close)
    _check_rows(run, params, prompts, tokens, close, repeat=True)
    _check_frozen(run, params, prompts, tokens, close)
    if increments is not None:
        _check_increments(increments, params, prompts, tokens, expected, close)
    _check_scoring(run, params, prompts, tokens, expected, gradients, close)
    _verified.check_blocks(run, params, prompts, close)


class _Close(NamedTuple):
    rtol: float
    atol: float

    def __call__(self, law: int, when: str, found: object, expected: object, rows: Sequence[int] | None = None) -> None:
        whole = "output" if isinstance(found, list | Numbers) else ""
        assert_same(law, when, found, expected, rtol=self.rtol, atol=self.atol, rows=rows, whole=whole)


def _check_walk(run: Compiled, params: Params, prompts: Prompts, close: _Close) -> ResponseTokens:
    """Laws 1, 6, 13 and the normalisation of law 5 along a response: its tokens [B,T]."""
    with errors_break(1, "policy.init"):
        state, output = run.init(params, prompts)
    _laws.assert_no_keys("state", state)
    tokens: list[Array] = []
    for t in range(run.steps):
        when = f"before token {t}"
        _laws.assert_finite(13, when, output, "output")
        for name in ("log_prob", "log_prob_ref"):
            total = jax.nn.logsumexp(getattr(output, name), axis=-1)
            close(5, f"{when}, logsumexp of {name} over the vocabulary", total, jnp.zeros_like(total))
        tokens.append(supported_tokens(output, run.policy.eos_ids or ()))
        if t < run.steps - 1:
            with errors_break(1, "policy.step"):
                moved, after = run.step(params, state, tokens[-1])
            _laws.assert_same_form(f"after token {t}", moved, state, "state")
            _laws.assert_same_form(f"after token {t}", after, output, "output")
            state, output = moved, after
    return jnp.stack(tokens, axis=1)


def _check_per_prompt(
    run: Compiled, params: Params, prompts: Prompts, tokens: Array, names: Sequence[str], close: _Close
) -> None:
    """Law 3: a scalar, the array of it, and each row of an array of different values."""
    batch = tokens.shape[0]
    seen: list[Array] = []
    _laws.map_per_prompt(lambda x: seen.append(x) or x, params, names, batch)  # type: ignore[func-returns-value]
    if not seen:
        return

    def given(row: int) -> Params:
        return _laws.map_per_prompt(lambda x: _laws.different(x)[row], params, names, batch)

    each = _laws.map_per_prompt(_laws.different, params, names, batch)
    equal = _laws.map_per_prompt(lambda x: jnp.stack([_laws.different(x)[0]] * batch), params, names, batch)
    with errors_break(3, "a value per prompt", ValueError, TypeError):
        together = run.outputs(each, prompts, tokens)
        same = run.outputs(equal, prompts, tokens)
    for row in (0, batch - 1):
        with errors_break(3, "one value for all prompts", ValueError, TypeError):
            alone = run.outputs(given(row), prompts, tokens)
        if row == 0:
            close(3, "one value for all prompts beside the array of it", alone, same)
        close(3, f"row {row}'s value alone beside an array of different values", alone, together, [row])
    state, _ = run.init(each, prompts)
    expected = numbers(run.step(each, state, tokens[:, 0])[1])
    found = numbers(run.step(equal, state, tokens[:, 0])[1])
    close(3, "a step with values other than those at init", found, expected)


def _check_rows(run: Compiled, params: Params, prompts: Prompts, tokens: Array, close: _Close, *, repeat: bool) -> None:
    """Law 1: rows of a state are taken in another order, or repeated. The first has every row in it, so that rows that
    depend on each other are left to law 8."""
    state, _ = run.init(params, prompts)
    expected = numbers(run.step(params, state, tokens[:, 0])[1])
    batch = tokens.shape[0]
    if repeat:  # as many rows as before, which step is compiled for
        when, order = "a step after repeat_rows(state, 2)", jnp.arange(batch) // 2
        mixed = take_rows(repeat_rows(state, 2), jnp.arange(batch))
    else:
        when, order = "a step after take_rows in reverse order", jnp.arange(batch)[::-1]
        mixed = take_rows(state, order)
    close(1, when, numbers(run.step(params, mixed, tokens[order, 0])[1]), take_rows(expected, order))


def _check_frozen(run: Compiled, params: Params, prompts: Prompts, tokens: Array, close: _Close) -> None:
    """Law 2: rows that stand still go on as if nothing had been, and those beside them are not touched."""
    state, _ = run.init(params, prompts)
    once, first = run.step(params, state, tokens[:, 0])
    _, second = run.step(params, once, tokens[:, 1])
    frozen = jnp.arange(tokens.shape[0]) % 2 == 0
    held, moved = (np.flatnonzero(np.asarray(rows)).tolist() for rows in (frozen, ~frozen))
    paused, beside = run.step(params, state, jnp.where(frozen, -1, tokens[:, 0]))
    close(2, "a row that moves beside frozen rows", numbers(beside), numbers(first), moved)
    resumed, output = run.step(params, paused, jnp.where(frozen, tokens[:, 0], -1))
    close(2, "a row's step after it was frozen (token -1)", numbers(output), numbers(first), held)
    _, found = run.step(params, resumed, tokens[:, 1])
    close(2, "the step after each row was frozen once (token -1)", numbers(found), numbers(second))


def _check_forms(
    run: Compiled,
    params: Params,
    prompts: Prompts,
    tokens: Array,
    expected: list[Numbers],
    names: Sequence[str],
    close: _Close,
) -> None:
    """Laws 4, 7 and 8: the same prompts in another form."""
    batch, vocab = tokens.shape[0], expected[0].log_prob.shape[-1]
    order = _laws.other_rows(batch)
    mixed = _laws.map_per_prompt(lambda x: x[jnp.asarray(order)], params, names, batch)
    found = run.outputs(mixed, _laws.rows_of(prompts, order), tokens[jnp.asarray(order)])
    close(8, f"rows {order} of the prompts", found, take_rows(expected, jnp.asarray(order)))
    for side, extra, fill in (("right", 2, vocab - 1), ("left", 2, _laws.mixed_ids(vocab, vocab))):
        found = run.outputs(params, _laws.padded(prompts, side, extra, fill), tokens)
        close(7, f"prompts padded on the {side} with {extra} more columns of ids {np.unique(fill)}", found, expected)
    form = _laws.mirrored(params, prompts)
    if form is not prompts:
        with errors_break(4, "init with a TokenBatch for each model", ValueError, TypeError, KeyError, AttributeError):
            found = run.outputs(params, form, tokens)
        close(4, "a TokenBatch for each model beside one for all", found, expected)


def _check_increments(
    increments: Increments,
    params: Params,
    prompts: Prompts,
    tokens: Array,
    expected: list[Numbers],
    close: _Close,
) -> None:
    """Law 5 on the support, token by token."""
    for t, output in enumerate(expected):
        added = increments(params, prompts, tokens[:, :t])
        inside = is_supported(output.log_prob)
        found = jnp.where(inside, output.log_prob - output.log_prob_ref + output.log_norm[:, None], 0)
        close(5, f"before token {t}, log_prob - log_prob_ref + log_norm beside increments", found, inside * added)


def _check_scoring(
    run: Compiled,
    params: Params,
    prompts: Prompts,
    tokens: Array,
    expected: list[Numbers],
    gradients: bool,
    close: _Close,
) -> None:
    """Laws 10 and 9: given responses are scored in parallel and by steps, and can be differentiated."""
    mask = jnp.ones(tokens.shape, bool)
    # Row 0 is one token shorter, as responses of a batch are.
    mask = mask.at[0, -1].set(False)
    stepwise = run.policy._replace(log_prob=None, verify=None, accept=None)
    batch = any_prompts(prompts).tokens.shape[0]
    if run.policy.log_prob is not None:
        steps = decoding.log_prob(stepwise, params, run.rng, prompts, tokens, mask)
        parallel = decoding.log_prob(run.policy, params, run.rng, prompts, tokens, mask)
        for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
            left, right = getattr(parallel, name), getattr(steps, name)
            if left is not None:
                if left.shape != (batch, tokens.shape[1]):
                    raise broken(10, f"{name} of the parallel form has shape {left.shape} in place of {right.shape}")
                close(10, f"{name} of the parallel form beside that of the steps", left, right)
    if gradients:
        policies = [stepwise]
        if run.policy.log_prob is not None or run.policy.verify is not None:  # in parallel, or by blocks
            policies.append(run.policy)
        for each in policies:
            _laws.check_gradients(
                lambda given, each=each: decoding.log_prob(each, given, run.rng, prompts, tokens, mask).log_prob.sum(),  # type: ignore[misc]
                params,
            )
