"""How a reward model reads a text: at which token, with what after its end, and which of its labels.

The rules are those of transformers' …ForSequenceClassification (`GenericForSequenceClassification.forward`):

- The score stands at the last real token that is not the model's pad id, also where that id is an EOS (a model of TRL's
  trainer): the end of a finished response is then passed over. A text of pads alone is read at its first token.
- A model without a pad id is read at the last real token.
- An unfinished text, such as the prefix in guided decoding, is read at its last token, as ARGS reads it.
- A head that pools by the mean (`models.Head`) reads the mean of the hidden states of all real tokens, prompt and
  response, that are not the pad id; so it reads a partial text.
- A `tail`, the ids that the model's chat template writes after the end of a turn, follows a response that has ended,
  unless the response holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from jaxalign import mdp, models
from jaxalign._arrays import at_least_float32
from jaxalign._checks import fields_of
from jaxalign._parts import check_model
from jaxalign.rewards.params import LabelParams
from jaxalign.shapes import RewardValues, TextLength, TextMask, TextTokens
from jaxalign.types import Array, HeadModel, Params


class Reading(NamedTuple):
    """How a reward model reads a text. `reading_of` makes one."""

    pad_id: int | None
    """The id that is passed over at the end of a text, or None."""
    tail: tuple[int, ...] = ()
    """Ids that follow a response that has ended."""
    ends: tuple[int, ...] = ()
    """Ids that end a response; empty without a tail."""
    label: int | None = 0
    """The column of the head that is the reward; None: a weighted sum of all, whose params are `LabelParams`."""
    pooling: Literal["last", "mean"] = "last"
    """Whether the head reads the last token, or the mean of all."""


class ReadHidden(Protocol):
    """The hidden states of given texts: [N,L,D], or [N,R,D] at the columns at [N,R]."""

    def __call__(self, *, at: Array | None = None) -> Array: ...


def reading_of(
    name: str,
    lm: HeadModel,
    *,
    label: str | int | None = None,
    weighted: bool = False,
    tail: Sequence[int] = (),
    ends: int | Sequence[int] | None = None,
    log_weights: bool = False,
) -> Reading:
    """Makes the Reading of a model.

    Args:
      name: of the builder, for error texts.
      lm: a model with a head of scalars. Its `reward_pad_id` is the id that is passed over, its `label_names` name the
        head's columns, and its `eos_ids` end a response; a model that lacks them has none. Its `reward_pooling` is
        "last" or "mean"; "last" where it lacks it.
      label: the name or the number of a label; needed where the head has several, unless `weighted`.
      weighted: whether the reward is a weighted sum of the labels.
      tail: ids that follow a response that has ended.
      ends: the ids that end it; None: the model's EOS ids.
      log_weights: whether a head of log weights (models.Follower) may be read, which are no rewards.

    Returns:
      The Reading.

    Raises:
      ValueError: no head of scalars, or one of log weights without `log_weights`, several labels of which none is named
        (they are listed), a label that there is not, ids outside the vocabulary, a tail without an id that ends a
        response.
    """
    check_model(name, lm, ("vocab_size", "head_width"))
    width = lm.head_width
    names = tuple(getattr(lm, "label_names", ())) or ("LABEL_0",)  # a head without labels is one scalar
    if len(names) != width:
        found = "no head" if width == 0 else f"a head of width {width}"
        raise ValueError(f"{name}: expected a model with a scalar head, found {found}")
    spec = getattr(getattr(lm, "config", None), "head", None)
    if spec is not None and spec.follower is not None and not log_weights:
        raise ValueError(f"{name}: expected a head of rewards, found one of log weights ({spec.follower})")
    ended = _ids(name, "ends", getattr(lm, "eos_ids", ()) if ends is None else ends, lm.vocab_size)
    after = _ids(name, "tail", tail, lm.vocab_size)
    if after and not ended:
        raise ValueError(f"{name}: ends: expected an id that ends a response, which the tail follows, found none")
    column = None if weighted else _column(name, names, label)
    if weighted and label is not None:
        raise ValueError(f"{name}: label: expected None where the labels are weighted, found {label!r}")
    pooling: Literal["last", "mean"] = "mean" if getattr(lm, "reward_pooling", "last") == "mean" else "last"
    return Reading(getattr(lm, "reward_pad_id", None), after, ended if after else (), column, pooling)


def _ids(name: str, field: str, ids: int | Sequence[int], vocab_size: int) -> tuple[int, ...]:
    found = (ids,) if isinstance(ids, int) else tuple(ids)
    if not all(isinstance(i, int | np.integer) and 0 <= i < vocab_size for i in found):
        raise ValueError(f"{name}: {field}: expected token ids in [0, {vocab_size}), found {found}")
    return tuple(int(i) for i in found)


def _column(name: str, names: tuple[str, ...], label: str | int | None) -> int:
    if label is None:
        if len(names) > 1:
            raise ValueError(
                f"{name}: label: expected one of {', '.join(map(repr, names))}, found none for a model with several; "
                "rewards.from_model(weighted=True) takes a weighted sum of them"
            )
        return 0
    if isinstance(label, str) and names.count(label) == 1:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    raise ValueError(f"{name}: label: expected one of {', '.join(map(repr, names))} or its number, found {label!r}")


def model_params(reading: Reading, params: Params) -> Params:
    """The parameters of the model itself."""
    return params if reading.label is not None else fields_of(params, LabelParams).model


def label_weights(lm: HeadModel, params: Params) -> Array:
    """The weights [W] of the labels, in at least float32. ValueError for another shape."""
    weights = at_least_float32(jnp.asarray(fields_of(params, LabelParams).weights))
    if weights.shape != (lm.head_width,):
        raise ValueError(f"weights: expected one for each of {lm.head_width} labels, found shape {weights.shape}")
    return weights


def value(reading: Reading, lm: HeadModel, params: Params, hidden: Array) -> Array:
    """The reward [...] of hidden states [...,D] where a text is read, in at least float32."""
    found = at_least_float32(lm.head(model_params(reading, params), hidden))
    if reading.label is not None:
        return found[..., reading.label]
    return (found * label_weights(lm, params)).sum(axis=-1)


def value_of_texts(
    reading: Reading, lm: HeadModel, params: Params, tokens: TextTokens, mask: TextMask, hidden: ReadHidden
) -> RewardValues:
    """The reward [N] of whole texts [N,L], whose hidden states `hidden` gives."""
    if reading.pooling == "mean":
        return value(reading, lm, params, models.pooled(hidden(), tokens, mask, reading.pad_id).mean)
    at = models.read_index(tokens, mask, reading.pad_id)[:, None]
    return value(reading, lm, params, hidden(at=at))[:, 0]


def follow(reading: Reading, tokens: Array, mask: Array, ended: Array) -> tuple[Array, Array]:
    """Texts [...,L] with the tail behind the last real token of those that have ended [...]: (tokens, mask) [...,L+k],
    k the length of the tail. The columns of the real tokens stay as they are."""
    count = len(reading.tail)
    if not count:
        return tokens, mask
    room = [(0, 0)] * (tokens.ndim - 1) + [(0, count)]
    place = jnp.arange(tokens.shape[-1] + count) - (mdp.last_index(mask)[..., None] + 1)
    inside = ended[..., None] & (place >= 0) & (place < count)
    tail = jnp.asarray(reading.tail, tokens.dtype)[jnp.clip(place, 0, count - 1)]
    return jnp.where(inside, tail, jnp.pad(tokens, room)), jnp.pad(mask, room) | inside


def has_ended(reading: Reading, tokens: Array, mask: Array) -> Array:
    """Whether responses [...,L] have ended and lack their tail: [...]. The last real token is one of the ends, and not
    the last of a tail behind an end, as in a text that a template has written whole. False without real tokens."""
    if not reading.tail:
        return jnp.zeros(tokens.shape[:-1], bool)
    last, ends = mdp.last_index(mask), jnp.asarray(reading.ends, tokens.dtype)

    def at(place: Array) -> tuple[Array, Array]:
        inside = jnp.maximum(place, 0)
        real = (place >= 0) & jnp.take_along_axis(mask, inside, axis=-1)
        return jnp.take_along_axis(tokens, inside, axis=-1), real

    token, real = at(last[..., None])
    ended = real[..., 0] & (token == ends).any(axis=-1)
    if reading.tail[-1] not in reading.ends:
        return ended
    token, real = at(last[..., None] - jnp.arange(len(reading.tail), -1, -1))
    tailed = (token[..., 1:] == jnp.asarray(reading.tail, tokens.dtype)).all(axis=-1)
    return ended & ~(real.all(axis=-1) & tailed & (token[..., :1] == ends).any(axis=-1))


def whole(
    reading: Reading, tokens: TextTokens, mask: TextMask, prompt_length: TextLength
) -> tuple[TextTokens, TextMask]:
    """Whole texts [N,L] with the tail of those whose response has ended and lacks it: (tokens, mask) [N,L+k]."""
    mask = mask.astype(bool)
    response = mdp.response_part(mask, prompt_length)
    return follow(reading, tokens, mask, has_ended(reading, tokens, response))
