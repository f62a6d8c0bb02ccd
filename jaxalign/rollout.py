"""The sampling loop.

`sample`, `best_of_n`, `rejection`, `first_above`, `blockwise`, `smc`, `quest`, `cards` and the roll-outs of Transfer Q*
draw their tokens in `rollout`; what is theirs comes in as `Hooks`. Three loops stand apart. `decoding.speculative`
makes several tokens a round, another number in each row. `decoding.ggro` draws nothing: its rows are each at their own
token of their own candidate segment, a segment ends before the token that would have been next, and the loop stops when
half of the rows are ready, so that a step of it is no step of this one. `decoding.log_prob` scores given tokens, and is
a scan because it has to be differentiable.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from jaxalign._arrays import draw_width, is_supported, where_rows
from jaxalign._checks import check_rng
from jaxalign._parts import called, check_same_types, step_policy
from jaxalign.shapes import LogProbs, NextToken, Numbers, OverTokens, PerPrompt, PerPromptFlag
from jaxalign.types import Array, ArrayLike, Completions, Params, Policy, State, StepOutput

__all__ = [
    "AfterStep",
    "BeforeDraw",
    "ChooseToken",
    "Frame",
    "Hooks",
    "Rolled",
    "draw",
    "draw_margin",
    "draw_rows",
    "exact_kl",
    "is_eos",
    "no_records",
    "record",
    "rollout",
    "step_key",
    "token_value",
    "uniform_rows",
]

_MOVE = 2**31 - 1  # no prompt's index: keys of the policy's steps are none of the draws'


def draw(log_prob: LogProbs, uniform: PerPrompt) -> NextToken:
    """Draws a token of each row by the inverse CDF.

    One uniform number per row, and two short prefix sums (over blocks, then inside the chosen block) in place of noise
    over the whole vocabulary. Probabilities are right up to the resolution of the uniform number, 2^-23 in float32.

    Args:
      log_prob: [B,V], normalised or not.
      uniform: [B] in [0,1).

    Returns:
      Tokens [B]; one of probability zero is never drawn.
    """
    chex.assert_rank([log_prob, uniform], [2, 1])
    batch, vocab = log_prob.shape
    width = draw_width(vocab)
    blocks = -(-vocab // width)
    weight = jnp.exp(log_prob - log_prob.max(axis=-1, keepdims=True))
    weight = jnp.pad(weight, ((0, 0), (0, blocks * width - vocab))).reshape(batch, blocks, width)
    mass = weight.sum(axis=-1)
    cumulative = jnp.cumsum(mass, axis=-1)
    target = uniform * cumulative[:, -1]
    block = (cumulative <= target[:, None]).sum(axis=-1).clip(max=blocks - 1)
    before = jnp.take_along_axis(cumulative - mass, block[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(weight, block[:, None, None], axis=1)[:, 0]
    # The block's mass and its prefix sums round differently: keep the rest inside the block's support.
    rest = jnp.maximum(target - before, 0)
    token = (jnp.cumsum(inside, axis=-1) <= rest[:, None]).sum(axis=-1)
    last = jnp.where(inside > 0, jnp.arange(width), 0).max(axis=-1)
    return (block * width + jnp.minimum(token, last)).astype(jnp.int32)


def exact_kl(log_prob: OverTokens, log_prob_ref: OverTokens) -> Numbers:
    """Gives the KL of one step's distribution, Σ_z pi(z)·(log pi(z) − log pi_ref(z)), with finite gradients.

    Args:
      log_prob: [...,V], in nats.
      log_prob_ref: [...,V], in nats.

    Returns:
      [...], in nats; 0·log 0 = 0. Up to rounding: what is below about 1e-6 may be negative.
    """
    inside = is_supported(log_prob)
    difference = jnp.where(inside, log_prob, 0) - jnp.where(inside, log_prob_ref, 0)
    return jnp.sum(jnp.where(inside, jnp.exp(jnp.where(inside, log_prob, 0)), 0) * difference, axis=-1)


def token_value(table: OverTokens, token: Array) -> Numbers:
    """Reads a table at one token of each row.

    Args:
      table: [...,V].
      token: [...]; −1 reads column 0, which callers mask.

    Returns:
      [...].
    """
    return jnp.take_along_axis(table, jnp.maximum(token, 0)[..., None], axis=-1)[..., 0]


def is_eos(token: Array, eos_ids: tuple[int, ...]) -> Array:
    """Tells which tokens end a response.

    Args:
      token: ids of any shape.
      eos_ids: the ids that end one; () holds none.

    Returns:
      bool, in token's shape.
    """
    if not eos_ids:
        return jnp.zeros(token.shape, bool)
    return (token[..., None] == jnp.asarray(eos_ids, token.dtype)).any(axis=-1)


def step_key(rng: Array, t: ArrayLike) -> Array:
    """Gives the key of the policy's step after one token of a rollout.

    Args:
      rng: the rollout's key.
      t: the token's number.

    Returns:
      A key.

    Raises:
      ValueError: an rng that is no key.
    """
    check_rng(rng)
    return jax.random.fold_in(jax.random.fold_in(rng, t), _MOVE)


def draw_rows(log_prob: LogProbs, rng: Array, rows: Array) -> NextToken:
    """Draws a token of each row from its own random stream.

    Args:
      log_prob: [B,V], normalised or not.
      rng: consumed; row b draws with it folded with each number of rows[b].
      rows: [B,m] integers.

    Returns:
      Tokens [B].

    Raises:
      ValueError: an rng that is no key.
    """
    return draw(log_prob, uniform_rows(rng, rows, log_prob.dtype))


def uniform_rows(rng: Array, rows: Array, dtype: jnp.dtype) -> PerPrompt:
    """Draws a uniform number of each row from its own random stream.

    Args:
      rng: consumed; row b draws with it folded with each number of rows[b].
      rows: [B,m] integers.
      dtype: of the numbers.

    Returns:
      [B] in [0,1).

    Raises:
      ValueError: an rng that is no key.
    """
    check_rng(rng)
    keys = jnp.broadcast_to(rng, rows.shape[:1] + rng.shape)
    for i in range(rows.shape[1]):
        keys = jax.vmap(jax.random.fold_in)(keys, rows[:, i])
    return jax.vmap(lambda key: jax.random.uniform(key, dtype=dtype))(keys)


def draw_margin(log_prob: LogProbs, uniform: PerPrompt) -> PerPrompt:
    """Gives how far the cumulative probabilities may move before `draw` takes another token.

    Args:
      log_prob: [B,V], normalised or not.
      uniform: [B] in [0,1), the number that the token is drawn with.

    Returns:
      [B] in [0,1]: the distance of u to the nearest cumulative sum between two tokens; 1 where one token has all the
      mass.
    """
    weight = jnp.exp(log_prob - log_prob.max(axis=-1, keepdims=True))
    edges = jnp.cumsum(weight, axis=-1) / weight.sum(axis=-1, keepdims=True)
    inner = (weight > 0) & (jnp.cumsum((weight > 0)[:, ::-1], axis=-1)[:, ::-1] > 1)  # not after the last token
    return jnp.where(inner, jnp.abs(uniform[:, None] - edges), 1).min(axis=-1)


def record(output: StepOutput, token: NextToken, active: PerPromptFlag) -> dict[str, Array]:
    """Gives what Completions keep of one step.

    Args:
      output: of the policy, before the token.
      token: [B].
      active: [B]; the entries of other rows are 0.

    Returns:
      The fields by name, each [B].
    """
    new = {
        "tokens": token,
        "mask": active,
        "log_prob": token_value(output.log_prob, token),
        "log_prob_ref": token_value(output.log_prob_ref, token),
        "log_norm": output.log_norm,
        "kl": exact_kl(output.log_prob, output.log_prob_ref),
    }
    return {name: jnp.where(active, value, 0).astype(value.dtype) for name, value in new.items()}


def no_records(shape: tuple[int, ...], dtype: jnp.dtype) -> dict[str, Array]:
    """Gives zeros for every field of `record`.

    Args:
      shape: of each.
      dtype: of the log-probabilities.

    Returns:
      The fields by name.
    """
    records = {name: jnp.zeros(shape, dtype) for name in ("log_prob", "log_prob_ref", "log_norm", "kl")}
    return records | {"tokens": jnp.zeros(shape, jnp.int32), "mask": jnp.zeros(shape, bool)}


class Frame(NamedTuple):
    """Where a rollout stands before it draws a token. Every array but records has the B rows first."""

    state: State
    """The policy's."""
    output: StepOutput
    """What the next tokens are drawn from."""
    finished: Array
    """[B] bool: rows that have ended."""
    records: dict[str, Array]
    """The tokens so far and what is known of them (`record`), each [T,B]: one row a step."""


class BeforeDraw(Protocol):
    """May change the frame before token t is drawn, as a resampling does. memory: the hook's own, of one structure."""

    def __call__(self, t: Array, frame: Frame, memory: Any) -> tuple[Frame, Any]: ...


class ChooseToken(Protocol):
    """The token [B] that is taken at step t, given the one drawn."""

    def __call__(self, t: Array, drawn: Array) -> Array: ...


class AfterStep(Protocol):
    """Rows [B] that stop after the policy's step on token t, given the output of the next token. A row that stopped
    keeps its state and output; it has not finished."""

    def __call__(self, t: Array, output: StepOutput) -> Array: ...


class Hooks(NamedTuple):
    """What a decoder does at each step of a rollout besides drawing; None: nothing."""

    before_draw: BeforeDraw | None = None
    """Changes the frame before a token is drawn."""
    choose_token: ChooseToken | None = None
    """Takes another token than the one drawn."""
    after_step: AfterStep | None = None
    """Stops rows after the policy's step."""


class Rolled(NamedTuple):
    """The end of a rollout."""

    state: State
    """A finished or stopped row's is the one it had before its EOS, or when it stopped."""
    output: StepOutput
    """As state; in rows that stand still it is kept only with keep_output."""
    completions: Completions
    """[B,T] of what was drawn."""
    memory: Any
    """The hooks' memory."""


class _Carry(NamedTuple):
    t: Array
    frame: Frame
    stopped: Array  # [B], by after_step
    memory: Any


def rollout(
    policy: Policy,
    params: Params,
    rng: Array,
    state: State,
    output: StepOutput,
    *,
    steps: int,
    eos_ids: tuple[int, ...],
    finished: Array | None = None,
    rows: Array | None = None,
    last_step: bool = True,
    begin: ArrayLike = 0,
    limits: ArrayLike | None = None,
    step_rng: Array | None = None,
    keep_output: bool = False,
    hooks: Hooks = Hooks(),  # noqa: B008  # immutable
    memory: Any = None,
) -> Rolled:
    """Draws up to `steps` tokens per row from output and its successors; stops when every row has finished or stopped.

    Args:
      policy, params: the policy and its parameters.
      rng: consumed. Step t of row b draws with rng folded with t and then with each number of rows[b], so a row's
        tokens do not depend on the other rows.
      state, output: as `policy.init` or a former rollout gave them, B rows.
      steps: T, at most.
      eos_ids: a row that draws one of them is finished; the EOS is part of its response.
      finished: [B], rows that draw nothing from the start.
      rows: [B,m] integers, m per row, that name the rows' random streams (decoders: the prompt's index and the
        sample's number); (0..B-1, 0) when None.
      last_step: False leaves out the policy's step after the last token, for callers that need no further state.
      begin: the number t of the first step, for the random streams: a rollout that goes on where another stopped draws
        what one long rollout would. May be traced.
      limits: of the T = steps tokens, draw at most this many, one number or [B]; all when None. May be traced.
      step_rng: the policy's step after token t gets this key folded with t; one made of rng when None.
      keep_output: a row that does not step keeps its output, at the cost of one more copy of the outputs a step.
      hooks: what happens at each step besides.
      memory: the initial memory of the hooks' before_draw.

    Returns:
      Rolled. A policy that has no distribution (NaN, as of a model whose cache is full) leaves NaN in log_prob and kl.

    Raises:
      ValueError: a key that is none; while tracing, a policy or hook that changes the form of what it is given.
    """
    check_rng(rng)
    if step_rng is not None:
        check_rng(step_rng, name="step_rng")
    batch = output.log_prob.shape[0]
    if rows is None:
        rows = jnp.stack([jnp.arange(batch), jnp.zeros(batch, jnp.int32)], axis=1)
    chex.assert_shape(rows, (batch, None))
    if finished is None:
        finished = jnp.zeros(batch, bool)
    most = jnp.broadcast_to(jnp.asarray(steps if limits is None else limits, jnp.int32), (batch,)).clip(max=steps)
    records = no_records((steps, batch), output.log_prob.dtype)

    def choose(carry: _Carry) -> tuple[_Carry, Array]:
        """The carry with one more token, and that token; -1 where the row draws nothing or has just ended."""
        t, frame, memory = carry.t, carry.frame, carry.memory
        if hooks.before_draw is not None:
            frame, memory = hooks.before_draw(t, frame, memory)
        active = ~frame.finished & ~carry.stopped & (t < most)
        token = draw_rows(frame.output.log_prob, jax.random.fold_in(rng, begin + t), rows)
        if hooks.choose_token is not None:
            token = hooks.choose_token(t, token)
        records = {
            name: frame.records[name].at[t].set(value.astype(frame.records[name].dtype))
            for name, value in record(frame.output, token, active).items()
        }
        finished = frame.finished | (active & is_eos(token, eos_ids))
        moves = active & ~finished
        frame = frame._replace(finished=finished, records=records)
        return carry._replace(t=t + 1, frame=frame, memory=memory), jnp.where(moves, token, -1)

    def body(carry: _Carry) -> _Carry:
        t = carry.t
        key = step_key(rng, begin + t) if step_rng is None else jax.random.fold_in(step_rng, t)
        carry, token = choose(carry)
        state, output = step_policy(policy, params, key, carry.frame.state, token)
        check_same_types(f"policy.step ({called(policy.step)})", "output", carry.frame.output, output)
        if keep_output:
            output = where_rows(token >= 0, output, carry.frame.output)
        carry = carry._replace(frame=carry.frame._replace(state=state, output=output))
        if hooks.after_step is not None:
            carry = carry._replace(stopped=carry.stopped | ((token >= 0) & hooks.after_step(t, output)))
        return carry

    def goes_on(carry: _Carry) -> Array:
        going = ~carry.frame.finished & ~carry.stopped
        return (going & (carry.t < (most if last_step else most - 1))).any()

    frame = Frame(state, output, finished, records)
    carry = _Carry(jnp.zeros((), jnp.int32), frame, jnp.zeros(batch, bool), memory)
    carry = jax.lax.while_loop(goes_on, body, carry)
    if not last_step:
        carry, _ = choose(carry)
    frame = carry.frame
    fields = {name: value.T for name, value in frame.records.items()}
    completions = Completions(**fields, finished=frame.finished, truncated=~frame.finished)
    return Rolled(frame.state, frame.output, completions, carry.memory)
