"""A leader's gradient through a follower's tokens on one GPU, beside an iteration of train.rl of equal responses."""

from __future__ import annotations

import statistics
from typing import Any

import jax

from jaxalign import bilevel, models, policies
from jaxalign.types import TokenBatch

from .. import rl
from .sizes import Row, Rows, Sizes, first_and_median, model

PROMPTS, SAMPLES = 4, 4
LAYERS = 4
"""Of the small model: the time is the compiler's, and grows with them."""


def gradient(sizes: Sizes) -> Rows:
    """The leader is the model's own weights, in bfloat16, whose responses are drawn and then scored in one pass. The
    iteration (RLOO) casts float32 weights and has an optimizer's step, the gradient has neither.

    Args:
      sizes: of the model, the prompts and the responses.

    Returns:
      One row: seconds of both, and those of the gradient over those of the iteration ("ratio").
    """

    def measure() -> Row:
        layers = min(LAYERS, sizes.small["num_hidden_layers"])
        lm = model(sizes.small | {"num_hidden_layers": layers})
        tokens = jax.random.randint(jax.random.key(4), (PROMPTS, sizes.prompt), 1, lm.vocab_size)
        prompts = TokenBatch(tokens, tokens >= 0)
        follower = {"follower": lm.init(jax.random.key(0)), "utility": None}
        policy = policies.language_model(lm)

        def once() -> bilevel.LeaderGradient:
            return bilevel.leader_gradient(
                policy,
                rl.even_share,
                follower,
                jax.random.key(1),
                prompts,
                wrt="",
                estimator="score",
                samples=SAMPLES,
                max_new_tokens=sizes.new,
                eos_ids=(),
            )

        compiling, seconds = first_and_median(once, sizes.repeats)
        shapes: dict[str, Any] = {name: getattr(sizes, name) for name in ("prompt", "new", "repeats")}
        shapes |= {"batch": PROMPTS * SAMPLES, "samples": SAMPLES}
        config = rl.Config(**shapes, dtype="bfloat16", torch=False)
        masters = models.LanguageModel(lm.config).init(jax.random.key(0))
        iteration = statistics.median(one["whole"] for one in rl._ours(lm, masters, config))
        row = {"leader": f"1B, {layers} layers", "responses": PROMPTS * SAMPLES, "new tokens": sizes.new}
        row |= {"gradient s": seconds, "RLOO s": iteration, "ratio": seconds / iteration}
        return row | {"compile s": compiling}

    yield "leader's gradient", measure
