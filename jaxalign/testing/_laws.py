"""What the checks share: the laws' names, comparisons that say where two results differ, and prompts in other forms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign._checks import check_rng, entries_of, same_prompts
from jaxalign._parts import LawError
from jaxalign.prompts import any_prompts
from jaxalign.types import Array, Params, Prompts, TokenBatch

LAWS = {
    1: "batch axis first",
    2: "frozen rows",
    3: "values per prompt",
    4: "prompts mirror params",
    5: "log_prob = log_prob_ref + increments - log_norm",
    6: "built once, traced once",
    7: "padding",
    8: "rows are independent",
    9: "finite gradients",
    10: "parallel log_prob",
    11: "candidates as the vocabulary",
    12: "kind of a critic",
    13: "finite numbers",
    14: "one number per text",
    15: "nothing beyond the mask",
    16: "index of a prompt",
    17: "prefix form of a reward",
    18: "verify and accept as steps",
}
"""Number -> short name, as the messages give them."""

PER_PROMPT = ("beta", "temperature", "top_p", "step_size")
"""Entries of params that are taken to be per prompt (law 3) unless the caller names others."""


def broken(law: int, seen: str) -> AssertionError:
    """The error of a law that does not hold. seen: one sentence."""
    return AssertionError(f"law {law} ({LAWS[law]}): {seen}")


@contextlib.contextmanager
def errors_break(law: int, doing: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns an error of these kinds (ValueError when none is named) into that of a law: its own where it has one, else
    `law`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, kinds or ValueError):
            raise
        first = str(error).strip().splitlines() or [""]
        named = error.law if isinstance(error, LawError) else law
        raise broken(named, f"{doing} raised {type(error).__name__}: {first[0]}") from error


def leaf_name(path: tuple[Any, ...], whole: str) -> str:
    """The name of a leaf for a message."""
    return f"{whole}{jax.tree_util.keystr(path)}"


def assert_same(
    law: int,
    when: str,
    found: Any,
    expected: Any,
    *,
    rtol: float,
    atol: float,
    rows: Sequence[int] | None = None,
    whole: str = "",
) -> None:
    """Compares two trees of arrays leaf by leaf, rows first.

    Args:
      law: the number of the law that holds when they are equal.
      when: what was done, which begins the sentence.
      found, expected: trees of one structure.
      rtol, atol: relative and absolute tolerance.
      rows: the rows that are compared; None: all.
      whole: the name of the trees in the message.

    Raises:
      AssertionError: naming the leaf, the row, the place in it, and both numbers.
    """
    pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, left), right in pairs:
        name, a, b = leaf_name(path, whole) or "the number", np.asarray(left, np.float64), np.asarray(right, np.float64)
        if a.shape != b.shape:
            raise broken(law, f"{when}: {name} has shape {a.shape} in place of {b.shape}")
        differs = ~np.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)
        if rows is not None:
            keep = np.zeros(len(differs), bool)
            keep[list(rows)] = True
            differs = differs & keep.reshape((-1,) + (1,) * (a.ndim - 1))
        if differs.any():
            with np.errstate(invalid="ignore"):
                worst = np.argmax(np.where(differs, np.nan_to_num(np.abs(a - b), nan=np.inf), -1))
            row, *rest = (int(i) for i in np.unravel_index(worst, a.shape))
            place = _entry(rest)
            at = (row, *rest)
            # Adding 0 makes −0 a 0.
            raise broken(law, f"{when}: {name} of row {row}{place} is {a[at] + 0.0:.6g} in place of {b[at] + 0.0:.6g}")


def _entry(place: Sequence[int]) -> str:
    return f", entry {place[0] if len(place) == 1 else list(place)}" if place else ""


def assert_finite(law: int, when: str, tree: Any, name: str) -> None:
    """AssertionError naming the leaf of a tree with an infinity or NaN, and its row."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            continue
        values = np.asarray(leaf, np.float64)
        if not np.isfinite(values).all():
            at = np.argwhere(~np.isfinite(values))[0].tolist()
            raise broken(law, f"{when}: {leaf_name(path, name)} is {values[tuple(at)]} in row {at[0]}{_entry(at[1:])}")


def assert_same_form(when: str, found: Any, expected: Any, name: str) -> None:
    """Law 6: a state keeps its structure, shapes and dtypes from step to step, as a loop needs it."""
    left, right = (jax.tree_util.tree_leaves_with_path(tree) for tree in (found, expected))
    names, before = ([leaf_name(path, name) for path, _ in leaves] for leaves in (left, right))
    if str(jax.tree.structure(found)) != str(jax.tree.structure(expected)):
        changed = sorted(set(names) ^ set(before))
        raise broken(6, f"{when}: the {name} has another structure than before{_listed(changed)}")
    for leaf, (_, a), (_, b) in zip(names, left, right, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise broken(6, f"{when}: {leaf} is {a.dtype}{list(a.shape)} in place of {b.dtype}{list(b.shape)}")


def _listed(leaves: Sequence[str]) -> str:
    return f", in {', '.join(leaves[:4])}{', ...' if len(leaves) > 4 else ''}" if leaves else ""


def assert_no_keys(name: str, state: Any) -> None:
    """Law 1: random keys come in as rng; one in a state would be shared by repeated rows."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise broken(1, f"{leaf_name(path, name)} is a random key, which rows repeated from one would share")


def assert_hashable(name: str, part: Any) -> None:
    """Law 6: decoders take a part as a static argument of jit."""
    with errors_break(6, f"hash({name}), which makes it a static argument of jit,", TypeError):
        hash(part)


# Prompts and params in other forms -----------------------------------------------------------------------------------


def is_batch(leaf: Any) -> bool:
    """True for a TokenBatch: prompts are trees of them."""
    return isinstance(leaf, TokenBatch)


def opened(prompts: Prompts) -> Prompts:
    """The prompts with their index, checked. ValueError for fewer than two rows: one has none beside it."""
    prompts = same_prompts(prompts)
    if any_prompts(prompts).tokens.shape[0] < 2:
        raise ValueError("prompts: expected at least two, so that rows can be mixed, found one")
    return prompts


def opened_rng(rng: Array | None) -> Array:
    """The key, or key 0 for None. ValueError for what is no key."""
    if rng is None:
        return jax.random.key(0)
    check_rng(rng)
    return rng


def each_batch(change: Callable[[TokenBatch], TokenBatch], prompts: Prompts) -> Prompts:
    """`change` of every TokenBatch of the prompts."""
    return jax.tree.map(change, prompts, is_leaf=is_batch)


def mixed_ids(vocab_size: int, size: int) -> np.ndarray:
    """[size] ids of all kinds in a fixed order: every id where there are no more than `size`."""
    return np.resize(np.random.default_rng(0).permutation(vocab_size), size)


def padded(prompts: Prompts, side: str, extra: int, fill: int | np.ndarray) -> Prompts:
    """The same prompts padded on one side ("left" or "right") to `extra` more columns, with the id or ids `fill`."""

    def pad(batch: TokenBatch) -> TokenBatch:
        tokens, mask = repadded(batch.tokens, batch.mask, side, extra, fill)
        return batch._replace(tokens=tokens, mask=mask)

    return each_batch(pad, prompts)


def repadded(tokens: Array, mask: Array, side: str, extra: int, fill: int | np.ndarray) -> tuple[Array, Array]:
    """Texts [N,L] and their mask, padded on one side to L + extra columns with the id `fill`, or with several in
    turn."""
    old, real = np.asarray(tokens), np.asarray(mask, bool)
    new = np.zeros((old.shape[0], old.shape[1] + extra), old.dtype)
    places = np.zeros(new.shape, bool)
    for row, kept in enumerate(real):
        size = int(kept.sum())
        at = slice(0, size) if side == "right" else slice(new.shape[1] - size, None)
        new[row, at], places[row, at] = old[row, kept], True
    new[~places] = np.resize(fill, int((~places).sum()))
    return jnp.asarray(new), jnp.asarray(places)


def rows_of(prompts: Prompts, order: Sequence[int]) -> Prompts:
    """Rows `order` of every TokenBatch, with their index."""
    index = jnp.asarray(order)
    return each_batch(lambda batch: TokenBatch(*jax.tree.map(lambda leaf: leaf[index], tuple(batch))), prompts)


def other_rows(batch: int) -> list[int]:
    """An order of B rows in which most have moved and one is missing."""
    return [0, *range(batch - 2, -1, -1)] if batch > 2 else [1, 1]


def mirrored(params: Params, prompts: Prompts) -> Prompts:
    """A TokenBatch in the place of each model of params, by the names that the library's parts use; the prompts
    themselves where there is no such name or they mirror params already."""
    entries = entries_of(params)
    if entries is None or not isinstance(prompts, TokenBatch):
        return prompts
    found: dict[str, Prompts] = {}
    for name in ("policy", "critic", "reference", "baseline", "reward", "baseline_reward"):
        if name in entries:
            found[name] = mirrored(entries[name], prompts)
    for name in ("critics", "policies"):
        if name in entries:
            found[name] = [mirrored(part, prompts) for part in entries[name]]
    if "adapters" in entries:
        found["adapters"] = [prompts] * len(jax.tree.leaves(entries["adapters"])[0])
    return found or prompts


def map_per_prompt(change: Callable[[Array], Array], params: Params, names: Sequence[str], batch: int) -> Params:
    """`change` of the [B,...] form of each entry of params, at any depth, that is called one of `names`. For the names
    of PER_PROMPT only scalars and [B] count."""

    def at(path: tuple[Any, ...], leaf: Any) -> Any:
        last = path[-1] if path else None
        name = getattr(last, "key", getattr(last, "name", None))
        shape = np.shape(leaf)
        if name not in names or (name in PER_PROMPT and shape not in ((), (batch,))):
            return leaf
        array = jnp.asarray(leaf)
        array = array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)
        return change(array if shape[:1] == (batch,) else jnp.broadcast_to(array, (batch, *shape)))

    return jax.tree_util.tree_map_with_path(at, params)


def different(values: Array) -> Array:
    """Values [B,...] made different from row to row: times numbers from 1 down to 0.6."""
    batch = values.shape[0]
    return values * jnp.linspace(1.0, 0.6, batch, dtype=values.dtype).reshape((batch,) + (1,) * (values.ndim - 1))


def floating_leaves(params: Params) -> tuple[list[Any], Callable[[list[Any]], Params], list[str]]:
    """(the floating-point leaves of params, a function from such leaves to params, their names)."""
    named, form = jax.tree_util.tree_flatten_with_path(params)
    kept = [i for i, (_, leaf) in enumerate(named) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]

    def filled(leaves: list[Any]) -> Params:
        every = [leaf for _, leaf in named]
        for i, leaf in zip(kept, leaves, strict=True):
            every[i] = leaf
        return jax.tree.unflatten(form, every)

    return [jnp.asarray(named[i][1]) for i in kept], filled, [leaf_name(named[i][0], "params") for i in kept]


def check_gradients(total: Callable[[Params], Array], params: Params) -> None:
    """Law 9: the derivative of a number by every floating-point leaf of params is finite."""
    leaves, filled, names = floating_leaves(params)
    if not leaves:
        return
    gradients = jax.grad(lambda given: total(filled(given)))(leaves)
    for name, gradient in zip(names, gradients, strict=True):
        bad = int((~np.isfinite(np.asarray(gradient, np.float64))).sum())
        if bad:
            raise broken(
                9, f"the gradient of the responses' log_prob by {name} has {bad} of {gradient.size} not finite"
            )
