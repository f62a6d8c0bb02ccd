"""What stands in another's place (a function, a model, a class, parameters) is named at once, with what to call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import Critic, Policy, critics, decoding, models, policies, prompt_batch, rewards, testing, text
from jaxalign.data.tokenizers import word_level
from jaxalign.types import CheckedReward

CONFIG = models.Config(
    vocab_size=8,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=32,
    max_length=32,
    eos_ids=(1,),
)
LM = models.LanguageModel(CONFIG)
REWARD_LM = models.with_head(LM, models.Head("reward"))
PARAMS, REWARD_PARAMS = LM.init(jax.random.key(0)), REWARD_LM.init(jax.random.key(1))
BASE, ARGS, REWARD = policies.language_model(LM), critics.args(REWARD_LM), rewards.from_model(REWARD_LM)
TILT = policies.tilt(BASE, ARGS, top_k=4)
PROMPTS, KEY, LIMITS = prompt_batch([[2, 3], [3]]), jax.random.key(2), {"max_new_tokens": 2}
WORDS = word_level(["a", "b", "c", "d"])


def of_texts(prompts, responses):
    return [0.0 for _ in responses]


def of_arrays(tokens, mask, prompt_length, index):
    return np.zeros(len(tokens))


NO_REWARD = {
    "text": (of_texts, r"found the function of_texts\(prompts, responses\); rewards.from_text\(tokenizer, f\)"),
    "numpy": (of_arrays, r"found the function of_arrays\(tokens, .*\); rewards.from_numpy"),
    "model": (REWARD_LM, "found LanguageModel; rewards.from_model"),
    "policy": (BASE, "found Policy"),
    "critic": (ARGS, "found Critic"),
    "class": (CheckedReward, "found the class CheckedReward"),
    "folder": ("runs/reward", "found 'runs/reward'"),
    "params": (REWARD_PARAMS, "found a dict, as parameters are"),
    "none": (None, "found NoneType"),
}
TAKE_REWARDS = {
    "weighted_sum": lambda reward: rewards.weighted_sum([REWARD, reward]),
    "pool": lambda reward: rewards.pool([REWARD, reward], lambda params, values, index: values.min(axis=1)),
    "map_reward": lambda reward: rewards.map_reward(reward, lambda params, r, index: r),
    "calibrated": rewards.calibrated,
    "shaped": rewards.shaped,
    "transfer_q": lambda reward: critics.transfer_q(BASE, reward, num_samples=1),
    "baseline_reward": lambda reward: critics.transfer_q(BASE, REWARD, num_samples=1, baseline_reward=reward or 1),
    "check_reward": lambda reward: testing.check_reward(reward, REWARD_PARAMS, PROMPTS, vocab_size=8),
}


@pytest.mark.parametrize("kind", NO_REWARD)
@pytest.mark.parametrize("takes", TAKE_REWARDS)
def test_what_is_no_reward_is_refused_when_it_is_given(takes, kind):
    given, match = NO_REWARD[kind]
    if takes == "baseline_reward" and given is None:
        match = "found int"
    with pytest.raises(ValueError, match=f"reward.*: expected a Reward.*{match}"):
        TAKE_REWARDS[takes](given)


def test_rewards_of_every_form_pass():
    assert rewards.weighted_sum([REWARD, jax.jit(REWARD), rewards.from_text(WORDS, of_texts)])
    assert rewards.shaped(lambda params, tokens, mask, prompt_length, index, scale=1.0: mask.sum(axis=1) * scale)
    assert rewards.shaped(lambda *arguments: arguments[1].sum(axis=1))


NO_POLICY = {
    "model": (LM, r"found a LanguageModel \(policies.language_model makes one of a model\)"),
    "critic": (ARGS, "found a Critic"),
    "reward": (REWARD, "found a CheckedReward"),
    "function": (of_texts, "found the function of_texts"),
    "class": (Policy, "found the class Policy"),
    "folder": ("runs/base", "found 'runs/base'"),
    "params": (PARAMS, "found a dict, as parameters are"),
    "none": (None, "found None"),
}
BOTH = {"policy": PARAMS, "reward": REWARD_PARAMS}
TAKE_POLICIES = {
    "sample": lambda policy: decoding.sample(policy, PARAMS, KEY, PROMPTS, **LIMITS),
    "log_prob": lambda policy: decoding.log_prob(policy, PARAMS, KEY, PROMPTS, PROMPTS.tokens, PROMPTS.mask),
    "best_of_n": lambda policy: decoding.best_of_n(policy, REWARD, BOTH, KEY, PROMPTS, num_samples=2, **LIMITS),
    "blockwise": lambda policy: decoding.blockwise(
        policy, ARGS, {"policy": PARAMS, "critic": REWARD_PARAMS}, KEY, PROMPTS, num_samples=2, block_size=2, **LIMITS
    ),
    "text.log_prob": lambda policy: text.log_prob(policy, PARAMS, WORDS, ["a"], ["b"]),
    "tilt": lambda policy: policies.tilt(policy, ARGS),
    "with_reference": lambda policy: policies.with_reference(policy, BASE),
}


@pytest.mark.parametrize("kind", NO_POLICY)
@pytest.mark.parametrize("takes", TAKE_POLICIES)
def test_what_is_no_policy_is_named(takes, kind):
    given, match = NO_POLICY[kind]
    with pytest.raises(ValueError, match=f"policy: expected a Policy, {match}"):
        TAKE_POLICIES[takes](given)


OTHERS = {
    "critic of a model": (lambda: policies.tilt(BASE, LM), "expected a Critic, found a LanguageModel .critics.args"),
    "critic of a reward": (lambda: policies.tilt(BASE, REWARD), "found a CheckedReward .critics.args makes one"),
    "critic class": (lambda: policies.tilt(BASE, Critic), "critic: expected a Critic, found the class Critic"),
    "one reward": (lambda: rewards.weighted_sum(REWARD), "rewards: expected a sequence of Rewards, found a CheckedRew"),
    "one folder": (lambda: rewards.weighted_sum("runs/a"), "rewards: expected a sequence of Rewards, found 'runs/a'"),
    "no map": (lambda: rewards.map_reward(REWARD, "x"), r"f: expected a function \(map_params, .*found 'x'"),
    "map of one": (lambda: rewards.map_reward(REWARD, lambda r: r), r"f: expected a function .*<lambda>\(r\)"),
    "swapped map": (lambda: rewards.map_reward(lambda p, r, i: r, REWARD), "reward: expected a Reward"),
    "blockwise": (
        lambda: decoding.blockwise(BASE, REWARD, {}, KEY, PROMPTS, num_samples=2, block_size=2, **LIMITS),
        "critic: expected a Critic, found a CheckedReward",
    ),
    "ggro": (
        lambda: decoding.ggro(BASE, None, REWARD, BOTH, KEY, PROMPTS, num_samples=2, top_k=2, **LIMITS),
        "gradient: expected a TokenGradient, found a CheckedReward .rewards.token_gradient",
    ),
    "generate": (
        lambda: text.generate(REWARD, PARAMS, WORDS, ["a"]),
        "model: expected a language model or a Policy, .*found a CheckedReward",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_parts_in_anothers_place(case):
    call, match = OTHERS[case]
    with pytest.raises(ValueError, match=match):
        call()


def tilted(params):
    return decoding.sample(TILT, params, KEY, PROMPTS, **LIMITS)


def sampled(params):
    return decoding.sample(BASE, params, KEY, PROMPTS, **LIMITS)


def scored(params):
    return text.score(REWARD, params, WORDS, ["a"], ["b"])


LACKS = "expected an array of shape .* found none"
PARAMS_OF = {
    "swapped": (tilted, policies.TiltParams(REWARD_PARAMS, PARAMS, 1.0), rf"params\['policy'\].*lm_head'\]: {LACKS}"),
    "a base for a critic": (tilted, policies.TiltParams(PARAMS, PARAMS, 1.0), r"params\['critic'\]: .*entry 'head'"),
    "a word for beta": (tilted, policies.TiltParams(PARAMS, REWARD_PARAMS, "x"), "params.beta: expected arrays"),
    "a policy": (sampled, BASE, "params.init: expected arrays and numbers, found a function"),
    "a model": (sampled, LM, "params: expected the parameters of a model, .*found a LanguageModel"),
    "none": (sampled, None, "params: expected the parameters of a model, .*found None"),
    "nothing": (sampled, {}, r"params: expected the parameters of a model, .*found the entries \[\]"),
    "an array": (sampled, jnp.ones(3), r"params: expected the parameters of a model, .*found an array of shape \(3,\)"),
    "a classifier's": (sampled, REWARD_PARAMS, rf"params\['transformer'\]\['lm_head'\]: {LACKS}"),
    "a base's": (scored, PARAMS, "params: expected the parameters of a model, .*'head'"),
    "a policy for a reward": (scored, BASE, "params.init: expected arrays"),
    "applied": (lambda params: LM.apply(params, PROMPTS.tokens), REWARD_PARAMS, rf"'lm_head'\]: {LACKS}"),
    "applied to none": (
        lambda params: LM.apply(params, PROMPTS.tokens),
        None,
        "params: expected the parameters",
    ),
    "no head": (lambda params: REWARD_LM.head(params, jnp.ones(16)), PARAMS, "params: expected .*entry 'head'"),
}


@pytest.mark.parametrize("case", PARAMS_OF)
def test_parameters_of_another_part_are_named_where_they_stand(case):
    call, params, match = PARAMS_OF[case]
    with pytest.raises(ValueError, match=match):
        call(params)


def test_parameters_of_another_size_are_named():
    other = models.LanguageModel(models.Config(**{**vars(CONFIG), "vocab_size": 9})).init(KEY)
    with pytest.raises(ValueError, match=r"params\['transformer'\]\['embedding'\]: .*\(8, 16\).*found shape \(9, 16\)"):
        sampled(other)
