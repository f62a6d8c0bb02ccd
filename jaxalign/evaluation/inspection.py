"""Responses token by token: `python -m eval.decode --inspect N` writes tokens.jsonl beside responses.jsonl.

A line is a response: method, beta, index, reward_before (the proxy of the prompt alone), and pieces, one per token:

    text, special       the token, and whether it is no text (an EOS)
    log_prob            under the method's distribution [nats]; null for methods that select whole texts
    log_prob_ref        under the base
    kl                  the exact KL of the step's distribution to the base's; null as log_prob
    q                   of a tilt: the score of the token less the base's mean score [units of reward]; else null
    reward              the proxy of the text so far, this token included; null without --reward
    candidates          [text, log_prob, log_prob_ref, q] of the likeliest tokens, and of the one drawn
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, decoding, rollout
from jaxalign._arrays import is_supported
from jaxalign._parts import start_policy, step_policy
from jaxalign._programs import telling
from jaxalign.decoding.requests import with_temperature
from jaxalign.evaluation import results
from jaxalign.evaluation.engine import Batch, Method, Stepwise, Texts, batches
from jaxalign.evaluation.loading import Scorer
from jaxalign.evaluation.results import Record
from jaxalign.tokens import decode_text
from jaxalign.types import Array, Completions, Params, Policy, Prompts

CANDIDATES = 8
CONTEXT = 4  # tokens before one that its text is decoded with


class Steps(NamedTuple):
    """What a Policy says along given responses."""

    log_prob: Any
    """[T,B], of the tokens."""
    log_prob_ref: Any
    """[T,B], under the base."""
    kl: Any
    """[T,B]."""
    q: Any
    """[T,B], of the tokens: see `centred`."""
    candidates: Any
    """[T,B,K], the likeliest tokens."""
    numbers: Any
    """[T,B,K,3]: log_prob, log_prob_ref and q of the candidates."""


def inspect(
    plan: Sequence[Method],
    base: Stepwise,
    scorer: Scorer | None,
    prompts: Texts,
    folder: pathlib.Path,
    *,
    count: int,
    batch_size: int,
    mesh: str,
    seed: int,
) -> None:
    """Writes tokens.jsonl of a method's folder, unless it holds these responses.

    Args:
      plan: the methods whose responses the folder holds.
      base: read for methods that draw from no Policy of their own.
      scorer: the proxy; None without.
      prompts: of the run.
      folder: with responses.jsonl.
      count: how many prompts, from the first on.
      batch_size, mesh: as in decoding.
      seed: of critics that draw, whose scores are drawn anew here.
    """
    path = folder / "tokens.jsonl"
    count = min(count, len(prompts.ids))
    wanted = [(method.name, method.beta, i) for method in plan for i in range(count)]
    if path.exists():
        there = {(line["method"], line["beta"], line["index"]) for line in results.read(path)}
        if there >= set(wanted):
            return
    known = {(r["method"], r["beta"], r["index"]): r for r in results.read(folder / "responses.jsonl")}
    size = batch_size if mesh else min(batch_size, count)
    lines: dict[tuple[str, float | None, int], Record] = {}
    with telling():
        for method in plan:
            for batch in batches(prompts.ids[:count], batch_size=size, mesh=mesh):
                records = [known[method.name, method.beta, i] for i in batch.rows]
                found = _inspect(method.stepwise, base, scorer, prompts, batch, records, jax.random.key(seed))
                for i, line in zip(batch.rows, found, strict=True):
                    lines[method.name, method.beta, i] = {"method": method.name, "beta": method.beta, "index": i} | line
    results.write(path, [lines[key] for key in wanted])


def _inspect(
    own: Stepwise | None,
    base: Stepwise,
    scorer: Scorer | None,
    prompts: Texts,
    batch: Batch,
    records: Sequence[Record],
    rng: Array,
) -> list[Record]:
    """A line per row of a batch, without the method's name."""
    rows = batch.prompts.tokens.shape[0]
    steps = own if own is not None else base
    length = steps.limits["max_new_tokens"]  # one shape for all methods
    tokens, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for b in range(rows):
        ids = records[min(b, len(records) - 1)]["tokens"]
        tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
    policy, params, inner = with_temperature(steps.policy, steps.params, batch.prompts, steps.limits["temperature"])
    temperature = jnp.asarray(steps.limits["temperature"], jnp.float32)
    beta = jnp.asarray(1.0 if steps.beta is None else steps.beta, jnp.float32)
    host: Steps = _hosts.host_value(_replay(policy, params, rng, inner, tokens, mask, beta * temperature, beta))
    rewards = _rewards(scorer, batch, tokens, mask)
    ends = set(steps.limits["eos_ids"]) | set(getattr(prompts.tokenizer, "all_special_ids", ()))
    known = Known(own is not None, own is not None and own.beta is not None)
    out = []
    for b, record in enumerate(records):
        ids, pieces = record["tokens"], []
        for t, token in enumerate(ids):
            drawn = known.numbers([host.log_prob[t, b], host.log_prob_ref[t, b], host.q[t, b]])
            likely = dict(zip(host.candidates[t, b].tolist(), map(known.numbers, host.numbers[t, b]), strict=True))
            if own is not None:  # those that the method cannot draw are left out
                likely = {z: numbers for z, numbers in likely.items() if numbers[0] is not None}
            pieces.append(
                {
                    "text": _piece(prompts.tokenizer, ids, t, token),
                    "special": token in ends,
                    "log_prob": drawn[0],
                    "log_prob_ref": drawn[1],
                    "kl": None if own is None else _round(host.kl[t, b]),
                    "q": drawn[2],
                    "reward": None if rewards is None else _round(rewards[t + 1, b]),
                    "candidates": [
                        [_piece(prompts.tokenizer, ids, t, z), *numbers]
                        for z, numbers in (likely | {token: drawn}).items()
                    ],
                }
            )
        before = None if rewards is None else _round(rewards[0, b])
        out.append({"reward_before": before, "pieces": pieces})
    return out


class Known(NamedTuple):
    """Which numbers of a token a method has."""

    log_prob: bool
    """Whether it draws from a Policy."""
    q: bool
    """Whether that is a tilt of the base."""

    def numbers(self, given: Sequence[Any]) -> list[float | None]:
        """log_prob, log_prob_ref and q; None for those that the method has not."""
        log_prob, log_prob_ref, q = map(_round, given)
        return [log_prob if self.log_prob else None, log_prob_ref, q if self.q else None]


@functools.partial(jax.jit, static_argnums=0)
def _replay(
    policy: Policy, params: Params, rng: Array, prompts: Prompts, tokens: Array, mask: Array, heat: Array, beta: Array
) -> Steps:
    """Steps a Policy along responses [B,T]; heat: beta times the temperature."""
    start, moves = jax.random.split(rng)
    state, output = start_policy(policy, params, start, prompts, tokens.shape[1])
    feed = mask & jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))

    def step(carry: Any, xs: Any) -> Any:
        state, output = carry
        t, token, fed = xs
        q = centred(output.log_prob, output.log_prob_ref, heat, beta)
        kept = jax.lax.top_k(output.log_prob, min(CANDIDATES, output.log_prob.shape[-1]))[1]
        each = [output.log_prob, output.log_prob_ref, q]
        numbers = jnp.stack([jnp.take_along_axis(x, kept, axis=-1) for x in each], axis=-1)
        chosen = [rollout.token_value(x, token) for x in each]
        kl = rollout.exact_kl(output.log_prob, output.log_prob_ref)
        record = Steps(chosen[0], chosen[1], kl, chosen[2], kept, numbers)
        moved = step_policy(policy, params, jax.random.fold_in(moves, t), state, jnp.where(fed, token, -1))
        return moved, record

    xs = jnp.arange(tokens.shape[1]), jnp.asarray(tokens).T, feed.T
    found: Steps = jax.lax.scan(step, (state, output), xs)[1]
    return found


def centred(log_prob: Array, log_prob_ref: Array, heat: Array, beta: Array) -> Array:
    """The score of each token by which a tilt made its distribution of the base's, less its mean under the base.

    q(z) − E_base[q] with q = beta·(tau·log pi(z) − log pi_ref(z)) + const, at temperature tau, on the candidates of the
    tilt; 0 outside.

    Args:
      log_prob: [...,V], of the tilt at the temperature.
      log_prob_ref: [...,V], of the base.
      heat: beta·tau.
      beta: the KL weight.

    Returns:
      [...,V].
    """
    inside = is_supported(log_prob) & is_supported(log_prob_ref)
    q = jnp.where(inside, heat * log_prob - beta * log_prob_ref, 0)
    weight = jnp.where(inside, jnp.exp(log_prob_ref), 0)
    mean = (weight * q).sum(axis=-1, keepdims=True) / weight.sum(axis=-1, keepdims=True)
    return jnp.where(inside, q - mean, 0)


def _rewards(scorer: Scorer | None, batch: Batch, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """[T+1,B]: the proxy of the prompt and of the text after each token; None without a proxy."""
    if scorer is None:
        return None
    longest = int(mask.sum(axis=1).max())
    zeros, ends = jnp.zeros(tokens.shape), jnp.zeros(len(tokens), bool)
    out = []
    for t in range(longest + 1):
        part = mask & (np.arange(tokens.shape[1]) < t)
        so_far = Completions(jnp.asarray(tokens * part), jnp.asarray(part), zeros, zeros, zeros, None, ends, ends)
        joined = decoding.join(batch.prompts, so_far)
        assert batch.prompts.index is not None
        out.append(_hosts.host_value(scorer.reward(scorer.params, *joined, batch.prompts.index)))
    return np.stack(out)


def _piece(tokenizer: Any, ids: Sequence[int], t: int, token: int) -> str:
    """The text that a token adds after the first t."""
    before = list(ids[max(t - CONTEXT, 0) : t])
    text, whole = decode_text(tokenizer, before, special=True), decode_text(tokenizer, [*before, token], special=True)
    return whole[len(text) :] if whole.startswith(text) else decode_text(tokenizer, [token], special=True)


def _round(value: Any) -> float | None:
    """Six decimals; None for what is not finite or stands for log 0."""
    number = float(value)
    return round(number, 6) + 0.0 if np.isfinite(number) and number > -1e9 else None
