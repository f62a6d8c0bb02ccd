"""A folder's model beside transformers' own, on the same tokens: the work of `python -m eval.parity`."""

from __future__ import annotations

import importlib.util
import inspect
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import models, rewards
from jaxalign.models.hf.sources import find_source
from jaxalign.types import Params


class Difference(NamedTuple):
    """How far two models are apart on some tokens."""

    tokens: str
    """What was read: "random, left-padded", or the text's beginning."""
    kind: str
    """What was compared: "logits" or "rewards"."""
    largest: float
    """The largest difference of two numbers."""
    scale: float
    """The largest number of transformers' model."""
    agreement: float
    """The share of positions at which both have the same most probable token; 1 for rewards."""

    @property
    def relative(self) -> float:
        """The largest difference, in units of the largest number."""
        return self.largest / max(self.scale, 1e-30)


def check_torch() -> None:
    """ValueError, in one line that says what to install, where transformers' models cannot run."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError("torch: expected for transformers' own forward (pip install torch), found none installed")


def load_theirs(path: str) -> Any:
    """transformers' model of a folder, in float32 and with plain attention; no code from the folder is run.

    Raises:
      ValueError: torch is not installed, or the folder is an adapter's.
    """
    check_torch()
    import torch
    import transformers

    source = find_source(path)
    if source.adapters:
        raise ValueError(f"model: expected the folder of a whole model, found an adapter's in {path}")
    config = models.read_config(path)
    reward = config.head is not None and config.head.kind == "reward"
    reader = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model = reader.from_pretrained(
        pathlib.Path(source.base),
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
    )
    return model.eval()


def forward(model: Any, tokens: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> np.ndarray:
    """What transformers' model gives for padded rows, at positions that count real tokens.

    Rotary frequencies that read a text's length read the longest of a batch in transformers, and may keep those of the
    batch before: such a model reads row by row, each after a row of one token.

    Args:
      model: of transformers.
      tokens: [B,L] ids.
      mask: [B,L], 1 on real tokens.

    Returns:
      Logits [B,L,V], or scores [B,W] of a classifier.
    """
    import torch

    settings = getattr(model.config, "rope_parameters", None) or {}
    alone = settings.get("rope_type") in ("dynamic", "longrope")
    found = []
    with torch.no_grad():
        for part in [slice(b, b + 1) for b in range(len(tokens))] if alone else [slice(None)]:
            if alone:
                model(input_ids=torch.tensor([[7]]))
            given = {"attention_mask": torch.tensor(mask[part])}
            if "position_ids" in inspect.signature(model.forward).parameters:
                given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
            found.append(model(input_ids=torch.tensor(tokens[part]), **given).logits)
    joined: np.ndarray = torch.cat(found).numpy()
    return joined


def padded(rows: Sequence[Sequence[int]], side: str, pad_id: int) -> tuple[list[list[int]], list[list[int]]]:
    """(tokens, mask) of rows, with pads on the left or on the right."""
    width = max(map(len, rows))
    pads = [[pad_id] * (width - len(row)) for row in rows]
    if side == "left":
        tokens = [[*pad, *row] for pad, row in zip(pads, rows, strict=True)]
        return tokens, [[0] * len(pad) + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]
    tokens = [[*row, *pad] for pad, row in zip(pads, rows, strict=True)]
    return tokens, [[1] * len(row) + [0] * len(pad) for pad, row in zip(pads, rows, strict=True)]


def difference(name: str, kind: str, ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> Difference:
    """Compares two models' numbers where mask is True.

    Args:
      name: what was read.
      kind: "logits" or "rewards".
      ours, theirs: [B,L,V] logits, or [B,W] rewards.
      mask: [B,L], or [B] of rewards.

    Raises:
      ValueError: numbers of different shapes.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"{kind} of {name}: expected shape {theirs.shape} as transformers has it, found {ours.shape}")
    ours, theirs = ours[mask], theirs[mask]
    agreement = 1.0 if kind == "rewards" else float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    return Difference(name, kind, float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()), agreement)


def compare(
    lm: models.LanguageModel, params: Params, model: Any, name: str, rows: Sequence[Sequence[int]], side: str
) -> Difference:
    """The difference of two models on rows of tokens, padded on one side.

    Args:
      lm: ours.
      params: its parameters.
      model: transformers' model of the same folder.
      name: what the rows are, for the result.
      rows: ids, at least one in each row.
      side: "left" or "right".
    """
    if lm.has_lm_head:
        tokens, mask = padded(rows, side, lm.config.pad_id or 0)
        real = np.asarray(mask, bool)
        logits = jax.jit(lambda p, t, m: lm.apply(p, t, mask=m).logits)(params, jnp.asarray(tokens), jnp.asarray(real))
        return difference(name, "logits", np.asarray(logits), forward(model, tokens, mask), real)
    # Without a pad id transformers takes one text at a time.
    groups = [list(rows)] if lm.config.pad_id is not None else [[row] for row in rows]
    ours, theirs = [], []
    for group in groups:
        tokens, mask = padded(group, side, lm.config.pad_id or 0)
        theirs.append(forward(model, tokens, mask))
        ours.append(_scores(lm, params, jnp.asarray(tokens), jnp.asarray(mask, bool)))
    return difference(name, "rewards", np.concatenate(ours), np.concatenate(theirs), np.ones(len(rows), bool))


def _scores(lm: models.LanguageModel, params: Params, tokens: jax.Array, mask: jax.Array) -> np.ndarray:
    """[B,W]: the rewards of every label, as the library reads them."""
    rest = jnp.ones(len(tokens), jnp.int32), jnp.arange(len(tokens))
    every = [rewards.from_model(lm, label=i)(params, tokens, mask, *rest) for i in range(lm.head_width)]
    return np.stack([np.asarray(found) for found in every], axis=-1)


def random_rows(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` rows of random ids, of lengths from `length` down to half of it."""
    draw = np.random.default_rng(seed)
    sizes = [max(1, length - i * length // (2 * count)) for i in range(count)]
    return [draw.integers(0, vocab_size, size).tolist() for size in sizes]


def run(path: str, *, texts: Sequence[str] = (), rows: int = 4, length: int = 64, seed: int = 0) -> list[Difference]:
    """Compares a folder's model with transformers' own, on random tokens under either padding and on texts.

    Both are read in float32, whatever the folder holds.

    Args:
      path: the folder of a language model or of a …ForSequenceClassification.
      texts: texts to be read besides, each alone, by the folder's tokenizer.
      rows: how many rows of random tokens.
      length: of the longest one [tokens].
      seed: of these tokens.

    Returns:
      A Difference for each padding, and for each text.

    Raises:
      ValueError: torch is not installed; a folder that cannot be read; a length beyond the model's context.
    """
    check_torch()
    lm, params = models.load(path)
    if not 1 <= length <= lm.max_length:
        raise ValueError(f"length: expected 1 to the model's {lm.max_length} tokens, found {length}")
    model = load_theirs(path)
    drawn = random_rows(lm.vocab_size, rows, length, seed)
    found = [compare(lm, params, model, f"random, {side}-padded", drawn, side) for side in ("left", "right")]
    if texts:
        tokenizer = models.tokenizer(path)
        for text in texts:
            found.append(compare(lm, params, model, repr(text[:40]), [tokenizer(text)["input_ids"]], "right"))
    return found
