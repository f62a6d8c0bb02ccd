"""Any function from tokens to logits as a Policy: a jax function, a flax, equinox or torch module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _modules, mdp
from jaxalign._arrays import where_rows
from jaxalign._builders import cached
from jaxalign._checks import check_count, check_prompts, is_concrete
from jaxalign._parts import called, check_array, check_function_argument, pair
from jaxalign.shapes import NextToken, TextLength, TextMask, TextTokens
from jaxalign.types import Array, Completions, Params, Policy, State, StepOutput, TokenBatch


class Apply(Protocol):
    """Logits [B,L,V] of the token after each of tokens [B,L], real where mask [B,L] is True, right-padded; with
    `hidden`, (logits, hidden [B,L,D]). What it gives for padding is not read."""

    def __call__(self, params: Params, tokens: TextTokens, mask: TextMask, /) -> Any: ...


class ApplyPrefill(Protocol):
    """Encodes right-padded prompts [B,P]: (logits [B,V] after each row's last token, a cache of leaves with B first and
    room for `capacity` tokens)."""

    def __call__(self, params: Params, tokens: TextTokens, mask: TextMask, capacity: int, /) -> tuple[Array, State]: ...


class ApplyStep(Protocol):
    """Appends token [B]: (logits [B,V], cache)."""

    def __call__(self, params: Params, cache: State, token: NextToken, /) -> tuple[Array, State]: ...


class ApplyState(NamedTuple):
    """State of `from_apply` without a cache."""

    tokens: TextTokens
    """[B,P+T], the text so far, right-padded."""
    length: TextLength
    """[B], its real tokens."""


class CachedState(NamedTuple):
    """State of `from_apply` with a cache."""

    cache: State
    """The function's own."""
    logits: Array
    """[B,V], after the text so far."""


def from_apply(
    apply: Apply,
    *,
    vocab_size: int,
    prefill: ApplyPrefill | None = None,
    step: ApplyStep | None = None,
    hidden: bool = False,
    eos_ids: int | Sequence[int] = (),
) -> Policy:
    """Any function from tokens to logits as a Policy, which is its own base.

    params: those of the function. Without `prefill` and `step` the whole text is read anew for each token; with them a
    step reads one token. Given responses are scored by one call of `apply`.

    Args:
      apply: apply(params, tokens [B,L], mask [B,L]) -> logits [B,L,V]. Define it once: it is compared by identity.
      vocab_size: V.
      prefill: prefill(params, tokens [B,P], mask [B,P], capacity) -> (logits [B,V], cache); with `step`.
      step: step(params, cache, token [B]) -> (logits [B,V], cache). Rows that stand still are put back here.
      hidden: apply gives (logits, hidden [B,L,D]), which critics on hidden states read; without a cache alone.
      eos_ids: the ids that end a response; () for none.

    Returns:
      A Policy.

    Raises:
      ValueError: no functions, one of prefill and step alone, hidden with a cache, a vocabulary below 1; while tracing,
        results of another shape, with the function's name.
    """
    check_function_argument("apply", apply)
    if (prefill is None) != (step is None):
        given = "prefill" if step is None else "step"
        raise ValueError(f"prefill, step: expected both or neither, found {given} alone")
    if prefill is not None and step is not None:
        check_function_argument("prefill", prefill)
        check_function_argument("step", step)
        if hidden:
            raise ValueError("hidden: expected False beside prefill and step, found True")
    check_count("vocab_size", vocab_size, least=1, unit="token")
    ids = (eos_ids,) if isinstance(eos_ids, int) else tuple(int(i) for i in eos_ids)
    return _from_apply(apply, vocab_size, prefill, step, hidden, ids)


@cached
def _from_apply(
    apply: Apply,
    vocab_size: int,
    prefill: ApplyPrefill | None,
    step_cache: ApplyStep | None,
    hidden: bool,
    eos_ids: tuple[int, ...],
) -> Policy:
    name = f"from_apply: apply ({called(apply)})"

    def read(params: Params, tokens: Array, mask: Array) -> tuple[Array, Array | None]:
        """(logits [B,L,V], hidden [B,L,D] or None), checked."""
        found = apply(params, tokens, mask)
        logits, states = pair(name, found, "(logits, hidden)") if hidden else (found, None)
        check_array(name, logits, (*tokens.shape, vocab_size), "a logit per text, place and token")
        if states is not None and np.shape(states)[:2] != tokens.shape:
            raise ValueError(f"{name}: expected hidden of shape {(*tokens.shape, 'D')}, found {np.shape(states)}")
        return logits, states

    def output(logits: Array, states: Array | None = None) -> StepOutput:
        log_prob = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        return StepOutput(log_prob, log_prob, jnp.zeros(logits.shape[:1], log_prob.dtype), states)

    def last(params: Params, state: ApplyState) -> StepOutput:
        mask = jnp.arange(state.tokens.shape[1]) < state.length[:, None]
        logits, states = read(params, state.tokens, mask)
        at = (state.length - 1)[:, None, None]
        taken = jnp.take_along_axis(logits, at, axis=1)[:, 0]
        return output(taken, None if states is None else jnp.take_along_axis(states, at, axis=1)[:, 0])

    def check_last(what: str, logits: Array, batch: int) -> None:
        check_array(f"from_apply: {what}", logits, (batch, vocab_size), "a logit per row and token")

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> tuple[State, StepOutput]:
        del rng
        tokens, mask = mdp.compact(prompts.tokens, prompts.mask)
        batch, width = tokens.shape
        if prefill is not None:
            found = prefill(params, tokens, mask, width + max_new_tokens)
            logits, cache = pair(f"from_apply: prefill ({called(prefill)})", found, "(logits, cache)")
            check_last(f"prefill ({called(prefill)})", logits, batch)
            return CachedState(cache, logits), output(logits)
        state = ApplyState(jnp.pad(tokens, ((0, 0), (0, max_new_tokens))), mask.sum(axis=1).astype(jnp.int32))
        return state, last(params, state)

    def step(params: Params, rng: Array, state: Any, token: Array) -> tuple[State, StepOutput]:
        del rng
        moves = token >= 0
        if step_cache is not None:
            found = step_cache(params, state.cache, jnp.maximum(token, 0))
            logits, cache = pair(f"from_apply: step ({called(step_cache)})", found, "(logits, cache)")
            check_last(f"step ({called(step_cache)})", logits, token.shape[0])
            moved = where_rows(moves, CachedState(cache, logits), state)
            return moved, output(moved.logits)
        here = (jnp.arange(state.tokens.shape[1]) == state.length[:, None]) & moves[:, None]
        tokens = jnp.where(here, token[:, None], state.tokens).astype(state.tokens.dtype)
        moved_text = ApplyState(tokens, state.length + moves.astype(jnp.int32))
        return moved_text, last(params, moved_text)

    def log_prob(params: Params, prompts: TokenBatch, tokens: Array, mask: Array) -> Completions:
        text, text_mask, length = mdp.concatenate(prompts, tokens, mask)
        logits, _ = read(params, text, text_mask)
        # Logits of padding are not read, also where the token is none: their gradient might be no number.
        at = jnp.minimum(length[:, None] - 1 + jnp.arange(tokens.shape[1]), text_mask.sum(axis=1)[:, None] - 1)
        each = output(jnp.take_along_axis(logits, at[..., None], axis=1).reshape(-1, vocab_size)).log_prob
        value = jnp.take_along_axis(each, tokens.reshape(-1, 1), axis=1).reshape(tokens.shape)
        value = jnp.where(mask, value, 0)
        zero, rows = jnp.zeros_like(value), jnp.zeros(tokens.shape[:1], bool)
        return Completions(tokens, mask, value, value, zero, zero, rows, ~rows, ~rows)

    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_prompts(prompts)
        if is_concrete(prompts.tokens, prompts.mask):
            real = np.asarray(prompts.tokens)[np.asarray(prompts.mask, bool)]
            if real.min() < 0 or real.max() >= vocab_size:
                raise ValueError(
                    f"prompts: expected token ids in [0, {vocab_size}), found ids from {real.min()} to {real.max()}"
                )

    return Policy(init, step, log_prob, check, vocab_size, eos_ids)


def from_nnx(module: Any, *, vocab_size: int, eos_ids: int | Sequence[int] = ()) -> tuple[Policy, Params]:
    """A flax nnx module module(tokens [B,L], mask [B,L]) -> logits [B,L,V] as a Policy and its parameters.

    Args:
      module: an nnx.Module; it is split once, and its state are the parameters.
      vocab_size, eos_ids: as in `from_apply`.

    Returns:
      (Policy, params), differentiable in params.

    Raises:
      ValueError: as in `from_apply`.
    """
    apply, params = _modules.of_nnx(module)
    return from_apply(apply, vocab_size=vocab_size, eos_ids=eos_ids), params


def from_equinox(module: Any, *, vocab_size: int, eos_ids: int | Sequence[int] = ()) -> tuple[Policy, Params]:
    """An equinox module module(tokens [B,L], mask [B,L]) -> logits [B,L,V] as a Policy and its parameters.

    Args:
      module: an equinox.Module of whole batches (jax.vmap one of single texts); its arrays are the parameters.
      vocab_size, eos_ids: as in `from_apply`.

    Returns:
      (Policy, params), differentiable in params.

    Raises:
      ValueError: as in `from_apply`.
    """
    apply, params = _modules.of_equinox(module)
    return from_apply(apply, vocab_size=vocab_size, eos_ids=eos_ids), params


def from_torch(module: Any, *, vocab_size: int, eos_ids: int | Sequence[int] = ()) -> tuple[Policy, Params]:
    """A torch module module(tokens [B,L], mask [B,L]) -> logits [B,L,V] as a Policy, read on the host without a cache.

    transformers' models serve as they are: an output with `logits` is read. There are no parameters, and so
    no gradients.

    Args:
      module: in evaluation mode; called under no_grad with an int64 and a bool tensor where its parameters lie.
      vocab_size, eos_ids: as in `from_apply`.

    Returns:
      (Policy, ()).

    Raises:
      ValueError: as in `from_apply`; while it draws, an error of the module or logits of another shape, with its name.
    """
    check_count("vocab_size", vocab_size, least=1, unit="token")
    return from_apply(_modules.of_torch(module, vocab_size=vocab_size), vocab_size=vocab_size, eos_ids=eos_ids), ()
