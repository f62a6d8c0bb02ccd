"""Critics of shaped rewards: the exact follower's log weights, and thresholds over the candidates."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import models, shaping
from jaxalign._arrays import at_least_float32, per_row
from jaxalign._blocks import accept_critic, merged, merged_candidates, split, verify_critic
from jaxalign._builders import cached
from jaxalign._checks import check_part, check_positive, fields_of
from jaxalign._parts import advance_critic, check_critic_argument, check_model, score_critic, start_critic
from jaxalign.critics import reads
from jaxalign.critics._distribution import distribution, with_numbers
from jaxalign.critics._model_critics import candidate_critic, gather, vocabulary_critic
from jaxalign.prompts import prompt_index, prompts_for
from jaxalign.shapes import Candidates, PerPrompt, Scores
from jaxalign.types import Array, ArrayLike, Critic, Params, Prompts, State, StepOutput


@cached
def follower(lm: models.LanguageModel, *, beta: float | None = None, bound: float | None = None) -> Critic:
    """The exact follower of a shaped reward: q(s,z) = the log weight of sz, under `tilt` with beta 1. Level.

    params: the model's. If the head is right, decoding by tokens has the law of the whole response's optimum, which
    V_ref in its place has not.

    Args:
      lm: has a head trained by `train.value --objective exceedance` or `soft` (models.Follower): a classifier of
        Pr_ref(u > m | prefix), read as log(1 + (e^(bound/beta) − 1)·p), or the soft value of the shaped reward over
        beta. Or a head of laws, read with the threshold that is solved from the law of the prompt.
      beta, bound: those that the caller wants.

    Returns:
      A level Critic for beta 1.

    Raises:
      ValueError: a head that was trained for another beta or bound, or for none.
    """
    check_model("follower", lm, ("config", "vocab_size", "max_length", "head_width", "prefill", "step", "head"))
    head = lm.config.head
    if head is not None and head.distribution is not None:
        if beta is None or bound is None:
            raise ValueError("follower: expected beta and bound for a head of laws, which was trained for none")
        check_positive("beta", beta)
        check_positive("bound", bound)
        return with_numbers(distribution(lm, reads.follower(solve=True)), {"beta": beta, "bound": bound})
    spec = None if head is None else head.follower
    if head is None or spec is None:
        raise ValueError(f"follower: expected a head that was trained for a shaped reward, found {head}")
    for name, wanted in (("beta", beta), ("bound", bound)):
        if wanted is not None and wanted != getattr(spec, name):
            raise ValueError(f"{name}: expected {getattr(spec, name)}, which the head was trained for, found {wanted}")

    def weigh(found: Array) -> Array:
        if spec.objective == "exceedance":
            return shaping.exceedance_log_weight(found, gain=spec.bound / spec.beta)
        return at_least_float32(found) / spec.beta

    def read(params: Params, hidden: Array) -> Array:
        return weigh(lm.head(params, hidden))

    if head.kind == "q":
        return vocabulary_critic("follower", lm, read, "level", beta=1.0)
    return candidate_critic("follower", lm, weigh, beta=1.0)


class ShapedParams(NamedTuple):
    """Parameters of `shaped_over_candidates`."""

    critic: Params
    """Those of the critic whose scores are shaped."""
    bound: ArrayLike
    """The bound B > 0: a scalar, or one per prompt [B]."""


class ShapedState(NamedTuple):
    """State and proposal of `shaped_over_candidates`."""

    critic: State
    """Those of the critic whose scores are shaped."""
    bound: PerPrompt
    """[B]."""


@cached
def shaped_over_candidates(
    critic: Critic,
    *,
    beta: float,
    sharpness: float | None = None,
    range_factor: float | None = None,
    max_gain: float | None = None,
) -> Critic:
    """SRS-ARGS as its authors run it: at every step the threshold is solved again over the candidates' scores, weighted
    by the policy below, and the score becomes bound·1[q > m] or bound·sigmoid(sharpness·(q − m)).

    params: ShapedParams(critic, bound), or a dict of these names. This is not the per-prompt
    threshold of the theory: it takes scores of partial text, and one fixed point a token.

    Args:
      critic: of the scores that are shaped; its kind is kept.
      beta: of the tilt, for the gain B/beta.
      sharpness: of the sigmoid; None: the step 1[q > m].
      range_factor: B_t = min(B, range_factor·range of the candidates' scores) (the authors: 1.01); None: B.
      max_gain: cap of B/beta (the authors: log 2); None: no cap.

    Returns:
      A Critic of the same kind, for the tilt's beta that is given here.

    Raises:
      ValueError: `critic` is no Critic, beta <= 0; on the host before tracing, a bound <= 0 or of another shape.
    """
    check_critic_argument("critic", critic)
    check_positive("beta", beta)

    def shape(bound: Array, q: Array, log_prob: Array) -> Array:
        if range_factor is not None:
            bound = jnp.minimum(bound, range_factor * (q.max(axis=-1) - q.min(axis=-1)))
        threshold = shaping.optimal_threshold(q, log_base=log_prob, gain=bound / beta, max_gain=max_gain)
        # Scores that are all equal leave no range and no signal.
        above = q > threshold[:, None] if sharpness is None else jax.nn.sigmoid(sharpness * (q - threshold[:, None]))
        return bound[:, None] * above

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
        critic_params, bound = fields_of(params, ShapedParams)
        state = start_critic(critic, critic_params, rng, prompts_for(prompts, "critic"), max_new_tokens)
        return ShapedState(state, per_row(bound, prompt_index(prompts).shape[0], name="bound"))

    def score(
        params: Params, rng: Array, state: ShapedState, output: StepOutput, candidates: Candidates | None
    ) -> tuple[Scores, State]:
        critic_params = fields_of(params, ShapedParams).critic
        q, proposal = score_critic(critic, critic_params, rng, state.critic, output, candidates)
        q = shape(state.bound, at_least_float32(q), gather(output.log_prob, candidates))
        return q, ShapedState(proposal, state.bound)

    def advance(params: Params, proposal: ShapedState, choice: Array) -> State:
        critic_params = fields_of(params, ShapedParams).critic
        return proposal._replace(critic=advance_critic(critic, critic_params, proposal.critic, choice))

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        bound = fields_of(params, ShapedParams).bound
        check_positive("bound", bound)
        per_row(bound, prompt_index(prompts).shape[0], name="bound")
        check_part(critic, params, prompts, max_new_tokens, "critic")

    def verify(
        params: Params,
        rng: Array,
        state: ShapedState,
        outputs: StepOutput,
        candidates: Array | None,
        tokens: Array,
        mask: Array,
        choices: Array,
    ) -> tuple[Array, State]:
        critic_params = fields_of(params, ShapedParams).critic
        q, proposal = verify_critic(
            critic, critic_params, rng, state.critic, outputs, candidates, tokens, mask, choices
        )
        log_prob = gather(merged(outputs.log_prob), merged_candidates(candidates))
        q = shape(jnp.repeat(state.bound, tokens.shape[1]), merged(at_least_float32(q)), log_prob)
        return split(q, tokens.shape[0]), ShapedState(proposal, state.bound)

    def accept(params: Params, proposal: ShapedState, count: Array) -> State:
        critic_params = fields_of(params, ShapedParams).critic
        return proposal._replace(critic=accept_critic(critic, critic_params, proposal.critic, count))

    shaped = Critic(init, score, advance, critic.kind, check, critic.vocab_size)
    return shaped if critic.verify is None else shaped._replace(verify=verify, accept=accept)
