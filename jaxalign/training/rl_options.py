"""Options of policy gradients: the reward that a policy is aligned with, and the algorithm; with their checks."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxalign import infalign
from jaxalign.training.group_advantages import of_group
from jaxalign.training.options import check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """What a policy is aligned with."""

    reward: str
    """Folder of a reward model over the model's vocabulary, or MODULE:FUNCTION, a program f(prompts, responses) ->
    numbers on lists of texts; or a weighted sum of such, "DIR - 0.1 * MODULE:FUNCTION"."""
    beta: float = 0.1
    """KL weight [units of the transformed reward per nat]; with --target-kl where it starts."""
    target_kl: float = 0.0
    """KL to hold by changing beta [nats per response]; 0: beta is fixed."""
    calibration: str = ""
    """Folder of train.calibrate: rewards become their quantile among the base's own for the prompt, in [0, 1]."""
    transform: str = ""
    """Map of the quantile: identity, log, exp:A, bon:N, won:N, best_of:N, worst_of:N (infalign.parse_transform), or the
    optimum for best-of-N and worst-of-N at --beta, bon_fp:N and won_fp:N. Without --calibration the map is of the
    sigmoid of the reward."""
    width: float = 0.0
    """Width of a smoothed calibration [units of reward]; 0: ranks."""
    bound: float = 0.0
    """Bound B of a Stackelberg threshold reward, B·1[r > m(x)], with m from the calibration's samples at gain B/beta;
    0: none. With --transform, of the transformed reward."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLOptions:
    """How the policy is improved on its own responses."""

    algorithm: Literal["rloo", "grpo", "ppo"] = "rloo"
    """rloo: rewards against the mean of the prompt's other samples; grpo: standardised within the group; ppo:
    generalised advantages with a value head, which is trained along."""
    kl: Literal["reward", "k2", "k3", "exact"] = "reward"
    """Where the KL enters. reward: beta·log(pi/pi_ref) is taken off the reward; k2, k3: a term of the loss. k3 is the
    one of GRPO's paper; its optimum is not the Gibbs policy. exact: summed over the vocabulary at each token, with less
    noise, for a pass of the reference with each update."""
    advantage: str = "mean"
    """What the rewards of a prompt's samples are worth, with rloo. mean: that of each; max@K, min@K, pass@K: the best,
    the worst, any success (reward > 0) of K draws. With --calibration and --transform best_of:K (worst_of:K) max@K
    (min@K) is the win rate over the base under that procedure."""
    samples: int = 8
    """Responses per prompt and iteration."""
    max_new_tokens: int = 128
    """Limit of a response [tokens], its EOS included; one without EOS is scored as it stands."""
    minibatches: int = 1
    """Optimizer steps per pass over an iteration's responses."""
    passes: int = 1
    """Passes over an iteration's responses."""
    ratio_clip: float = 0.2
    """Largest change of a token's probability ratio (rloo: of a response's) that is rewarded."""
    sampler_clip: float = 0.0
    """Weigh each token by its probability under the policy over that under the sampler, at most this (2 is usual):
    corrects for the rounding of a sampler in bfloat16, which the metrics mismatch and sampler_kl show. 0: no weights.
    Weights of tokens go with ratios of tokens: grpo, ppo, or --kl exact."""
    sampler_weights: Literal["token", "response"] = "token"
    """What --sampler-clip bounds: the weight of a token, or that of a whole response, whose logarithm is a sum over its
    T tokens and which only serves where T x sampler_kl is far below the logarithm of --sampler-clip."""
    decay: float = 0.95
    """ppo: decay of generalised advantages, in [0, 1]."""
    value_weight: float = 0.1
    """ppo: weight of the value loss."""


def check_reward_options(options: RewardOptions) -> None:
    """ValueErrors that name the option."""
    check_finite(options, "beta", above=True)
    check_finite(options, "target_kl", "width", "bound")
    if options.transform:
        solved = infalign.needs_beta(options.transform)
        if (solved or options.transform == "log") and not options.calibration:
            raise ValueError(f"transform: expected {options.transform} with --calibration, which gives it quantiles")
        if solved and options.target_kl:
            raise ValueError(f"transform: expected {options.transform}, solved for one beta, without --target-kl")
        infalign.check_increasing(infalign.parse_transform(options.transform, beta=options.beta))
    if options.width and options.bound and not options.transform:
        raise ValueError("width: expected with --transform: the threshold alone is on the reward itself")
    for name in ("width", "bound"):
        if getattr(options, name) and not options.calibration:
            raise ValueError(f"{name}: expected with --calibration, whose samples it needs")
    if options.bound and options.target_kl:
        raise ValueError("bound: expected without --target-kl: the threshold is solved for one beta")


def check_rl_options(options: RLOptions, *, batch_size: int, accumulate: int) -> int:
    """Checks the options that need no file.

    Args:
      options: of the algorithm.
      batch_size: prompts of an iteration.
      accumulate: micro-batches that each minibatch is run in.

    Returns:
      Responses of a minibatch, the rows of an optimizer step.

    Raises:
      ValueError: it names the option, what was expected and what was found.
    """
    check_finite(options, "ratio_clip", above=True)
    check_finite(options, "sampler_clip")
    of_tokens = options.algorithm != "rloo" or options.kl == "exact"
    if options.sampler_clip and not of_tokens and options.sampler_weights == "token":
        raise ValueError(
            f"sampler_clip: expected with ratios by token (grpo, ppo, or --kl exact), found {options.sampler_clip} "
            "with rloo, whose ratio is of a whole response (--sampler-weights response weighs these)"
        )
    if options.sampler_weights == "response" and not options.sampler_clip:
        raise ValueError("sampler_weights: expected with --sampler-clip, found response without")
    least = 1 if options.algorithm == "ppo" else 2
    if options.samples < least:
        raise ValueError(f"samples: expected at least {least} for {options.algorithm}, found {options.samples}")
    if options.advantage != "mean":
        _, k = of_group(options.advantage)
        if options.algorithm != "rloo" or k > options.samples:
            raise ValueError(
                f"advantage: expected {options.advantage} with rloo and at least {k} samples, found "
                f"{options.algorithm} and {options.samples}"
            )
    for name in ("minibatches", "passes", "max_new_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(options, name)}")
    if accumulate < 1:
        raise ValueError(f"accumulate: expected at least 1, found {accumulate}")
    responses = batch_size * options.samples
    if responses % (options.minibatches * accumulate):
        raise ValueError(
            f"minibatches: expected minibatches x accumulate to divide the {responses} responses of an iteration, "
            f"found {options.minibatches} x {accumulate}"
        )
    return responses // options.minibatches
