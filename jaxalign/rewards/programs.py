"""Rewards that are programs on the host: functions of numpy arrays or of text. `jaxalign.rewards` names them too."""

from __future__ import annotations

import importlib
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, Params, Reward


def from_numpy(f: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Reward:
    """A program on host arrays: f(tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> [N] numbers. params: None.

    Works under jit through a callback; it has no gradient, and a result of another shape is a ValueError. float32, or
    float64 where jax has it enabled.
    """

    def dtype() -> np.dtype:
        return jnp.dtype(jnp.result_type(float))

    def call(tokens: Array, mask: Array, prompt_length: Array, index: Array) -> np.ndarray:
        found = np.asarray(f(*(np.asarray(a) for a in (tokens, mask, prompt_length, index))), dtype())
        if found.shape != np.shape(prompt_length):
            raise ValueError(f"from_numpy: expected one number per row, {np.shape(prompt_length)}, found {found.shape}")
        return found

    def reward(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
        shape = jax.ShapeDtypeStruct(prompt_length.shape, dtype())
        return jax.pure_callback(call, shape, tokens, mask, prompt_length, index, vmap_method="sequential")

    return reward


def program(spec: str, *, name: str = "reward") -> Callable[..., Any]:
    """The function of "MODULE:FUNCTION": of a reward, f(prompts, responses) -> one number each. ValueError that names
    the field where there is none."""
    module, _, function = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: expected MODULE:FUNCTION, found {spec!r} ({error})") from error
    if not callable(found):
        raise ValueError(f"{name}: expected MODULE:FUNCTION, found {spec!r}, a {type(found).__name__}")
    return found


def is_program(spec: str) -> bool:
    """Whether an option names a program, "MODULE:FUNCTION", and not a folder."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec)) and not pathlib.Path(spec).exists()


def parse(spec: str, *, name: str = "reward") -> tuple[tuple[float, str], ...]:
    """(weight, folder or MODULE:FUNCTION) of each term of an option: "DIR", or a weighted sum with spaces about its
    signs, "0.5 * DIR + DIR2 - 0.1 * MODULE:FUNCTION". ValueError that names the field: a term is empty or holds a sign
    that is not one of the sum's, or a weight is not a finite number other than 0."""
    if spec and pathlib.Path(spec).exists():
        return ((1.0, spec),)
    first, *rest = re.split(r"\s([+-])\s", spec)
    out = []
    for sign, term in zip(["+", *rest[::2]], [first, *rest[1::2]], strict=True):
        weight, times, found = term.rpartition(" * ")
        found = found.strip()
        try:
            value = float(weight) if times else 1.0
        except ValueError as error:
            raise ValueError(f"{name}: expected WEIGHT * REWARD, found {term.strip()!r} in {spec!r}") from error
        if not found or not 1e-30 < abs(value) < 1e30:  # beyond, a float32 would be 0 or infinite
            raise ValueError(f"{name}: expected a weight other than 0 and a reward, found {term.strip()!r} in {spec!r}")
        if re.search(r"\*|^[+-]\s|\s[+-]", found) and not pathlib.Path(found).exists():
            raise ValueError(f"{name}: expected spaces about each sign and a reward after it, found {spec!r}")
        out.append((value if sign == "+" else -value, found))
    return tuple(out)


def from_text(decode: Callable[[Sequence[int]], str], f: Callable[[list[str], list[str]], Sequence[float]]) -> Reward:
    """A program on text: f(prompts, responses) -> one number each. params: None.

    `decode` turns token ids into text (a tokenizer's decode). This is the explicit path for a reward model with another
    tokenizer: decode here, re-encode inside f.
    """

    def score(tokens: np.ndarray, mask: np.ndarray, prompt_length: np.ndarray, index: np.ndarray) -> np.ndarray:
        rows = [row[real].tolist() for row, real in zip(tokens, mask.astype(bool), strict=True)]
        prompts = [decode(row[:n]) for row, n in zip(rows, prompt_length.tolist(), strict=True)]
        responses = [decode(row[n:]) for row, n in zip(rows, prompt_length.tolist(), strict=True)]
        return np.asarray(f(prompts, responses))

    return from_numpy(score)
