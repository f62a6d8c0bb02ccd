"""A user's own method, MODULE:FUNCTION: what the function receives, and the checks of what its decoder gives.

A file my_method.py in the folder where the command runs, given as `--method my_method:longest@2,4`, keeps the longer of
`strength` draws:

    import jax.numpy as jnp
    from jaxalign import decoding

    def longest(given):
        length = lambda params, tokens, mask, prompt_length, index: mask.sum(axis=1).astype(jnp.float32)
        params = {"policy": given.params, "reward": None}
        def draw(rng, prompts):
            n = int(given.strength)
            return decoding.best_of_n(given.policy, length, params, rng, prompts, num_samples=n, **given.limits)
        return draw
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, decoding, rewards
from jaxalign._checks import check_prompt_fits
from jaxalign._programs import naming
from jaxalign.evaluation.engine import Drawn, Limits, Method
from jaxalign.evaluation.loading import OTHER, Model
from jaxalign.evaluation.settings import Setting
from jaxalign.evaluation.specs import Spec
from jaxalign.types import KL, Array, Completions, Decoded, KLKind, Params, Policy, Reward, TokenBatch


class MethodInputs(NamedTuple):
    """The models, rewards and limits that a method of your own receives."""

    policy: Policy
    """The base; a Policy for every decoder and combinator of the library."""
    params: Params
    """The parameters of the policy."""
    reward: Reward | None
    """The reward of --reward; None without one."""
    reward_params: Params
    """The parameters of the reward; None for a program."""
    tokenizer: Any
    """The tokenizer of the base."""
    limits: Limits
    """max_new_tokens, eos_ids and temperature: keyword arguments of every decoder."""
    strength: float | None
    """One of the numbers behind @; None without."""
    models: Mapping[str, Model] = {}
    """Model and parameters by the name of --with-model NAME=DIR."""

    def model(self, name: str) -> Model:
        """Gives a further model of the run.

        Args:
          name: of --with-model NAME=DIR.

        Returns:
          The model and its parameters, over the base's vocabulary.

        Raises:
          ValueError: no --with-model has this name.
        """
        if name not in self.models:
            raise ValueError(f"with_model: expected {name}=DIR, which the method reads, found {sorted(self.models)}")
        return self.models[name]


class OwnDraw(Protocol):
    """Decodes one batch. A prompt's response should depend on rng and its index alone at one batch size and width.

    Args:
      rng: one key for all batches; the library's decoders fold the prompts' index into it.
      prompts: [B,P] with index [B]; rows that pad a short batch are repeated.

    Returns:
      Decoded [B,T], T <= max_new_tokens; or Completions, whose KL is the sum of `kl` over the steps or, where that is
      None, log_prob − log_prob_ref of the response.
    """

    def __call__(self, rng: Array, prompts: TokenBatch, /) -> Decoded[Any] | Completions: ...


class OwnMethod(Protocol):
    """A method of your own. Called once per strength."""

    def __call__(self, given: MethodInputs, /) -> OwnDraw: ...


def sampled(given: MethodInputs, policy: Policy, params: Params) -> OwnDraw:
    """Makes a method of your own of a Policy: it is sampled.

    Args:
      given: what the method received; its limits are kept.
      policy: any Policy.
      params: its parameters.

    Returns:
      What `OwnMethod` gives.
    """

    def draw(rng: Array, prompts: TokenBatch, /) -> Completions:
        return decoding.sample(policy, params, rng, prompts, **given.limits)

    return draw


def build(setting: Setting, spec: Spec) -> list[Method]:
    """The methods of a user's function, one per strength.

    Raises:
      ValueError: there is no such function, it raises (the method, its file and line are named), or gives no decoder.
    """
    function = cast(OwnMethod, rewards.program(spec.target, name="method"))
    scorer = setting.scorer
    reward, reward_params = (None, None) if scorer is None else (scorer.reward, scorer.params)
    others = {name.removeprefix(OTHER): model for name, model in setting.loaded.items() if name.startswith(OTHER)}
    limit = setting.options.max_new_tokens
    check = functools.partial(_check_fits, setting.lm, limit)

    def at(strength: float | None) -> Method:
        given = MethodInputs(
            setting.proposal,
            setting.params,
            reward,
            reward_params,
            setting.prompts.tokenizer,
            setting.limits,
            strength,
            others,
        )
        without = " (strength is None: the method was given without @STRENGTH)" if strength is None else ""
        with naming(function, spec.target, f"draw(rng, prompts) -> Decoded{without}"):
            own = function(given)
        if not callable(own):
            raise ValueError(f"{spec.target}: expected draw(rng, prompts) -> Decoded, found a {type(own).__name__}")

        def draw(rng: Array, prompts: TokenBatch, /) -> Drawn:
            with naming(own, spec.target, f"Decoded or Completions{without}"):
                found = own(rng, prompts)
            return check_decoded(spec.target, found, prompts, limit, vocab_size=setting.lm.vocab_size)

        return Method(spec.name, strength, draw, check, ("function", spec.text, strength))

    return [at(strength) for strength in spec.strengths or (None,)]


def _check_fits(lm: Any, max_new_tokens: int, prompts: TokenBatch) -> None:
    check_prompt_fits(lm, prompts, max_new_tokens)


def check_decoded(
    name: str, found: Any, prompts: TokenBatch, max_new_tokens: int, *, vocab_size: int | None = None
) -> Drawn:
    """Checks what a user's decoder gives for a batch.

    Args:
      name: of the user's function.
      found: Decoded or Completions.
      prompts: [B,P], of the batch.
      max_new_tokens: the limit of T.
      vocab_size: of the base; None: tokens are not compared with it.

    Returns:
      Decoded, with a KL where Completions came without one.

    Raises:
      ValueError: another type, shape, or type of numbers, or numbers that no decoder gives: tokens outside the
        vocabulary, log-probabilities above 0, a KL below 0 of a kind that never is. The function and the field are
        named.
    """
    drawn = found.completions if isinstance(found, Decoded) else found
    if not isinstance(drawn, Completions):
        wanted = "Decoded or Completions"
        raise ValueError(f"{name}: expected {wanted}, found a {type(found).__name__} of {type(drawn).__name__}")
    batch = prompts.tokens.shape[0]
    shape = np.shape(drawn.tokens)
    if len(shape) != 2 or shape[0] != batch or not 1 <= shape[1] <= max_new_tokens:
        raise ValueError(f"{name}: expected tokens of shape ({batch}, 1 to {max_new_tokens}), found {shape}")
    for field in ("mask", "log_prob", "log_prob_ref", "log_norm", "kl"):
        value = getattr(drawn, field)
        if np.shape(value) != shape and not (field == "kl" and value is None):
            raise ValueError(f"{name}: expected {field} of tokens' shape {shape}, found {np.shape(value)}")
    for field in ("finished", "truncated"):
        if np.shape(getattr(drawn, field)) != (batch,):
            raise ValueError(f"{name}: expected {field} of shape ({batch},), found {np.shape(getattr(drawn, field))}")
    types = {"tokens": INTEGERS, "mask": BOOLEANS, "finished": BOOLEANS, "truncated": BOOLEANS}
    for field in ("tokens", "mask", "log_prob", "log_prob_ref", "log_norm", "kl", "finished", "truncated"):
        if getattr(drawn, field) is not None:
            _check_type(name, field, getattr(drawn, field), types.get(field, REALS))
    if isinstance(found, Decoded):
        if not isinstance(found.kl, KL) or np.shape(found.kl.value) != (batch,):
            shape = np.shape(found.kl.value) if isinstance(found.kl, KL) else type(found.kl).__name__
            raise ValueError(f"{name}: expected kl as a KL of shape ({batch},), found {shape}")
        _check_type(name, "kl", found.kl.value, REALS)
        whole = found
    else:
        steps = drawn.log_prob - drawn.log_prob_ref if drawn.kl is None else drawn.kl
        whole = Decoded(drawn, KL(steps.sum(axis=1), "log_ratio" if drawn.kl is None else "exact"), None)
    _check_numbers(name, _hosts.host_value(whole.completions), prompts, vocab_size)
    _check_kl(name, whole.kl, prompts)
    _check_info(name, whole.info, batch)
    return whole


Numbers = np.ndarray[Any, np.dtype[Any]]
Kinds = tuple[tuple[Any, ...], str]
INTEGERS: Kinds = ((jnp.integer,), "integers")
BOOLEANS: Kinds = ((jnp.bool_,), "booleans")
REALS: Kinds = ((jnp.integer, jnp.floating), "real numbers")

SLACK = 1e-2
"""How far numbers of few bits may lie beyond a limit that they have in exact arithmetic."""


def _check_type(name: str, field: str, value: Any, kinds: Kinds) -> None:
    if not isinstance(value, np.ndarray | jax.Array) or np.ma.isMA(value):
        raise ValueError(f"{name}: expected an array in {field}, found {type(value).__name__}")
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds[0]):
        raise ValueError(f"{name}: expected {kinds[1]} in {field}, found {value.dtype}")


def _check_numbers(name: str, drawn: Completions, prompts: TokenBatch, vocab_size: int | None) -> None:
    """The entries that count."""
    real, tokens = np.asarray(drawn.mask), np.asarray(drawn.tokens)
    if vocab_size is not None:
        bad = real & ((tokens < 0) | (tokens >= vocab_size))
        _refuse(name, f"tokens from 0 to {vocab_size - 1}", tokens, bad, prompts)
    for field in ("log_prob", "log_prob_ref"):
        values = np.asarray(getattr(drawn, field))
        _refuse(name, f"{field} <= 0", values, real & (values > SLACK), prompts)


def _check_kl(name: str, kl: KL, prompts: TokenBatch) -> None:
    known = get_args(KLKind)
    if kl.kind not in known:
        raise ValueError(f"{name}: expected a KL of kind {', '.join(known)}, found {kl.kind!r}")
    if kl.kind in ("exact", "bound", "surprisal"):  # others are random and may lie below what they are of
        values = _hosts.host_value(kl.value)
        _refuse(name, f"a KL of kind {kl.kind} >= 0", values, values < -SLACK, prompts)


def _check_info(name: str, info: Any, batch: int) -> None:
    """What `records.on_host` reads of it."""
    fields = info._asdict() if hasattr(info, "_asdict") else {} if info is None else info
    if not isinstance(fields, Mapping):
        raise ValueError(f"{name}: expected info as a NamedTuple, a dict or None, found {type(info).__name__}")
    for field, value in fields.items():
        if not isinstance(value, np.ndarray | jax.Array) or np.shape(value) != (batch,):
            continue
        real = any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.bool_, *REALS[0]))
        if not real or not np.isfinite(host := np.asarray(_hosts.host_value(value), np.float64)).all():
            shown = " ".join(str(host).split())[:80] if real else value.dtype
            raise ValueError(f"{name}: expected finite real numbers in info {field}, found {shown}")


def _refuse(name: str, expected: str, values: Numbers, bad: Numbers, prompts: TokenBatch) -> None:
    """ValueError where there are bad values [B] or [B,T], with the first and the prompts that they are of."""
    if not bad.any():
        return
    rows: Numbers = bad if bad.ndim == 1 else np.asarray(bad.any(axis=1))
    index = np.arange(len(rows)) if prompts.index is None else _hosts.host_value(prompts.index)
    shown = sorted({int(i) for i in index[rows]})
    first = values[bad][0].item()
    found = first if isinstance(first, int) else f"{first:g}"
    raise ValueError(f"{name}: expected {expected}, found {found} for prompts {shown}")
