"""Best of n: several independent responses, of which the one of highest reward is kept."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import rewards, rollout
from jaxalign._arrays import repeat_rows, take_rows
from jaxalign._checks import is_concrete
from jaxalign._parts import start_policy
from jaxalign._programs import tells_programs
from jaxalign.decoding import _chunks, _kl
from jaxalign.decoding.requests import (
    Decode,
    EosIds,
    Request,
    Tokenizer,
    check_scores,
    count,
    open_request,
    score_completions,
    streams,
)
from jaxalign.prompts import prompt_index
from jaxalign.types import (
    KL,
    Array,
    ArrayLike,
    Completions,
    Decoded,
    Params,
    Policy,
    Prompts,
    Reward,
    State,
    StepOutput,
    TextReward,
    TokenBatch,
)

Drops: TypeAlias = Sequence[tuple[int, int]]
"""Pairs (t, keep): after t tokens the `keep` best samples go on."""


class BestOfNParams(NamedTuple):
    """Parameters of `best_of_n`; a dict of the same names is accepted."""

    policy: Params
    """The policy's."""
    reward: Params = None
    """The reward's."""


class BestOfNInfo(NamedTuple):
    """The responses of each prompt that were drawn to their end and their rewards: all n without `drop`, else m."""

    samples: Completions
    """[B,n,T]."""
    reward: Array
    """[B,n] of each."""


@tells_programs
def best_of_n(
    policy: Policy,
    reward: Reward | TextReward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    *,
    num_samples: int,
    max_new_tokens: int,
    eos_ids: EosIds = None,
    temperature: ArrayLike = 1.0,
    chunk: int | None = None,
    drop: Drops = (),
    allow_nan: bool = False,
    tokenizer: Tokenizer | Decode | None = None,
    deterministic: int | None = None,
) -> Decoded[BestOfNInfo]:
    """Draws n independent responses per prompt and keeps the one of highest reward, the first among equals.

    The prompt is encoded once and its state repeated. Sample j of a prompt draws from rng, the prompt's index and j:
    the first m of n are those of a call with m, and sample 0 is what `sample` draws, up to the rounding of programs of
    other batch sizes, and exactly with `deterministic`.

    Args:
      policy: what the responses are drawn from.
      reward: a Reward, or with `tokenizer` a reward of texts f(prompts, responses) -> numbers.
      params: BestOfNParams, or {"policy", "reward"}.
      rng: consumed.
      prompts: a TokenBatch [B,P], a dict that mirrors params, or with `tokenizer` a list of strings.
      num_samples: n >= 1, responses per prompt.
      max_new_tokens, eos_ids, temperature: as `sample`.
      chunk: samples per prompt that are decoded and scored at a time, a divisor of n; all when None. It bounds memory
        (B·chunk caches) and changes no sample beyond the rounding of another batch size.
      drop: pairs (t, keep) with which drawing stops early for samples that look bad (speculative rejection, arXiv
        2410.20290): after t tokens the reward scores the texts so far, and the `keep` best of those that are left go
        on. t and keep are integers, t rises and keep falls. A response that has ended is scored as it stands. The
        reward should read partial texts; those that are dropped are not in the info. () drops none.
      allow_nan: whether a reward may be NaN, which is an error otherwise; the caller has to look at each one.
      tokenizer: turns ids into texts and, where prompts are strings, texts into ids; a decode function serves for
        the former.
      deterministic: G >= 1, as `sample`: the B·n samples are drawn, and scored, in chunks of G rows, and are the same
        at any batch size, n and padding. It goes with neither `chunk` nor `drop`.

    Returns:
      Decoded: the best responses [B,T], the bound KL(best‖policy) <= log n − (n−1)/n, which holds for any choice among
      n draws, and BestOfNInfo of the m samples that were drawn to their end, n without `drop`.

    Raises:
      ValueError: counts below 1, a chunk that does not divide n, a `drop` whose t do not rise below max_new_tokens or
        whose keep do not fall below n, beside a chunk or with a reward that runs programs of its own; deterministic
        beside a chunk or a `drop`; a reward over
        another vocabulary, of another shape than [N], or NaN, and those of `sample`.
    """
    n = count("num_samples", num_samples)
    chunk = n if chunk is None else count("chunk", chunk)
    if n % chunk:
        raise ValueError(f"chunk: expected a divisor of num_samples = {n}, found {chunk}")
    request = open_request(
        policy,
        reward,
        params,
        rng,
        prompts,
        max_new_tokens,
        eos_ids,
        temperature,
        tokenizer=tokenizer,
        whole_responses=True,
    )
    host = rewards.on_host(request.reward)
    stages = _stages(drop, n, request.max_new_tokens)
    if stages and (host or chunk != n):
        other = "a reward that runs programs of its own" if host else f"chunk={chunk}"
        raise ValueError(f"drop: expected all samples in one program, found {other}")
    found: Decoded[BestOfNInfo]
    if deterministic is not None:
        if stages or chunk != n:
            raise ValueError(f"deterministic: expected no chunk and no drop, found chunk={chunk} and drop={drop!r}")
        found = _in_chunks(request, rng, n, count("deterministic", deterministic), host=host)
        if not allow_nan:
            check_scores(found.info.reward)
        return found
    found, broken = _best_of_n(
        request.policy,
        _no_reward if host else request.reward,
        request.params,
        rng,
        request.prompts,
        n,
        request.max_new_tokens,
        request.eos_ids,
        chunk,
        stages,
        request.tempered,
    )
    if not allow_nan and is_concrete(broken) and bool(broken.any()):
        rows = np.flatnonzero(np.asarray(broken)).tolist()
        raise ValueError(f"reward: expected numbers for partial texts, found NaN for prompts {rows}")
    if host:
        found = _scored_on_host(request, found, chunk)
    if not allow_nan:
        check_scores(found.info.reward)
    return found


def _stages(drop: Drops, n: int, max_new_tokens: int) -> tuple[tuple[int, int], ...]:
    """The pairs (t, keep) as ints, checked."""
    pairs = [tuple(pair) if isinstance(pair, Sequence) else () for pair in drop]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"drop: expected pairs (tokens, samples kept), found {drop!r}")
    stages = tuple((count("drop: tokens", t), count("drop: samples kept", keep)) for t, keep in pairs)
    ends = [0, *(t for t, _ in stages), max_new_tokens]
    left = [n, *(keep for _, keep in stages)]
    if any(a >= b for a, b in itertools.pairwise(ends)) or any(a <= b for a, b in itertools.pairwise(left)):
        raise ValueError(
            f"drop: expected tokens that rise below max_new_tokens = {max_new_tokens} and counts that fall below "
            f"num_samples = {n}, found {drop!r}"
        )
    return stages


def _no_reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
    return jnp.zeros(prompt_length.shape, jnp.float32)


def _scored_on_host(request: Request, drawn: Decoded[BestOfNInfo], chunk: int) -> Decoded[BestOfNInfo]:
    """The decoded samples with the scores of a reward that runs programs of its own, `chunk` samples at a time."""
    samples = drawn.info.samples
    batch, n = samples.mask.shape[:2]
    prompts = repeat_rows(request.prompts["reward"], chunk)
    parts = []
    for start in range(0, n, chunk):
        flat = jax.tree.map(lambda x, s=start: x[:, s : s + chunk].reshape((-1, *x.shape[2:])), samples)
        parts.append(score_completions(request.reward, request.params["reward"], prompts, flat).reshape(batch, chunk))
    return _best(samples, jnp.concatenate(parts, axis=1), drawn.kl)


def _best(samples: Completions, score: Array, kl: KL) -> Decoded[BestOfNInfo]:
    """The sample [B,T] of highest score [B,n] of each prompt."""
    best: Completions = jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), jnp.argmax(score, axis=1)], samples)
    return Decoded(best, kl, BestOfNInfo(samples, score))


def _in_chunks(request: Request, rng: Array, n: int, size: int, *, host: bool) -> Decoded[BestOfNInfo]:
    """The n samples of each prompt, drawn and scored `size` rows at a time."""
    prompts, scored = request.prompts["policy"], request.prompts["reward"]
    params, limit = request.params["policy"], request.max_new_tokens
    drawn = _chunks.draw(request.policy, params, rng, prompts, limit, request.eos_ids, n, size)
    samples: Completions = jax.tree.map(lambda x: x.reshape((-1, n, *x.shape[1:])), drawn)
    kl = _kl.best_of_n_bound(n, samples.log_prob[:, 0, 0], tempered=request.tempered)
    if host:
        waiting = BestOfNInfo(samples, jnp.zeros(samples.finished.shape))
        return _scored_on_host(request, Decoded(jax.tree.map(lambda x: x[:, 0], samples), kl, waiting), n)
    repeated = repeat_rows(scored._replace(index=prompt_index(scored)), n)
    parts = list(itertools.chain(*_chunks.chunks(repeated, size)))
    found = [
        _score(request.reward, request.params["reward"], part.prompts, take_rows(drawn, jnp.asarray(part.rows)))
        for part in parts
    ]
    score = _chunks.in_order(found, [part.rows[: part.size] for part in parts])
    return _best(samples, score.reshape(-1, n), kl)


_score = jax.jit(score_completions, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7, 8, 9, 10))
def _best_of_n(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: Prompts,
    n: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    chunk: int,
    stages: tuple[tuple[int, int], ...],
    tempered: bool,
) -> tuple[Decoded[BestOfNInfo], Array]:
    """(what was decoded, whether the reward of a partial text was NaN [B])."""
    start, draws = jax.random.split(rng)
    index = prompt_index(prompts)
    state, output = start_policy(policy, params["policy"], start, prompts["policy"], max_new_tokens)
    state, output = repeat_rows((state, output), chunk)
    scored = repeat_rows(prompts["reward"], chunk)

    def draw(sample: Array) -> tuple[Completions, Array]:
        """Completions [B,chunk,T] and rewards [B,chunk] of the samples numbered `sample` [chunk]."""
        drawn = rollout.rollout(
            policy,
            params["policy"],
            draws,
            state,
            output,
            steps=max_new_tokens,
            eos_ids=eos_ids,
            rows=streams(index, sample),
            last_step=False,
        ).completions
        score = score_completions(reward, params["reward"], scored, drawn)
        chunked: tuple[Completions, Array] = jax.tree.map(
            lambda x: x.reshape((-1, chunk, *x.shape[1:])), (drawn, score)
        )
        return chunked

    broken = jnp.zeros(index.shape, bool)
    if stages:
        samples, score, broken = _dropping(
            policy, reward, params, draws, state, output, prompts["reward"], index, n, max_new_tokens, eos_ids, stages
        )
    elif chunk == n:
        samples, score = draw(jnp.arange(n, dtype=jnp.int32))
    else:
        parts = jax.lax.map(draw, jnp.arange(n, dtype=jnp.int32).reshape(-1, chunk))
        # [n/chunk, B, chunk, ...] -> [B, n, ...]
        samples, score = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape((x.shape[1], n, *x.shape[3:])), parts)
    return _best(samples, score, _kl.best_of_n_bound(n, score[:, 0], tempered=tempered)), broken


def _dropping(
    policy: Policy,
    reward: Reward,
    params: Params,
    draws: Array,
    state: State,
    output: StepOutput,
    prompts: TokenBatch,
    index: Array,
    n: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    stages: tuple[tuple[int, int], ...],
) -> tuple[Completions, Array, Array]:
    """(the samples that are left, [B,m,T], their rewards [B,m], whether a partial text's was NaN [B]) of n rows a
    prompt, which draw as they do without stages."""
    batch, left, begin = index.shape[0], n, 0
    rows, finished = streams(index, jnp.arange(n, dtype=jnp.int32)), jnp.zeros(batch * n, bool)
    fields = rollout.no_records((batch * n, max_new_tokens), output.log_prob.dtype)
    broken = jnp.zeros(batch, bool)

    def drawn(finished: Array) -> tuple[Completions, Array]:
        whole = Completions(**fields, finished=finished, truncated=~finished)
        score = score_completions(reward, params["reward"], repeat_rows(prompts, left), whole)
        return whole, score.reshape(batch, left)

    for end, keep in (*stages, (max_new_tokens, 0)):
        rolled = rollout.rollout(
            policy,
            params["policy"],
            draws,
            state,
            output,
            steps=end - begin,
            eos_ids=eos_ids,
            finished=finished,
            rows=rows,
            last_step=end < max_new_tokens,
            begin=begin,
            keep_output=True,
        )
        state, output, finished = rolled.state, rolled.output, rolled.completions.finished
        fields = {name: x.at[:, begin:end].set(getattr(rolled.completions, name)) for name, x in fields.items()}
        whole, score = drawn(finished)
        if not keep:
            break
        broken = broken | jnp.isnan(score).any(axis=1)
        kept = jnp.sort(jnp.argsort(-score, axis=1, stable=True)[:, :keep], axis=1)  # the first among equals
        flat = (kept + left * jnp.arange(batch)[:, None]).reshape(-1)
        state, output, finished, fields, rows = take_rows((state, output, finished, fields, rows), flat)
        begin, left = end, keep
    samples: Completions = jax.tree.map(lambda x: x.reshape((batch, left, *x.shape[1:])), whole)
    return samples, score, broken
