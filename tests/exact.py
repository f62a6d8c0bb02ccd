"""Exact laws of decoders on a small tree: every response is scored under the policy, nothing is sampled."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, policies, tree
from jaxalign._arrays import is_supported
from jaxalign.types import Critic, Params, Policy, TokenBatch

RNG = jax.random.key(0)


def tables(t: tree.Tree, seed: int) -> tuple[jax.Array, jax.Array]:
    """(log_policy [S,V] with N(0,1) logits, reward [M] ~ N(0,1)), in float64 where it is enabled."""
    return tree.random(jax.random.key(seed), t, dtype=jnp.result_type(float))


def one_prompt(batch: int) -> TokenBatch:
    """`batch` copies of one dummy prompt, all of index 0 so that they share a table."""
    return TokenBatch(jnp.ones((batch, 2), jnp.int32), jnp.ones((batch, 2), bool), jnp.zeros(batch, jnp.int32))


def responses(t: tree.Tree) -> tuple[jax.Array, jax.Array]:
    tokens, mask = t.responses
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


def completions(t: tree.Tree, policy: Policy, params: Params):
    """Completions of all M responses under any Policy."""
    tokens, mask = responses(t)
    return decoding.log_prob(policy, params, RNG, one_prompt(len(tokens)), tokens, mask)


def log_law(t: tree.Tree, policy: Policy, params: Params) -> np.ndarray:
    """log pi(y) [M] of any Policy; −inf where a token has probability zero."""
    scored = completions(t, policy, params)
    total = np.asarray(scored.log_prob.sum(axis=1))
    return np.where(np.asarray(is_supported(scored.log_prob).all(axis=1)), total, -np.inf)


@functools.lru_cache(maxsize=64)
def tilt(t: tree.Tree, critic: Critic, top_k: int | None = None) -> Policy:
    """One tilt for each critic: a new closure would be a new trace (law 6)."""
    return policies.tilt(tree.policy(t), critic, top_k=top_k)


def tilted_law(
    t: tree.Tree, log_base: jax.Array, critic: Critic, critic_params: Params, *, beta, top_k: int | None = None
) -> np.ndarray:
    """log pi'(y) [M] of the base table tilted by a critic."""
    return log_law(t, tilt(t, critic, top_k), {"policy": log_base, "critic": critic_params, "beta": jnp.asarray(beta)})


def gibbs_law(log_base: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """log of pi_ref(y)·exp(r/beta)/Z, in plain numpy."""
    logit = np.asarray(log_base) + np.asarray(reward) / beta
    return logit - np.log(np.exp(logit - logit.max()).sum()) - logit.max()


def total_variation(log_p: np.ndarray, log_q: np.ndarray) -> float:
    return 0.5 * float(np.abs(np.exp(log_p) - np.exp(log_q)).sum())


def kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    p = np.exp(log_p)
    return float(np.where(p > 0, p * (np.where(p > 0, log_p, 0) - log_q), 0).sum())


def beam_law(t: tree.Tree, log_base, q, *, width: int, samples: int) -> np.ndarray:
    """log of the law [M] of beam search with blocks of one token, by going through all draws of all blocks: q [S,V] is
    the level critic, ties keep the first, and a response that has ended stands once among those that are compared."""
    base, score = np.exp(np.asarray(log_base, np.float64)), np.asarray(q, np.float64)
    tokens, mask = (np.asarray(x) for x in t.responses)
    number = {tuple(row[real].tolist()): i for i, (row, real) in enumerate(zip(tokens, mask, strict=True))}

    def node(path):
        s = 0
        for z in path:
            s = t.vocab_size * s + 1 + z
        return s

    def value(path):
        return score[node(path[:-1]), path[-1]]

    searches = {((),): 1.0}
    for _ in range(t.horizon):
        after: dict[tuple, float] = {}
        for beams, p in searches.items():
            beams = beams if beams != ((),) else ((),) * width  # a prompt begins with all its beams
            going = [path not in number for path in beams]
            for draw in itertools.product(range(t.vocab_size), repeat=samples * sum(going)):
                each, texts, share = iter(draw), [], p
                for path, goes in zip(beams, going, strict=True):
                    if not goes:
                        texts.append(path)
                        continue
                    for z in itertools.islice(each, samples):
                        texts.append((*path, z))
                        share *= base[node(path), z]
                kept = sorted(sorted(range(len(texts)), key=lambda i: -value(texts[i]))[:width])
                key = tuple(texts[i] for i in kept)
                after[key] = after.get(key, 0) + share
        searches = after
    law = np.zeros(len(tokens))
    for beams, p in searches.items():
        law[number[max(beams, key=value)]] += p
    return np.log(law)
