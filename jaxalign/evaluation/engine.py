"""Decoding prompts by any number of methods, batch by batch, into a responses file from which an interrupted run goes
on."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign import _progress, data, decoding, metrics
from jaxalign.evaluation import results
from jaxalign.models import sharding
from jaxalign.types import Array, Completions, Params, Reward, TokenBatch

Extra = dict[str, Array]
"""Numbers [B] of each row that a method tells beside its Completions: segments, tries, effective samples."""


class Method(NamedTuple):
    """One row group of the results.

    draw(rng, prompts) -> (Completions, Extra); kl(host, extra, b) -> the KL of row b, of the kind that kl_kind names;
    check(prompts): ValueErrors on the host; trace: methods with the same one share their compiled program; forwards(P,
    T, extra of the row) -> tokens that pass through models for a response of T tokens to a prompt of P, beyond the
    prompt's first reading by each; measure(rng, prompts, extra) -> more of Extra, outside the time and the count."""

    name: str
    beta: float | None
    draw: Callable[[Array, TokenBatch], tuple[Completions, Extra]]
    kl: Callable[[Completions, Extra, int], float]
    kl_kind: str
    check: Callable[[TokenBatch], None]
    trace: Hashable
    forwards: Callable[[int, int, dict[str, float]], float]
    measure: Callable[[Array, TokenBatch, Extra], Extra] | None = None


class Judge(NamedTuple):
    """A jitted Reward and its parameters."""

    reward: Reward
    params: Params


class Texts(NamedTuple):
    """The prompts of a run. texts and ids: as given, and their tokens."""

    texts: list[str]
    ids: list[list[int]]
    tokenizer: Any


class Batch(NamedTuple):
    """rows: indices of the prompts; prompts: padded to batch_size rows."""

    rows: list[int]
    prompts: TokenBatch


def batches(ids: list[list[int]], *, batch_size: int, mesh: str) -> list[Batch]:
    """Prompts of near lengths together. The same batches for every method and after every interruption."""
    devices = sharding.make_mesh(mesh)
    order = sorted(range(len(ids)), key=lambda i: (data.bucket(len(ids[i])), i))
    out = []
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        prompts = data.prompt_batch([ids[i] for i in rows], index=rows, batch_size=batch_size)
        if devices is not None:
            prompts = jax.device_put(prompts, NamedSharding(devices, PartitionSpec("data")))
        out.append(Batch(rows, prompts))
    return out


def sampled_kl(host: Completions, told: Extra, b: int) -> float:
    """Σ_t of the exact KL of each step."""
    assert host.kl is not None
    return float(host.kl[b].sum())


def decode_batch(method: Method, rng: Array, prompts: TokenBatch) -> tuple[Completions, Extra]:
    """One batch by one method."""
    return method.draw(rng, prompts)


def decode(
    plan: Sequence[Method],
    judges: dict[str, Judge],
    prompts: Texts,
    final: pathlib.Path,
    *,
    batch_size: int,
    mesh: str,
    seed: int,
    embed: Callable[..., Any] | None = None,
) -> dict[results.Key, float]:
    """Writes the responses of every method to `final`, unless it is there; gives the tokens/s of each method and beta
    that was decoded here beyond its first, compiling batch. Each finished batch is appended to a partial file beside
    it, from which the next call goes on."""
    if final.exists():
        return {}
    partial = final.with_name(final.name + ".partial")
    found = {(r["method"], r["beta"], r["index"]): r for r in results.read(partial)}
    results.check_texts(list(found.values()), prompts.texts, partial)
    parts = batches(prompts.ids, batch_size=batch_size, mesh=mesh)
    # A batch that was cut short is decoded again whole: the same shapes and neighbours give the same bits.
    whole = {
        (k, j)
        for k, method in enumerate(plan)
        for j, batch in enumerate(parts)
        if all((method.name, method.beta, i) in found for i in batch.rows)
    }
    records = [found[plan[k].name, plan[k].beta, i] for k, j in sorted(whole) for i in parts[j].rows]
    results.write(partial, records)
    traced: set[Any] = set()
    timed: dict[results.Key, tuple[int, float]] = {}
    rng = jax.random.key(seed)
    # Draws that a method shares with the base would count as ties, and best-of-n would win too often.
    keys = [rng if method.name == "base" else jax.random.fold_in(rng, 1) for method in plan]
    total = len(plan) * len(prompts.ids)
    progress = _progress.progress("decode", total, initial=len(records), unit="response")
    with partial.open("a") as sink, progress:
        for k, method in enumerate(plan):
            for j, batch in enumerate(parts):
                if (k, j) in whole:
                    continue
                begin = time.perf_counter()
                drawn, extra = jax.block_until_ready(decode_batch(method, keys[k], batch.prompts))
                seconds = time.perf_counter() - begin
                if method.measure is not None:
                    extra = extra | method.measure(keys[k], batch.prompts, extra)
                new = _records(method, judges, prompts, batch, drawn, extra)
                if embed is not None:
                    add_coherence(new, embed)
                sink.writelines(json.dumps(record, allow_nan=False) + "\n" for record in new)
                sink.flush()
                records += new
                tokens = sum(len(record["tokens"]) for record in new)
                trace = (method.trace, batch.prompts.tokens.shape)
                if trace in traced:
                    before = timed.get((method.name, method.beta), (0, 0.0))
                    timed[method.name, method.beta] = (before[0] + tokens, before[1] + seconds)
                traced.add(trace)
                progress.set_postfix_str(f"{method.name} {tokens / seconds:.0f} tokens/s")
                progress.update(len(batch.rows))
    order = {(m.name, m.beta): k for k, m in enumerate(plan)}
    records.sort(key=lambda r: (order[r["method"], r["beta"]], r["index"]))
    results.write(final, records)
    partial.unlink()
    return {key: count / seconds for key, (count, seconds) in timed.items()}


def _records(
    method: Method, judges: dict[str, Judge], prompts: Texts, batch: Batch, drawn: Completions, extra: Extra
) -> list[dict[str, Any]]:
    """One record per real row. ValueErrors: a reward or a distribution that is not finite."""
    joined = decoding.join(batch.prompts, drawn)
    assert batch.prompts.index is not None
    scores = {
        name: np.asarray(judge.reward(judge.params, *joined, batch.prompts.index)) for name, judge in judges.items()
    }
    for name, values in scores.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: expected finite rewards, found {values} for prompts {batch.rows}")
    host, told = jax.tree.map(np.asarray, (drawn, extra))
    check_finite(method, host, batch.rows)
    return [
        _record(method, i, prompts, host, told, b) | {n: round(float(values[b]), 6) for n, values in scores.items()}
        for b, i in enumerate(batch.rows)
    ]


def add_coherence(records: list[dict[str, Any]], embed: Callable[[list[str]], Any]) -> None:
    """Writes the cosine of prompt and response into each record. ValueError where there is none."""
    vectors = (np.asarray(embed([r[name] for r in records]), np.float64) for name in ("prompt", "response"))
    with np.errstate(invalid="ignore"):
        found = metrics.coherence(*vectors)
    bad = [r["index"] for r, value in zip(records, found, strict=True) if not np.isfinite(value)]
    if bad:
        raise ValueError(f"embedding: expected finite vectors other than 0, found none for prompts {bad}")
    for record, value in zip(records, found.tolist(), strict=True):
        record["coherence"] = round(value, 6)


def check_finite(method: Method, host: Completions, rows: list[int]) -> None:
    """ValueError that names the method and the prompts where a policy has no distribution (NaN weights, an overflow).
    host: Completions of numpy arrays; the rows beyond len(rows) are padding."""
    count = len(rows)
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        values = getattr(host, name)
        if values is None:
            continue
        bad = [i for i, row in zip(rows, np.isfinite(values[:count]).all(axis=1), strict=True) if not row]
        if bad:
            raise ValueError(f"{method.name}: expected finite {name}, found NaN or infinity for prompts {bad}")


def _record(method: Method, index: int, prompts: Texts, host: Completions, told: Extra, b: int) -> dict[str, Any]:
    real = host.mask[b]
    log_prob, log_ref = host.log_prob[b][real], host.log_prob_ref[b][real]
    tokens = host.tokens[b][real].tolist()
    extra = {name: round(float(values[b]), 6) for name, values in told.items()}
    length = max(len(tokens), 1)
    return {
        "method": method.name,
        "beta": method.beta,
        "index": index,
        "prompt": prompts.texts[index],
        "response": prompts.tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": tokens,
        "log_prob": [round(float(x), 6) for x in log_prob],
        "log_prob_ref": [round(float(x), 6) for x in log_ref],
        "log_prob_sum": round(float(log_prob.sum()), 5),
        "log_prob_ref_sum": round(float(log_ref.sum()), 5),
        "log_norm_sum": round(float(host.log_norm[b][real].sum()), 5),
        "kl": round(method.kl(host, told, b), 5),
        "kl_kind": method.kl_kind,
        "finished": bool(host.finished[b]),
        "truncated": bool(host.truncated[b]),
        "forwards": round(method.forwards(len(prompts.ids[index]), length, extra) / length, 3),
    } | extra
