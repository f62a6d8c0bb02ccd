"""Critics from critics: weighted sums, maps of the scores, thresholds over the candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _checks, shaping
from jaxalign._arrays import at_least_float32
from jaxalign._checks import entry, is_concrete
from jaxalign.critics._models import gather
from jaxalign.prompts import prompt_index, prompts_at, prompts_for
from jaxalign.types import Array, Critic, Params, Prompts, State, StepOutput


def weighted_sum(critics: Sequence[Critic]) -> Critic:
    """q = Σ_i w_i·q_i. params {"critics": a sequence, "weights": [m] or one row per prompt [B,m]}; any sign.

    All critics are of one kind (a ValueError otherwise: levels and increments do not add). Exact for V_ref, which is
    linear in the reward; the paper's rule for several rewards in GenARM and controlled decoding.
    """
    critics = tuple(critics)
    if not critics:
        raise ValueError("critics: expected at least one critic, found none")
    kinds = sorted({critic.kind for critic in critics})
    if len(kinds) > 1:
        raise ValueError(f"critics: expected critics of one kind, found {kinds}")
    sizes = sorted({critic.vocab_size for critic in critics if critic.vocab_size is not None})
    if len(sizes) > 1:
        raise ValueError(f"critics: expected one vocabulary, found {sizes} tokens")

    def weights_of(params: Params, batch: int) -> Array:
        weights = at_least_float32(params["weights"])
        if weights.shape not in ((len(critics),), (batch, len(critics))):
            raise ValueError(
                f"weights: expected shape ({len(critics)},) or ({batch}, {len(critics)}), one weight per critic, "
                f"found {weights.shape}"
            )
        return jnp.broadcast_to(weights, (batch, len(critics)))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        prompts = prompts_for(prompts, "critics")
        batch = prompt_index(prompts).shape[0]
        keys = jax.random.split(rng, len(critics))
        states = tuple(
            critic.init(params["critics"][i], keys[i], prompts_at(prompts, i), max_new_tokens)
            for i, critic in enumerate(critics)
        )
        return {"critics": states, "weights": weights_of(params, batch)}

    def score(params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None) -> Any:
        keys = jax.random.split(rng, len(critics))
        scored = [
            critic.score(params["critics"][i], keys[i], state["critics"][i], output, candidates)
            for i, critic in enumerate(critics)
        ]
        q = sum(state["weights"][:, i, None] * at_least_float32(q) for i, (q, _) in enumerate(scored))
        return q, {"critics": tuple(proposal for _, proposal in scored), "weights": state["weights"]}

    def advance(params: Params, proposal: State, choice: Array) -> State:
        states = tuple(
            critic.advance(params["critics"][i], proposal["critics"][i], choice) for i, critic in enumerate(critics)
        )
        return {"critics": states, "weights": proposal["weights"]}

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        prompts = prompts_for(prompts, "critics")
        if len(entry(params, "critics")) != len(critics):
            raise ValueError(f"critics: expected parameters of {len(critics)} critics, found {len(params['critics'])}")
        entry(params, "weights")
        weights = weights_of(params, prompt_index(prompts).shape[0])
        if is_concrete(weights) and not np.all(np.isfinite(np.asarray(weights))):
            raise ValueError(f"weights: expected finite numbers, found {np.asarray(weights)}")
        for i, critic in enumerate(critics):
            if critic.check is not None:
                critic.check(params["critics"][i], prompts_at(prompts, i), max_new_tokens)

    betas = sorted({critic.beta for critic in critics if critic.beta is not None})
    if len(betas) > 1:
        raise ValueError(f"critics: expected critics for one beta, found {betas}")
    return Critic(
        init, score, advance, critics[0].kind, check, sizes[0] if sizes else None, betas[0] if betas else None
    )


def map_scores(critic: Critic, f: Callable[[Params, Array, Array, Array], Array]) -> Critic:
    """q' = f(map_params, q [B,K], log_prob [B,K] of the candidates under the policy below, index [B]); same kind.

    params {"critic", "map"}. `index` is the prompt's row in its set, for tables per prompt. Shaping over the candidates
    (SRS-ARGS), clipping and standardising are such maps.
    """

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        state = critic.init(params["critic"], rng, prompts_for(prompts, "critic"), max_new_tokens)
        return {"critic": state, "index": prompt_index(prompts)}

    def score(params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None) -> Any:
        q, proposal = critic.score(params["critic"], rng, state["critic"], output, candidates)
        q = f(params["map"], at_least_float32(q), gather(output.log_prob, candidates), state["index"])
        return q, {"critic": proposal, "index": state["index"]}

    def advance(params: Params, proposal: State, choice: Array) -> State:
        return {"critic": critic.advance(params["critic"], proposal["critic"], choice), "index": proposal["index"]}

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        entry(params, "map")
        below = entry(params, "critic")
        if critic.check is not None:
            critic.check(below, prompts_for(prompts, "critic"), max_new_tokens)

    return Critic(init, score, advance, critic.kind, check, critic.vocab_size)


def shaped_over_candidates(
    critic: Critic,
    *,
    beta: float,
    sharpness: float | None = None,
    range_factor: float | None = None,
    max_gain: float | None = None,
) -> Critic:
    """SRS-ARGS as its authors run it: at every step the threshold is solved again over the candidates' scores, weighted
    by the policy below, and the score becomes bound·1[q > m] or bound·sigmoid(sharpness·(q − m)). Level.

    params {"critic", "map": the bound B > 0}. beta: of the tilt, for the gain B/beta. range_factor: B_t = min(B,
    factor·range of the candidates' scores) (the authors: 1.01); max_gain: their cap (log 2). This is not the per-prompt
    threshold of the theory: scores of partial text, one fixed point a token.
    """
    _checks.check_positive("beta", beta)

    def shape(bound: Params, q: Array, log_prob: Array, index: Array) -> Array:
        bound = jnp.broadcast_to(at_least_float32(bound), q.shape[:1])
        if range_factor is not None:
            bound = jnp.minimum(bound, range_factor * (q.max(axis=-1) - q.min(axis=-1)))
        threshold = shaping.optimal_threshold(q, log_prob, gain=bound / beta, max_gain=max_gain)
        # Scores that are all equal leave no range and no signal.
        above = q > threshold[:, None] if sharpness is None else jax.nn.sigmoid(sharpness * (q - threshold[:, None]))
        return bound[:, None] * above

    return map_scores(critic, shape)
