"""At which token a reward model is read, what follows an end, and which label is the reward: on every path."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, rewards
from jaxalign.types import StepOutput
from tests.conftest import EOS, VOCAB, alone, padded, tiny_lm

PAD = 2
PADS = {"none": None, "eos": EOS[0], "own": PAD}
TAILS = {"no tail": (), "tail": (7, 8), "tail with a pad": (7, PAD), "tail of pads": (PAD,)}
PROMPTS = [[4, 5, 6], [7], [8, PAD], [9, EOS[0]], [5, 0, 5]]
RESPONSES = [list(r) for n in range(4) for r in itertools.product((EOS[0], PAD, 5), repeat=n)]


def model(pad: str, seed: int = 1):
    return tiny_lm(seed, "reward", num_layers=1, pad_id=PADS[pad])


def wanted(lm, params, prompt: list[int], response: list[int], tail=(), ends=EOS, label: int = 0) -> float:
    """The rule in plain Python: the whole text, with its tail, at its last id that is not the pad id."""
    text = [*prompt, *response, *(tail if response and response[-1] in ends else ())]
    places = [i for i, token in enumerate(text) if token != lm.config.pad_id]
    return float(alone(lm, params, text).head[max(places, default=0), label])


@functools.partial(jax.jit, static_argnums=0)
def whole(reward, params, tokens, mask, length):
    return reward(params, tokens, mask, length, jnp.arange(len(tokens)))


def texts(prompt: list[int], responses: list[list[int]], side: str):
    batch = padded([[*prompt, *response] for response in responses], side=side, extra=1)
    return batch.tokens, batch.mask, jnp.full(len(responses), len(prompt), jnp.int32)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("pad", PADS)
def test_a_text_is_read_at_its_last_token_that_is_not_the_pad(pad, tail):
    """Every response of up to three tokens among an EOS, a pad and another, after prompts that end in any of them."""
    lm, params = model(pad)
    reward = rewards.from_model(lm, tail=TAILS[tail])
    for prompt, side in zip(PROMPTS, ("left", "right", "left", "right", "left"), strict=True):
        expected = [wanted(lm, params, prompt, response, TAILS[tail]) for response in RESPONSES]
        found = whole(reward, params, *texts(prompt, RESPONSES, side))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("pad", PADS)
def test_a_kept_prefix_is_read_at_the_same_token(pad, tail):
    """Each response as one segment, and as two wherever no end stands before the second."""
    lm, params = model(pad)
    prefix = rewards.from_model(lm, tail=TAILS[tail]).prefix
    init, score, commit = jax.jit(prefix.init, static_argnums=2), jax.jit(prefix.score), jax.jit(prefix.commit)
    segments = padded(RESPONSES, side="right")
    tokens, mask = (jnp.broadcast_to(x, (len(PROMPTS), *x.shape)) for x in segments[:2])
    start = init(params, padded(PROMPTS), 8)
    found, proposal = score(params, start, tokens, mask)
    expected = [[wanted(lm, params, p, r, TAILS[tail]) for r in RESPONSES] for p in PROMPTS]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for number, first in enumerate(RESPONSES):
        state = commit(params, start, proposal, jnp.full(len(PROMPTS), number, jnp.int32))
        found = score(params, state, tokens, mask)[0]
        ended = bool(first) and first[-1] in EOS
        keep = [k for k, r in enumerate(RESPONSES) if not (ended and TAILS[tail]) or not r]
        if len(first) > 1:
            continue
        expected = [[wanted(lm, params, p, [*first, *(RESPONSES[k])], TAILS[tail]) for k in keep] for p in PROMPTS]
        np.testing.assert_allclose(found[:, jnp.asarray(keep)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("pad", PADS)
def test_args_scores_each_candidate_as_the_whole_text_is_scored(pad, tail):
    """Over the whole vocabulary and over candidates, at the prompt and after each of three tokens."""
    lm, params = model(pad)
    critic = critics.args(lm, tail=TAILS[tail])
    blank = StepOutput(*(jnp.zeros((len(PROMPTS), VOCAB)),) * 2, jnp.zeros(len(PROMPTS)))
    some = jnp.broadcast_to(jnp.array([5, EOS[0], PAD, 9], jnp.int32), (len(PROMPTS), 4))
    score = jax.jit(lambda state, candidates: critic.score(params, jax.random.key(0), state, blank, candidates))
    advance = jax.jit(lambda proposal, choice: critic.advance(params, proposal, choice))
    for wide in (True, False):
        state = jax.jit(critic.init, static_argnums=3)(params, jax.random.key(0), padded(PROMPTS), 4)
        before: list[int] = []
        for token in (5, PAD, 6):
            every, vocabulary = score(state, None)
            few, proposal = score(state, some)
            expected = [[wanted(lm, params, p, [*before, z], TAILS[tail]) for z in range(VOCAB)] for p in PROMPTS]
            np.testing.assert_allclose(every, expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(few, jnp.take_along_axis(every, some, axis=1), rtol=1e-4, atol=1e-5)
            if not wide and token not in (5, PAD):
                break
            choice = token if wide else {5: 0, PAD: 2}[token]
            state = advance(vocabulary if wide else proposal, jnp.full(len(PROMPTS), choice, jnp.int32))
            before.append(token)


@pytest.mark.parametrize("pad", PADS)
def test_training_reads_the_token_that_the_saved_model_is_read_at(pad):
    from jaxalign.training import objectives

    lm, params = model(pad)
    for side in ("left", "right"):
        tokens, mask, _ = texts(PROMPTS[0], RESPONSES, side)
        found = objectives.rewards_of(lm, params, {"tokens": tokens, "mask": mask})
        expected = [wanted(lm, params, PROMPTS[0], response) for response in RESPONSES]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
