"""Decoding prompts by any number of methods, batch by batch, into a responses file from which an interrupted run goes
on."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypedDict

import jax
import numpy as np

from jaxalign import _hosts, _progress, _signals, decoding
from jaxalign._checks import check_rng
from jaxalign._programs import telling
from jaxalign.evaluation import results
from jaxalign.evaluation.loading import Scorer
from jaxalign.evaluation.records import add_coherence, check_finite, on_host, record_of
from jaxalign.models import sharding
from jaxalign.prompts import bucket, prompt_batch
from jaxalign.types import KL, Array, ArrayLike, Completions, Decoded, Params, Policy, TokenBatch

Drawn: TypeAlias = Decoded[Any]
"""What a method gives for a batch."""


class Untempered(TypedDict):
    """Arguments of decoders without a temperature."""

    max_new_tokens: int
    eos_ids: tuple[int, ...]


class Limits(Untempered):
    """Arguments of every decoder."""

    temperature: ArrayLike


class Draw(Protocol):
    """Decodes one batch. A prompt's response depends on rng and its index alone at one batch size and width."""

    def __call__(self, rng: Array, prompts: TokenBatch, /) -> Drawn: ...


class Check(Protocol):
    """Checks a batch on the host; raises ValueErrors that name the field."""

    def __call__(self, prompts: TokenBatch, /) -> None: ...


class Forwards(Protocol):
    """Tokens that pass through models for a response of `length` tokens to a prompt of `prompt` tokens, beyond the
    prompt's first reading by each model; info holds the row's own numbers."""

    def __call__(self, prompt: int, length: int, info: Mapping[str, float], /) -> float: ...


class Measure(Protocol):
    """Completes what was drawn by numbers that are neither timed nor counted."""

    def __call__(self, rng: Array, prompts: TokenBatch, drawn: Drawn, /) -> Drawn: ...


class Stepwise(NamedTuple):
    """A method that draws its response token by token from a Policy."""

    policy: Policy
    """The Policy as it is drawn from."""
    params: Params
    """Its parameters."""
    limits: Limits
    """max_new_tokens, eos_ids and temperature."""
    kl: Callable[[Completions], KL]
    """The KL of what was drawn."""
    beta: float | None = None
    """The KL weight of a tilt of the base, whose scores follow from its distribution; None for other policies."""


class Method(NamedTuple):
    """One row group of the results."""

    name: str
    """The name of the method in tables."""
    beta: float | None
    """The strength of the method; None where the name says it."""
    draw: Draw
    """draw(rng, prompts) -> Decoded."""
    check: Check
    """check(prompts): ValueErrors on the host, before anything is written."""
    trace: Hashable
    """Methods with equal traces share their compiled program, so that the first batch of each is not timed."""
    forwards: Forwards | None = None
    """The tokens that pass through models for a response; None: unknown."""
    measure: Measure | None = None
    """measure(rng, prompts, drawn) -> Decoded, after the clock has stopped."""
    stepwise: Stepwise | None = None
    """The Policy behind `draw`, for methods that draw token by token from one."""


class Texts(NamedTuple):
    """The prompts of a run."""

    texts: list[str]
    """The prompts as given."""
    ids: list[list[int]]
    """The token ids of each prompt."""
    tokenizer: Any
    """The tokenizer of the base."""


class Batch(NamedTuple):
    """Prompts that are decoded together."""

    rows: list[int]
    """Indices of the prompts; rows of `prompts` beyond them are padding."""
    prompts: TokenBatch
    """Padded to the batch size."""


class Watch(Protocol):
    """Draws a batch by a method and shows it; gives what the method's `draw` gives."""

    def __call__(self, method: Method, rng: Array, batch: Batch, /) -> Drawn: ...


def batches(ids: list[list[int]], *, batch_size: int, mesh: str) -> list[Batch]:
    """Puts prompts of near lengths together: the same batches for every method and after every interruption."""
    devices = sharding.make_mesh(mesh, local=True)
    order = sorted(range(len(ids)), key=lambda i: (bucket(len(ids[i])), i))
    out = []
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        prompts = prompt_batch([ids[i] for i in rows], index=rows, batch_size=batch_size)
        if devices is not None:
            prompts = jax.device_put(prompts, sharding.batch_sharding(devices))
        out.append(Batch(rows, prompts))
    return out


def in_chunks(method: Method, size: int) -> Method:
    """The method with `size` prompts decoded at a time (`decoding.in_chunks`), the same in every batch."""

    def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
        return decoding.in_chunks(lambda part: method.draw(rng, part), prompts, size)

    return method._replace(draw=draw, trace=(method.trace, size))


def decode_batch(method: Method, rng: Array, prompts: TokenBatch) -> Drawn:
    """Decodes one batch by one method."""
    check_rng(rng)
    return method.draw(rng, prompts)


def decode(
    plan: Sequence[Method],
    scorers: Mapping[str, Scorer],
    prompts: Texts,
    final: pathlib.Path,
    *,
    batch_size: int,
    mesh: str,
    seed: int,
    embed: results.Embed | None = None,
    watch: Watch | None = None,
) -> dict[results.Key, float]:
    """Writes the responses of every method to a file, unless it is there.

    Each finished batch is appended to a partial file beside it, from which the next call goes on. Several processes
    share the batches: each has a partial file of its own, and the first makes one file of all.

    Args:
      plan: the methods; the one named "base" draws with the run's key, all others with one of their own.
      scorers: name -> what scores every response.
      prompts: of the run.
      final: the responses file.
      batch_size: prompts decoded together.
      mesh: as `sharding.make_mesh` reads it.
      seed: of all draws.
      embed: texts -> one vector each, for coherence.
      watch: draws each batch in place of its method's `draw`, to show it while it is drawn; nothing is timed then.

    Returns:
      Tokens/s of each method and strength that was decoded here beyond its first, compiling batch; of several processes
      the sum, where each knows its own.

    Raises:
      ValueError: a response, reward or KL that is not finite (the method or reward is named), or a former call's
        responses to other prompts.
    """
    partial = final.with_name(final.name + ".partial")
    if _hosts.from_first("whole" if final.exists() else ""):
        with contextlib.suppress(OSError):  # of a folder that cannot be written
            if _hosts.is_first():
                _remove(_partials(partial))  # a job was killed when it had made one file of them
        return {}
    found = _read_partial(partial)
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
    _hosts.barrier("decode: read")
    with _hosts.together():
        if _hosts.is_first():
            results.write(partial, records, partial=True)
            _remove(path for path in _partials(partial) if path != partial)
    own = partial if _hosts.count() == 1 else partial.with_name(f"{partial.name}-{_hosts.index():05d}")
    missing = [(k, j) for k in range(len(plan)) for j in range(len(parts)) if (k, j) not in whole]
    traced: set[Hashable] = set()
    timed: dict[results.Key, tuple[int, float]] = {}
    rng = jax.random.key(seed)
    # Draws that a method shares with the base would count as ties, and best-of-n would win too often.
    keys = [rng if method.name == "base" else jax.random.fold_in(rng, 1) for method in plan]
    total = len(plan) * len(prompts.ids)
    progress = _progress.progress("decode", total, initial=len(records), unit="response", shown=watch is None)
    with own.open("a") as sink, progress, telling():
        for k, j in _hosts.dealt(missing):
            _signals.check()
            method, batch = plan[k], parts[j]
            begin = time.perf_counter()
            drawn = decode_batch(method, keys[k], batch.prompts) if watch is None else watch(method, keys[k], batch)
            jax.block_until_ready(drawn)  # type: ignore[no-untyped-call, unused-ignore]
            seconds = time.perf_counter() - begin
            if method.measure is not None:
                drawn = method.measure(keys[k], batch.prompts, drawn)
            new = _records(method, _scores(scorers, batch, drawn), prompts, batch, drawn)
            if embed is not None:
                add_coherence(new, embed)
            sink.writelines(json.dumps(record, allow_nan=False) + "\n" for record in new)
            sink.flush()
            tokens = sum(len(record["tokens"]) for record in new)
            trace = (method.trace, batch.prompts.tokens.shape)
            if trace in traced and watch is None:
                before = timed.get((method.name, method.beta), (0, 0.0))
                timed[method.name, method.beta] = (before[0] + tokens, before[1] + seconds)
            traced.add(trace)
            progress.set_postfix_str(f"{method.name} {tokens / seconds:.0f} tokens/s")
            progress.update(len(batch.rows))
    _hosts.barrier("decode: done")
    with _hosts.together():
        if _hosts.is_first():
            _join_partial(partial, plan, final)
    speeds = [
        json.loads(text) for text in _hosts.gather_texts(json.dumps([[*key, n / s] for key, (n, s) in timed.items()]))
    ]
    each = [{(name, beta): rate for name, beta, rate in rates} for rates in speeds]
    return {key: sum(rates[key] for rates in each) for key in each[0] if all(key in rates for rates in each)}


def _partials(partial: pathlib.Path) -> list[pathlib.Path]:
    """The partial file and those of single processes, of this call or of one with another number of them."""
    return [path for path in (partial, *sorted(partial.parent.glob(partial.name + "-*"))) if path.exists()]


def _remove(paths: Iterable[pathlib.Path]) -> None:
    for path in paths:
        path.unlink()


def _read_partial(partial: pathlib.Path) -> dict[tuple[str, float | None, int], results.Record]:
    """(method, strength, prompt) -> record, of all partial files."""
    return {(r["method"], r["beta"], r["index"]): r for path in _partials(partial) for r in results.read(path)}


def _join_partial(partial: pathlib.Path, plan: Sequence[Method], final: pathlib.Path) -> None:
    """Makes the responses file of the partial files, which go."""
    order = {(m.name, m.beta): k for k, m in enumerate(plan)}
    records = list(_read_partial(partial).values())
    records.sort(key=lambda r: (order[r["method"], r["beta"]], r["index"]))
    results.write(final, records)
    _remove(_partials(partial))


def _scores(scorers: Mapping[str, Scorer], batch: Batch, drawn: Drawn) -> dict[str, np.ndarray]:
    """Name -> reward [B] of each response. ValueError where one is not finite."""
    joined = decoding.join(batch.prompts, drawn.completions)
    assert batch.prompts.index is not None
    out = {}
    for name, scorer in scorers.items():
        out[name] = _hosts.host_value(scorer.reward(scorer.params, *joined, batch.prompts.index))
        if not np.isfinite(out[name]).all():
            raise ValueError(f"{name}: expected finite rewards, found {out[name]} for prompts {batch.rows}")
    return out


def _records(
    method: Method, scores: Mapping[str, np.ndarray], prompts: Texts, batch: Batch, drawn: Drawn
) -> list[results.Record]:
    """One record per real row."""
    numbers = on_host(drawn)
    check_finite(method.name, numbers, batch.rows)
    out = []
    for b, i in enumerate(batch.rows):
        own = record_of(numbers, b)
        record = {"method": method.name, "beta": method.beta, "index": i, "prompt": prompts.texts[i]}
        record |= {"response": prompts.tokenizer.decode(own["tokens"], skip_special_tokens=True)} | own
        if method.forwards is not None:
            length = max(len(own["tokens"]), 1)
            record["forwards"] = round(method.forwards(len(prompts.ids[i]), length, own["info"]) / length, 3)
        out.append(record | {name: round(float(values[b]), 6) for name, values in scores.items()})
    return out
