"""Responses in a run folder, and their summary: one row per method and beta.

A responses file is JSON lines; each holds at least method, beta, index, prompt, tokens, kl, kl_kind, truncated, and
where rewards were computed reward and gold.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from jaxalign import _io, metrics

SCORED = ("reward", "gold", "second_gold")
"""Options that score every response, and the fields of their numbers: the first is what methods maximise."""

TABLE, PICTURE = "results.json", "frontier.png"

Record: TypeAlias = dict[str, Any]
"""A line of a responses file, or a row of results (`summarise`), by name.

A response: method, beta (its strength; None without), index (the prompt's row), prompt, response, tokens [T] (ids),
log_prob and log_prob_ref [T] with their sums log_prob_sum, log_prob_ref_sum and log_norm_sum, kl [nats] and kl_kind,
finished, truncated, info (the decoder's own numbers), forwards where the cost is known, and reward, gold, second_gold
and coherence where they were computed.

A row: method, beta, responses (how many), means of reward, gold, second_gold, kl and win_rate, and the perplexity under
the base, each with its 95 % half-width under NAME_95 (None of one response), kl_kind, means of tokens, truncated,
forwards, diversity and coherence, and tokens_per_second (None where it was not measured). What was not computed is left
out."""
Key: TypeAlias = tuple[str, float | None]
"""Method and strength."""


class Embed(Protocol):
    """A user's embedding of texts: one vector each."""

    def __call__(self, texts: list[str], /) -> Any: ...


def read(path: pathlib.Path) -> list[Record]:
    """Reads the whole lines of a responses file; [] for no file. A last line without its end was cut short and is left
    out. ValueError for a damaged file: a line that is no JSON object, or another digest than that beside the file."""
    if not path.exists():
        return []
    then = f"remove it, and the same command draws its responses again; if you changed it yourself, {_io.sidecar(path)}"
    _io.check_digest(path, then=then)
    records = []
    # Written as ASCII; only newlines part lines.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line.decode("ascii"))
            if not isinstance(record, dict):
                raise ValueError(f"a JSON {type(record).__name__}")
        except ValueError as error:
            raise ValueError(
                f"{path.name}: expected a JSON object in line {number}, found {error} in {path}; {then}"
            ) from None
        records.append(record)
    return records


def write(path: pathlib.Path, records: Sequence[Record], *, partial: bool = False) -> None:
    """Writes all records, whole or not at all; with the digest of the file beside it, unless lines will follow."""
    _io.write_lines(path, records, digest=not partial)


def check_texts(
    records: Sequence[Record], texts: Sequence[str], path: pathlib.Path, *, expected: int | None = None
) -> None:
    """Checks that the records of a former call answer the prompts of this one.

    Args:
      records: read from `path`.
      texts: the prompts of this call.
      path: named in errors.
      expected: how many records there should be; None: any number.

    Raises:
      ValueError: another prompt at some index, or another number of records.
    """
    for r in records:
        now = texts[r["index"]] if r["index"] < len(texts) else None
        if r["prompt"] != now:
            raise ValueError(
                f"prompts: expected {r['prompt']!r} at index {r['index']}, as in {path}, found {now!r}; "
                "name another --out, or remove that folder"
            )
    if expected is not None and len(records) != expected:
        raise ValueError(
            f"prompts: expected the prompts of the {len(records)} responses in {path}, found {len(texts)} prompts that "
            f"call for {expected}; name another --out, or remove that folder"
        )


def check_folder(out: pathlib.Path) -> None:
    """Checks that no results of others lie where those of decoding are to be written.

    Args:
      out: the folder.

    Raises:
      ValueError: its results.json is no table of decoding, or there is a picture beside none.
    """
    path, picture = out / TABLE, out / PICTURE
    if path.exists():
        with contextlib.suppress(ValueError, OSError):
            rows = _io.read_json(path, then="", kind=list)
            if rows and all(isinstance(row, dict) and "method" in row for row in rows):
                return
    elif picture.exists():
        path = picture
    else:
        return
    raise ValueError(
        f"out: expected a folder with no {path.name} but decoding's own, found another in {out}; name another --out, "
        f"or remove {path}"
    )


def summarise(records: Sequence[Record]) -> list[Record]:
    """Summarises responses: one row per method and strength, in order of appearance.

    Args:
      records: of any number of methods, all scored by the same rewards.

    Returns:
      Rows with the means of reward, gold, second gold and KL [nats] and their 95 % half-widths ("_95", None for a
      single response), the perplexity under the base, exp of the mean over responses of their nats per token, with the
      half-width that follows from that mean's, the kind of KL, mean length [tokens], share truncated, tokens through
      models per token ("forwards", where known),
      mean diversity of a response's tokens, mean coherence where it was computed, and the win rate against the method
      "base" on the same prompts, by gold (by reward where there is no gold), ties half.
    """
    decisive = next((name for name in ("gold", "reward") if records and name in records[0]), None)
    base = {r["index"]: r[decisive] for r in records if r["method"] == "base" and decisive in r} if decisive else {}
    groups: dict[Key, list[Record]] = {}
    for r in records:
        groups.setdefault((r["method"], r["beta"]), []).append(r)
    rows = []
    for (method, beta), group in groups.items():
        row: Record = {"method": method, "beta": beta, "responses": len(group)}
        for name in (*SCORED, "kl"):
            if name in group[0]:
                row |= _estimate(name, [r[name] for r in group])
        row |= _perplexity(group)
        row["kl_kind"] = group[0]["kl_kind"]
        row["tokens"] = metrics.mean_interval([len(r["tokens"]) for r in group]).mean
        row["truncated"] = metrics.mean_interval([r["truncated"] for r in group]).mean
        if "forwards" in group[0]:
            row["forwards"] = metrics.mean_interval([r["forwards"] for r in group]).mean
        row["diversity"] = metrics.mean_interval([metrics.diversity(r["tokens"]) for r in group]).mean
        if "coherence" in group[0]:
            row["coherence"] = metrics.mean_interval([r["coherence"] for r in group]).mean
        if decisive and all(r["index"] in base and decisive in r for r in group):
            margin = [r[decisive] - base[r["index"]] for r in group]
            row |= _estimate("win_rate", [(m > 0) + 0.5 * (m == 0) for m in margin])
        rows.append(row)
    return rows


def _estimate(name: str, values: Sequence[float]) -> Record:
    """The mean and its 95 % half-width, None for a single value."""
    estimate = metrics.mean_interval(values)
    half = None if math.isnan(estimate.half_width) else estimate.half_width
    return {name: estimate.mean, f"{name}_95": half}


def _perplexity(group: Sequence[Record]) -> Record:
    """exp of the mean of a response's nats per token under the base; {} for responses of files without them."""
    known = [r for r in group if r.get("log_prob_ref_sum") is not None and r["tokens"]]
    if not known:
        return {}
    nats = _estimate("nats", [-r["log_prob_ref_sum"] / len(r["tokens"]) for r in known])
    value = math.exp(min(nats["nats"], 100.0))  # finite for JSON, whatever the base excludes
    half = nats["nats_95"]
    return {"perplexity": value, "perplexity_95": None if half is None else value * half}


def add_speed(rows: Sequence[Record], speed: Mapping[Key, float], former: pathlib.Path) -> None:
    """Writes tokens_per_second into each row: of this call, else of the `former` summary, else None."""
    then = "remove that file: the same command writes it anew"
    known = _io.read_json(former, then=then, kind=list) if former.exists() else []
    before = {(row["method"], row["beta"]): row.get("tokens_per_second") for row in known}
    for row in rows:
        key = (row["method"], row["beta"])
        row["tokens_per_second"] = speed.get(key, before.get(key))


def print_table(rows: Sequence[Record]) -> None:
    """Prints one line per row; a mean is followed by its 95 % half-width.

    "-" stands for what is not known: the interval of one response, the speed of a method that was decoded in its
    compiling batch alone, the cost of a method of the user's. passes/token: tokens that pass through models for each
    token of a response.
    """
    names = [name for name in (*SCORED, "kl", "win_rate") if name in rows[0]]
    plain = [name for name in ("diversity", "coherence") if name in rows[0]]
    plain_head = [*plain, "perplexity", "tokens", "truncated", "passes/token", "tokens/s", "kind of KL"]
    head = ["method", "beta", *names, *plain_head]
    lines = [head]
    for row in rows:
        cells = [str(row["method"]), _number(row["beta"], "g")]
        cells += [f"{row[name]:.3f} ± {_number(row[f'{name}_95'], '.3f')}" for name in names]
        cells += [
            *(f"{row[name]:.2f}" for name in plain),
            _number(row.get("perplexity"), ".3g"),
            f"{row['tokens']:.1f}",
            f"{row['truncated']:.2f}",
            _number(row.get("forwards"), ".1f"),
            _number(row["tokens_per_second"], ".0f"),
        ]
        lines.append([*cells, row["kl_kind"]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
