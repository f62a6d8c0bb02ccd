"""GGRO: greedy decoding in segments, each begun by the token that the reward's gradient proposes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import drop_weak_types, per_row
from jaxalign._checks import is_concrete, same_prompts
from jaxalign._parts import described, takes
from jaxalign._programs import tells_programs
from jaxalign.decoding._ggro_search import GGROInfo as GGROInfo
from jaxalign.decoding._ggro_search import Plan, search
from jaxalign.decoding._kl import surprisal
from jaxalign.decoding.requests import (
    POLICY,
    Decode,
    EosIds,
    Tokenizer,
    check_request,
    check_reward,
    count,
    number,
    open_params,
    open_prompts,
    open_reward,
    optional_reward,
)
from jaxalign.decoding.stopping import SegmentRule, entropy_reaches
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.rewards import TokenGradient
from jaxalign.rewards.token_scores import TokenScore
from jaxalign.types import Array, ArrayLike, CheckedReward, Decoded, Params, Policy, Prompts, Reward, TextReward


class GGROParams(NamedTuple):
    """Parameters of `ggro`; a dict of the same names is accepted."""

    policy: Params
    """The policy's."""
    reward: Params
    """The reward's."""
    entropy_threshold: ArrayLike
    """The predictive entropy [nats] that ends a segment, a scalar or [B]; infinity: one segment."""
    gradient: Params = None
    """The gradient's; None: the reward's."""


@tells_programs
def ggro(
    policy: Policy,
    reward: Reward | TextReward | None,
    gradient: TokenScore,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    num_samples: int,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    top_k: int = 25,
    temperature: ArrayLike = 0.0,
    rule: Literal["difference", "code"] = "difference",
    min_segment: int = 3,
    segment_rule: SegmentRule = entropy_reaches,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[GGROInfo]:
    """Decodes greedily, segment by segment, up to S candidates of each from an accepted prefix s, and accepts the one
    of highest reward r(s, segment), until EOS: gradient-guided reward optimisation (GGRO, arXiv 2606.09635).

    The first candidate is the greedy one: the reward of a segment is never below it. Each later one begins with the
    token of s's top_k that the gradient at the LATEST candidate proposes: argmax over v, or a draw from
    softmax(·/temperature), of

        difference: g_v − g_current, the first-order gain of the replacement     code: g_v, and 0 for the current token

    A proposal that was tried already ends the segment's search (a candidate follows from its first token). A segment
    ends before the first token, after min_segment, whose distribution has an entropy of at least entropy_threshold,
    unless that token is an EOS or the last one; the next segment begins there. The reward reads partial text, without
    an EOS.

    A reward and a gradient that keep a prefix (`rewards.from_model`, `rewards.token_gradient`) read the prompt once and
    then each candidate alone; the accepted one joins their caches. Others read the whole text of every candidate.

    Args:
      policy: any; its most probable tokens may be forced, its greedy tokens are the text. Built once, as reward and
        gradient.
      reward: r, read on partial text. None: the one behind `gradient`, in one pass with it.
      gradient: `rewards.token_gradient(lm)`, or any function of that form: the first-order score g_v of each candidate
        token v in the place of one token of the text.
      params: GGROParams, or {"policy", "reward", "entropy_threshold"} and if wanted {"gradient"}; without it, the
        gradient reads the reward's.
      rng: consumed, by proposals at a temperature and by policies that draw in their steps. Without the latter, a
        prompt's response depends on rng and its index alone at one batch size and width; `in_chunks` holds it at every
        other.
      num_samples: S >= 1, candidates per segment; 1 is greedy decoding.
      top_k: k, tokens that may be forced; 1 is greedy decoding. More than the vocabulary: all of it.
      temperature: scalar or [B] >= 0, of the proposal [units of reward]; 0: the best.
      rule: what proposals maximise, "difference" or "code", as above.
      min_segment: tokens >= 1 that a segment has at least, unless the response ends.
      segment_rule: where a segment ends, a function of `stopping`.
      prompts, max_new_tokens, eos_ids, tokenizer: as `best_of_n`.

    Returns:
      Decoded: given rng the response is determined, as under greedy decoding: log_prob is 0, log_norm the policy's +
      log pi of the token, and the KL −log pi_ref(y), of kind "surprisal"; GGROInfo.

    Raises:
      ValueError: arguments outside these ranges, a reward or gradient over another vocabulary, of another shape or
        NaN, and those of `sample`.
    """
    n, k = count("num_samples", num_samples), count("top_k", top_k)
    shortest = count("min_segment", min_segment)
    if rule not in ("difference", "code"):
        raise ValueError(f"rule: expected 'difference' or 'code', found {rule!r}")
    number("temperature", temperature)
    if is_concrete(temperature) and not np.all(np.asarray(temperature) >= 0):
        raise ValueError(f"temperature: expected a value >= 0, found {np.asarray(temperature)}")
    if isinstance(gradient, CheckedReward) or not takes(gradient, 6):
        raise ValueError(
            f"gradient: expected a TokenGradient, found {described(gradient)} (rewards.token_gradient makes one of a "
            "reward model)"
        )
    if reward is None and not isinstance(gradient, TokenGradient):
        raise ValueError("reward: expected a Reward beside a gradient that is a plain function, found None")
    given = open_params(
        params, ("policy", "reward", "entropy_threshold"), {"gradient": None, **optional_reward(reward)}
    )
    # A dict that names "gradient" means it, None included: a function without parameters.
    has_gradient_params = given["gradient"] is not None or (isinstance(params, dict) and "gradient" in params)
    gradient_params = given["gradient"] if has_gradient_params else given["reward"]
    threshold = number("entropy_threshold", given["entropy_threshold"])
    if is_concrete(threshold) and np.any(np.isnan(np.asarray(threshold))):
        raise ValueError("entropy_threshold: expected numbers, found NaN")
    prompts = same_prompts(open_prompts(prompts, tokenizer))
    inner, scored = prompts_for(prompts, "policy"), prompts_for(prompts, "reward")
    own = given["policy"]
    inner, max_new_tokens, ids = check_request(policy, own, rng, inner, max_new_tokens, eos_ids, path=POLICY)
    score = None if reward is None else open_reward(reward, tokenizer)
    if score is not None:
        check_reward(score, given["reward"], scored, max_new_tokens, policy.vocab_size)
    where = "['gradient']" if has_gradient_params else "['reward']"
    check_reward(gradient, gradient_params, scored, max_new_tokens, policy.vocab_size, path=where)
    batch = prompt_index(scored).shape[0]
    arrays = {
        "policy": given["policy"],
        "reward": gradient_params if score is None else given["reward"],
        "gradient": gradient_params,
        "num_samples": jnp.asarray(n, jnp.int32),
        "entropy_threshold": per_row(threshold, batch, name="entropy_threshold"),
        "temperature": per_row(temperature, batch, name="temperature"),
    }
    plan = Plan(max_new_tokens, ids, k, rule, shortest, segment_rule)
    both = {"policy": inner, "reward": scored}
    completions, info, bad = search(policy, score, gradient, drop_weak_types(arrays), rng, both, plan)
    if is_concrete(bad) and bool(bad.any()):
        raise ValueError(f"reward, gradient: expected numbers, found NaN for prompts {np.flatnonzero(bad).tolist()}")
    return Decoded(completions, surprisal(completions), info)
