"""Texts drawn from a Policy, whole or as a stream."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, decoding, policies, rollout
from jaxalign._arrays import drop_weak_types
from jaxalign._checks import same_prompts
from jaxalign._parts import described, start_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding.requests import check_request, open_eos_ids, streams, with_temperature
from jaxalign.prompts import prompt_index
from jaxalign.text._requests import (
    Prompt,
    batches,
    check_count,
    check_prompts,
    check_tokenizer,
    format_of,
    in_order,
    key_of,
    prompt_ids,
)
from jaxalign.text._texts import Stream, Watch, texts_of, watch_texts
from jaxalign.tokens import TextFormat, Tokenizer, decode_text, ends_of_reply
from jaxalign.types import (
    Array,
    ArrayLike,
    Completions,
    Critic,
    LanguageModel,
    Params,
    Policy,
    Prompts,
    State,
    StepOutput,
)

Draft: TypeAlias = "tuple[LanguageModel | Policy, Params] | Literal['below']"
"""A model or Policy that proposes tokens, with its parameters; "below": the policy that the model, a tilt, is over."""


class Generated(NamedTuple):
    """What `generate` gives, in the order of the prompts."""

    texts: list[Any]
    """The responses as strings, without special tokens; with num_samples a list of n strings for each prompt."""
    completions: Completions
    """Their tokens and log-probabilities: leaves [N,T] and [N], with num_samples [N,n,T] and [N,n]."""


@tells_programs
def generate(
    model: LanguageModel | Policy,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    rng: Array | None = None,
    seed: int | None = None,
    max_new_tokens: int = 128,
    temperature: ArrayLike = 1.0,
    num_samples: int | None = None,
    draft: Draft | None = None,
    draft_tokens: int = 4,
    eos_ids: int | Sequence[int] | None = None,
    batch_size: int = 32,
    stream: Stream | None = None,
    stream_every: int = 8,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    generation_config: bool | Mapping[str, Any] = False,
    deterministic: int | None = None,
) -> Generated:
    """Draws a response to each prompt. The draws are those of `decoding.sample` with the same key, and with a draft
    those of `decoding.speculative`, which have the same law.

    Args:
      model: what the responses are drawn from: a language model, as `models.load` gives it, or any Policy.
      params: its parameters. Values per prompt in them, as one beta for each, need all prompts in one batch.
      tokenizer: its tokenizer, as `models.tokenizer` gives it.
      prompts: texts, or chats as lists of messages.
      rng: a key, consumed. In batches of one size and width a response depends on it and on the prompt's number in the
        list; with `deterministic` in all of them.
      seed: makes the key where rng is None; 0 when both are.
      max_new_tokens: the limit of a response, its EOS included [tokens].
      temperature: one value, or one for each prompt, >= 0; 0 is greedy.
      num_samples: n responses to each prompt; None: one, which is the first of any n.
      draft: (a language model or Policy over the same tokens, its parameters), which proposes tokens that the model
        verifies several at a time: the law is the model's own, and decoding is faster where the two agree
        (`decoding.speculative`). "below": the policy that a tilt is over. It is drawn from under the same temperature
        and generation_config. None: none.
      draft_tokens: tokens that the draft proposes at a time.
      eos_ids: the id or ids that end a response; None: the model's own, and for chats the special token in which the
        chat template ends an assistant's turn, which is told in a warning where the model does not name it.
      batch_size: prompts that are decoded together. Those of like length share a batch, padded to a bucket, so that
        few shapes are compiled.
      stream: called as stream(row, text) while the texts grow; the pieces of a row add up to its text. A character is
        given when no further token changes it.
      stream_every: tokens between two calls of `stream`.
      system: a system turn for chats that have none.
      chat_template_kwargs: further arguments of the chat template, for instance {"enable_thinking": False}.
      generation_config: temperature, top_k and top_p as transformers names them, in place of `temperature`; True: those
        of the model's generation_config.json (`policies.read_generation_config`).
      deterministic: G rows that are decoded together whatever batch_size is: the tokens are the same at any batch_size
        and beside any other prompts (`decoding.sample`). None: a batch at once.

    Returns:
      Generated: the texts and their Completions.

    Raises:
      ValueError: a model that is neither, no prompts, an empty one, one without tokens or too long for a language model
        (its row is named), a chat that the template refuses or a tokenizer without one, a tokenizer with ids beyond the
        model's, a draft beside num_samples or a stream, deterministic beside a draft or a stream, arguments outside
        their ranges, and those of `decoding.sample` and `decoding.speculative`.
    """
    policy = model if isinstance(model, Policy) else policies.language_model(_checked(model))
    items = check_prompts(prompts)
    check_tokenizer(tokenizer, policy.vocab_size)
    form = format_of(tokenizer, items, chat_template_kwargs, system)
    counts = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "stream_every": stream_every}
    for name, value in (counts | {"draft_tokens": draft_tokens}).items():
        check_count(name, value)
    proposes, own = _opened(draft, num_samples, stream)
    for name, other in (("draft", draft), ("stream", stream)):
        if deterministic is not None and other is not None:
            raise ValueError(f"{name}: expected None with deterministic = {deterministic}, found {other!r:.60}")
    if num_samples is not None:
        check_count("num_samples", num_samples)
        if stream is not None:
            raise ValueError(f"stream: expected None with num_samples, found one with num_samples = {num_samples}")
    sequences = prompt_ids(form, items)
    if not isinstance(model, Policy):
        _check_room(sequences, model.max_length, max_new_tokens)
    ends = open_eos_ids(policy, eos_ids)
    if eos_ids is None:
        ends = _with_chat_end(form, ends, items)
    policy = _with_generation_config(policy, model, generation_config, temperature)
    if isinstance(proposes, Policy):
        proposes = _with_generation_config(proposes, model, generation_config, temperature)
    key = key_of(rng, seed)
    heat = _temperatures(temperature, len(items))

    parts, found = [], list(batches(sequences, batch_size))
    for batch in found:  # all of them before the first is drawn
        check_request(policy, params, key, batch.prompts, max_new_tokens, ends)
    for batch in found:
        here = heat if np.ndim(heat) == 0 else jnp.asarray(np.asarray(heat)[batch.source])
        if proposes is not None:
            both = {"target": params} if proposes == "below" else {"target": params, "draft": own}
            limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_ids": ends}
            if np.ndim(here) or here != 1:
                limits["temperature"] = here
            drawn = decoding.speculative(
                policy, proposes, both, key, batch.prompts, draft_tokens=draft_tokens, **limits
            ).completions
            parts.append(jax.tree.map(lambda x: x[:, None], drawn))
        elif stream is None:
            parts.append(
                decoding.sample(
                    policy,
                    params,
                    key,
                    batch.prompts,
                    max_new_tokens=max_new_tokens,
                    eos_ids=ends,
                    temperature=here,
                    num_samples=num_samples or 1,
                    deterministic=deterministic,
                )
            )
        else:
            warm = with_temperature(policy, params, same_prompts(batch.prompts), here)
            watch = watch_texts(stream, tokenizer, ends, batch)
            parts.append(draw_in_chunks(*warm, key, max_new_tokens, ends, stream_every, watch))
    completions = in_order(parts, found)
    texts = texts_of(tokenizer, completions, ends)
    if num_samples is not None:
        return Generated(texts, completions)
    return Generated([samples[0] for samples in texts], jax.tree.map(lambda x: x[:, 0], completions))


def _opened(
    draft: Draft | None, num_samples: int | None, stream: Stream | None
) -> tuple[Policy | Literal["below"] | None, Params]:
    """(the draft as a Policy, its parameters)."""
    if draft is None:
        return None, None
    for name, value in (("num_samples", num_samples), ("stream", stream)):
        if value is not None:
            raise ValueError(f"{name}: expected None with a draft, found {value!r:.60}")
    if isinstance(draft, str):
        if draft != "below":
            raise ValueError(f"draft: expected (model, params) or 'below', found {draft!r}")
        return "below", None
    if isinstance(draft, Policy) or not isinstance(draft, tuple) or len(draft) != 2:
        raise ValueError(f"draft: expected (model, params) or 'below', found {described(draft)}")
    model, params = draft
    if isinstance(model, Policy):
        return model, params
    if not hasattr(model, "prefill"):
        raise ValueError(f"draft: expected a language model or a Policy, found {described(model)}")
    return policies.language_model(model), params


def _checked(model: LanguageModel) -> LanguageModel:
    if not hasattr(model, "prefill") and not isinstance(model, type | Critic | str):
        raise ValueError(f"model: expected a language model or a Policy, with its parameters, found {described(model)}")
    return model


def _check_room(sequences: Sequence[Sequence[int]], max_length: int, max_new_tokens: int) -> None:
    room = max_length - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens: expected fewer than the model's context of {max_length} tokens, found {max_new_tokens}"
        )
    for row, ids in enumerate(sequences):
        if len(ids) > room:
            raise ValueError(
                f"prompts[{row}]: expected at most {room} tokens, so that {max_new_tokens} new ones fit in the model's "
                f"context of {max_length}, found {len(ids)}"
            )


def _with_generation_config(
    policy: Policy, model: LanguageModel | Policy, given: bool | Mapping[str, Any], temperature: ArrayLike
) -> Policy:
    if given is False:
        return policy
    if np.ndim(temperature) or temperature != 1:
        raise ValueError(f"temperature: expected 1 beside generation_config, found {temperature}")
    fields: Any = given
    if given is True:
        fields = getattr(getattr(model, "config", None), "generation", "")
        if not fields:
            raise ValueError("generation_config: expected a model with fields of generation_config.json, found none")
    return policies.with_sampling(policy, policies.read_generation_config(fields))


def _with_chat_end(form: TextFormat, eos_ids: tuple[int, ...], prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """The EOS ids, and the end of an assistant's turn where a prompt is a chat."""
    found = ends_of_reply(form, prompts, eos_ids)
    end = found[-1] if found else None
    if end is None or end in eos_ids:
        return eos_ids
    name = decode_text(form.tokenizer, [end], special=True)
    warnings.warn(
        f"the chat template ends a turn in {name!r} ({end}), which is not among the model's EOS ids {list(eos_ids)}: "
        "responses end there too (eos_ids= says otherwise)",
        stacklevel=3,
    )
    return found


def _temperatures(temperature: ArrayLike, count: int) -> ArrayLike:
    if np.shape(temperature) not in ((), (count,)):
        raise ValueError(
            f"temperature: expected one value, or one for each of {count} prompts, found shape {np.shape(temperature)}"
        )
    return temperature


# Draws ----------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 4))
def _open(
    policy: Policy, params: Params, rng: Array, prompts: Prompts, max_new_tokens: int
) -> tuple[Array, State, StepOutput]:
    """(the key of the draws, state, output) before the first token, as `decoding.sample` makes them."""
    start, draws = jax.random.split(rng)
    return draws, *start_policy(policy, params, start, prompts, max_new_tokens)


@functools.partial(jax.jit, static_argnums=(0, 8, 9), donate_argnums=3)
def _advance(
    policy: Policy,
    params: Params,
    draws: Array,
    frame: tuple[State, StepOutput],
    finished: Array,
    index: Array,
    begin: Array,
    left: Array,
    steps: int,
    eos_ids: tuple[int, ...],
) -> tuple[tuple[State, StepOutput], Completions]:
    """The next `steps` tokens, at most `left` of them, from token number `begin` on."""
    state, output, completions, *_ = rollout.rollout(
        policy,
        params,
        draws,
        *frame,
        steps=steps,
        eos_ids=eos_ids,
        finished=finished,
        rows=streams(index, jnp.zeros(1, jnp.int32)),
        begin=begin,
        limits=left,
    )
    return (state, output), completions


def draw_in_chunks(
    policy: Policy,
    params: Params,
    prompts: Prompts,
    rng: Array,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    every: int,
    watch: Watch,
) -> Completions:
    """One response to each prompt, [B,1,T], as `decoding.sample` draws it, `every` tokens at a time, which `watch`
    sees."""
    steps, params = min(every, max_new_tokens), drop_weak_types(params)
    draws, *frame = _open(policy, params, rng, prompts, max_new_tokens)
    index = prompt_index(prompts)
    state = (frame[0], frame[1])
    finished = jnp.zeros(index.shape, bool)
    chunks: list[Completions] = []
    for begin in range(0, max_new_tokens, steps):
        left = min(steps, max_new_tokens - begin)
        state, drawn = _advance(
            policy, params, draws, state, finished, index, jnp.asarray(begin), jnp.asarray(left), steps, eos_ids
        )
        finished = drawn.finished
        last = begin + left == max_new_tokens or bool(_hosts.host_value(finished.all()))
        watch(drawn, last)
        chunks.append(drawn)
        if last:
            break
    return _joined(chunks, max_new_tokens)


def _joined(chunks: Sequence[Completions], max_new_tokens: int) -> Completions:
    """Completions [B,1,T] of chunks [B,steps] that follow each other; zeros where no chunk was needed."""

    def join(*leaves: Array) -> Array:
        if leaves[0].ndim == 1:  # finished, truncated: as the last chunk left them
            return leaves[-1][:, None]
        whole = jnp.concatenate(leaves, axis=1)[:, :max_new_tokens]
        return jnp.pad(whole, ((0, 0), (0, max_new_tokens - whole.shape[1])))[:, None]

    joined: Completions = jax.tree.map(join, *chunks)
    return joined
