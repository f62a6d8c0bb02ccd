"""Roll-outs whose first tokens a guided policy writes and whose rest is the base's, in rounds that share their data.

The law of the reward is that of the base's continuations, and so it can be learned from any prefix that the base goes
on from: with a roll-in the head learns at the prefixes that the guided policy visits. Source: arXiv 2502.20548.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from jaxalign import critics, decoding, models, policies
from jaxalign._arrays import NEGATIVE
from jaxalign._builders import cached
from jaxalign._checks import check_part, fields_of
from jaxalign._parts import start_policy, step_policy
from jaxalign.critics import reads
from jaxalign.training import law_sources
from jaxalign.training.options import RolloutOptions
from jaxalign.training.training_job import check_length
from jaxalign.types import Array, Params, Policy, Prompts, Reward, State, StepOutput, TokenBatch

TOP_K = 10
"""Candidates of the guided policy with a scalar head, as eval.decode takes them."""


class RollIn(NamedTuple):
    """What writes the first tokens of roll-outs."""

    folder: str
    """Of the head of laws whose soft values guide; "": none, the base alone."""
    beta: float
    """Of its tilt [units of reward per nat]."""
    earlier: tuple[str, ...] = ()
    """Run folders of the rounds before, whose roll-outs are learned from too."""


class Guide(NamedTuple):
    """A guided policy with its parameters."""

    policy: Policy
    """The tilt of the base."""
    params: Params
    """Its parameters."""
    round: int
    """Of the draws: those of two rounds are apart."""


class BegunParams(NamedTuple):
    """Parameters of `begun`."""

    policy: Params
    """Those of the policy that goes on."""
    tokens: Array
    """[B,T], the first tokens of each row."""
    number: Array
    """[B], how many of them it has to write; it chooses from there on."""


class BegunState(NamedTuple):
    """State of `begun`."""

    policy: State
    """That of the policy that goes on."""
    tokens: Array
    """[B,T], as in the parameters."""
    number: Array
    """[B], as in the parameters."""
    step: Array
    """[B], tokens so far."""


class Drawn(NamedTuple):
    """Roll-outs of a batch of prompts."""

    tokens: Array
    """[B,S,T], S to each prompt."""
    length: Array
    """[B,S], tokens of each."""
    reward: Array
    """[B,S]."""
    start: Array
    """[B,S], how many tokens the guided policy wrote, 0 to length − 1."""


@cached
def begun(policy: Policy) -> Policy:
    """Gives the policy that writes given tokens first, with probability one, and then chooses as `policy`.

    params: BegunParams(policy, tokens, number), or a dict of these names. log_prob_ref and log_norm stay the policy's.

    Args:
      policy: what goes on.

    Returns:
      A Policy.
    """

    def forced(state: BegunState, output: StepOutput) -> StepOutput:
        place = jnp.minimum(state.step, state.tokens.shape[1] - 1)
        token = jnp.take_along_axis(state.tokens, place[:, None], axis=1)
        only = jnp.where(jnp.arange(output.log_prob.shape[-1]) == token, 0, NEGATIVE).astype(output.log_prob.dtype)
        return output._replace(log_prob=jnp.where((state.step < state.number)[:, None], only, output.log_prob))

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        given = fields_of(params, BegunParams)
        inner, output = start_policy(policy, given.policy, rng, prompts, max_new_tokens)
        state = BegunState(inner, given.tokens, given.number, jnp.zeros_like(given.number))
        return state, forced(state, output)

    def step(params: Params, rng: Array, state: BegunState, token: Array) -> tuple[State, StepOutput]:
        inner, output = step_policy(policy, fields_of(params, BegunParams).policy, rng, state.policy, token)
        moved = state._replace(policy=inner, step=state.step + (token >= 0))
        return moved, forced(moved, output)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        check_part(policy, fields_of(params, BegunParams), prompts, max_new_tokens, "policy")

    return Policy(init, step, None, check, policy.vocab_size, policy.eos_ids)


def guide_of(
    given: RollIn, options: RolloutOptions, lm: models.LanguageModel, params: Params, tokenizer: Any, *, dtype: str
) -> Guide | None:
    """Opens the guided policy: the base, tilted by the soft values of a head of laws.

    Args:
      given: its folder and beta.
      options: of the roll-outs, which must be of the base, reward, template and limit that the laws are of.
      lm: the base.
      params: its parameters.
      tokenizer: the base's.
      dtype: type that the head's model computes in.

    Returns:
      The Guide; None without a folder.

    Raises:
      ValueError: a folder without a head of laws, laws of another base, reward, template or limit.
    """
    if not given.folder:
        return None
    law_sources.check(
        [given.folder],
        base=options.base,
        reward=options.reward,
        tokenizer=tokenizer,
        max_new_tokens=options.max_new_tokens,
    )
    scorer, head = models.load_beside(given.folder, lm, tokenizer, name="roll_in", dtype=dtype)
    found = scorer.config.head
    if found is None or found.distribution is None:
        raise ValueError(f"roll_in: expected the folder of a head of laws, found {found} in {given.folder}")
    top_k = None if found.kind == "q" else min(TOP_K, lm.vocab_size)
    policy = policies.tilt(policies.language_model(lm), critics.distribution(scorer, reads.soft()), top_k=top_k)
    own = critics.DistributionParams(head, {"beta": jnp.asarray(given.beta, jnp.float32)})
    return Guide(policy, policies.TiltParams(params, own, beta=jnp.asarray(1.0)), 1 + len(given.earlier))


def draw(
    guide: Guide,
    base: Policy,
    reward: Reward,
    params: Any,
    rng: Array,
    prompts: TokenBatch,
    *,
    samples: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
) -> Drawn:
    """Draws roll-outs that the guided policy begins and the base finishes.

    The guided policy writes a whole response, of which a number of tokens, uniform in 0 to its length − 1, is kept.

    Args:
      guide: what begins.
      base: what finishes.
      reward: scores the whole responses.
      params: {"policy", "reward"}, those of the base and of the reward.
      rng: of the draws; a prompt's depend on it and on the prompt's index.
      prompts: B prompts.
      samples: S, roll-outs a prompt.
      max_new_tokens: T, limit of a response [tokens].
      eos_ids: the ids that end a response.

    Returns:
      Drawn, of S roll-outs a prompt.
    """
    rng = jax.random.fold_in(rng, guide.round)
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
    found = []
    for sample in range(samples):
        first, place, rest = jax.random.split(jax.random.fold_in(rng, sample), 3)
        led = decoding.sample(guide.policy, guide.params, first, prompts, **limits)
        uniform = jax.vmap(lambda row, key=place: jax.random.uniform(jax.random.fold_in(key, row)))(prompts.index)
        length = led.mask.sum(axis=1)
        count = jnp.clip((uniform * length).astype(length.dtype), 0, jnp.maximum(length - 1, 0))
        own = {"policy": BegunParams(params["policy"], led.tokens, count), "reward": params["reward"]}
        drawn = decoding.best_of_n(begun(base), reward, own, rest, prompts, num_samples=1, **limits).info
        kept = drawn.samples.tokens[:, 0], drawn.samples.mask[:, 0].sum(axis=-1), drawn.reward[:, 0]
        found.append(Drawn(*kept, count))
    stacked: Drawn = jax.tree.map(lambda *each: jnp.stack(each, axis=1), *found)
    return stacked


class _Config(Protocol):
    """What `after_rounds` reads of a script's options."""

    @property
    def run(self) -> Any:
        """The run folder."""

    @property
    def value(self) -> Any:
        """rounds, roll_in and earlier."""


C = TypeVar("C", bound=_Config)


def after_rounds(config: C, out: pathlib.Path, run: Callable[[C], Any]) -> C:
    """Trains the heads of all rounds but the last, each in a run folder of its own in rounds/, and gives the options of
    the last: it rolls in with the head before it, and learns from the roll-outs of all.

    Args:
      config: the options of the script, with rounds > 1; those of one round, and of a dry run, are given back.
      out: the run folder.
      run: trains by options; a round that is whole is not trained again.

    Returns:
      The options of the last round.

    Raises:
      ValueError: a round that has begun had another number of steps or epochs.
    """
    options: Any = config
    rounds = options.value.rounds
    if rounds == 1 or options.run.dry_run:
        return config
    earlier: list[str] = folders(options.value.earlier)
    for number in range(1, rounds):  # before anything is trained
        why = "whose head writes the first tokens of a later round"
        check_length(out / "rounds" / str(number), options.optimizer, why)
    for number in range(1, rounds):
        folder = str(out / "rounds" / str(number))
        value = dataclasses.replace(options.value, rounds=1, earlier=",".join(earlier))
        if not value.roll_in:
            value = dataclasses.replace(value, roll_in_beta=0.0)
        run(dataclasses.replace(options, run=dataclasses.replace(options.run, out=folder), value=value))
        earlier.append(folder)
        model = str(pathlib.Path(folder) / "model")
        options = dataclasses.replace(options, value=dataclasses.replace(options.value, roll_in=model))
    value = dataclasses.replace(options.value, rounds=1, earlier=",".join(earlier))
    last: C = dataclasses.replace(options, value=value)
    return last


def folders(text: str) -> list[str]:
    """The folders of an option, separated by commas; none for ""."""
    return [name.strip() for name in text.split(",") if name.strip()]


def shard_paths(folder: pathlib.Path, number: int) -> list[pathlib.Path]:
    """The files of so many shards in a folder, in order."""
    return [folder / f"{k:05d}.npz" for k in range(number)]


def shards_of(given: Sequence[str]) -> list[pathlib.Path]:
    """The shards of run folders, in order. ValueError for a folder without any."""
    found = []
    for folder in given:
        paths = sorted((pathlib.Path(folder) / "rollouts").glob("[0-9]*.npz"))
        if not paths:
            raise ValueError(f"earlier: expected run folders of train.value, found no roll-outs in {folder}")
        found += paths
    return found
