"""KL-regularised policy gradients: roll-outs of the policy as it stands, what they are worth, and the loss.

One iteration is `collect` (draws and scores), `prepare` (advantages) and one or more steps of `loss` on rows of what
came out; the policy's parameters serve both sides and never leave the device. Rows are {"prompt_tokens", "prompt_mask"
[b,P], "tokens", "mask" [b,T], "drawn", "old", "ref" [b,T] (log-probabilities of the sampler, of the policy before the
first update, and of the reference), "beta" [b], "advantage" [b,T] or [b], and for PPO "value", "returns" [b,T]}.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign import advantages, decoding, gibbs, losses, models
from jaxalign._arrays import at_least_float32, repeat_rows
from jaxalign._builders import cached
from jaxalign._checks import check_rng
from jaxalign._programs import tells_programs
from jaxalign.training.group_advantages import check_advantage, worth
from jaxalign.training.objectives import cast
from jaxalign.training.protocols import PolicyModel, TextModel
from jaxalign.training.step import Loss, LossAux
from jaxalign.types import Array, Params, Policy, Reward, TokenBatch

Read = Callable[[Params, Any], tuple[Array, Array | None]]
"""(params, rows) -> (log pi(y_t) [b,T], V(s_t) [b,T] before each token, or None)."""

ReadBoth = Callable[[Params, Params, Any], tuple[Array, Array | None, Array, Array]]
"""(params, frozen, rows) -> (log pi(y_t), V(s_t) or None, log pi_ref(y_t), KL(pi(·|s_t)‖pi_ref(·|s_t)) over the
vocabulary in nats), [b,T] each."""


@dataclasses.dataclass(frozen=True)
class Method:
    """What is estimated, and how. Static under jit."""

    algorithm: Literal["rloo", "grpo", "ppo"] = "rloo"
    """"rloo": rewards against the mean of the prompt's other samples; "grpo": the group's rewards standardised, so that
    beta weighs the KL against rewards of unit spread; "ppo": generalised advantages with a value head."""
    kl: Literal["reward", "k2", "k3", "exact"] = "reward"
    """"reward": beta·log(pi/pi_ref) is taken off the reward, right in the mean. "k2" and "k3": a term of the loss
    (`losses.kl_penalty`); k3 is the one of GRPO's paper and leads to another optimum. "exact": the sum over the
    vocabulary at each state, in the loss as it stands and, for the states that a token leads to, off its advantage:
    right in the mean, and without the noise of which token was drawn (arXiv 2504.10637). Ratios are of tokens."""
    clip: float = 0.2
    """Of the probability ratios: of a token's, for "rloo" of the whole response's."""
    decay: float = 0.95
    """Of PPO's generalised advantages, in [0, 1]."""
    value_weight: float = 0.1
    """Of PPO's value loss."""
    value_clip: float = math.inf
    """Largest change of a value that PPO's value loss follows [units of reward]."""
    advantage: str = "mean"
    """Of rewards, for "rloo": "mean", or of k draws "max@k", "min@k", "pass@k" (`advantages.max_at_k`)."""

    def __post_init__(self) -> None:
        for name, allowed in (("algorithm", ("rloo", "grpo", "ppo")), ("kl", ("reward", "k2", "k3", "exact"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, found {getattr(self, name)!r}")
        for name, value in (("clip", self.clip), ("value_clip", self.value_clip)):
            if not value > 0:
                raise ValueError(f"{name}: expected a value > 0, found {value}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay: expected a value in [0, 1], found {self.decay}")
        if not 0 <= self.value_weight < math.inf:
            raise ValueError(f"value_weight: expected a finite value >= 0, found {self.value_weight}")
        check_advantage(self.algorithm, self.advantage)


@cached
def of_model(lm: PolicyModel) -> Read:
    """Log-probabilities, and the values of the model's scalar head where it has one, in one pass."""

    def read(params: Params, rows: Any) -> tuple[Array, Array | None]:
        params = cast(lm, params)
        hidden = models.response_hidden(lm, params, prompts_of(rows), rows["tokens"], rows["mask"])
        log_prob = models.token_log_prob(lm, params, hidden, rows["tokens"])
        return log_prob, None if lm.config.head is None else lm.head(params, hidden)[..., 0]

    return read


@cached
def of_models(lm: PolicyModel, reference: TextModel) -> ReadBoth:
    """`ReadBoth` of a model and its reference, whose parameters are `frozen`: its KL is Σ_z pi·log(pi/pi_ref),
    logits of both in chunks."""

    def read(params: Params, frozen: Params, rows: Any) -> tuple[Array, Array | None, Array, Array]:
        params, frozen = cast(lm, params), cast(reference, frozen)
        prompts, tokens = prompts_of(rows), rows["tokens"]
        own = models.response_hidden(lm, params, prompts, tokens, rows["mask"])
        base = jax.lax.stop_gradient(models.response_hidden(reference, frozen, prompts, tokens, rows["mask"]))

        def part(own: Array, base: Array, tokens: Array) -> tuple[Array, Array, Array]:
            log_p = jax.nn.log_softmax(lm.logits(params, own))
            log_q = jax.lax.stop_gradient(jax.nn.log_softmax(reference.logits(frozen, base)))
            chosen, chosen_ref = (jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0] for x in (log_p, log_q))
            return chosen, chosen_ref, gibbs.kl(log_p, log_q)

        log_prob, ref, kl = models.chunked(part, own, base, tokens, width=4 * lm.vocab_size)
        return log_prob, None if lm.config.head is None else lm.head(params, own)[..., 0], ref, kl

    return read


@cached
def of_policy(policy: Policy) -> Read:
    """Log-probabilities of any Policy, by `decoding.log_prob`: a tilt, or a table, can be trained as a model can."""

    def read(params: Params, rows: Any) -> tuple[Array, None]:
        found = decoding.log_prob(policy, params, jax.random.key(0), prompts_of(rows), rows["tokens"], rows["mask"])
        return found.log_prob, None

    return read


def prompts_of(rows: Any) -> TokenBatch:
    return TokenBatch(rows["prompt_tokens"], rows["prompt_mask"])


@tells_programs
def collect(
    policy: Policy,
    reward: Reward,
    params: Params,
    rng: Array,
    prompts: TokenBatch,
    *,
    samples: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
) -> decoding.BestOfNInfo:
    """Draws responses from the policy as it stands, and scores them.

    Args:
      policy: the policy.
      reward: its Reward. A value may come out NaN: look before learning.
      params: {"policy", "reward"}.
      rng: a key; consumed.
      prompts: B prompts, left-padded.
      samples: n, responses of each prompt.
      max_new_tokens: limit of a response.
      eos_ids: the ids that end one.

    Returns:
      Samples, with the log-probabilities that they were drawn with, and rewards [B,n].
    """
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
    return decoding.best_of_n(policy, reward, params, rng, prompts, num_samples=samples, allow_nan=True, **options).info


def prepare(
    method: Method,
    read: Read,
    reference: Callable[[Params, Any], Array],
    params: Params,
    frozen: Params,
    prompts: TokenBatch,
    drawn: decoding.BestOfNInfo,
    beta: Array,
    *,
    both: ReadBoth | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Makes rows to learn from of what `collect` drew. Pure; jit it with the first three arguments static.

    Args:
      method: the settings of the algorithm.
      read: reads the policy, whose values PPO needs.
      reference: (frozen, rows) -> log pi_ref(y_t) [b,T].
      params: the policy's.
      frozen: the reference's.
      prompts: B prompts, left-padded.
      drawn: n responses of each, with their rewards.
      beta: KL weight [].
      both: for the exact KL, in place of `read` and `reference`.

    Returns:
      (rows of B·n responses, metrics): reward, kl (mean of log pi/pi_ref(y), or of the exact KL of its states) and its
      95 % half-width over responses, length [tokens], entropy (−log pi(y)).

    Raises:
      ValueError: the exact KL without `both`, PPO without values.
    """
    _check_both(method, both)
    samples, reward = drawn.samples, at_least_float32(drawn.reward)
    count, n = reward.shape

    def flat(x: Array) -> Array:
        return x.reshape(count * n, *x.shape[2:])

    repeated = repeat_rows(prompts, n)
    mask = flat(samples.mask)
    rows = {
        "prompt_tokens": repeated.tokens,
        "prompt_mask": repeated.mask,
        "tokens": flat(samples.tokens),
        "mask": mask,
    }
    rows["drawn"] = rows["old"] = jnp.where(mask, flat(samples.log_prob), 0)
    kl, value = None, None
    if both is not None:
        _, value, ref, kl = both(params, frozen, rows)
    else:
        ref = reference(frozen, rows)
        if method.algorithm == "ppo":
            _, value = read(params, rows)
    rows["ref"] = jnp.where(mask, ref, 0)
    rows["beta"] = jnp.full(count * n, beta, jnp.float32)
    ratio = rows["old"] - rows["ref"]
    penalty = beta if method.kl == "reward" else jnp.zeros_like(beta)
    ahead = jnp.zeros_like(ratio) if kl is None else beta * advantages.following(kl, mask=mask)
    if method.algorithm == "ppo":
        if value is None:
            raise ValueError("ppo: expected a model with a value head, found none")
        rows["value"] = jnp.where(mask, value, 0)
        each = advantages.token_rewards(flat(reward), log_ratio=ratio, mask=mask, beta=penalty) - ahead
        rows["advantage"], rows["returns"] = advantages.gae(each, value=rows["value"], mask=mask, decay=method.decay)
    elif kl is not None:
        # Against the mean of the prompt's other samples at the same token, which tells nothing of this one.
        later = advantages.to_come(ahead).reshape(count, n, -1)
        later = jnp.moveaxis(advantages.leave_one_out(jnp.moveaxis(later, 1, 2)), 2, 1)
        rows["advantage"] = flat(worth(method.algorithm, method.advantage, reward))[:, None] - flat(later)
    else:
        cost = penalty * ratio.sum(axis=-1).reshape(count, n)
        # Each by itself: beside a reward of 1e6 the KL would have lost its digits, and in a group of equal rewards the
        # division of grpo would give the KL alone unit spread.
        found = flat(worth(method.algorithm, method.advantage, reward) - advantages.leave_one_out(cost))
        rows["advantage"] = found if method.algorithm == "rloo" else jnp.broadcast_to(found[:, None], mask.shape)
    kl = ratio.sum(axis=-1) if kl is None else jnp.where(mask, kl, 0).sum(axis=-1)
    metrics = {
        "reward": reward.mean(),
        "kl": kl.mean(),
        "kl_95": 1.96 * kl.std(ddof=min(kl.size - 1, 1)) / jnp.sqrt(kl.size),
        "length": mask.sum(axis=-1).mean(),
        "entropy": -rows["old"].sum(axis=-1).mean(),
    }
    return jax.lax.stop_gradient((rows, metrics))


def _check_both(method: Method, both: ReadBoth | None) -> None:
    if (method.kl == "exact") != (both is not None):
        raise ValueError(f"both: expected for the exact KL and for no other, found {both} for {method.kl}")


@cached
def loss(
    method: Method,
    read: Read,
    both: ReadBoth | None = None,
    *,
    once: bool = False,
    sampler_clip: float = 0.0,
    sampler_weights: Literal["token", "response"] = "token",
) -> Loss:
    """Makes the clipped policy-gradient loss, with the KL term and PPO's value loss as the method says.

    Args:
      method: the settings of the algorithm.
      read: reads the policy.
      both: for the exact KL, in place of `read`.
      once: whether the rows serve one update, so that pi_old is the policy itself: its log-probability is that of this
        very pass, and each ratio is 1 exactly, whatever the rounding of the pass that drew.
      sampler_clip: C > 0 weighs each token by min(pi_old/pi_sampler, C), which corrects for a sampler that is not the
        policy itself (another type, temperature or engine); 0: no weights. No gradient goes through them.
      sampler_weights: "token": pi_old/pi_sampler of that token, with ratios of tokens alone; the states stay the
        sampler's. "response": of the whole response, min(Π_t pi_old/pi_sampler, C), which with C = inf is right for the
        states, too. Its logarithm is a sum over the T tokens: use it where T·sampler_kl is far below log C.

    Returns:
      The loss of rows of `prepare`, whose "old" is `own_log_prob` where they serve several updates. Metrics: clipped
      (share of ratios outside the clip); drift (mean log pi_sampler/pi of a response); mismatch and mismatch_max (mean
      and largest |log pi_old/pi_sampler| of a token) and sampler_kl (mean of x − 1 − log x at x = pi_old/pi_sampler,
      an estimate of KL(pi_sampler‖pi_old) of a token in nats); with sampler_clip, sampler_clipped (share of weights at
      C); value_error (PPO). mismatch_max is the largest of all micro-batches, the others are means.

    Raises:
      ValueError: a sampler_clip that is negative, another kind of weights, or weights of tokens with the ratio of whole
        responses (rloo without the exact KL).
    """
    _check_both(method, both)
    whole = method.algorithm == "rloo" and both is None
    if not sampler_clip >= 0:
        raise ValueError(f"sampler_clip: expected a value >= 0, found {sampler_clip}")
    if sampler_weights not in ("token", "response"):
        raise ValueError(f"sampler_weights: expected 'token' or 'response', found {sampler_weights!r}")
    if sampler_clip and whole and sampler_weights == "token":
        raise ValueError(
            "sampler_clip: expected ratios of tokens (grpo, ppo, or the exact KL) for weights of tokens, or "
            f'sampler_weights="response", found {sampler_clip} for rloo, whose ratio is of a whole response'
        )

    def measured(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        rows = batch
        mask, old = rows["mask"], rows["old"]
        if both is None:
            log_prob, value = read(params, rows)
        else:
            log_prob, value, _, kl = both(params, frozen, rows)
        before = jax.lax.stop_gradient(log_prob) if once else old
        drawn = rows.get("drawn", old)
        apart = jnp.where(mask, at_least_float32(before) - drawn, 0)
        advantage = rows["advantage"]
        if sampler_clip:
            by_token = sampler_weights == "token"
            weight = jnp.exp(apart if by_token else apart.sum(axis=-1, keepdims=advantage.ndim == 2))
            advantage = advantage * jnp.minimum(weight, sampler_clip)
        total = losses.policy_gradient(
            log_prob, old_log_prob=before, advantage=advantage, mask=mask, clip=method.clip, whole=whole
        )
        if both is not None:
            total += rows["beta"].mean() * jnp.where(mask, kl, 0).sum(axis=-1).mean()
        elif method.kl != "reward":
            total += rows["beta"].mean() * losses.kl_penalty(
                log_prob, log_prob_ref=rows["ref"], mask=mask, estimator=method.kl
            )
        clipped = losses.clipped_ratios(log_prob, old_log_prob=before, mask=mask, clip=method.clip, whole=whole).mean()
        count = jnp.maximum(mask.sum(), 1)
        metrics = {
            "clipped": clipped,
            "drift": jnp.where(mask, drawn - log_prob, 0).sum(axis=-1).mean(),
            "mismatch": jnp.abs(apart).sum() / count,
            "sampler_kl": (jnp.expm1(apart) - apart).sum() / count,
        }
        if sampler_clip:
            at_most = weight >= sampler_clip
            metrics["sampler_clipped"] = (mask & at_most).sum() / count if by_token else at_most.mean()
        if method.algorithm == "ppo":
            assert value is not None
            error = losses.clipped_value(
                value, old_value=rows["value"], returns=rows["returns"], mask=mask, clip=method.value_clip
            )
            total += method.value_weight * error
            metrics["value_error"] = error
        return total, LossAux(jnp.asarray(mask.shape[0]), metrics, {"mismatch_max": jnp.abs(apart).max()})

    return measured


def own_log_prob(read: Callable[[Any], Array], rows: Any, *, batches: int) -> Array:
    """The policy's own log-probabilities of rows, in batches of the size that the updates have.

    They are pi_old where rows serve several updates. The sampler's own numbers are of another program and are rounded
    in another way, in bfloat16 by enough to clip the ratios of a policy that has not moved.

    Args:
      read: rows -> log pi(y_t) [b,T], as the loss reads the policy.
      rows: R rows of `prepare`.
      batches: how many batches the updates take the rows in, a divisor of R.

    Returns:
      [R,T], 0 outside the mask.
    """
    parts = jax.tree.map(lambda x: x.reshape(batches, -1, *x.shape[1:]), rows)
    found = jax.lax.map(read, parts)
    return jax.lax.stop_gradient(jnp.where(rows["mask"], found.reshape(rows["mask"].shape), 0))


def trim(drawn: decoding.BestOfNInfo, length: int) -> decoding.BestOfNInfo:
    """Cuts every sample to its first `length` tokens: columns that no response reaches cost a pass."""
    cut = lambda x: x[:, :, :length] if x is not None and x.ndim == 3 else x  # noqa: E731
    return drawn._replace(samples=jax.tree.map(cut, drawn.samples))


def split(rows: Any, rng: Array, *, minibatches: int, accumulate: int) -> list[Any]:
    """Deals rows into batches for `train_step`.

    Args:
      rows: R rows of `prepare`.
      rng: a key for their order; consumed.
      minibatches: number of batches.
      accumulate: A, micro-batches of each.

    Returns:
      The batches, leaves [A,b,...].

    Raises:
      ValueError: minibatches x accumulate does not divide R, or an rng that is no key.
    """
    count = rows["mask"].shape[0]
    if count % (minibatches * accumulate):
        raise ValueError(f"minibatches: expected minibatches x accumulate to divide {count} responses")
    check_rng(rng)
    if minibatches == 1 and accumulate == 1:
        return [jax.tree.map(lambda x: x[None], rows)]
    return list(_split(rows, rng, minibatches, accumulate))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _split(rows: Any, rng: Array, minibatches: int, accumulate: int) -> list[Any]:
    order = jax.random.permutation(rng, rows["mask"].shape[0])
    parts = jax.tree.map(lambda x: x[order].reshape((minibatches, accumulate, -1, *x.shape[1:])), rows)
    return [jax.tree.map(lambda x: x[i], parts) for i in range(minibatches)]  # noqa: B023
