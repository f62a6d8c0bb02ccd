"""What every decoder checks and prepares on the host before anything is traced."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, policies, rewards
from jaxalign._arrays import drop_weak_types, per_row
from jaxalign._builders import cached
from jaxalign._checks import (
    check_arrays,
    check_at_most,
    check_below,
    check_positive,
    check_rng,
    is_concrete,
    named_entries,
    run_check,
    same_prompts,
)
from jaxalign._parts import check_policy_argument, check_reward_argument, takes_texts
from jaxalign.prompts import any_prompts, prompt_batch, prompt_index, prompts_for
from jaxalign.rewards.token_scores import TokenScore
from jaxalign.rewards.values import function_name
from jaxalign.types import (
    Array,
    ArrayLike,
    Completions,
    Params,
    Policy,
    Prompts,
    Reward,
    TextReward,
    TokenBatch,
)

EosIds: TypeAlias = int | Sequence[int] | None
"""The ids that end a response: one, several, () for none, or None for the policy's own (`Policy.eos_ids`)."""

POLICY = "['policy']"
"""Where the policy's params lie in those of a decoder."""


class Tokenizer(Protocol):
    """What decoders ask of a tokenizer: texts to ids and back, as the tokenizers of Hugging Face do."""

    def __call__(self, text: str) -> Mapping[str, Any]:
        """{"input_ids": ids} of a text."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of ids."""


Decode: TypeAlias = Callable[[list[int]], str]
"""Ids to text: takes the place of a tokenizer where no prompt is a string."""


class Request(NamedTuple):
    """What a decoder works on, checked."""

    policy: Policy
    """The policy, under its temperature."""
    reward: Reward
    """The reward of tokens; a reward of texts is wrapped."""
    params: dict[str, Any]
    """The entries of params; those that may differ per prompt as [B]."""
    prompts: dict[str, Any]
    """{"policy", "reward"}, with one index in every entry."""
    max_new_tokens: int
    """T."""
    eos_ids: tuple[int, ...]
    """The ids that end a response."""
    tempered: bool
    """Whether a temperature other than the number 1 was put on the policy."""


def open_request(
    policy: Policy,
    reward: Reward | TextReward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    max_new_tokens: int,
    eos_ids: EosIds,
    temperature: ArrayLike = 1.0,
    *,
    per_prompt: tuple[str, ...] = (),
    tokenizer: Tokenizer | Decode | None = None,
    whole_responses: bool = False,
) -> Request:
    """Checks the arguments of a decoder that draws from a policy and compares by a reward.

    Args:
      per_prompt: entries of params that are scalars or [B] and become [B]; a "beta" must be > 0.
      whole_responses: whether the decoder scores finished responses alone, outside its compiled program.

    Raises:
      ValueError: naming the argument, what was expected and what was found.
    """
    # A reward of texts has no parameters.
    given = open_params(params, ("policy", "reward", *per_prompt), optional_reward(reward))
    reward = open_reward(reward, tokenizer)
    if rewards.on_host(reward) and not whole_responses:
        raise ValueError(
            "reward: expected one over the policy's vocabulary, which scores tokens as they are drawn, found one that "
            "reads whole texts through its own tokenizer; decoding.best_of_n, training and scoring take it"
        )
    prompts = same_prompts(open_prompts(prompts, tokenizer))
    inner, scored = prompts_for(prompts, "policy"), prompts_for(prompts, "reward")
    if "beta" in per_prompt:
        check_positive("beta", number("beta", given["beta"]))
    own = given["policy"]
    inner, max_new_tokens, eos_ids = check_request(policy, own, rng, inner, max_new_tokens, eos_ids, path=POLICY)
    check_reward(reward, given["reward"], scored, max_new_tokens, policy.vocab_size)
    tempered, policy_params, inner = with_temperature(policy, given["policy"], inner, temperature)
    batch = prompt_index(scored).shape[0]
    arrays = {"policy": policy_params, "reward": given["reward"]}
    arrays |= {name: per_row(number(name, given[name]), batch, name=name) for name in per_prompt}
    both = {"policy": inner, "reward": scored}
    changed = tempered is not policy
    return Request(tempered, reward, drop_weak_types(arrays), both, max_new_tokens, eos_ids, changed)


def check_request(
    policy: Policy,
    params: Params,
    rng: Array,
    prompts: Prompts,
    max_new_tokens: int,
    eos_ids: EosIds,
    *,
    path: str = "",
) -> tuple[Prompts, int, tuple[int, ...]]:
    """The checks that every decoder makes of its policy.

    Args:
      path: where the policy's params lie in the decoder's, as "['policy']", for the error texts.

    Returns:
      (the prompts with one index in every entry, max_new_tokens, eos_ids as a tuple of ints).

    Raises:
      ValueError: naming the argument, what was expected and what was found.
    """
    check_policy_argument("policy", policy)
    max_new_tokens = count("max_new_tokens", max_new_tokens)
    ids = open_eos_ids(policy, eos_ids)
    prompts = same_prompts(prompts)
    check_rng(rng)
    check_arrays(params, path)
    check_below(policy, params, prompts, max_new_tokens, path)
    return prompts, max_new_tokens, ids


# Arguments ------------------------------------------------------------------------------------------------------------


def count(name: str, value: Any, *, least: int = 1) -> int:
    """value as an int. ValueError for a bool, for what is no integer, for less than `least` and for more than MOST."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an int, found {value!r} ({type(value).__name__})") from None
    if found < least:
        raise ValueError(f"{name}: expected at least {least}, found {found}")
    check_at_most(name, found)
    return found


def number(name: str, value: ArrayLike) -> ArrayLike:
    """value itself. ValueError unless it is real: an int or float, or an array of them."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        dtype = np.asarray(value).dtype
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(f"{name}: expected real numbers, found {value!r}")
    return value


def open_params(
    params: Params, required: tuple[str, ...], defaults: Mapping[str, ArrayLike | None] | None = None
) -> dict[str, Any]:
    """The entries of params, a dict or a NamedTuple: the required ones, and those of `defaults` that are given (in a
    NamedTuple: are not None), else their default.

    Raises:
      ParamsError: an entry is missing, or there is one that the decoder does not know.
    """
    defaults = defaults or {}
    given = named_entries(params, list(dict.fromkeys((*required, *defaults))), defaults)
    if not isinstance(params, Mapping):
        given = {name: value for name, value in given.items() if name not in defaults or value is not None}
    return {**defaults, **given}


def open_eos_ids(policy: Policy, eos_ids: EosIds) -> tuple[int, ...]:
    """eos_ids as a tuple; None: the policy's own. ValueError where neither is known, and for ids outside the
    vocabulary."""
    if eos_ids is None:
        if policy.eos_ids is None:
            raise ValueError(
                "eos_ids: expected an id or ids, since this policy does not name its own (Policy.eos_ids), found None; "
                "() for responses that only the limit ends"
            )
        eos_ids = policy.eos_ids
    if isinstance(eos_ids, str) or np.ndim(eos_ids) > 1:
        raise ValueError(f"eos_ids: expected an int or a sequence of ints, found {eos_ids!r}")
    given = [eos_ids] if np.ndim(eos_ids) == 0 else list(eos_ids)  # type: ignore[arg-type]
    ids = tuple(count("eos_ids", i, least=-(2**62)) for i in given)
    vocab = policy.vocab_size
    if any(i < 0 or (vocab is not None and i >= vocab) for i in ids):
        raise ValueError(f"eos_ids: expected ids in [0, {vocab}), found {ids}")
    return ids


def open_prompts(prompts: Any, tokenizer: Tokenizer | Decode | None) -> Prompts:
    """prompts as they are, or a TokenBatch of a list of strings where a tokenizer is given.

    Raises:
      ValueError: strings without a tokenizer, or lists of ids, which `prompts.prompt_batch` makes a batch of.
    """
    if isinstance(prompts, TokenBatch | Mapping) or (isinstance(prompts, tuple) and hasattr(prompts, "_asdict")):
        return prompts  # a NamedTuple is that of the params, filled with prompts
    texts = isinstance(prompts, str) or (isinstance(prompts, list | tuple) and any(isinstance(p, str) for p in prompts))
    if not texts:
        nested = isinstance(prompts, list | tuple) and all(isinstance(p, TokenBatch | Mapping) for p in prompts)
        if nested and prompts:
            return prompts
        raise ValueError(
            f"prompts: expected a TokenBatch, found {type(prompts).__name__}; prompts.prompt_batch makes one of lists "
            "of ids, and tokenizer= takes a list of strings"
        )
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts: expected a list of strings, found {prompts!r:.80}")
    if tokenizer is None or not hasattr(tokenizer, "decode"):
        raise ValueError(
            "prompts: expected a TokenBatch (prompts.prompt_batch) or strings with tokenizer=, found strings and "
            + ("no tokenizer" if tokenizer is None else "a decode function")
        )
    return prompt_batch([_encode(tokenizer, text) for text in prompts])


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer puts there."""
    ids = [int(i) for i in tokenizer(text)["input_ids"]]
    if not ids:
        raise ValueError(f"prompts: expected at least one token in each, found none in {text!r}")
    return ids


def with_temperature(
    policy: Policy, params: Params, prompts: Prompts, temperature: ArrayLike
) -> tuple[Policy, Params, Prompts]:
    """The policy under `policies.temperature`; unchanged for the Python number 1. ValueError: a temperature that is
    negative, NaN or of another shape than () and [B]."""
    number("temperature", temperature)
    if isinstance(temperature, int | float) and temperature == 1:
        return policy, params, prompts
    if is_concrete(temperature) and not np.all(np.asarray(temperature) >= 0):
        raise ValueError(f"temperature: expected a value >= 0, found {np.asarray(temperature)}")
    per_row(temperature, any_prompts(prompts).tokens.shape[0], name="temperature")
    params = {"policy": params, "temperature": jnp.asarray(temperature, jnp.result_type(float))}
    if isinstance(prompts, dict):
        prompts = {"policy": prompts}
    return _tempered(policy), params, prompts


@functools.lru_cache(maxsize=64)
def _tempered(policy: Policy) -> Policy:
    """One wrapped Policy per Policy: a new closure would be a new trace (law 6)."""
    return policies.temperature(policy)


# Rewards --------------------------------------------------------------------------------------------------------------


def open_reward(reward: Reward | TextReward, tokenizer: Tokenizer | Decode | None) -> Reward:
    """A reward of tokens: the reward itself, or a reward of texts f(prompts, responses) behind the tokenizer's decode.

    Raises:
      ValueError: what is no function, or a reward of texts without a tokenizer.
    """
    if not takes_texts(reward):
        check_reward_argument("reward", reward)
        return reward  # type: ignore[return-value]  # its signature was just read
    if tokenizer is None:
        raise ValueError(f"reward: expected tokenizer= for {function_name(reward)}(prompts, responses), found none")
    return _text_reward(reward, tokenizer)  # type: ignore[arg-type]


def optional_reward(reward: Any) -> dict[str, None]:
    """The default of params["reward"]: None for a reward of texts, which has no parameters."""
    return {"reward": None} if takes_texts(reward) else {}


@cached
def _text_reward(f: TextReward, tokenizer: Tokenizer | Decode) -> Reward:
    """One Reward for equal arguments, so that an inline call is no new trace."""
    plain: Any = getattr(tokenizer, "decode", None)

    def decode(ids: Sequence[int]) -> str:
        found: str
        if plain is None:
            function: Any = tokenizer
            found = function(list(ids))
        else:
            found = plain(list(ids), skip_special_tokens=True)
        return found

    return rewards.from_text(decode, f)


def check_reward(
    reward: Reward | TokenScore,
    params: Params,
    prompts: TokenBatch,
    max_new_tokens: int,
    vocab_size: int | None,
    *,
    path: str = "['reward']",
) -> None:
    """The host checks of a Reward, whose params lie at `path` of the decoder's, for prompts [B] and responses over
    vocab_size tokens. ValueErrors."""
    if not isinstance(prompts, TokenBatch):
        raise ValueError(f"prompts['reward']: expected one TokenBatch, found {type(prompts).__name__}")
    found = getattr(reward, "vocab_size", None)
    if None not in (found, vocab_size) and found != vocab_size:
        raise ValueError(
            f"reward: expected the policy's vocabulary of {vocab_size} tokens, found {found} (models.match_vocabulary "
            "cuts appended rows; rewards.from_text decodes and re-encodes)"
        )
    check_arrays(params, path)
    run_check(getattr(reward, "check", None), params, prompts, max_new_tokens, path)


def check_scores(scores: Array) -> None:
    """ValueError on the host where a reward is NaN, which would be chosen as the best, or never, or is +inf, which has
    no law at any beta. −inf forbids a response and is allowed."""
    if not is_concrete(scores):
        return
    for wrong, found in ((jnp.isnan(scores), "numbers, found NaN"), (scores == jnp.inf, "numbers < inf, found inf")):
        if bool(wrong.any()):
            rows = np.flatnonzero(np.asarray(wrong).any(axis=-1)).tolist()
            raise ValueError(f"reward: expected {found} for prompts {rows}")


def check_values(found: Any, shape: tuple[int, ...], name: str) -> None:
    """ValueError unless what a user's function gave is an array of real numbers of this shape. It runs while the
    program is traced, before anything is computed."""
    try:
        actual, dtype = np.shape(found), jnp.result_type(found)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected an array of shape {shape}, found {type(found).__name__}") from None
    if actual != shape:
        raise ValueError(f"{name}: expected one number for each of {shape}, found shape {actual}")
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(f"{name}: expected real numbers, found dtype {dtype}")


def score_completions(reward: Reward, params: Params, prompts: TokenBatch, completions: Completions) -> Array:
    """reward [N] of completions [N,T] after prompts [N,P], at least float32. ValueError naming the reward's function
    where it gives another shape, or what are no real numbers."""
    return rewards.call_reward(reward, params, *join(prompts, completions), prompt_index(prompts))


def join(prompts: TokenBatch, completions: Completions) -> tuple[Array, Array, Array]:
    """Joins prompts and their responses into the whole texts that a Reward takes.

    Args:
      prompts: [B,P].
      completions: [B,T].

    Returns:
      (tokens [B,P+T], mask [B,P+T], prompt_length [B]), right-padded.
    """
    return mdp.concatenate(prompts, completions.tokens, completions.mask)


def streams(index: Array, sample: Array) -> Array:
    """The random streams [B·n,2] of samples `sample` [n] of the prompts `index` [B]: what `rollout.rollout` takes as
    rows."""
    pairs = jnp.broadcast_arrays(index[:, None], sample[None, :])
    return jnp.stack([pair.reshape(-1) for pair in pairs], axis=1)


def uniform_per_prompt(key: Array, number: ArrayLike, index: Array) -> Array:
    """One uniform number for each prompt of index [B], of the stream of key and number."""
    key = jax.random.fold_in(key, number)
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(index)
