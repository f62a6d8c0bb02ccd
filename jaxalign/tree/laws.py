"""Laws over whole responses: of policies, of the Gibbs optimum, and of decoders that select."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import at_least_float32, is_supported
from jaxalign.shapes import Numbers, PerResponse, Scalar, StateTable, StateValues
from jaxalign.tree.structure import Tree, check_table
from jaxalign.types import Array, ArrayLike


@functools.partial(jax.jit, static_argnums=0)
def response_log_prob(tree: Tree, log_policy: StateTable) -> PerResponse:
    """Gives the law of a policy over whole responses, log pi(y) = Σ_t log pi(y_t|s_t).

    Args:
      tree: the tree.
      log_policy: [S,V], in nats.

    Returns:
      [M], in nats.

    Raises:
      ValueError: a table of another shape.
    """
    check_table(tree, "log_policy", log_policy, "SV")
    tokens, mask = tree.responses
    each = at_least_float32(log_policy)[jnp.asarray(tree.nodes), jnp.asarray(tokens)]
    return jnp.where(jnp.asarray(mask), each, 0).sum(axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def state_log_prob(tree: Tree, log_policy: StateTable) -> StateValues:
    """Gives the log-probability that a policy reaches each state.

    Args:
      tree: the tree.
      log_policy: [S,V], in nats.

    Returns:
      [S], in nats; −inf for dead states.

    Raises:
      ValueError: a table of another shape.
    """
    check_table(tree, "log_policy", log_policy, "SV")
    log_policy = at_least_float32(log_policy)
    levels = [jnp.zeros(1, log_policy.dtype)]
    for depth in range(tree.horizon - 1):
        levels.append((levels[-1][:, None] + log_policy[tree.level(depth)]).reshape(-1))
    return jnp.where(jnp.asarray(tree.alive), jnp.concatenate(levels), -jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def policy_of(tree: Tree, log_prob: PerResponse) -> StateTable:
    """Gives the policy that has a given law over responses: its conditionals.

    Args:
      tree: the tree.
      log_prob: [M], log of the law, normalised or not.

    Returns:
      [S,V], in nats; uniform where the law has no mass and in dead states.

    Raises:
      ValueError: a law of another shape.
    """
    check_table(tree, "log_prob", log_prob, "M")
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
def expected(log_prob: PerResponse, *, values: PerResponse) -> Scalar:
    """Gives the mean of a function of the response, E_pi[f] = Σ_y pi(y)·f(y).

    Args:
      log_prob: [M], normalised, in nats.
      values: [M], f; where the law has no mass it may hold anything.

    Returns:
      A scalar in units of f; NaN where the law has a NaN.
    """
    weight = jnp.exp(at_least_float32(log_prob))
    # Tested for zero, not for positive: a NaN in a law must show in every number that rests on it.
    return jnp.where(weight == 0, 0, weight * values).sum(axis=-1)


@jax.jit
def sequence_kl(log_p: PerResponse, log_q: PerResponse) -> Scalar:
    """Gives KL(p‖q) of two laws over responses, with 0·log 0 = 0.

    Args:
      log_p: [M], normalised.
      log_q: [M], normalised.

    Returns:
      A scalar, in nats.
    """
    return _divergence(log_p, log_q)


def _divergence(log_p: Array, log_q: Array) -> Array:
    """Σ p·(log p − log q) over the last axis; 0·log 0 = 0, NaN passes."""
    weight = jnp.exp(at_least_float32(log_p))
    absent = weight == 0
    return jnp.where(absent, 0, weight * (jnp.where(absent, 0, log_p) - jnp.where(absent, 0, log_q))).sum(axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def step_kl(tree: Tree, log_p: StateTable, log_q: StateTable) -> StateValues:
    """Gives the share of each state in the KL of two policies, Pr_p(s)·KL(p(·|s)‖q(·|s)).

    Its sum over the states is the sequence KL (chain rule).

    Args:
      tree: the tree.
      log_p: [S,V], in nats.
      log_q: [S,V], in nats.

    Returns:
      [S], in nats; 0 for states that p does not reach.

    Raises:
      ValueError: a table of another shape.
    """
    check_table(tree, "log_p", log_p, "SV")
    check_table(tree, "log_q", log_q, "SV")
    each = _divergence(log_p, log_q)
    reach = jnp.exp(state_log_prob(tree, log_p))
    return jnp.where(reach == 0, 0, reach * each)


def optimal_log_prob(tree: Tree, log_ref: StateTable, reward: PerResponse, *, beta: ArrayLike) -> PerResponse:
    """Gives the Gibbs optimum over responses, log pi*(y) = log pi_ref(y) + r(y)/beta − log Z.

    Args:
      tree: the tree.
      log_ref: [S,V], the base policy, in nats.
      reward: [M].
      beta: the KL weight > 0, in units of reward per nat.

    Returns:
      [M], in nats.

    Raises:
      ValueError: a table of another shape.
    """
    check_table(tree, "reward", reward, "M")
    log_base, reward = response_log_prob(tree, log_ref), at_least_float32(reward)
    # Differences of the reward before the division: beside r/beta of 1e7 the base would be lost.
    top = jnp.where(is_supported(log_base), jax.lax.stop_gradient(reward), -jnp.inf).max(axis=-1, keepdims=True)
    return jax.nn.log_softmax(log_base + (reward - jnp.where(jnp.isfinite(top), top, 0)) / beta)


def greedy_response(tree: Tree, log_policy: StateTable) -> int:
    """Gives the response of taking the most probable token in each state, the first among equals.

    Args:
      tree: the tree.
      log_policy: [S,V].

    Returns:
      The response's number.

    Raises:
      ValueError: a table of another shape.
    """
    check_table(tree, "log_policy", log_policy, "SV")
    best = np.argmax(np.asarray(log_policy), axis=-1)
    state = 0
    while True:
        end = tree.leaf[state, best[state]]
        if end >= 0:
            return int(end)
        state = state * tree.vocab_size + 1 + int(best[state])


@jax.jit
def win_rate(log_p: PerResponse, log_q: PerResponse, *, reward: PerResponse, ties: ArrayLike = 0.5) -> Scalar:
    """Gives Pr(r(y) > r(y')) + ties·Pr(r(y) = r(y')) for independent y ~ p and y' ~ q.

    Args:
      log_p: [M], normalised.
      log_q: [M], normalised.
      reward: [M].
      ties: what a tie counts.

    Returns:
      A scalar in [0, 1].
    """
    below, at, total = _ranks(jnp.zeros(reward.shape, jnp.int32), reward, jnp.exp(at_least_float32(log_q)))
    return (jnp.exp(log_p) * (below + ties * at) / total).sum()


def _ranks(group: Array, score: Array, mass: Array) -> tuple[Array, Array, Array]:
    """Mass of lower scores, of equal scores, and of all, inside each entry's group; all [M].

    Equal scores are summed by themselves and lower ones from the group's start: a difference of two prefix sums would
    leave no digit of a rare response.
    """
    order = jnp.lexsort((score, group))
    group, score, mass = group[order], score[order], mass[order]
    one = jnp.ones(1, bool)
    new_group = jnp.concatenate([one, group[1:] != group[:-1]])
    new_value = new_group | jnp.concatenate([one, score[1:] != score[:-1]])
    value, count = jnp.cumsum(new_value) - 1, mass.shape[0]
    at = jax.ops.segment_sum(mass, value, num_segments=count)[value]
    total = jax.ops.segment_sum(mass, jnp.cumsum(new_group) - 1, num_segments=count)[jnp.cumsum(new_group) - 1]

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    upto = jax.lax.associative_scan(add, (new_group, jnp.where(new_value, at, 0)))[1]
    # Up to and with the value before this one: read at the entry before the value's first.
    first = jax.lax.cummax(jnp.where(new_value, jnp.arange(count), 0))
    below = jnp.where(new_group[first], 0, upto[jnp.maximum(first - 1, 0)])
    return (
        jnp.zeros_like(below).at[order].set(below),
        jnp.zeros_like(at).at[order].set(at),
        jnp.zeros_like(total).at[order].set(total),
    )


def _log_best(log_own: Array, below: Array, at: Array, total: Array, n: ArrayLike) -> Array:
    """log of own/at·(F(<=v)^n − F(<v)^n), the difference as F^n·(1 − (1 − at/F)^n); −inf where own is zero."""
    absent = (jnp.exp(log_own) == 0) | (at == 0)
    at = jnp.where(absent, 1, at)
    upto = below + at
    log_upto = jnp.log(upto) - jnp.log(jnp.where(absent, 1, total))
    lowest = below == 0  # of its group: gained = 1, and no derivative of log1p at -1
    gained = jnp.where(lowest, 1, -jnp.expm1(n * jnp.log1p(-jnp.where(lowest, 0.5, at / upto))))
    law = jnp.where(absent, 0, log_own) - jnp.log(at) + n * log_upto + jnp.log(jnp.where(absent, 1, gained))
    return jnp.where(absent, -jnp.inf, law)


@jax.jit
def best_of_n_law(log_prob: PerResponse, *, score: PerResponse, n: ArrayLike) -> PerResponse:
    """Gives the law of the best of n independent responses, P(y) = share(y)·(F(<=v)^n − F(<v)^n).

    Ties are split by their share of the base.

    Args:
      log_prob: [M], the base's law, in nats.
      score: [M], what the best is chosen by.
      n: samples >= 1; any real number.

    Returns:
      [M], in nats; −inf where the base has no mass.
    """
    log_prob = at_least_float32(log_prob)
    below, at, total = _ranks(jnp.zeros(score.shape, jnp.int32), score, jnp.exp(log_prob))
    return _log_best(log_prob, below, at, total, n)


@jax.jit
def worst_of_n_law(log_prob: PerResponse, *, score: PerResponse, n: ArrayLike) -> PerResponse:
    """Gives the law of the worst of n independent responses: the best by the negated score.

    Args:
      log_prob: [M], the base's law, in nats.
      score: [M], what the worst is chosen by.
      n: samples >= 1; any real number.

    Returns:
      [M], in nats; −inf where the base has no mass.
    """
    result: Array = best_of_n_law(log_prob, score=-score, n=n)
    return result


def best_of_n_bound(n: ArrayLike) -> Numbers:
    """Gives an upper bound of KL(best of n‖base), log n − (n−1)/n, to which it tends for continuous scores.

    Args:
      n: samples >= 1, any shape.

    Returns:
      In nats, in n's shape.
    """
    n = at_least_float32(n)
    return jnp.log(n) - (n - 1) / n


def blockwise_law(
    tree: Tree, log_ref: StateTable, *, state_score: StateValues, reward: PerResponse, num_samples: int, block_size: int
) -> PerResponse:
    """Gives the law of blockwise best-of-N over responses.

    The decoder repeats {draw N blocks of M tokens from the base, cut at the response's end; keep the best by the score
    of what the block reaches}; ties are split by their share. A block_size of at least the horizon is best-of-N by
    reward; N = 1 is the base.

    Args:
      tree: the tree.
      log_ref: [S,V], the base policy, in nats.
      state_score: [S], the score of a state at a block's end.
      reward: [M], the score of a completed response.
      num_samples: N >= 1 blocks to choose from.
      block_size: M >= 1 tokens.

    Returns:
      [M], in nats.

    Raises:
      ValueError: num_samples or block_size below 1, a table of another shape.
    """
    if num_samples < 1 or block_size < 1:
        raise ValueError(f"num_samples, block_size: expected at least 1 each, found {num_samples} and {block_size}")
    check_table(tree, "log_ref", log_ref, "SV")
    check_table(tree, "state_score", state_score, "S")
    check_table(tree, "reward", reward, "M")
    result: Array = _blockwise(tree, log_ref, state_score, reward, num_samples, block_size)
    return result


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
        law = _log_best(log_block, *_ranks(start, score, mass), candidates)
        total = jnp.where(live, total + law, total)
    return total


def blockwise_bound(tree: Tree, log_prob: PerResponse, *, num_samples: int, block_size: int) -> Scalar:
    """Gives an upper bound of KL(blockwise best-of-N‖base), E⌈|y|/M⌉·(log N − (N−1)/N) under the decoded law.

    Args:
      tree: the tree.
      log_prob: [M], the decoded law (`blockwise_law`), in nats.
      num_samples: N >= 1 blocks to choose from.
      block_size: M >= 1 tokens.

    Returns:
      A scalar, in nats.

    Raises:
      ValueError: a law of another shape.

    Source: arXiv 2310.17022. Without the ceiling the bound is violated.
    """
    check_table(tree, "log_prob", log_prob, "M")
    blocks = -(-jnp.asarray(tree.responses[1]).sum(axis=-1) // block_size)
    result: Array = expected(log_prob, values=blocks) * best_of_n_bound(num_samples)
    return result
