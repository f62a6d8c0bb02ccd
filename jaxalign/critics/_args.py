"""ARGS: a reward model's score of the partial text."""

from __future__ import annotations

from collections.abc import Sequence

from jaxalign._builders import cached
from jaxalign.critics._model_critics import candidate_critic
from jaxalign.rewards.reading import Reading, reading_of
from jaxalign.types import CandidateModel, Critic


def args(
    reward_lm: CandidateModel,
    *,
    label: str | int | None = None,
    tail: Sequence[int] = (),
    ends: int | Sequence[int] | None = None,
) -> Critic:
    """ARGS: q(s,z) = r(sz), a reward model's scalar on the partial text (arXiv 2402.01694). Level.

    params: the model's. The K candidates are scored in one forward pass of K tokens at one position over the shared
    cache of the prefix; the keys and values of the chosen one are then written to the cache. Under `tilt` it is
    pi ∝ exp(logit + lam·r) with beta = 1/lam.

    A partial text without an end is read at its last token, as the paper does. A candidate that ends the text is scored
    as `rewards.from_model` of the same arguments scores the whole text: the model's pad id, also where it is an EOS,
    has the score of the text before it, and an end is read with its tail.

    Args:
      reward_lm: a model with a scalar head, or a classifier with several labels, of the base's vocabulary.
      label: which label is the score, by name or number; needed where there are several.
      tail: ids that follow a response that has ended, as a chat template writes them.
      ends: the ids that end a response; None: the model's EOS ids.

    Returns:
      A level Critic.

    Raises:
      ValueError: as in `rewards.from_model`.
    """
    return _args(reward_lm, reading_of("args", reward_lm, label=label, tail=tail, ends=ends))


@cached
def _args(reward_lm: CandidateModel, reading: Reading) -> Critic:
    return candidate_critic("args", reward_lm, reading=reading)
