"""GGRO: greedy decoding in segments, each begun by the token that the reward's gradient proposes."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxalign._arrays import drop_weak_types, per_row
from jaxalign._checks import entry, is_concrete, same_prompts
from jaxalign.decoding._best_of_n import check_reward
from jaxalign.decoding._ggro_scores import Gain
from jaxalign.decoding._ggro_search import Nudged, Plan, search
from jaxalign.decoding._sampling import check_request
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.rewards import TokenGradient
from jaxalign.types import Array, ArrayLike, Params, Policy, Prompts, Reward


def ggro(
    policy: Policy,
    reward: Reward | None,
    gain: Gain,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    candidates: int,
    threshold: ArrayLike,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    top_k: int = 25,
    temperature: ArrayLike = 0.0,
    rule: Literal["difference", "code"] = "difference",
    shortest: int = 3,
) -> Nudged:
    """Gradient-guided reward optimisation (GGRO, arXiv 2606.09635): from an accepted prefix s, up to `candidates` forms
    of the next segment are decoded greedily, and the one of highest reward r(s, segment) is accepted; until EOS.

    The first form has no ggro: the reward of a segment is never below its greedy form's. Each later one begins with
    the token of s's top_k that the gradient at the LATEST form proposes: argmax over v, or a draw from
    softmax(·/temperature), of

        difference: g_v − g_current, the first-order gain of the replacement     code: g_v, and 0 for the current token

    A proposal that was tried already ends the segment's search (a form follows from its first token). A segment ends
    before the first token, after `shortest`, whose distribution has an entropy of at least `threshold`, unless that
    token is an EOS or the last one; the next segment begins there. The reward reads partial text, without an EOS.

    A reward and a gain that keep a prefix (`rewards.from_model`, `rewards.token_gradient`) read the prompt once and
    then each form of a segment alone; the accepted form joins their caches. Others read the whole text of every form.

    Args:
      policy: any; its most probable tokens are the candidates, its greedy tokens the text. Built once, as reward and
        gain.
      reward: r, read on partial text. None: the one behind `gain`, in one pass with it.
      gain: `rewards.token_gradient(lm)`, or any function of that form.
      params: {"policy", "reward", "gain"}; without "gain", gain reads the reward's.
      rng: consumed, by proposals at a temperature and by policies that draw in their steps. Without the latter, a
        prompt's response depends on rng and its index alone.
      candidates: S >= 1, forms per segment; 1 is greedy decoding.
      threshold: scalar or [B] [nats]; inf: one segment.
      top_k: k, tokens that may be forced; 1 is greedy decoding. More than the vocabulary: all of it.
      temperature: scalar or [B] >= 0, of the proposal [units of reward]; 0: the best.
      shortest: tokens >= 1 that a segment keeps at least, unless the response ends.

    Returns:
      Nudged. Given rng the response is determined, as under greedy decoding: log_prob is 0, kl = −log_prob_ref (whose
      mean is the −log pi_ref(y) to report beside the reward), log_norm = the policy's + log pi of the token.

    Raises:
      ValueError: arguments outside these ranges, a reward or gain over another vocabulary, a reward or gain that is
        NaN, and those of `sample`.
    """
    for name, value, least in (("candidates", candidates, 1), ("top_k", top_k, 1), ("shortest", shortest, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")
    if rule not in ("difference", "code"):
        raise ValueError(f"rule: expected 'difference' or 'code', found {rule!r}")
    if is_concrete(temperature) and not np.all(np.asarray(temperature) >= 0):
        raise ValueError(f"temperature: expected a value >= 0, found {np.asarray(temperature)}")
    if is_concrete(threshold) and np.any(np.isnan(np.asarray(threshold))):
        raise ValueError("threshold: expected numbers, found NaN")
    if reward is None and not isinstance(gain, TokenGradient):
        raise ValueError("reward: expected a Reward beside a gain that is a plain function, found None")
    prompts = same_prompts(prompts)
    inner, judged = prompts_for(prompts, "policy"), prompts_for(prompts, "reward")
    own, reward_params = entry(params, "policy"), entry(params, "reward")
    gain_params = params.get("gain", reward_params)
    inner, eos_ids = check_request(policy, own, inner, max_new_tokens, eos_ids)
    if reward is not None:
        check_reward(reward, reward_params, judged, max_new_tokens, policy.vocab_size)
    check_reward(gain, gain_params, judged, max_new_tokens, policy.vocab_size)
    batch = prompt_index(judged).shape[0]
    arrays = {"policy": own, "reward": gain_params if reward is None else reward_params, "gain": gain_params}
    arrays |= {"candidates": jnp.asarray(candidates, jnp.int32)}
    arrays |= {"threshold": per_row(threshold, batch, name="threshold")}
    arrays |= {"temperature": per_row(temperature, batch, name="temperature")}
    plan = Plan(max_new_tokens, eos_ids, top_k, rule, shortest)
    both = {"policy": inner, "reward": judged}
    found, bad = search(policy, reward, gain, drop_weak_types(arrays), rng, both, plan)
    if is_concrete(bad) and bool(bad.any()):
        raise ValueError(f"reward, gain: expected numbers, found NaN for prompts {np.flatnonzero(bad).tolist()}")
    return found
