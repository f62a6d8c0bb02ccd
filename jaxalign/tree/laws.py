"""Laws over whole responses: of policies, of the Gibbs optimum, and of decoders that select."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.tree.structure import Tree
from jaxalign.types import Array, ArrayLike, at_least_float32


@functools.partial(jax.jit, static_argnums=0)
def response_log_prob(tree: Tree, log_policy: Array) -> Array:
    """log pi(y) = Σ_t log pi(y_t|s_t), [M] from log_policy [S,V]."""
    tokens, mask = tree.responses
    each = at_least_float32(log_policy)[jnp.asarray(tree.nodes), jnp.asarray(tokens)]
    return jnp.where(jnp.asarray(mask), each, 0).sum(axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def state_log_prob(tree: Tree, log_policy: Array) -> Array:
    """log Pr(s is reached), [S]; −inf for dead states."""
    log_policy = at_least_float32(log_policy)
    levels = [jnp.zeros(1, log_policy.dtype)]
    for depth in range(tree.horizon - 1):
        levels.append((levels[-1][:, None] + log_policy[tree.level(depth)]).reshape(-1))
    return jnp.where(jnp.asarray(tree.alive), jnp.concatenate(levels), -jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def policy_of(tree: Tree, log_prob: Array) -> Array:
    """The conditionals [S,V] of any law over responses log_prob [M] (normalised or not); uniform where the law has no
    mass and in dead states."""
    log_prob = at_least_float32(log_prob)
    leaf = jnp.asarray(tree.leaf)
    own = jnp.where(leaf >= 0, log_prob[jnp.maximum(leaf, 0)], -jnp.inf)
    levels: list[Array] = []
    below = jnp.full((tree.vocab_size**tree.horizon,), -jnp.inf, log_prob.dtype)
    for depth in reversed(range(tree.horizon)):
        at = tree.level(depth)
        mass = jnp.where(leaf[at] >= 0, own[at], below.reshape(-1, tree.vocab_size))
        mass = jnp.where(jnp.asarray(tree.alive)[at][:, None], mass, -jnp.inf)
        total = jax.nn.logsumexp(mass, axis=-1, keepdims=True)
        empty = ~jnp.isfinite(total)
        levels.append(jnp.where(empty, -jnp.log(tree.vocab_size), mass - jnp.where(empty, 0, total)))
        below = total[:, 0]
    return jnp.concatenate(levels[::-1])


@jax.jit
def expected(log_prob: Array, values: Array) -> Array:
    """E_pi[f] = Σ_y pi(y)·f(y), from [M] and [M]."""
    weight = jnp.exp(at_least_float32(log_prob))
    return jnp.where(weight > 0, weight * values, 0).sum(axis=-1)


@jax.jit
def sequence_kl(log_p: Array, log_q: Array) -> Array:
    """KL(p‖q) of two laws over responses [M], in nats; 0·log 0 = 0."""
    weight = jnp.exp(at_least_float32(log_p))
    return jnp.where(weight > 0, weight * (jnp.where(weight > 0, log_p, 0) - log_q), 0).sum(axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def step_kl(tree: Tree, log_p: Array, log_q: Array) -> Array:
    """KL(p(·|s)‖q(·|s)) [S] of two policies [S,V], weighted by the probability of reaching s under p: the sum over s is
    the sequence KL (chain rule)."""
    weight = jnp.exp(at_least_float32(log_p))
    each = jnp.where(weight > 0, weight * (jnp.where(weight > 0, log_p, 0) - log_q), 0).sum(axis=-1)
    reach = jnp.exp(state_log_prob(tree, log_p))
    return jnp.where(reach > 0, reach * each, 0)


def optimal_log_prob(tree: Tree, log_ref: Array, reward: Array, *, beta: ArrayLike) -> Array:
    """The Gibbs optimum over responses, log pi*(y) = log pi_ref(y) + r(y)/beta − log Z, [M]."""
    return jax.nn.log_softmax(response_log_prob(tree, log_ref) + at_least_float32(reward) / beta)


def greedy_response(tree: Tree, log_policy: Array) -> int:
    """The response of taking the most probable token in each state (the first among equals)."""
    best = np.argmax(np.asarray(log_policy), axis=-1)
    state = 0
    while True:
        end = tree.leaf[state, best[state]]
        if end >= 0:
            return int(end)
        state = state * tree.vocab_size + 1 + int(best[state])


@jax.jit
def win_rate(log_p: Array, log_q: Array, reward: Array, *, ties: ArrayLike = 0.5) -> Array:
    """Pr(r(y) > r(y')) + ties·Pr(r(y) = r(y')), y ~ p and y' ~ q independent, laws [M]."""
    below, at = _cumulative(log_q, reward)
    return (jnp.exp(log_p) * (below + ties * at)).sum()


def _cumulative(log_prob: Array, score: Array) -> tuple[Array, Array]:
    """(Pr(score < score_i), Pr(score = score_i)) [M] under the law log_prob [M]."""
    order = jnp.argsort(score)
    ranked, mass = score[order], jnp.exp(at_least_float32(log_prob))[order]
    total = jnp.concatenate([jnp.zeros(1, mass.dtype), jnp.cumsum(mass)])
    low = total[jnp.searchsorted(ranked, score, side="left")]
    high = total[jnp.searchsorted(ranked, score, side="right")]
    return low / total[-1], (high - low) / total[-1]


@jax.jit
def best_of_n_law(log_prob: Array, score: Array, n: ArrayLike) -> Array:
    """log-law [M] of the best of n independent responses by score [M], ties split by their share of the base:
    P(y) = share(y)·(F(<=v)^n − F(<v)^n)."""
    below, at = _cumulative(log_prob, score)
    share = jnp.exp(log_prob) / at
    return jnp.log(share * ((below + at) ** n - below**n))


@jax.jit
def worst_of_n_law(log_prob: Array, score: Array, n: ArrayLike) -> Array:
    """log-law [M] of the worst of n: the best by the negated score."""
    return best_of_n_law(log_prob, -score, n)


def best_of_n_bound(n: ArrayLike) -> Array:
    """log n − (n−1)/n, in nats: KL(best of n‖base) is at most this, and tends to it for continuous scores."""
    n = at_least_float32(n)
    return jnp.log(n) - (n - 1) / n


def blockwise_law(
    tree: Tree, log_ref: Array, state_score: Array, reward: Array, *, candidates: int, block: int
) -> Array:
    """log-law [M] of blockwise best-of-N: repeat {draw N blocks of M tokens from the base, cut at the response's end;
    keep the best by the score of what the block reaches}, ties split by their share.

    state_score [S] scores a state at a block's end, reward [M] a completed response. candidates = N >= 1, block =
    M >= 1 tokens. block >= horizon is best-of-N by reward; N = 1 is the base.
    """
    if candidates < 1 or block < 1:
        raise ValueError(f"candidates, block: expected at least 1 each, found {candidates} and {block}")
    return _blockwise(tree, log_ref, state_score, reward, candidates, block)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _blockwise(tree: Tree, log_ref: Array, state_score: Array, reward: Array, candidates: int, block: int) -> Array:
    log_ref = at_least_float32(log_ref)
    tokens, mask = (jnp.asarray(x) for x in tree.responses)
    nodes, length = jnp.asarray(tree.nodes), jnp.asarray(tree.responses[1]).sum(axis=-1)
    each = jnp.where(mask, log_ref[nodes, tokens], 0)
    prefix = jnp.cumsum(each, axis=-1)
    rows = jnp.arange(tree.num_responses)
    total = jnp.zeros(tree.num_responses, log_ref.dtype)
    for begin in range(0, tree.horizon, block):
        stop = min(begin + block, tree.horizon)
        ended = length <= stop
        # What the block reaches: a response, numbered S + i, or the state before token `stop`.
        end_state = nodes[:, stop] if stop < tree.horizon else jnp.zeros_like(rows)
        reached = jnp.where(ended, tree.num_states + rows, end_state)
        score = jnp.where(ended, at_least_float32(reward)[rows], state_score[end_state])
        before = prefix[:, begin - 1] if begin else jnp.zeros_like(total)
        log_block = prefix[:, stop - 1] - before
        start = nodes[:, begin]
        # Each block is counted once: by the first response that passes through it.
        first = (
            jnp.full(tree.num_states + tree.num_responses, tree.num_responses).at[reached].min(rows)[reached] == rows
        )
        live = length > begin
        mass = jnp.where(first & live, jnp.exp(log_block), 0)
        law = _grouped_best(start, score, mass, jnp.exp(log_block), candidates)
        total = jnp.where(live, total + jnp.log(law), total)
    return total


def _grouped_best(group: Array, score: Array, mass: Array, own: Array, n: int) -> Array:
    """P(block) = share·(F(<=v)^n − F(<v)^n) with F the law of scores inside each group; own: the block's base mass."""
    order = jnp.lexsort((score, group))
    ranked_group, ranked_score, ranked_mass = group[order], score[order], mass[order]
    cumulative = jnp.concatenate([jnp.zeros(1, mass.dtype), jnp.cumsum(ranked_mass)])
    new_group = jnp.concatenate([jnp.ones(1, bool), ranked_group[1:] != ranked_group[:-1]])
    new_value = new_group | jnp.concatenate([jnp.ones(1, bool), ranked_score[1:] != ranked_score[:-1]])
    position = jnp.arange(group.shape[0])
    group_first = jax.lax.cummax(jnp.where(new_group, position, 0))
    value_first = jax.lax.cummax(jnp.where(new_value, position, 0))
    ends_value = jnp.concatenate([new_value[1:], jnp.ones(1, bool)])
    value_last = jax.lax.cummin(jnp.where(ends_value, position, group.shape[0]), reverse=True)
    below = cumulative[value_first] - cumulative[group_first]
    upto = cumulative[value_last + 1] - cumulative[group_first]
    share_base = upto - below
    gain = jnp.where(share_base > 0, (upto**n - below**n) / jnp.where(share_base > 0, share_base, 1), 0)
    return own * jnp.zeros_like(gain).at[order].set(gain)


def blockwise_bound(tree: Tree, log_prob: Array, *, candidates: int, block: int) -> Array:
    """E⌈|y|/M⌉·(log N − (N−1)/N) under the decoded law log_prob [M]: an upper bound of its KL to the base. The ceiling
    is needed (arXiv 2310.17022 has it; without it the bound is violated)."""
    blocks = -(-jnp.asarray(tree.responses[1]).sum(axis=-1) // block)
    return expected(log_prob, blocks) * best_of_n_bound(candidates)
