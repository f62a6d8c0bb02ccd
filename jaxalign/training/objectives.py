"""Objectives on language models, as losses for `train_step`: each binds a function of `jaxalign.losses` to a model.

Batches are right-padded: tokens [b,L] int32, mask [b,L] real tokens, loss_mask [b,L] the response's. A model whose
dtype is bfloat16 computes in it: parameters are cast where they are used and their gradients come back in float32;
rewards, log-probabilities and all sums stay in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import losses, mdp, models, shaping
from jaxalign._builders import cached
from jaxalign.models.sharding import path_name
from jaxalign.training.protocols import HasDType, ScoringModel, TextModel
from jaxalign.training.step import Loss, LossAux
from jaxalign.types import Array, Params

VALUE_OBJECTIVES = ("fudge", "cd_q", "td", "pairs", "soft", "exceedance")
DPO_OBJECTIVES = ("dpo", "ipo")


def cast(lm: HasDType, params: Params) -> Params:
    """Parameters in the dtype that the model computes in, but those that it casts where it reads them. These are the
    vocabulary's matrices and the head, whose gradients are sums over chunks of positions, made in float32; and the
    layers of a model that rematerialises them, so that a copy of one layer is alive and not of all."""
    later = ["/embedding", "/lm_head", "/head/"] + (["/layer_"] if getattr(lm, "remat", "none") != "none" else [])

    def one(path: tuple[Any, ...], x: Array) -> Array:
        return x if any(name in f"/{path_name(path)}" for name in later) else x.astype(lm.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


@cached
def language_model(lm: TextModel) -> Loss:
    """Makes the negative log-likelihood of the responses (`losses.language_model`).

    Args:
      lm: the model that is trained.

    Returns:
      The loss, a mean over the tokens of loss_mask, which are its weight.
    """

    def loss(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        log_prob, target = _response_log_prob(lm, cast(lm, params), batch)
        return losses.language_model(log_prob, mask=target), LossAux(target.sum(), {})

    return loss


@cached
def bradley_terry(lm: ScoringModel) -> Loss:
    """Makes `losses.bradley_terry` of the rewards of a scalar head (`rewards_of`).

    Args:
      lm: the reward model that is trained.

    Returns:
      The loss of batches {"chosen", "rejected"}, each as above. Metrics: accuracy (ties half), margin.
    """

    def loss(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        chosen, rejected = jnp.split(rewards_of(lm, cast(lm, params), _joined(batch)), 2)
        return _pairs(losses.bradley_terry(chosen, rejected), chosen, rejected)

    return loss


@cached
def autoregressive_reward(lm: TextModel, *, beta_r: float) -> Loss:
    """Makes `losses.autoregressive_reward` of the responses' log-likelihoods.

    Args:
      lm: the model that is trained.
      beta_r: scale of the log-likelihood [1].

    Returns:
      The loss; batches and metrics are those of `bradley_terry`.
    """

    def loss(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        chosen, rejected = jnp.split(log_likelihoods(lm, cast(lm, params), _joined(batch)), 2)
        return _pairs(losses.autoregressive_reward(chosen, rejected, beta_r=beta_r), chosen, rejected)

    return loss


@cached
def dpo(
    lm: TextModel,
    *,
    beta: float,
    objective: str = "dpo",
    label_smoothing: float = 0.0,
    likelihood_weight: float = 0.0,
) -> Loss:
    """Makes `losses.dpo` or `losses.ipo` against a reference, a model of the same config.

    The reference reads each batch in a pass of the same shape, so that at the first step both are equal to the last
    bit.

    Args:
      lm: the model that is trained.
      beta: KL weight [units of the implicit reward per nat].
      objective: "dpo" or "ipo".
      label_smoothing: share of pairs taken to be labelled the wrong way round, in [0, 1/2); "dpo" alone.
      likelihood_weight: w in [0, 1); the loss is (1 − w) of that and −w·mean log pi(chosen) (BoNBoN, arXiv 2406.00832).

    Returns:
      The loss, which takes the reference's parameters as frozen; batches are those of `bradley_terry`. Metrics of the
      implicit reward beta·log(pi/pi_ref)(y): accuracy (ties half), margin.

    Raises:
      ValueError: an unknown objective, label smoothing outside its range.
    """
    if objective not in DPO_OBJECTIVES:
        raise ValueError(f"objective: expected one of {DPO_OBJECTIVES}, found {objective!r}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and objective != "dpo"):
        raise ValueError(
            f"label_smoothing: expected a share in [0, 0.5), and 0 for ipo, found {label_smoothing} for {objective}"
        )

    def loss(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        both = _joined(batch)
        chosen, rejected = jnp.split(log_likelihoods(lm, cast(lm, params), both), 2)
        reference = jax.lax.stop_gradient(log_likelihoods(lm, cast(lm, frozen), both))
        chosen_ref, rejected_ref = jnp.split(reference, 2)
        if objective == "ipo":
            total = losses.ipo(
                chosen, rejected, chosen_log_prob_ref=chosen_ref, rejected_log_prob_ref=rejected_ref, beta=beta
            )
        else:
            total = losses.dpo(
                chosen,
                rejected,
                chosen_log_prob_ref=chosen_ref,
                rejected_log_prob_ref=rejected_ref,
                beta=beta,
                label_smoothing=label_smoothing,
            )
        if likelihood_weight:
            total = (1 - likelihood_weight) * total - likelihood_weight * chosen.mean()
        return _pairs(total, beta * (chosen - chosen_ref), beta * (rejected - rejected_ref))

    return loss


def implicit_rewards(lm: TextModel, params: Params, reference: Params, batch: Any, *, beta: float) -> Array:
    """Gives DPO's reward of responses.

    Args:
      lm: the model.
      params: its parameters.
      reference: those of the reference, a model of the same config.
      batch: {"tokens", "mask", "loss_mask"} [b,L].
      beta: KL weight [units of the implicit reward per nat].

    Returns:
      beta·log(pi/pi_ref)(y|x) [b], summed over the response's tokens (arXiv 2305.18290, eq. 5, up to a constant of the
      prompt).
    """
    ratio = log_likelihoods(lm, cast(lm, params), batch) - log_likelihoods(lm, cast(lm, reference), batch)
    return beta * ratio


@cached
def value(
    lm: ScoringModel,
    objective: str,
    *,
    base: TextModel | None = None,
    beta: float | None = None,
    pair_weight: float = 1.0,
    before: bool = False,
) -> Loss:
    """Makes the loss of a value after each response token.

    A scalar head is read at y_t; a Q head at the position before, in the column of y_t.

    Args:
      lm: the model with its head.
      objective: the loss: "fudge", "cd_q", "td", "pairs" (`losses.last_and_pairs`), "soft" (`losses.soft_value`) or
        "exceedance". "cd_q" needs a Q head and `base`: its target is the exact mean over pi_ref's next tokens.
      base: with "cd_q": the model that made the responses.
      beta: KL weight, with "soft" [units of reward per nat].
      pair_weight: of the pair term, with "pairs" [1].
      before: the value of each state that a response token is drawn from, in place of the state after it: the prompt's
        first, and last the one that draws the last token, whose target is the reward. With "td" that is RE-Control's
        loss (arXiv 2406.05954, eq. 6; here with a factor ½ and stopped gradients), for `policies.re_control`.

    Returns:
      The loss of batches {"tokens", "mask", "loss_mask", "reward" [b]}, and of a frozen body's "hidden" [b,L,D] where
      they are stored, with "exceedance" also "threshold" [b], where
      the reward is the utility. With "cd_q" it takes the base's parameters as frozen. Metrics: squared_error to the
      reward at the last token, or with "exceedance" accuracy there; with "soft" also clipped, the share of response
      tokens whose exponent was clipped, where the fit is of less than V_soft.

    Raises:
      ValueError: an unknown objective, a model without a head, cd_q without Q head and base, soft without beta, before
        with a Q head.
    """
    if objective not in VALUE_OBJECTIVES:
        raise ValueError(f"objective: expected one of {VALUE_OBJECTIVES}, found {objective!r}")
    if lm.config.head is None:
        raise ValueError("value: expected a model with a head, found none")
    if lm.config.head.distribution is not None:
        raise ValueError("value: expected a head of values, found one of laws, which objectives.laws trains")
    wide = lm.config.head.kind == "q"
    if objective == "cd_q" and not (wide and base is not None):
        raise ValueError("cd_q: expected a Q head, whose target is a mean over the vocabulary, and the base model")
    if before and wide:
        raise ValueError("before: expected a scalar head, found a Q head, which reads the token that is drawn")
    if objective == "soft" and beta is None:
        raise ValueError("beta: expected the KL weight of the soft value, found none")

    def loss(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        params = cast(lm, params)
        tokens, mask = batch["tokens"], batch["mask"]
        drawn, reward = batch["loss_mask"][:, 1:], batch["reward"]
        hidden = batch["hidden"] if "hidden" in batch else lm.hidden(params, tokens, mask=mask)
        found = values_of(lm, params, hidden, tokens)
        found = found[:, :-1] if before else found[:, 1:]
        if objective == "fudge":
            total = losses.fudge(found, reward=reward, mask=drawn)
        elif objective == "td":
            total = losses.td(found, reward=reward, mask=drawn)
        elif objective == "pairs":
            total = losses.last_and_pairs(found, reward=reward, mask=drawn, pair_weight=pair_weight)
        elif objective == "soft":
            assert beta is not None
            total = losses.soft_value(found, reward=reward, mask=drawn, beta=beta)
        elif objective == "exceedance":
            total = losses.exceedance(found, utility=reward, threshold=batch["threshold"], mask=drawn)
        else:
            assert base is not None
            base_hidden = jax.lax.stop_gradient(base.hidden(cast(base, frozen), tokens, mask=mask))
            total = losses.cd_q(
                found,
                expected=_expected_next(lm, params, base, frozen, hidden, base_hidden)[:, 1:],
                reward=reward,
                mask=drawn,
            )
        last = mdp.last_index(drawn)
        final = jnp.take_along_axis(found, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
        # The weight counts rows with a response: padding rows carry none.
        rows = drawn.any(axis=1)
        count = jnp.maximum(rows.sum(), 1)
        if objective == "exceedance":
            right = (final > 0) == (reward > batch["threshold"])
            metrics = {"accuracy": jnp.where(rows, right, False).sum() / count}
        else:
            metrics = {"squared_error": (jnp.where(rows, final - reward, 0) ** 2).sum() / count}
        if objective == "soft":
            assert beta is not None
            share = losses.clipped_share(found, reward=reward, mask=drawn, beta=beta)
            metrics["clipped"] = jnp.where(rows, share, 0).sum() / count
        return total * (rows.shape[0] / count), LossAux(rows.sum(), metrics)

    return loss


def values_of(lm: ScoringModel, params: Params, hidden: Array, tokens: Array) -> Array:
    """Reads the value of each prefix.

    Args:
      lm: the model with its head.
      params: its parameters.
      hidden: hidden states [b,L,D] of the texts.
      tokens: their ids [b,L].

    Returns:
      V([x,y^t]) at the position of y_t, [b,L] in float32; position 0 of a Q head is 0. Of a head of laws the mean.
    """
    spec = lm.config.head
    if spec is not None and spec.distribution is not None:
        return (jnp.exp(lm.head(params, hidden)) * jnp.asarray(spec.distribution.support)).sum(axis=-1)
    if lm.config.head is None or lm.config.head.kind != "q":
        return lm.head(params, hidden)[..., 0]

    def read(hidden: Array, following: Array) -> Array:
        return jnp.take_along_axis(lm.head(params, hidden), following[..., None], axis=-1)[..., 0]

    return jnp.pad(models.chunked(read, hidden[:, :-1], tokens[:, 1:], width=lm.vocab_size), ((0, 0), (1, 0)))


def _expected_next(
    lm: ScoringModel, params: Params, base: TextModel, frozen: Params, hidden: Array, base_hidden: Array
) -> Array:
    """Σ_z pi_ref(z|s)·Q(s,z) at each position [b,L], in chunks: neither table is held for all positions."""
    frozen = cast(base, frozen)

    def read(hidden: Array, base_hidden: Array) -> Array:
        return losses.expected_next(
            lm.head(params, hidden), log_prob_ref=jax.nn.log_softmax(base.logits(frozen, base_hidden))
        )

    return jax.lax.stop_gradient(models.chunked(read, jax.lax.stop_gradient(hidden), base_hidden))


@cached
def stackelberg(lm: ScoringModel, *, beta: float) -> Loss:
    """Makes the loss −E[u] under the follower of the model's reward.

    −Σ_i w_i·u_i per prompt, w = softmax(r/beta) over its n samples of the base. The weights are self-normalised
    estimates of the closed form, and the gradient passes through them into every parameter:
    dU/dr_i = w_i·(u_i − U)/beta.

    Args:
      lm: the reward model; the bound of its head keeps r within [0, B].
      beta: KL weight of the follower [units of reward per nat].

    Returns:
      The loss of batches {"tokens", "mask" [b,n,L], "utility" [b,n]}. Metrics: utility, effective_samples (1/Σ w²).

    Raises:
      ValueError: a head without a bound.
    """
    if lm.config.head is None or lm.config.head.bound is None:
        raise ValueError(f"stackelberg: expected a reward head with a bound, found {lm.config.head}")

    def loss(params: Params, batch: Any, frozen: Params = None) -> tuple[Array, LossAux]:
        reward = group_rewards(lm, cast(lm, params), batch)
        log_base = batch.get("log_base", jnp.zeros_like(reward))
        delivered = shaping.leader_utility(log_base, reward, utility=batch["utility"], beta=beta).mean()
        ess = shaping.effective_samples(reward, beta=beta).mean()
        return -delivered, LossAux(jnp.asarray(reward.shape[0]), {"utility": delivered, "effective_samples": ess})

    return loss


def group_rewards(lm: ScoringModel, params: Params, batch: Any) -> Array:
    """r(x,y_i) [b,n] of {"tokens", "mask" [b,n,L]}."""
    shape = batch["tokens"].shape
    flat = {name: batch[name].reshape(-1, shape[-1]) for name in ("tokens", "mask")}
    return rewards_of(lm, params, flat).reshape(shape[:-1])


def rewards_of(lm: ScoringModel, params: Params, batch: Any) -> Array:
    """Reads rewards where `rewards.from_model` reads the model once it is saved: at the token at which transformers
    reads it, or from the mean of the hidden states where its head pools by the mean.

    Args:
      lm: the reward model.
      params: its parameters.
      batch: {"tokens", "mask"} [b,L].

    Returns:
      r(x,y) [b].

    Raises:
      ValueError: a head that is not a scalar.
    """
    if lm.head_width != 1:
        raise ValueError(f"reward: expected a model with a scalar head, found head_width = {lm.head_width}")
    tokens, mask = batch["tokens"], batch["mask"]
    if lm.reward_pooling == "mean":
        states = models.pooled(lm.hidden(params, tokens, mask=mask), tokens, mask, lm.reward_pad_id).mean
        return lm.head(params, states)[:, 0]
    at = models.read_index(tokens, mask, lm.reward_pad_id)[:, None]
    return lm.head(params, lm.hidden(params, tokens, mask=mask, at=at))[:, 0, 0]


def log_likelihoods(lm: TextModel, params: Params, batch: Any) -> Array:
    """log pi(y|x) [b], summed over the response's tokens."""
    log_prob, target = _response_log_prob(lm, params, batch)
    return jnp.where(target, log_prob, 0).sum(axis=-1)


def _response_log_prob(lm: TextModel, params: Params, batch: Any) -> tuple[Array, Array]:
    """(log pi(token), whether it counts) [b,L-1] of tokens 1..L-1."""
    tokens, mask = batch["tokens"], batch["mask"]
    hidden = lm.hidden(params, tokens[:, :-1], mask=mask[:, :-1])
    return models.token_log_prob(lm, params, hidden, tokens[:, 1:]), batch["loss_mask"][:, 1:]


def _joined(batch: Any) -> Any:
    """Chosen over rejected: one pass of 2b rows."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch["chosen"], batch["rejected"])


def _pairs(loss: Array, chosen: Array, rejected: Array) -> tuple[Array, LossAux]:
    margin = chosen - rejected
    accuracy = jnp.mean((margin > 0) + 0.5 * (margin == 0))
    return loss, LossAux(jnp.asarray(chosen.shape[0]), {"accuracy": accuracy, "margin": margin.mean()})
