"""What a head of laws was learned from: a law of rewards is that of one base, reward, template, temperature and
limit."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxalign import _io, policies
from jaxalign.training import tables
from jaxalign.training.options import RolloutOptions

FILE = "laws.json"
MEANING = {
    "base": ("model", "the model whose responses the rewards are of"),
    "reward": ("reward", "the reward"),
    "template": ("model", "the chat template"),
    "temperature": ("temperature", "of the draws"),
    "max_new_tokens": ("max_new_tokens", "the longest response"),
}
"""What is compared when a head is read -> the option of a run that decides it, and what it is."""
WHOLE = policies.Sampling()
"""At temperature 1, from the whole vocabulary, as roll-outs are drawn."""


def made_with(
    rolled: RolloutOptions, tokenizer: Any, *, responses: bool, of_base: bool, clipped: float
) -> dict[str, Any]:
    """Says what laws are of, for `FILE` in the folder of the head. Weights count, names of folders do not.

    Args:
      rolled: the base, the reward and the limit of the roll-outs.
      tokenizer: the model's, whose template counts.
      responses: whether given responses were learned from, which have neither this limit nor this number per prompt.
      of_base: whether the laws are under the base, as from its roll-outs; False: under whoever wrote the responses.
      clipped: share of the rewards that lay beyond the support and were clipped.

    Returns:
      base, reward, template, temperature, max_new_tokens, rollouts_per_prompt, clipped_share; None for what is not
      known.
    """
    found = tables.made_with(
        rolled.base, rolled.reward, tokenizer, (), max_new_tokens=rolled.max_new_tokens, dtype="", temperature=1.0
    )
    return {
        "base": found["base"] if of_base else None,
        "reward": found["reward"],
        "template": found["template"],
        "temperature": None if responses else found["temperature"],
        "max_new_tokens": None if responses else found["max_new_tokens"],
        "rollouts_per_prompt": None if responses else rolled.samples,
        "clipped_share": clipped,
    }


def check(
    folders: list[str],
    *,
    base: str,
    reward: str,
    tokenizer: Any,
    max_new_tokens: int,
    sampling: policies.Sampling = WHOLE,
) -> None:
    """Checks that heads of laws are of a run's base, reward, template, temperature and limit.

    What a head does not tell is not compared.

    Args:
      folders: of the heads.
      base: folder of the run's base.
      reward: as `rewards.parse_reward` reads it; "": none.
      tokenizer: the base's.
      max_new_tokens: limit of a response [tokens].
      sampling: how the run draws. Laws are of the temperature that they name and of the whole vocabulary.

    Raises:
      ValueError: a head of another base, reward, template, temperature or limit; it names the option and the folder.
    """
    told = {name: _about(name) for name in folders}
    if not any(told.values()):
        return
    heat = sampling.temperature
    run = tables.made_with(
        base, reward or base, tokenizer, (), max_new_tokens=max_new_tokens, dtype="", temperature=heat
    )
    if sampling != policies.Sampling(heat):
        run["temperature"] = sampling
    for folder, about in told.items():
        for name, (option, meaning) in MEANING.items():
            if about.get(name) is None or (name == "reward" and not reward):
                continue
            if about[name] != run[name]:
                raise ValueError(
                    f"{option}: expected the {name} ({meaning}) that the laws of {folder} are of, {about[name]}, found "
                    f"{run[name]}"
                )


def _about(folder: str) -> dict[str, Any]:
    path = pathlib.Path(folder) / FILE
    if not path.is_file():
        return {}
    found: dict[str, Any] = _io.read_json(path, then=f"the laws in {folder} have to be made again")
    return found
