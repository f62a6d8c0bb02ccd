"""Rewards and log-probabilities of given texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, mdp, rewards
from jaxalign._checks import check_arrays
from jaxalign._parts import check_policy_argument
from jaxalign._programs import tells_programs
from jaxalign.decoding.requests import open_reward
from jaxalign.prompts import bucket, prompt_index
from jaxalign.text._requests import (
    Batch,
    Prompt,
    batches,
    check_count,
    check_prompts,
    check_tokenizer,
    format_of,
    in_order,
    key_of,
)
from jaxalign.tokens import TextFormat, Tokenizer, encode_pair, encode_prompt
from jaxalign.types import Array, Completions, Params, Policy, Reward, TextReward, TokenBatch


@tells_programs
def score(
    reward: Reward | TextReward,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    append_eos: bool = True,
    eos_id: int | None = None,
    batch_size: int = 32,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """The reward of each response to its prompt.

    Args:
      reward: any Reward over the tokenizer's ids, or a function of texts f(prompts, responses) -> numbers.
      params: its parameters; None for a function of texts.
      tokenizer: a tokenizer.
      prompts: texts, or chats as lists of messages; a prompt's number in the list is its index.
      responses: one text for each prompt. After a chat it is written as the template writes an assistant's turn, with
        all that the template writes after it: that is the text that a reward model's author scores.
      append_eos: whether a response ends as a finished one does, in its EOS or in the template's end.
      eos_id: the EOS of a response in plain text; the tokenizer's when None.
      batch_size: texts that are read together.
      system: a system turn for chats that have none.
      chat_template_kwargs: further arguments of the chat template.

    Returns:
      [N] rewards, at least float32.

    Raises:
      ValueError: prompts as in `generate`; other than one response for each, one without tokens and without EOS (its
        row is named), no EOS to append, a tokenizer with ids beyond the reward's, values that are not one real number
        for each text.
    """
    items = check_prompts(prompts)
    decoder: Any = tokenizer
    reward = open_reward(reward, decoder)
    check_tokenizer(tokenizer, getattr(reward, "vocab_size", None))
    form = _format(tokenizer, items, append_eos, eos_id, chat_template_kwargs, system)
    pairs = _pairs(form, items, responses, append_eos, tail=True)
    check_count("batch_size", batch_size)
    check = getattr(reward, "check", None)
    parts, found = [], list(batches([prompt for prompt, _ in pairs], batch_size))
    check_arrays(params)
    for batch in found:
        tokens, mask = _responses(pairs, batch, bucket(max(len(pairs[row][1]) for row in batch.rows)))
        if check is not None:
            check(params, batch.prompts, max(len(pairs[row][1]) for row in batch.rows))
        score = _score_texts if rewards.on_host(reward) else _score
        parts.append(score(reward, params, batch.prompts, tokens, mask))
    return np.asarray(in_order(parts, found))


def _score_texts(reward: Reward, params: Params, prompts: TokenBatch, tokens: Array, mask: Array) -> Array:
    return rewards.call_reward(reward, params, *mdp.concatenate(prompts, tokens, mask), prompt_index(prompts))


_score = jax.jit(_score_texts, static_argnums=0)


@tells_programs
def log_prob(
    policy: Policy,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    rng: Array | None = None,
    seed: int | None = None,
    append_eos: bool = True,
    eos_id: int | None = None,
    batch_size: int = 32,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Completions:
    """log pi(y_t|x,y_<t) of each token of the responses under a policy, as `decoding.log_prob` gives it.

    Args:
      policy: any Policy over the tokenizer's ids.
      params: its parameters. Values per prompt in them need all prompts in one batch.
      tokenizer, prompts, responses, append_eos, eos_id, batch_size, system, chat_template_kwargs: as in `score`, but
        for what a template writes after the end of a response, which no policy draws.
      rng: a key, consumed by policies that draw.
      seed: makes the key where rng is None; 0 when both are.

    Returns:
      Completions [N,T], T a bucket of the longest response; `log_prob.sum(axis=1)` is that of a response [nats].

    Raises:
      ValueError: as in `score`.
    """
    check_policy_argument("policy", policy)
    items = check_prompts(prompts)
    check_tokenizer(tokenizer, policy.vocab_size)
    form = _format(tokenizer, items, append_eos, eos_id, chat_template_kwargs, system)
    pairs = _pairs(form, items, responses, append_eos, tail=False)
    check_count("batch_size", batch_size)
    key = key_of(rng, seed)
    ends = tuple({pair[-1] for _, pair in pairs}) if append_eos else ()
    longest = max(len(response) for _, response in pairs)
    parts, found = [], list(batches([prompt for prompt, _ in pairs], batch_size))
    for batch in found:
        tokens, mask = _responses(pairs, batch, longest)
        parts.append(decoding.log_prob(policy, params, key, batch.prompts, tokens, mask, eos_ids=ends))
    joined: Completions = in_order(parts, found)
    return joined


def _format(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    append_eos: bool,
    eos_id: int | None,
    options: Mapping[str, Any] | None,
    system: str | None,
) -> TextFormat:
    """The format of given texts. ValueError for a response in plain text whose EOS is not known."""
    closing = None if eos_id is None else (eos_id,)
    form = format_of(tokenizer, prompts, options, system, closing)
    if append_eos and not form.closing and any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("eos_id: expected an id, since the tokenizer has no EOS, found None (append_eos=False: none)")
    return form


def _pairs(
    form: TextFormat, prompts: Sequence[Prompt], responses: Sequence[str], append_eos: bool, *, tail: bool
) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) as token ids, for each row; tail: with what the template writes after the end. ValueError
    naming the row."""
    if not isinstance(responses, list | tuple) or not all(isinstance(text, str) for text in responses):
        raise ValueError(f"responses: expected a list of texts, found {responses!r:.80}")
    if len(responses) != len(prompts):
        raise ValueError(f"responses: expected one for each of {len(prompts)} prompts, found {len(responses)}")
    out = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            encode_prompt(form, prompt)
        except ValueError as error:  # the prompt's fault, not the response's
            raise ValueError(f"prompts[{row}]: {error}") from error
        try:
            found = encode_pair(form, prompt, response, allow_empty=append_eos)
        except ValueError as error:
            raise ValueError(f"responses[{row}]: {error}") from error
        end = [*found.closing, *(found.tail if tail else [])] if append_eos else []
        out.append((found.prompt, [*found.response, *end]))
    return out


def _responses(pairs: Sequence[tuple[list[int], list[int]]], batch: Batch, width: int) -> tuple[Array, Array]:
    """Right-padded responses of a batch: tokens [B,width] int32, mask [B,width]."""
    tokens = np.zeros((len(batch.source), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for b, row in enumerate(batch.source):
        response = pairs[row][1]
        tokens[b, : len(response)], mask[b, : len(response)] = response, True
    return jnp.asarray(tokens), jnp.asarray(mask)
