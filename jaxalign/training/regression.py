"""Rows, loss and measurements of train.regress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, losses, models, policies
from jaxalign._builders import cached
from jaxalign.data import encoded, preferences
from jaxalign.prompts import prompt_batch
from jaxalign.training import job, objectives, regression_targets
from jaxalign.training.protocols import TextModel
from jaxalign.training.regression_options import RegressionOptions
from jaxalign.training.regression_targets import Samples
from jaxalign.training.step import Loss, LossAux
from jaxalign.types import Array, Params, Reward

LARGEST_WEIGHT = 20.0
"""Of the base over the mixture of the policies that drew."""


class Response(NamedTuple):
    """A scored response."""

    row: int
    """Row of its prompt."""
    tokens: list[int]
    """Token ids, its end included where it has one."""
    reward: float
    """Of the whole response."""
    round: int
    """Which policy drew it: 0 the base, r that of the r-th refresh."""
    own: bool
    """Whether it is one of the table's."""


class Group(NamedTuple):
    """Responses to a prompt that are learned from together."""

    prompt: list[int]
    """Token ids, by which rows are split."""
    responses: list[list[int]]
    """Token ids of each."""
    target: list[float]
    """The optimum's log-ratio to the base of each [nats]."""
    weight: list[float]
    """Importance weight of each."""


class Measured(NamedTuple):
    """Draws of a policy."""

    responses: list[Response]
    """Each, in order of prompt and sample."""
    kl: np.ndarray
    """[prompts,n], to the base, summed over steps, exact at each [nats]."""


@cached
def regression(lm: TextModel, *, options: RegressionOptions) -> Loss:
    """Makes `losses.regress` of log-ratios to a reference, a model of the same config.

    The reference reads each batch in a pass of the same shape, so that at the first step every log-ratio is 0 to the
    last bit.

    Args:
      lm: the model that is trained.
      options: the form.

    Returns:
      The loss of batches {"tokens", "mask", "loss_mask" [b,n,L], "target", "weight" [b,n]}, which takes the reference's
      parameters as frozen. Metrics: log_ratio (mean), distance (mean |log-ratio − target|), floored and capped
      (`losses.regression_limits`).
    """

    def loss(params: Params, batch: Any, frozen: Params) -> tuple[Array, LossAux]:
        ratio = log_ratios(lm, params, frozen, batch)
        value = objective(options, ratio, batch["target"], batch["weight"])
        limits = losses.regression_limits(ratio.reshape(-1), batch["target"].reshape(-1))
        metrics = {"log_ratio": ratio.mean(), "distance": jnp.abs(ratio - batch["target"]).mean()}
        return value, LossAux(jnp.asarray(ratio.shape[0]), metrics | limits._asdict())

    return loss


def objective(options: RegressionOptions, ratio: Array, target: Array, weight: Array) -> Array:
    """`losses.regress` of groups [b,n], as the options say."""
    group = jnp.repeat(jnp.arange(ratio.shape[0]), ratio.shape[1]) if options.normaliser == "centred" else None
    flat = (x.reshape(-1) for x in (ratio, target, weight))
    x, t, w = flat
    return losses.regress(x, t, form=options.loss, weight=w, group=group, huber=options.huber or None)


def log_ratios(lm: TextModel, params: Params, reference: Params, batch: Any) -> Array:
    """log pi/pi_ref of each response [b,n], a sum over its tokens; no gradient goes into the reference."""
    shape = batch["tokens"].shape
    flat = {name: batch[name].reshape(-1, shape[-1]) for name in ("tokens", "mask", "loss_mask")}
    own = objectives.log_likelihoods(lm, objectives.cast(lm, params), flat)
    base = jax.lax.stop_gradient(objectives.log_likelihoods(lm, objectives.cast(lm, reference), flat))
    return (own - base).reshape(shape[:-1])


def collating(max_length: int) -> Callable[[list[Group]], dict[str, np.ndarray]]:
    """The function that pads groups of one size to the bucket of the longest.

    Args:
      max_length: longest row [tokens].

    Returns:
      A list of b groups -> the batch of `regression`.
    """

    def collate(rows: list[Group]) -> dict[str, np.ndarray]:
        texts = [encoded.TextTokens(row.prompt, r, "roll-out") for row in rows for r in row.responses]
        length = job.row_length([len(text.prompt) + len(text.response) for text in texts], max_length)
        flat = preferences.pad_texts(texts, length=length)
        each = {name: values.reshape(len(rows), -1, *values.shape[1:]) for name, values in flat.items()}
        return each | {
            name: np.asarray([getattr(row, name) for row in rows], np.float32) for name in ("target", "weight")
        }

    return collate


class Pool(NamedTuple):
    """Scored responses."""

    responses: list[Response]
    """R of them."""
    log_ratio: np.ndarray
    """[rounds,R], of each policy that drew to the base [nats]; 0 of the base itself, of prompts for which a policy did
    not draw, and of responses that are not learned from."""
    kept: np.ndarray
    """[R] bool, those that are learned from."""


def pool_of(own: Sequence[Any], fresh: Sequence[Any]) -> Pool:
    """The base's samples: roll-outs of the table and of --fresh."""
    found = [
        Response(x.row, x.response, x.reward, 0, is_own) for rows, is_own in ((own, True), (fresh, False)) for x in rows
    ]
    return Pool(found, np.zeros((1, len(found))), np.ones(len(found), bool))


def samples_of(responses: Sequence[Response]) -> Samples:
    """Their rewards, as the targets are made of."""
    return Samples(
        np.asarray([r.row for r in responses], np.int64),
        np.asarray([r.reward for r in responses], np.float64),
        np.asarray([r.own for r in responses], bool),
        np.asarray([r.round == 0 for r in responses], bool),
    )


def beside_draws(responses: Sequence[Response], seed: int) -> np.ndarray:
    """Gives the responses that a round learns from: all that policies drew, and beside them as many of the base's.

    The base's samples are many times the draws of a round, and a round has time for a part of them all: dealt out
    evenly, most of the draws would never be learned from.

    Args:
      responses: R of them.
      seed: of the choice among the base's.

    Returns:
      [R] bool. Of a prompt for which policies drew, no more of the base's than of theirs, chosen at random; of any
      other all.
    """
    by_policy = np.asarray([r.round > 0 for r in responses])
    rows = np.asarray([r.row for r in responses])
    most = np.bincount(rows[by_policy], minlength=rows.max() + 1)
    places = np.flatnonzero(~by_policy & (most[rows] > 0))
    kept, taken = np.ones(len(rows), bool), np.zeros_like(most)
    for i in np.random.default_rng(seed).permutation(places):
        taken[rows[i]] += 1
        kept[i] = taken[rows[i]] <= most[rows[i]]
    return kept


def mixture_weights(pool: Pool) -> np.ndarray:
    """Gives pi_ref(y) over the mixture of the policies that drew for its prompt, in the shares in which they drew.

    Args:
      pool: the responses, of which those that are learned from make up the shares.

    Returns:
      [R], at most `LARGEST_WEIGHT`; 1 where the base alone drew. It says nothing of those that are not learned from.

    Source: the balance heuristic (Veach and Guibas, 1995).
    """
    rows, rounds = np.asarray([r.row for r in pool.responses]), np.asarray([r.round for r in pool.responses])
    drawn = np.zeros((len(pool.log_ratio), rows.max() + 1))
    np.add.at(drawn, (rounds, rows), pool.kept)
    with np.errstate(divide="ignore"):
        share = np.log(drawn / drawn.sum(axis=0))[:, rows]
    log_mixture = np.logaddexp.reduce(share + pool.log_ratio, axis=0)
    return np.asarray(np.minimum(np.exp(-log_mixture), LARGEST_WEIGHT))


def groups_of(
    options: RegressionOptions,
    pool: Pool,
    prompts: Sequence[encoded.Prompt],
    table: np.ndarray,
    beta: float,
) -> tuple[list[Group], dict[str, Any]]:
    """Makes the rows of an optimizer step, a response each, or with centred --group of a prompt.

    Args:
      options: the targets and the size of a group.
      pool: all responses.
      prompts: all of them.
      table: [P,K], sorted rewards.
      beta: KL weight.

    Returns:
      (groups, figures): left_out, samples of the base that stand back (`beside_draws`); left_over, responses of which
      no whole group could be made; tied_prompts; truncated_weights; floored_targets.
    """
    # Targets know of all the base's samples: the posterior of log Z is of them.
    found = regression_targets.targets(options, beta, table, samples_of(pool.responses))
    kept = pool.kept
    weight, size = mixture_weights(pool), options.group if options.normaliser == "centred" else 1
    by_prompt: dict[int, list[int]] = {}
    for i in np.flatnonzero(kept):
        by_prompt.setdefault(pool.responses[i].row, []).append(int(i))
    groups = []
    for row, places in by_prompt.items():
        for first in range(0, len(places) - size + 1, size):
            part = places[first : first + size]
            made = [pool.responses[i].tokens for i in part]
            each = [float(found.target[i]) for i in part], [float(weight[i]) for i in part]
            groups.append(Group(prompts[row].tokens, made, *each))
    figures = {"left_out": int((~kept).sum()), "left_over": int(kept.sum()) - size * len(groups)}
    figures |= {
        "tied_prompts": found.tied,
        "truncated_weights": int((weight[kept] >= LARGEST_WEIGHT).sum()),
        "floored_targets": int((found.target[kept] < losses.LOWEST_TARGET).sum()),
    }
    return groups, figures


@cached
def scoring(lm: TextModel) -> Callable[[tuple[Params, Params], Any], Array]:
    """(parameters, those of the reference), batch -> log-ratios [b,n]."""

    def score(both: tuple[Params, Params], batch: Any) -> Array:
        return log_ratios(lm, *both, batch)

    return score


def draw(
    lm: models.LanguageModel,
    params: Params,
    reference: Params,
    reward: Reward,
    reward_params: Params,
    prompts: Sequence[encoded.Prompt],
    rows: Sequence[int],
    *,
    samples: int,
    max_new_tokens: int,
    decode_batch: int,
    seed: int,
    number: int,
) -> Measured:
    """Draws scored responses of a policy.

    Args:
      lm: the policy's model, and its base's.
      params: the policy's.
      reference: the base's.
      reward, reward_params: what scores them.
      prompts: all of them.
      rows: those that are answered.
      samples: n, to each.
      max_new_tokens: limit of a response.
      decode_batch: responses drawn together.
      seed: of the draws.
      number: of the round, which is told with each response; draws of two rounds are apart.

    Returns:
      Responses, and their KL.

    Raises:
      ValueError: a reward that is not finite.
    """
    plain = policies.language_model(lm)
    both: Params = {"policy": {"policy": params, "reference": reference}, "reward": reward_params}
    size = max(decode_batch // samples, 1)
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_ids": lm.config.eos_ids, "num_samples": samples}
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 7), number)
    responses, kls = [], []
    for part in job.iterate(list(rows), size):
        batch = prompt_batch([prompts[i].tokens for i in part], index=part, batch_size=size)
        found = decoding.best_of_n(policies.with_reference(plain, plain), reward, both, rng, batch, **limits).info
        assert found.samples.kl is not None
        kept = found.samples.tokens, found.samples.mask.sum(axis=-1), found.reward, found.samples.kl.sum(axis=-1)
        tokens, length, scores, kl = job.first_rows(kept, len(part))
        if not np.isfinite(scores).all():
            raise ValueError(f"reward: expected finite numbers, found {scores} for prompts {part}")
        for i, row in enumerate(part):
            responses += [
                Response(row, tokens[i, j, : length[i, j]].tolist(), float(scores[i, j]), number, False)
                for j in range(samples)
            ]
        kls.append(kl)
    return Measured(responses, np.concatenate(kls))


def figures_of(found: Measured, table: np.ndarray, name: str) -> dict[str, Any]:
    """KL to the base and win rate over it of draws, means over prompts with 95 % half-widths; "_name" ends each key."""
    rank = regression_targets.quantiles(*(lambda s: (s.reward, table, s.prompt))(samples_of(found.responses)))
    out: dict[str, Any] = {}
    for key, values in (("kl", found.kl), ("win_rate", rank.reshape(found.kl.shape))):
        mean, half = job.interval(values.mean(axis=1))
        out |= {f"{key}_{name}": mean, f"{key}_{name}_95": half}
    return out
