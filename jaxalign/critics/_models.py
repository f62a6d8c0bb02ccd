"""Critics that read a model: partial-text rewards, value heads, heads of shaped rewards, autoregressive rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import shaping
from jaxalign._arrays import at_least_float32, where_rows
from jaxalign._checks import check_has_logits, check_prompt_fits
from jaxalign.types import Array, Critic, Params, State, StepOutput, TokenBatch


def args(reward_lm: Any) -> Critic:
    """ARGS: q(s,z) = r(sz), a reward model's scalar on the partial text (arXiv 2402.01694). Level; params: the model's.

    The K candidates are scored in one forward pass of K tokens at one position over the shared cache of the prefix;
    the winner's keys and values are then written to the cache. Same as pi ∝ exp(logit + lam·r) with beta = 1/lam.
    """
    return _candidate_critic("args", reward_lm)


def value(lm: Any) -> Critic:
    """Controlled decoding: q(s,z) = V(sz), the value of the state after z (arXiv 2310.17022). Level; params: the
    model's.

    A scalar head reads V(sz) at each candidate (K tokens in one pass, as `args`); a Q head (V wide) gives all V(sz) at
    the state s, so that a step costs one token. The model may share its weights with the base: pass the base's arrays
    with the head beside them. For a Q head on hidden states that the policy computes anyway see `hidden_value`.
    """
    if lm.config.head is not None and lm.config.head.follower is not None:
        raise ValueError(f"value: expected a head of values, found one of log weights ({lm.config.head.follower})")
    if lm.config.head is not None and lm.config.head.kind == "q":
        return _vocabulary_critic("value", lm, lm.head, "level")
    return _candidate_critic("value", lm)


def follower(lm: Any, *, beta: float | None = None, bound: float | None = None) -> Critic:
    """The exact follower of a shaped reward: q(s,z) = the log weight of sz, under `tilt` with beta 1. Level; params:
    the model's.

    lm has a head trained by `train.value --objective exceedance` or `soft` (models.Follower): a classifier of
    Pr_ref(u > m | prefix), read as log(1 + (e^(bound/beta) − 1)·p), or the soft value of the shaped reward over beta.
    If they are right, decoding by tokens has the law of the whole response's optimum, which V_ref in their place has
    not. beta, bound: what the caller wants; ValueError where the head was trained for others, or for none.
    """
    spec = None if lm.config.head is None else lm.config.head.follower
    if spec is None:
        raise ValueError("follower: expected a head that was trained for a shaped reward, found " + str(lm.config.head))
    for name, wanted in (("beta", beta), ("bound", bound)):
        if wanted is not None and wanted != getattr(spec, name):
            raise ValueError(f"{name}: expected {getattr(spec, name)}, which the head was trained for, found {wanted}")

    def weigh(found: Array) -> Array:
        if spec.objective == "exceedance":
            return shaping.exceedance_log_weight(found, gain=spec.bound / spec.beta)
        return at_least_float32(found) / spec.beta

    if lm.config.head.kind == "q":
        critic = _vocabulary_critic("follower", lm, lambda params, hidden: weigh(lm.head(params, hidden)), "level")
    else:
        critic = _candidate_critic("follower", lm, weigh)
    return critic._replace(beta=1.0)


def genarm(lm: Any) -> Critic:
    """GenARM: q(s,z) = log pi_r(z|s), an autoregressive reward model (arXiv 2410.08193, eq. 7). Increment; params: the
    model's. Under `tilt` the guidance weight alpha is 1/beta."""
    check_has_logits("genarm", lm)

    def read(params: Params, hidden: Array) -> Array:
        return jax.nn.log_softmax(lm.logits(params, hidden))

    return _vocabulary_critic("genarm", lm, read, "increment")


def hidden_value(head: Callable[[Params, Array], Array], *, vocab_size: int | None = None) -> Critic:
    """A Q head on the hidden states of the policy below: q(s,·) = head(params, hidden [B,D]) -> [B,V]. Level.

    No model of its own, no cache: `lm.head` of a model with a Q head is such a head. A scalar head cannot serve here,
    since hidden belongs to s and not to the candidates sz: use `value` with the base's weights.
    """

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        return {}

    def score(params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None) -> Any:
        if output.hidden is None:
            raise ValueError("hidden_value: expected a policy that gives hidden states, found hidden = None")
        q = at_least_float32(head(params, output.hidden))
        if q.shape != output.log_prob.shape:
            raise ValueError(f"hidden_value: expected a head of shape {output.log_prob.shape}, found {q.shape}")
        return gather(q, candidates), {}

    def advance(params: Params, proposal: State, choice: Array) -> State:
        return {}

    return Critic(init, score, advance, "level", None, vocab_size)


def gather(table: Array, candidates: Array | None) -> Array:
    """table [B,V] at candidates [B,K], or whole."""
    return table if candidates is None else jnp.take_along_axis(table, candidates, axis=-1)


_BLOCK = 256  # candidates per pass where a scalar head scores the whole vocabulary


def _candidate_critic(name: str, lm: Any, weigh: Callable[[Array], Array] = at_least_float32) -> Critic:
    """Level critic that reads a scalar head at each candidate: K tokens at one position over the shared prefix.

    Over the whole vocabulary (candidates None) the tokens go through in blocks, and the chosen one once more: neither
    the activations nor the keys and values of V tokens a row are ever held.
    """
    head = lm.config.head
    if head is None or lm.head_width != 1:
        found = "no head" if head is None else f"a head of width {lm.head_width}"
        raise ValueError(f"{name}: expected a model with a scalar head, found {found}")

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        capacity = prompts.tokens.shape[1] + max_new_tokens
        return {"cache": lm.prefill(params, prompts.tokens, prompts.mask, capacity)[1]}

    def score(params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None) -> Any:
        if candidates is None:
            batch, vocab = output.log_prob.shape
            width = min(_BLOCK, vocab)
            # The last block may run over the end: its surplus tokens are scored and cut.
            ids = jnp.minimum(jnp.arange(-(-vocab // width) * width, dtype=jnp.int32), vocab - 1).reshape(-1, width)

            def block(tokens: Array) -> Array:
                hidden = lm.candidates(params, state["cache"], jnp.broadcast_to(tokens, (batch, width)))[0]
                return weigh(lm.head(params, hidden)[..., 0])

            q = jnp.moveaxis(jax.lax.map(block, ids), 0, 1).reshape(batch, -1)[:, :vocab]
            return q, {"cache": state["cache"]}
        hidden, entries = lm.candidates(params, state["cache"], candidates)
        return weigh(lm.head(params, hidden)[..., 0]), {"cache": state["cache"], "entries": entries}

    def advance(params: Params, proposal: State, choice: Array) -> State:
        if "entries" not in proposal:  # the choice is a token of the whole vocabulary
            return {"cache": lm.step(params, proposal["cache"], choice)[1]}
        return {"cache": lm.commit(proposal["cache"], proposal["entries"], choice)}

    return Critic(init, score, advance, "level", _model_check(lm), lm.vocab_size)


def _vocabulary_critic(name: str, lm: Any, read: Callable[[Params, Array], Array], kind: Any) -> Critic:
    """A critic whose model gives the score of every token at once: one token a step, read(params, hidden) [B,V]."""

    def table(params: Params, hidden: Array) -> Array:
        q = at_least_float32(read(params, hidden))
        if q.shape[-1] != lm.vocab_size:
            raise ValueError(f"{name}: expected a score for each of {lm.vocab_size} tokens, found {q.shape[-1]}")
        return q

    def init(params: Params, rng: Array, prompts: TokenBatch, max_new_tokens: int) -> State:
        capacity = prompts.tokens.shape[1] + max_new_tokens
        hidden, cache = lm.prefill(params, prompts.tokens, prompts.mask, capacity)
        return {"cache": cache, "q": table(params, hidden)}

    def score(params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None) -> Any:
        proposal = dict(state)
        if candidates is not None:
            proposal["candidates"] = candidates
        return gather(state["q"], candidates), proposal

    def advance(params: Params, proposal: State, choice: Array) -> State:
        token = choice
        if "candidates" in proposal:
            chosen = jnp.take_along_axis(proposal["candidates"], jnp.maximum(choice, 0)[:, None], axis=-1)[:, 0]
            token = jnp.where(choice < 0, -1, chosen)
        hidden, cache = lm.step(params, proposal["cache"], token)
        return {"cache": cache, "q": where_rows(choice < 0, proposal["q"], table(params, hidden))}

    return Critic(init, score, advance, kind, _model_check(lm), lm.vocab_size)


def _model_check(lm: Any) -> Callable[..., None]:
    def check(params: Params, prompts: TokenBatch, max_new_tokens: int) -> None:
        check_prompt_fits(lm, prompts, max_new_tokens)

    return check
