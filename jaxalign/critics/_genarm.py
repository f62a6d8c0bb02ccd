"""GenARM: the log-probability of an autoregressive reward model."""

from __future__ import annotations

import jax

from jaxalign._builders import cached
from jaxalign._checks import check_has_logits
from jaxalign._parts import check_model
from jaxalign.critics._model_critics import vocabulary_critic
from jaxalign.types import Array, Critic, LanguageModel, Params


@cached
def genarm(lm: LanguageModel) -> Critic:
    """GenARM: q(s,z) = log pi_r(z|s), an autoregressive reward model (arXiv 2410.08193, eq. 7). Increment.

    params: the model's. Under `tilt` the guidance weight alpha is 1/beta.

    Args:
      lm: a language model of the base's vocabulary: the library's, or one of your own (`types.LanguageModel`).

    Returns:
      An increment Critic.

    Raises:
      ValueError: a model that lacks a method (it is named), or without vocabulary logits.
    """
    check_model("genarm", lm, ("vocab_size", "max_length", "prefill", "step", "logits"))
    check_has_logits("genarm", lm)

    def read(params: Params, hidden: Array) -> Array:
        return jax.nn.log_softmax(lm.logits(params, hidden))

    return vocabulary_critic("genarm", lm, read, "increment")
