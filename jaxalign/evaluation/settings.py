"""What the methods of a run share."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, decoding, models, policies, rewards
from jaxalign.evaluation.engine import Limits, Texts, Untempered
from jaxalign.evaluation.loading import Model, Scorer
from jaxalign.evaluation.options import ResponseOptions
from jaxalign.prompts import prompt_batch
from jaxalign.types import Params, Policy


class Setting(NamedTuple):
    """The options, models, rewards and prompts that the methods of a run share."""

    options: ResponseOptions
    """The options of the run."""
    loaded: dict[str, Model]
    """Models by role: "model", the base, the folders of methods (`Spec.folders`) and of rewards."""
    scorer: Scorer | None
    """The reward that methods may use, the proxy; None without one."""
    prompts: Texts
    """All prompts, and the tokenizer."""
    reader: rewards.Reader
    """The base's tokens, and the prompts as they were given."""

    @property
    def lm(self) -> models.LanguageModel:
        """The base's model."""
        return self.loaded["model"][0]

    @property
    def params(self) -> Params:
        """The base's parameters."""
        return self.loaded["model"][1]

    @property
    def base(self) -> Policy:
        """The base as a Policy."""
        return policies.language_model(self.lm)

    @property
    def sampling(self) -> policies.Sampling:
        """How responses are drawn beside --temperature: as generation_config.json says, or from the whole
        distribution."""
        given = self.lm.config.generation if self.options.generation_config else ""
        return _sampling_of(given)

    @property
    def proposal(self) -> Policy:
        """The base as responses are drawn from it, which decoders with several draws take."""
        return policies.with_sampling(self.base, self.sampling)

    @property
    def draft(self) -> tuple[Policy, Params] | Literal["below"] | None:
        """What proposes tokens, and its parameters; "below": the base of a tilt; None: nothing."""
        if self.options.draft in ("", "below"):
            return "below" if self.options.draft else None
        lm, params = self.loaded["draft"]
        return policies.with_sampling(policies.language_model(lm), self.sampling), params

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.options.temperature == 0 or self.sampling.temperature == 0

    @property
    def reward_lm(self) -> models.LanguageModel | None:
        """The proxy's model, for methods that look inside it; None where it is a program or a sum."""
        return self.loaded["reward"][0] if "reward" in self.loaded else None

    @property
    def reward(self) -> Scorer:
        """The proxy. ValueError where there is none."""
        if self.scorer is None:
            raise ValueError("reward: expected a reward, which the method maximises, found none")
        return self.scorer

    @property
    def limits(self) -> Limits:
        """Arguments of every decoder."""
        given = self.options.temperature
        # The Python number 1 leaves the transform out; all other values share one trace.
        temperature = 1.0 if given == 1 else jnp.asarray(given, jnp.float32)
        return {**self.untempered, "temperature": temperature}

    @property
    def untempered(self) -> Untempered:
        """Arguments of decoders without a temperature."""
        return {"max_new_tokens": self.options.max_new_tokens, "eos_ids": self.lm.config.eos_ids}

    def candidates(self, *, whole: bool) -> int | None:
        """Candidates per token, None for the whole vocabulary; whole: of critics that give all scores at once."""
        if self.options.top_k is None:
            return None if whole else min(10, self.lm.vocab_size)
        return self.options.top_k or None


@functools.cache
def _sampling_of(generation: str) -> policies.Sampling:
    """`read_generation_config` of a text, which every method asks for, once."""
    return policies.read_generation_config(generation)


def default_threshold(setting: Setting) -> float:
    """The default reward that a segment of cards has to reach: the 0.9 quantile of the proxy over 32 base responses,
    one for each of up to 32 prompts."""
    scorer = setting.reward
    ids = setting.prompts.ids[:: max(len(setting.prompts.ids) // 32, 1)][:32]
    found = decoding.best_of_n(
        setting.proposal,
        scorer.reward,
        {"policy": setting.params, "reward": scorer.params},
        jax.random.key(setting.options.seed),
        prompt_batch(ids),
        num_samples=-(-32 // len(ids)),
        **setting.limits,
    )
    return float(np.quantile(_hosts.host_value(found.info.reward)[: len(ids)], 0.9))
