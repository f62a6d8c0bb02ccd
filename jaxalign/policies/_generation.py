"""Policies that draw as a folder's generation_config.json says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign._blocks import accept_policy, verify_policy
from jaxalign._builders import cached
from jaxalign._files import parse_json, printed
from jaxalign._parts import check_policy_argument, start_policy, step_policy
from jaxalign.policies._truncation import TemperatureParams, TopPParams, temperature, top_k, top_p
from jaxalign.types import Array, Params, Policy, Prompts, State, StepOutput


class Sampling(NamedTuple):
    """What is drawn from: the distribution after temperature, then top-k, then top-p."""

    temperature: float = 1.0
    """>= 0; 0 is greedy."""
    top_k: int | None = None
    """The k most probable tokens; None: all."""
    top_p: float = 1.0
    """The mass of the nucleus, in (0, 1]."""


READ = ("do_sample", "temperature", "top_k", "top_p")
WITHOUT_EFFECT: Mapping[str, Any] = {
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "length_penalty": 1,
    "min_p": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "penalty_alpha": 0,
    "early_stopping": False,
}
"""Fields that would change what is drawn, each with the value at which it does not."""
ABOUT_OTHER_THINGS = {
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_length",
    "max_new_tokens",
    "max_time",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "return_dict_in_generate",
    "return_legacy_cache",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
    "trust_remote_code",
    "transformers_version",
    "_from_model_config",
    "chat_format",
    "compile_config",
    "disable_compile",
    "prefill_chunk_size",
}
"""Fields that do not change the distribution of the next token."""


def read_generation_config(fields: str | Mapping[str, Any]) -> Sampling:
    """Reads the fields of a generation_config.json that say how tokens are drawn.

    Args:
      fields: a JSON object, as a mapping or as its text ("" for none); `Config.generation` holds a folder's.

    Returns:
      Sampling. `do_sample: false` is greedy; where it is not given, temperature, top_k and top_p are followed.

    Raises:
      ValueError: names a field that would change what is drawn and is not supported (repetition_penalty, num_beams,
        min_p, …), one that is not known, or a value outside its range.
    """
    values = dict(parse_json(fields, "generation_config") if isinstance(fields, str) and fields else fields or {})
    for name, value in values.items():
        if name in READ or name in ABOUT_OTHER_THINGS or value is None:
            continue
        if name not in WITHOUT_EFFECT:
            raise ValueError(
                f"generation_config: expected fields that are supported, found {printed(name)} = {printed(value)}"
            )
        if value != WITHOUT_EFFECT[name]:
            raise ValueError(
                f"generation_config: expected {name} = {WITHOUT_EFFECT[name]!r}, as no decoder here follows it, "
                f"found {printed(value)}"
            )
    given = {name: values[name] for name in READ if values.get(name) is not None}
    heat = _number(given, "temperature", 1.0)
    k = _number(given, "top_k", 0)
    mass = _number(given, "top_p", 1.0)
    for name, valid, expected in (
        ("temperature", heat >= 0, "a number >= 0"),
        ("top_k", k >= 0 and k == int(k), "an integer >= 0"),
        ("top_p", 0 < mass <= 1, "a number in (0, 1]"),
    ):
        if not valid:
            raise ValueError(f"generation_config: expected {expected} as {name}, found {printed(given[name])}")
    if given.get("do_sample") is False:
        return Sampling(temperature=0.0)
    return Sampling(heat, int(k) or None, mass)


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"generation_config: expected a number as {name}, found {printed(value)}")
    return float(value)


@cached
def with_sampling(policy: Policy, sampling: Sampling) -> Policy:
    """The policy after temperature, then top-k, then top-p, in the order of transformers. params: the policy's own.

    Args:
      policy: any Policy.
      sampling: fixed values; `temperature`, `top_p` and `top_k` take values that are traced or one per prompt.

    Returns:
      A Policy. It is the policy itself where `sampling` changes nothing.

    Raises:
      ValueError: `policy` is no Policy, or a value outside its range.
    """
    check_policy_argument("policy", policy)
    heat, k, mass = sampling
    if heat != 1:
        policy = _with_value(temperature(policy), TemperatureParams, heat)
    if k is not None and (policy.vocab_size is None or k < policy.vocab_size):
        policy = top_k(policy, k)
    if mass < 1:
        policy = _with_value(top_p(policy), TopPParams, mass)
    return policy


def _with_value(policy: Policy, fields: type[TemperatureParams] | type[TopPParams], value: float) -> Policy:
    """The policy with the second of its two parameters fixed."""

    def init(params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> tuple[State, StepOutput]:
        return start_policy(policy, fields(params, value), rng, prompts, max_new_tokens)

    def step(params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
        return step_policy(policy, fields(params, value), rng, state, token)

    def check(params: Params, prompts: Prompts, max_new_tokens: int) -> None:
        if policy.check is not None:
            policy.check(fields(params, value), prompts, max_new_tokens)

    def verify(
        params: Params,
        rng: Array,
        state: State,
        tokens: Array,
        mask: Array,
        below: tuple[StepOutput, State] | None = None,
    ) -> tuple[StepOutput, State]:
        return verify_policy(policy, fields(params, value), rng, state, tokens, mask, below)

    def accept(params: Params, proposal: State, count: Array) -> State:
        return accept_policy(policy, fields(params, value), proposal, count)

    fixed = Policy(init, step, None, check, policy.vocab_size, policy.eos_ids)
    return fixed if policy.verify is None else fixed._replace(verify=verify, accept=accept)
