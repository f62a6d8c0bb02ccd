"""What is checked on the host, before anything is traced: ValueErrors that name the field, what was expected and what
was found. Values of tracers are not looked at; shapes always are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts
from jaxalign.prompts import prompts_for
from jaxalign.types import ArrayLike, Critic, HostCheck, Params, Policy, Prompts, TokenBatch

Fields = TypeVar("Fields", bound=tuple[Any, ...])


def is_concrete(*trees: Any) -> bool:
    """True when values can be checked on the host: no leaf is a tracer, nor an array that lies across processes."""
    leaves = [leaf for tree in trees for leaf in jax.tree.leaves(tree)]
    return not any(isinstance(leaf, jax.core.Tracer) or _hosts.is_spread(leaf) for leaf in leaves)


def is_traced(*trees: Any) -> bool:
    """True when a leaf is a tracer: the caller is under jit."""
    return any(isinstance(leaf, jax.core.Tracer) for tree in trees for leaf in jax.tree.leaves(tree))


MOST = 1_000_000
"""Of rows, samples and tokens at once: arrays of more would fill any memory, slowly."""


def check_at_most(name: str, value: int) -> None:
    """ValueError unless value is at most MOST."""
    if value > MOST:
        raise ValueError(f"{name}: expected at most {MOST}, found {value}")


def check_positive(name: str, value: ArrayLike) -> None:
    """ValueError on the host unless every entry of value is > 0 (NaN fails)."""
    if not jnp.issubdtype(np.asarray(value).dtype if not hasattr(value, "dtype") else value.dtype, jnp.number):
        raise ValueError(f"{name}: expected numbers > 0, found {value!r:.80}")
    if is_concrete(value) and not bool(np.all(np.asarray(value) > 0)):
        raise ValueError(f"{name}: expected a value > 0, found {np.asarray(value)}")


def check_rng(rng: object, *, name: str = "rng", per_row: bool = False, hint: str = "") -> None:
    """ValueError naming the argument unless rng is one jax key, of jax.random.key or uint32 data as of PRNGKey; with
    per_row, an array [B] of them. Shape and dtype alone are looked at, so that a traced key passes; jax checks the
    width of raw key data."""
    rank = int(per_row)
    shape, dtype = getattr(rng, "shape", None), getattr(rng, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if shape is not None and len(shape) == rank:
            return
        found = f"an array of keys of shape {shape}"
    elif dtype is not None and shape is not None:
        if dtype == jnp.uint32 and len(shape) == rank + 1:
            return
        found = f"an array of shape {shape} and dtype {dtype}"
    else:
        found = repr(rng) if rng is None or isinstance(rng, int | float | str) else f"a {type(rng).__name__}"
    expected = "a jax key per row, [B], as of jax.random.split" if per_row else "a jax key as of jax.random.key(0)"
    raise ValueError(f"{name}: expected {expected}, found {found:.80}{hint}")


class ParamsError(ValueError):
    """Params (or an entry of them) of the wrong form. `path` grows as the error leaves nested parts."""

    def __init__(self, complaint: str, path: str = "") -> None:
        self.complaint, self.path = complaint, path
        super().__init__(f"params{path}: {complaint}")


def entries_of(params: Params) -> dict[str, Params] | None:
    """The entries of a Mapping or a NamedTuple by name; None for anything else."""
    if isinstance(params, Mapping):
        return {str(name): value for name, value in params.items()}
    if isinstance(params, tuple) and hasattr(params, "_fields") and not isinstance(params, TokenBatch):
        return dict(zip(params._fields, params, strict=True))
    return None


def entry(params: Params, name: str) -> Params:
    """The entry `name` of a Mapping or NamedTuple. ParamsError naming what is missing."""
    entries = entries_of(params)
    if entries is None or name not in entries:
        found = type(params).__name__ if entries is None else _listed(entries)
        raise ParamsError(f"expected an entry {name!r}, found {found}")
    return entries[name]


def fields_of(params: Params, fields: type[Fields], *, required: Sequence[str] = ()) -> Fields:
    """Params as the NamedTuple `fields`: from one, or from a Mapping (or another NamedTuple) with the same names.

    Args:
      params: what a user gave.
      fields: a NamedTuple class; entries with a default may be missing.
      required: fields with a default which must be there all the same.

    Raises:
      ParamsError: an entry is missing, or there is one that `fields` does not have.
    """
    if isinstance(params, fields):
        return params
    named_tuple: Any = fields
    defaults: Mapping[str, Any] = named_tuple._field_defaults
    found: Fields = named_tuple(**named_entries(params, named_tuple._fields, set(defaults) - set(required)))
    return found


def named_entries(params: Params, names: Sequence[str], optional: Collection[str] = ()) -> dict[str, Params]:
    """The entries of a Mapping or NamedTuple by name.

    Args:
      params: what a user gave.
      names: all the entries that there may be.
      optional: those of them that may be missing.

    Raises:
      ParamsError: an entry is missing, or there is one that `names` does not list.
    """
    entries = entries_of(params)
    required = [name for name in names if name not in optional]
    if entries is None or not set(required) <= set(entries) <= set(names):
        expected = ("entries " if len(names) > 1 else "an entry ") + ", ".join(
            name + (" (optional)" if name in optional else "") for name in names
        )
        found = type(params).__name__ if entries is None else _listed(entries)
        raise ParamsError(f"expected {expected}; found {found}{_difference(required, names, entries)}")
    return entries


def _listed(entries: Mapping[str, Any]) -> str:
    return ", ".join(entries) or "none"


def _difference(required: Sequence[str], names: Sequence[str], entries: Mapping[str, Any] | None) -> str:
    if entries is None:
        return ""
    missing = [name for name in required if name not in entries]
    surplus = [name for name in entries if name not in names]
    parts = [f"{word} {', '.join(found)}" for word, found in (("missing", missing), ("unknown", surplus)) if found]
    return f" ({'; '.join(parts)})"


def check_prompts(prompts: TokenBatch, *, name: str = "prompts") -> None:
    """Shapes always, values where they are concrete: tokens and mask [B,P], B and P at least 1, at least one real token
    in each row, index [B] of integers in [0, 2^31 − 1): a table is looked up by it, and random streams are named by it.
    Padding may lie on either side of the real tokens and between them: every reader moves the real tokens together
    (`mdp.compact`)."""
    tokens, mask, index = prompts
    if np.ndim(tokens) != 2 or np.shape(tokens) != np.shape(mask):
        raise ValueError(
            f"{name}: expected tokens and mask of one shape [B,P], found {np.shape(tokens)} and {np.shape(mask)}"
        )
    if 0 in np.shape(tokens):
        raise ValueError(f"{name}: expected at least one prompt and one token, found shape {np.shape(tokens)}")
    if index is not None and np.shape(index) != np.shape(tokens)[:1]:
        raise ValueError(f"{name}: expected index of shape {np.shape(tokens)[:1]}, found {np.shape(index)}")
    if index is not None and not jnp.issubdtype(jnp.result_type(index), jnp.integer):
        raise ValueError(f"{name}: expected an index of integers [B], found dtype {jnp.result_type(index)}")
    if index is not None and is_concrete(index):
        numbers = np.asarray(index)
        if numbers.min() < 0 or numbers.max() >= 2**31 - 1:
            raise ValueError(f"{name}: expected an index in [0, 2^31 - 1), found {numbers.tolist()}")
    if is_concrete(mask):
        empty = np.flatnonzero(~np.asarray(mask, bool).any(axis=1))
        if empty.size:
            raise ValueError(
                f"{name}: expected at least one real token in each row, found none in rows {empty.tolist()}"
            )


def _batches(prompts: Prompts) -> list[tuple[str, TokenBatch]]:
    """(name, TokenBatch) of each entry. ValueError: no entry, or one of another type."""
    found = jax.tree_util.tree_leaves_with_path(prompts, is_leaf=lambda leaf: isinstance(leaf, TokenBatch))
    named = [("prompts" + jax.tree_util.keystr(path), leaf) for path, leaf in found]
    for name, leaf in named:
        if not isinstance(leaf, TokenBatch):
            raise ValueError(f"{name}: expected a TokenBatch, found {type(leaf).__name__}")
    if not named:
        raise ValueError(f"prompts: expected a TokenBatch or a dict that mirrors params, found {prompts!r}")
    return named


def same_prompts(prompts: Prompts) -> Prompts:
    """The prompts with one index [B] in every entry: given once, it holds for all; 0..B-1 where none is given.

    ValueError naming the entry: shapes (`check_prompts`), another batch size than the first entry's, or another index.
    """
    named = _batches(prompts)
    for name, batch in named:
        check_prompts(batch, name=name)
    first, size = named[0][0], np.shape(named[0][1].tokens)[0]
    for name, batch in named:
        if np.shape(batch.tokens)[0] != size:
            raise ValueError(f"{name}: expected {size} prompts as in {first}, found {np.shape(batch.tokens)[0]}")
    given = [(name, batch.index) for name, batch in named if batch.index is not None]
    for name, index in given:
        if is_concrete(index, given[0][1]) and not np.array_equal(np.asarray(index), np.asarray(given[0][1])):
            raise ValueError(f"{name}: expected the index of {given[0][0]}, {given[0][1]}, found {index}")
    index = given[0][1] if given else jnp.arange(size, dtype=jnp.int32)
    return jax.tree.map(
        lambda batch: batch._replace(index=index), prompts, is_leaf=lambda leaf: isinstance(leaf, TokenBatch)
    )


class Sized(Protocol):
    """A model whose limits are known."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def max_length(self) -> int:
        """Longest text [tokens]."""


def check_has_logits(name: str, lm: object) -> None:
    """ValueError for a model without vocabulary logits."""
    if not getattr(lm, "has_lm_head", True):
        raise ValueError(f"{name}: expected a language model, found a sequence classifier without lm_head")


def check_language_model(name: str, lm: object, folder: str) -> None:
    """ValueError that names the role and the folder of a model that is no language model: a classifier, which has no
    vocabulary logits, or a value or Q model, whose hidden states were trained for its head."""
    head = getattr(getattr(lm, "config", None), "head", None)
    if not getattr(lm, "has_lm_head", True):
        raise ValueError(f"{name}: expected a language model, found a sequence classifier in {folder}")
    if head is not None:
        raise ValueError(
            f"{name}: expected a language model, found a model with a {head.kind} head in {folder}, whose hidden "
            "states were trained for that head (the folder that it was trained from is one)"
        )


def check_model_params(lm: object, params: Params, *, head: bool) -> None:
    """ParamsError where parameters are not those of a model that can tell (`models.LanguageModel.check_params`)."""
    check = getattr(lm, "check_params", None)
    if check is not None:
        check(params, head=head)


def check_arrays(params: Params, path: str = "") -> None:
    """ParamsError naming what stands among parameters and is neither an array nor a number: a Policy, a function."""
    for where, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)):
            found = repr(leaf)[:40] if isinstance(leaf, str) else f"a {type(leaf).__name__}"
            raise ParamsError(f"expected arrays and numbers, found {found}", path + jax.tree_util.keystr(where))


def check_prompt_fits(lm: Sized, prompts: TokenBatch, max_new_tokens: int, *, name: str = "prompts") -> None:
    """Host-side checks of a batch for a model: a full cache, a token id outside the vocabulary, an empty prompt.
    ValueErrors that name the field."""
    check_prompts(prompts, name=name)
    if not is_concrete(prompts.tokens, prompts.mask):
        return
    mask = np.asarray(prompts.mask, bool)
    longest = int(mask.sum(axis=1).max())
    if longest + max_new_tokens > lm.max_length:
        raise ValueError(
            f"{name}: expected prompt and new tokens within the model's context of {lm.max_length}, "
            f"found a prompt of {longest} tokens and max_new_tokens = {max_new_tokens}"
        )
    real = np.asarray(prompts.tokens)[mask]
    if real.min() < 0 or real.max() >= lm.vocab_size:
        raise ValueError(
            f"{name}: expected token ids in [0, {lm.vocab_size}), found ids from {real.min()} to {real.max()}"
        )


def check_part(part: Policy | Critic, params: Params, prompts: Prompts, max_new_tokens: int, name: str) -> None:
    """Runs the host checks of a policy or critic that another one is built on, with its entry `name` of params and
    prompts. A ParamsError of its own params gets the entry's name in front of its path."""
    check_below(part, entry(params, name), prompts_for(prompts, name), max_new_tokens, f"[{name!r}]")


def check_below(part: Policy | Critic, params: Params, prompts: Prompts, max_new_tokens: int, path: str) -> None:
    """Runs the host checks of a part whose params lie at `path`, such as "['critics'][1]", of the whole."""
    run_check(part.check, params, prompts, max_new_tokens, path)


def run_check(check: HostCheck | None, params: Params, prompts: Prompts, max_new_tokens: int, path: str) -> None:
    """Runs the host check of a part whose params lie at `path` of the whole, and lets its ParamsError say so."""
    if check is None:
        return
    try:
        check(params, prompts, max_new_tokens)
    except ParamsError as error:
        raise ParamsError(error.complaint, path + error.path) from None


def check_integer(name: str, value: object) -> int:
    """A Python (or numpy) integer, as what sets a shape must be; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}: expected an integer, found {value!r}")
    return int(value)


def check_count(name: str, value: object, *, least: int, unit: str = "") -> None:
    """ValueError unless value is an integer >= least."""
    if check_integer(name, value) < least:
        raise ValueError(f"{name}: expected at least {least}{unit and ' ' + unit}, found {value}")
