"""Decoded batches as records: one per response, checked and ready for JSON."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign import _hosts, metrics
from jaxalign._programs import called, of_prompts
from jaxalign.evaluation.results import Embed, Record
from jaxalign.rewards.values import function_name
from jaxalign.types import Completions, Decoded


class Numbers(NamedTuple):
    """A decoded batch on the host."""

    completions: Completions
    """Numpy arrays [B,T]; rows beyond those of the batch are padding."""
    kl: np.ndarray
    """[B], in nats."""
    kl_kind: str
    """The label of the KL in tables, `types.KL.label`."""
    info: dict[str, np.ndarray]
    """The decoder's own numbers [B]."""


def on_host(drawn: Decoded[Any]) -> Numbers:
    """Fetches a decoded batch; of its info, the fields of shape [B]."""
    host = _hosts.host_value(drawn)
    rows = np.shape(host.completions.finished)
    info = host.info._asdict() if hasattr(host.info, "_asdict") else (host.info or {})
    own = {name: value for name, value in info.items() if isinstance(value, np.ndarray) and value.shape == rows}
    return Numbers(host.completions, host.kl.value, host.kl.label, own)


def check_finite(name: str, numbers: Numbers, rows: Sequence[int]) -> None:
    """Checks that a method has a distribution (no NaN weights, no overflow) and a KL.

    Args:
      name: of the method.
      numbers: the batch, whose rows beyond len(rows) are padding.
      rows: indices of its prompts.

    Raises:
      ValueError: names the method, the field and the prompts.
    """
    count = len(rows)
    fields = {field: getattr(numbers.completions, field) for field in ("log_prob", "log_prob_ref", "log_norm", "kl")}
    # The sum of the steps has its own line above: it is named before what is computed from it.
    fields = {field: values for field, values in fields.items() if values is not None}
    fields["kl of the response"] = numbers.kl[:, None]
    for field, values in fields.items():
        finite = np.isfinite(values[:count]).all(axis=1)
        if not finite.all():
            bad = [i for i, row in zip(rows, finite, strict=True) if not row]
            raise ValueError(f"{name}: expected finite {field}, found NaN or infinity for prompts {bad}")


def record_of(numbers: Numbers, b: int) -> Record:
    """Gives the record of row b of a batch."""
    completions = numbers.completions
    real = completions.mask[b]
    log_prob, log_ref = completions.log_prob[b][real], completions.log_prob_ref[b][real]
    return {
        "tokens": completions.tokens[b][real].tolist(),
        "log_prob": [round(float(x), 6) for x in log_prob],
        "log_prob_ref": [round(float(x), 6) for x in log_ref],
        "log_prob_sum": round(float(log_prob.sum()), 5),
        "log_prob_ref_sum": round(float(log_ref.sum()), 5),
        "log_norm_sum": round(float(completions.log_norm[b][real].sum()), 5),
        "kl": round(float(numbers.kl[b]), 5),
        "kl_kind": numbers.kl_kind,
        "finished": bool(completions.finished[b]),
        "truncated": bool(completions.truncated[b]),
        "info": {name: round(float(values[b]), 6) for name, values in numbers.info.items()},
    }


def _embedded(embed: Embed, texts: list[str]) -> np.ndarray:
    found = embed(texts)
    return np.asarray(np.ma.filled(found.astype(np.float64), np.nan) if np.ma.isMA(found) else found, np.float64)


def add_coherence(records: Sequence[Record], embed: Embed) -> None:
    """Writes the cosine of prompt and response into each record.

    Raises:
      ValueError: an embedding that is not one vector per text, or has no direction (0, NaN, infinite).
    """
    vectors = []
    for name in ("prompt", "response"):
        expected = f"one vector per text, shape ({len(records)}, D)"
        read = functools.partial(_embedded, embed, [r[name] for r in records])
        rows = of_prompts([r["index"] for r in records])
        named = f"embedding: {function_name(embed)}"
        found = called(embed, read, name=named, expected=expected, rows=rows)
        if found.ndim != 2 or len(found) != len(records):
            raise ValueError(f"embedding: expected one vector per text, shape ({len(records)}, D), found {found.shape}")
        vectors.append(found)
    with np.errstate(invalid="ignore"):
        cosine = metrics.coherence(*vectors)
    bad = [r["index"] for r, value in zip(records, cosine, strict=True) if not np.isfinite(value)]
    if bad:
        raise ValueError(f"embedding: expected finite vectors other than 0, found none for prompts {bad}")
    for record, value in zip(records, cosine.tolist(), strict=True):
        record["coherence"] = round(value, 6)
