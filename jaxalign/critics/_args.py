"""ARGS: a reward model's score of the partial text."""

from __future__ import annotations

from jaxalign._builders import cached
from jaxalign.critics._model_critics import candidate_critic
from jaxalign.types import CandidateModel, Critic


@cached
def args(reward_lm: CandidateModel) -> Critic:
    """ARGS: q(s,z) = r(sz), a reward model's scalar on the partial text (arXiv 2402.01694). Level.

    params: the model's. The K candidates are scored in one forward pass of K tokens at one position over the shared
    cache of the prefix; the keys and values of the chosen one are then written to the cache. Under `tilt` it is
    pi ∝ exp(logit + lam·r) with beta = 1/lam.

    Args:
      reward_lm: a model with a scalar head, of the base's vocabulary.

    Raises:
      ValueError: a model without a scalar head.
    """
    return candidate_critic("args", reward_lm)
