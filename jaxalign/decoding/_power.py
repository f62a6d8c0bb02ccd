"""Responses by a power of their probability: what a model finds likely as a whole, without a reward."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import jax.numpy as jnp
import numpy as np

from jaxalign import rewards
from jaxalign._arrays import per_row
from jaxalign._builders import cached
from jaxalign._checks import is_concrete
from jaxalign._parts import check_policy_argument, start_policy, step_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding import resampling
from jaxalign.decoding._quest import QuestInfo, quest
from jaxalign.decoding._smc import SMCInfo, smc
from jaxalign.decoding.requests import Decode, EosIds, Tokenizer, number, open_prompts
from jaxalign.shapes import RewardValues, TextIndex, TextLength, TextMask, TextTokens
from jaxalign.types import (
    Array,
    ArrayLike,
    CheckedReward,
    Decoded,
    Params,
    Policy,
    Prompts,
    Reward,
    State,
    StepOutput,
    TokenBatch,
)


class _Arguments(NamedTuple):
    """What the two ways share, checked."""

    alpha: Array  # [B]
    above: bool  # alpha > 1


@overload
def power(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    alpha: ArrayLike,
    by: Literal["quest"] = "quest",
    num_steps: int | None = None,
    num_particles: int | None = None,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[QuestInfo]: ...


@overload
def power(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    alpha: ArrayLike,
    by: Literal["smc"],
    num_steps: int | None = None,
    num_particles: int | None = None,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[SMCInfo]: ...


@tells_programs
def power(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    alpha: ArrayLike,
    by: Literal["quest", "smc"] = "quest",
    num_steps: int | None = None,
    num_particles: int | None = None,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    tokenizer: Tokenizer | Decode | None = None,
) -> Decoded[QuestInfo] | Decoded[SMCInfo]:
    """Draws whole responses of probability pi(y)^alpha/Σ pi^alpha, pi the policy's own law (arXiv 2510.14901).

    No Policy has this law: its token factors are those of temperature 1/alpha times Σ over continuations. It is the
    response-level optimum pi(y)·exp(r(y)/beta) of the reward log pi at beta = 1/(alpha − 1), for alpha < 1 of −log pi
    at 1/(1 − alpha), so that `quest` and `smc` draw it.

    Args:
      policy: any; what it tilts plays no part.
      params: the policy's.
      rng: consumed, as by `quest` or `smc`.
      prompts: one TokenBatch, or with `tokenizer` a list of strings.
      max_new_tokens, eos_ids, tokenizer: as `sample`.
      alpha: > 0 and not 1, a number or one per prompt [B], all above 1 or all below it.
      by: "quest", a chain of whole responses whose last state tends to the law; or "smc", particles of temperature
        1/alpha with weights: E[exp(log_z)] = Σ_y pi(y)^alpha.
      num_steps: moves of the chain, with by="quest".
      num_particles: particles, with by="smc".

    Returns:
      Decoded, as `quest` or `smc` gives it; rewards are log pi(y), or −log pi(y) where alpha < 1.

    Raises:
      ValueError: an alpha that is traced, 1, not positive or on both sides of 1, another `by`, a count that is missing
        or belongs to the other way, prompts of several models, and those of `quest` and `smc`.
    """
    check_policy_argument("policy", policy)
    if by not in ("quest", "smc"):
        raise ValueError(f"by: expected 'quest' or 'smc', found {by!r}")
    counts = {"num_steps": num_steps, "num_particles": num_particles}
    needed, other = ("num_steps", "num_particles") if by == "quest" else ("num_particles", "num_steps")
    if counts[needed] is None or counts[other] is not None:
        found = [name for name, value in counts.items() if value is not None] or "neither"
        raise ValueError(f"{needed}: expected it alone with by={by!r}, found {found}")
    prompts = open_prompts(prompts, tokenizer)
    if not isinstance(prompts, TokenBatch):
        raise ValueError(f"prompts: expected one TokenBatch, found a {type(prompts).__name__} of several")
    each, above = _powers(alpha, prompts.tokens.shape[0])
    base, reward = _own_base(policy), _signed(policy, above)
    own = {"policy": params, "reward": params, "beta": 1 / jnp.abs(each - 1)}
    limits = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids, "tokenizer": tokenizer}
    if by == "quest":
        assert num_steps is not None
        return quest(base, reward, own, rng, prompts, num_steps=num_steps, **limits)  # type: ignore[arg-type]
    assert num_particles is not None
    return smc(
        base,
        reward,
        own,
        rng,
        prompts,
        num_particles=num_particles,
        temperature=1 / each,
        when=resampling.ess_below,
        **limits,  # type: ignore[arg-type]
    )


def _powers(alpha: ArrayLike, batch: int) -> _Arguments:
    number("alpha", alpha)
    if not is_concrete(alpha):
        raise ValueError("alpha: expected numbers that are known before tracing, found a traced array")
    values = np.asarray(alpha)
    if not np.all(np.isfinite(values) & (values > 0) & (values != 1)):
        raise ValueError(f"alpha: expected finite numbers > 0 other than 1, found {values}")
    above = bool((values > 1).all())
    if not above and (values > 1).any():
        raise ValueError(f"alpha: expected all above 1 or all below it, found {values}")
    return _Arguments(per_row(jnp.asarray(values, jnp.result_type(float)), batch, name="alpha"), above)


@cached
def _own_base(policy: Policy) -> Policy:
    """The policy as a base: its law is the reference, and it promises nothing."""

    def alone(output: StepOutput) -> StepOutput:
        return output._replace(log_prob_ref=output.log_prob, log_norm=jnp.zeros_like(output.log_norm))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        state, output = start_policy(policy, params, rng, prompts, max_new_tokens)
        return state, alone(output)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        state, output = step_policy(policy, params, rng, state, token)
        return state, alone(output)

    return Policy(init, step, None, policy.check, policy.vocab_size, policy.eos_ids)


@cached
def _signed(policy: Policy, above: bool) -> Reward:
    """log pi(y), or −log pi(y) for powers below 1."""
    plain = rewards.from_policy(policy)
    if above:
        return plain

    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        return -plain(params, tokens, mask, prompt_length, index)

    assert isinstance(plain, CheckedReward)
    return CheckedReward(reward, plain.check, plain.vocab_size)
