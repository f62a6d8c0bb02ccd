"""How far the numbers of two programs for one law are apart, and which are the same to the bit: the work of
`python -m eval.mismatch`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, models, policies
from jaxalign._arrays import take_rows
from jaxalign.evaluation.parity import random_rows
from jaxalign.prompts import prompt_batch
from jaxalign.types import Array, Completions, Params, Policy, TokenBatch

BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (0.05, 0.005)}
"""Type -> the largest and the mean difference of a token's log-probability [nats] between two programs."""
WEIGHT, CLIP = 2.0, 0.2
"""The bound of a token's importance weight and the clip of a response's ratio, whose shares are told."""


class MismatchError(RuntimeError):
    """Numbers of two programs are further apart than their bound."""


class Row(NamedTuple):
    """How far two programs are apart on the same tokens."""

    dtype: str
    """Type of the model's parameters and activations."""
    compared: str
    """The two programs."""
    batch: int
    """Rows of the first one."""
    tokens: int
    """Tokens that were compared."""
    largest: float
    """The largest difference of a token's log-probability [nats]."""
    mean: float
    """The mean of it [nats]."""
    equal_bits: float
    """Share of the tokens whose log-probability is the same to the bit."""
    other_tokens: float
    """Share of the tokens at which the first program draws another one than the second; 0 where it scores."""
    kl: float
    """Mean of exp(d) − 1 − d, d the scorer's minus the sampler's log-probability [nats]: the sampler's KL."""
    weights_cut: float
    """Share of the tokens whose importance weight exp(d) is at its bound, 2."""
    ratios_clipped: float
    """Share of the responses that a ratio to the sampler's numbers would clip at 1 ± 0.2 before any update."""
    near_edge: float
    """Share of the draws whose margin is below `largest`: a difference of that size may change them."""
    largest_bound: float
    """The bound of `largest`; 0 where bits have to be the same."""
    mean_bound: float
    """The bound of `mean`; 0 where bits have to be the same."""

    @property
    def holds(self) -> bool:
        """Whether the differences are within their bounds; where bits have to be the same, whether tokens are, too."""
        within = self.largest <= self.largest_bound and self.mean <= self.mean_bound
        return within and (self.largest_bound > 0 or (self.equal_bits == 1 and self.other_tokens == 0))


def run(
    path: str,
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    batches: Sequence[int] = (1, 3, 8),
    rows: int = 32,
    length: int = 16,
    max_new_tokens: int = 32,
    deterministic: int = 8,
    seed: int = 0,
) -> list[Row]:
    """Compares sampler and scorer, batch and batch, and the programs of deterministic decoding, on random prompts.

    Args:
      path: folder of a language model.
      dtypes: types to load it in.
      batches: batch sizes beside `rows`.
      rows: prompts, which are also the largest batch.
      length: of the longest prompt [tokens]; the shortest has half of it.
      max_new_tokens: T of each response.
      deterministic: G of the deterministic programs.
      seed: of prompts and draws.

    Returns:
      A Row for each comparison, those of one dtype together.

    Raises:
      ValueError: a folder that cannot be read, a type without bounds, sizes below 1 or a batch above `rows`, or texts
        beyond the model's context.
    """
    sizes = {"rows": rows, "length": length, "max_new_tokens": max_new_tokens, "deterministic": deterministic}
    for name, value in (*sizes.items(), *(("batches", size) for size in batches)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, found {value}")
    if max(batches, default=1) > rows:
        raise ValueError(f"batches: expected at most the {rows} rows, found {tuple(batches)}")
    for dtype in dtypes:
        if dtype not in BOUNDS:
            raise ValueError(f"dtypes: expected some of {tuple(BOUNDS)}, found {dtype!r}")
    found: list[Row] = []
    for dtype in dtypes:
        lm, params = models.load(path, dtype=dtype)
        prompts = prompt_batch(random_rows(lm.vocab_size, rows, length, seed))
        limits = {"max_new_tokens": max_new_tokens, "eos_ids": lm.config.eos_ids}
        made = _Programs(policies.language_model(lm), params, jax.random.key(seed), limits)
        found += _plain(made, dtype, prompts, [*batches, rows])
        found += _deterministic(made, dtype, prompts, [*batches, rows], deterministic)
    return found


class _Programs(NamedTuple):
    """The programs that are compared, by batches."""

    policy: Policy
    params: Params
    rng: Array
    limits: dict[str, Any]

    def sample(self, prompts: TokenBatch, size: int, **how: Any) -> Completions:
        draw = lambda part, _: decoding.sample(self.policy, self.params, self.rng, part, **self.limits, **how)  # noqa: E731
        drawn: Completions = _by_batches(draw, prompts, None, size)
        return drawn

    def score(self, prompts: TokenBatch, drawn: Completions, size: int, **how: Any) -> np.ndarray:
        def scored(part: TokenBatch, own: Any) -> Array:
            given = self.policy, self.params, self.rng, part, own.tokens, own.mask
            return decoding.log_prob(*given, eos_ids=self.limits["eos_ids"], **how).log_prob

        return np.asarray(_by_batches(scored, prompts, drawn, size))

    def margins(self, prompts: TokenBatch, drawn: Completions) -> np.ndarray:
        given = self.policy, self.params, self.rng, prompts, drawn.tokens, drawn.mask
        found = np.asarray(decoding.draw_margins(*given, eos_ids=self.limits["eos_ids"]))
        real: np.ndarray = found[np.asarray(drawn.mask)]
        return real


def _by_batches(call: Callable[[TokenBatch, Any], Any], prompts: TokenBatch, drawn: Any, size: int) -> Any:
    """call(prompts, drawn) on `size` rows at a time, the last ones filled up with the first rows; joined."""
    count = prompts.tokens.shape[0]
    parts = []
    for begin in range(0, count, size):
        rows = jnp.arange(begin, begin + size) % count
        parts.append(call(take_rows(prompts, rows), take_rows(drawn, rows)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)


def _plain(made: _Programs, dtype: str, prompts: TokenBatch, sizes: Sequence[int]) -> Iterable[Row]:
    """Whole batches at once: the scorer against the sampler at each size, and each size against the last."""
    largest = sizes[-1]
    reference = made.sample(prompts, largest)
    margins = made.margins(prompts, reference)
    whole = made.score(prompts, reference, largest)
    bound = BOUNDS[dtype]
    for size in sizes:
        drawn = made.sample(prompts, size)
        other = _other(drawn, reference)
        scored = whole if size == largest else made.score(prompts, reference, size)
        own = whole if size == largest else made.score(prompts, drawn, size)
        mask, sampled = np.asarray(drawn.mask), np.asarray(drawn.log_prob)
        yield _row(dtype, "scorer to sampler", size, own, sampled, mask, other, margins, bound)
        if size != largest:
            mask = np.asarray(reference.mask)
            yield _row(dtype, f"scorer to batch {largest}", size, scored, whole, mask, 0.0, margins, bound)


def _deterministic(made: _Programs, dtype: str, prompts: TokenBatch, sizes: Sequence[int], chunk: int) -> Iterable[Row]:
    """Chunks of fixed size: tokens and bits have to be those of the largest batch, and the exact scorer's the
    sampler's."""
    how, largest = {"deterministic": chunk}, sizes[-1]
    reference = made.sample(prompts, largest, **how)
    whole = made.score(prompts, reference, largest, **how)
    margins = made.margins(prompts, reference)
    mask, sampled = np.asarray(reference.mask), np.asarray(reference.log_prob)
    name = f"deterministic={chunk}"
    for size in sizes:
        drawn = made.sample(prompts, size, **how)
        own, other = np.asarray(drawn.log_prob), _other(drawn, reference)
        yield _row(dtype, f"{name}, sampler to batch {largest}", size, own, sampled, mask, other, margins, (0, 0))
        scored = made.score(prompts, reference, size, **how)
        yield _row(dtype, f"{name}, scorer to batch {largest}", size, scored, whole, mask, 0.0, margins, (0, 0))
        exact = made.score(prompts, reference, size, exact=True, **how)
        yield _row(dtype, f"{name}, exact scorer to sampler", size, exact, sampled, mask, 0.0, margins, (0, 0))
    yield _row(dtype, f"{name}, scorer to sampler", largest, whole, sampled, mask, 0.0, margins, BOUNDS[dtype])


def _other(drawn: Completions, reference: Completions) -> float:
    """Share of the reference's tokens in whose place another one is drawn."""
    mask = np.asarray(reference.mask)
    same = (np.asarray(drawn.tokens) == np.asarray(reference.tokens)) & np.asarray(drawn.mask)
    return float((~same[mask]).mean())


def _row(
    dtype: str,
    compared: str,
    batch: int,
    found: np.ndarray,
    expected: np.ndarray,
    mask: np.ndarray,
    other: float,
    margins: np.ndarray,
    bound: tuple[float, float],
) -> Row:
    apart = np.where(mask, found.astype(np.float64) - expected, 0)
    each = apart[mask]
    largest = float(np.abs(each).max())
    return Row(
        dtype=dtype,
        compared=compared,
        batch=batch,
        tokens=int(mask.sum()),
        largest=largest,
        mean=float(np.abs(each).mean()),
        equal_bits=float((found == expected)[mask].mean()),
        other_tokens=other,
        kl=float((np.expm1(each) - each).mean()),
        weights_cut=float((np.exp(each) >= WEIGHT).mean()),
        ratios_clipped=float((np.abs(np.expm1(apart.sum(axis=1))) > CLIP).mean()),
        near_edge=float((margins < largest).mean()),
        largest_bound=bound[0],
        mean_bound=bound[1],
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a line for each.

    Args:
      rows: as `run` gives them.

    Returns:
      Lines under a heading; the last column says "above" where a bound does not hold.
    """
    heading = ["dtype", "compared", "batch", "tokens", "largest", "mean", "equal bits", "other tokens", "KL", "w at 2"]
    heading += ["r clipped", "near edge", "bound", ""]
    lines = [heading]
    for row in rows:
        shares = [f"{share:.1%}" for share in (row.equal_bits, row.other_tokens)]
        rest = [f"{row.kl:.1e}", *(f"{x:.1%}" for x in (row.weights_cut, row.ratios_clipped, row.near_edge))]
        bound = f"{row.largest_bound:g}" if row.largest_bound else "equal"
        start = [row.dtype, row.compared, str(row.batch), str(row.tokens), f"{row.largest:.1e}", f"{row.mean:.1e}"]
        lines.append([*start, *shares, *rest, bound, "" if row.holds else "above"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)
