"""Options of the training of value models, and their checks that need no file."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jaxalign.training import laws
from jaxalign.training.options import RolloutOptions, check_finite, check_rollout_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueOptions:
    """What a value model learns."""

    responses: str = ""
    """In place of --prompts: rows of "prompt" and "response" by any policy, of any form of data (docs/data.md), such as
    responses.jsonl of eval.decode; each is scored as a whole text, EOS added unless the row says "truncated"."""
    objective: Literal["fudge", "cd_q", "td", "pairs", "soft", "exceedance", "distribution"] = "fudge"
    """fudge: the roll-out's reward at every prefix; cd_q: exact mean over the base's next tokens (Q head); td: the next
    prefix's value; pairs: the reward at the last token, and neighbours alike; soft: beta·log E exp(reward/beta);
    exceedance: a classifier of the utility's exceeding the threshold; distribution: the law of the reward, which
    serves every beta, threshold, bound and n (docs/methods/distribution.md)."""
    head: Literal["scalar", "q"] = "scalar"
    """scalar: one value a prefix; q: the value of every next token at once."""
    head_size: int = 0
    """Width of the head's hidden layers; 0: the model's."""
    head_layers: int = 1
    """Hidden layers of the head."""
    activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    """Between the head's layers."""
    frozen: bool = False
    """Train the head alone, on the base's hidden states: the value of each state that a token is drawn from, the
    prompt's included, for policies.re_control; or the laws of --objective distribution."""
    store_states: bool = True
    """With --frozen: compute the base's hidden states once, into states/ of the run folder (tokens x width numbers), in
    place of once at each step."""
    bound: float = 0.0
    """Bound B of the shaped reward [units of reward]; 0: the reward as it is."""
    beta: float = 0.0
    """KL weight that the head is for [units of reward per nat]; with --bound and with --objective soft."""
    sharpness: float = 0.0
    """Shaped reward B·sigmoid(sharpness·(u − m)) [per unit of reward]; 0: B·1[u > m]."""
    pair_weight: float = 1.0
    """Weight of the pair term of --objective pairs [1]."""
    bins: int = 49
    """Support points of --objective distribution, an even grid over the rewards."""
    bin_width: float = 0.0
    """In place of --bins: the distance of neighbouring points [units of reward], on the grid of --reward-range."""
    atoms: str = ""
    """With --objective distribution: the only rewards that there are, as in 0,1; "": a grid."""
    rank: int = 2
    """With --objective distribution and a Q head: in how many ways a token moves the law of a state; 1: it shifts it,
    2: and widens it."""
    targets: Literal["rollouts", "bellman"] = "rollouts"
    """What --objective distribution learns: the rewards of the roll-outs, or by a Q head the mean law after the base's
    next tokens, also from --responses of another policy."""
    reward_range: str = ""
    """With --objective distribution: LOW,HIGH, the ends of the grid; "": the smallest and the largest reward."""
    clip_reward: bool = False
    """Count rewards beyond --reward-range or --atoms as its ends, so that the laws are of the clipped reward; their
    share is told. Otherwise such a reward is an error."""
    roll_in: str = ""
    """With --objective distribution: folder of a head of laws, whose soft values at --roll-in-beta write the first
    tokens of each roll-out, a random number of them; the base writes the rest, whose laws are learned."""
    roll_in_beta: float = 0.0
    """KL weight of --roll-in and --rounds [units of reward per nat]."""
    rounds: int = 1
    """Heads trained one after another with --objective distribution: each rolls in with the one before and learns from
    the roll-outs of all rounds so far. The last is the run's; the others are in rounds/ of the run folder."""
    earlier: str = ""
    """Run folders of other rounds over the same prompts, separated by commas, whose roll-outs are learned from too."""


def number_of_bins(options: ValueOptions) -> int:
    """Gives the number of points of a grid: --bins, or what --bin-width makes of --reward-range."""
    if not options.bin_width:
        return options.bins
    low, high = laws.range_of(options.reward_range)
    return max(2, math.ceil((high - low) / options.bin_width - 1e-6) + 1)


def check_value_options(options: ValueOptions, rolled: RolloutOptions, *, model: str) -> None:
    """Checks the values of options that need no file.

    Args:
      options: of the value model.
      rolled: of its roll-outs.
      model: folder of the model that is trained.

    Raises:
      ValueError: it names the option, what was expected and what was found.
    """
    check_rollout_options(rolled)
    if bool(rolled.prompts) == bool(options.responses):
        found = "both" if rolled.prompts else "neither"
        raise ValueError(f"prompts: expected either --prompts or --responses, found {found}")
    for name, value in (("bound", options.bound), ("rollouts", rolled.rollouts)):
        if options.responses and value:
            raise ValueError(f"{name}: expected --prompts, of which roll-outs are made, found --responses")
    if options.objective == "cd_q" and options.head != "q":
        raise ValueError("head: expected q for --objective cd_q, whose target is a mean over the vocabulary")
    check_finite(options, "bound", "beta", "sharpness", "pair_weight")
    if options.head_layers < 1:
        raise ValueError(f"head_layers: expected at least 1, found {options.head_layers}")
    if options.frozen and options.head != "scalar":
        raise ValueError("head: expected scalar with --frozen, found q")
    if options.frozen and (options.bound or options.objective not in ("fudge", "td", "pairs", "distribution")):
        raise ValueError("objective: expected fudge, td, pairs or distribution, and no --bound, with --frozen")
    if options.frozen and model != rolled.base:
        raise ValueError("model: expected the base with --frozen, whose hidden states are edited")
    if options.objective == "exceedance" and not options.bound:
        raise ValueError(
            "bound: expected a value > 0 for --objective exceedance, which is for a shaped reward, found 0"
        )
    if (options.bound or options.objective == "soft") and not options.beta:
        raise ValueError("beta: expected a value > 0 with --bound and with --objective soft, found 0")
    _check_laws(options, rolled)
    if options.bound and rolled.samples < 2:
        raise ValueError(f"samples: expected at least 2 for a threshold per prompt, found {rolled.samples}")
    if options.objective == "exceedance" and options.sharpness:
        raise ValueError("sharpness: expected 0 for --objective exceedance; --objective soft serves a soft threshold")


def _check_laws(options: ValueOptions, rolled: RolloutOptions) -> None:
    if options.objective != "distribution":
        default = ValueOptions()
        for name in ("atoms", "targets", *_ROUNDS, "reward_range", "clip_reward", "bin_width"):
            if getattr(options, name) != getattr(default, name):
                raise ValueError(f"{name}: expected --objective distribution, found {options.objective}")
        return
    for name in ("bound", "beta", "sharpness"):
        if getattr(options, name):
            raise ValueError(f"{name}: expected none with --objective distribution, which is for all, at decoding")
    if options.targets == "bellman" and options.head != "q":
        raise ValueError("head: expected q for --targets bellman, whose target is a mean over the vocabulary")
    for name, least in (("bins", 2), ("rank", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}: expected at least {least}, found {getattr(options, name)}")
    if options.atoms and len(laws.numbers_of(options.atoms)) < 2:
        raise ValueError(f"atoms: expected at least two rewards, as in 0,1, found {options.atoms!r}")
    if options.reward_range:
        laws.range_of(options.reward_range)
    if options.atoms and options.reward_range:
        raise ValueError("reward_range: expected none beside --atoms, whose ends they are")
    check_finite(options, "bin_width")
    if options.bin_width and not options.reward_range:
        raise ValueError("reward_range: expected LOW,HIGH with --bin-width, which divides it, found none")
    if options.bin_width and options.bins != ValueOptions().bins:
        raise ValueError(f"bins: expected none beside --bin-width, found {options.bins}")
    if options.clip_reward and not (options.atoms or options.reward_range):
        raise ValueError("reward_range: expected LOW,HIGH or --atoms with --clip-reward, found neither")
    _check_rounds(options, rolled)


_ROUNDS = ("roll_in", "rounds", "earlier")


def _check_rounds(options: ValueOptions, rolled: RolloutOptions) -> None:
    if options.rounds < 1:
        raise ValueError(f"rounds: expected at least 1, found {options.rounds}")
    for name in _ROUNDS:
        for other, value in (("responses", options.responses), ("rollouts", rolled.rollouts)):
            if value and getattr(options, name) != getattr(ValueOptions(), name):
                raise ValueError(f"{name}: expected roll-outs that this run makes, found --{other}")
    if bool(options.roll_in or options.rounds > 1) != bool(options.roll_in_beta):
        raise ValueError(f"roll_in_beta: expected > 0 with --roll-in or --rounds alone, found {options.roll_in_beta:g}")
    check_finite(options, "roll_in_beta")
