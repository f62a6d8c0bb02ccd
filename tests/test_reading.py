"""At which token a reward model is read, what follows an end, and which label is the reward: on every path."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, models, policies, rewards
from jaxalign.training import objectives
from jaxalign.types import StepOutput
from tests.conftest import EOS, VOCAB, alone, padded, tiny_lm

PAD = 2
PADS = {"none": None, "eos": EOS[0], "own": PAD, "mean": PAD}
"""Name -> pad id; "mean" pools by the mean."""
TAILS = {"no tail": (), "tail": (7, 8), "tail with a pad": (7, PAD), "tail of pads": (PAD,)}
PROMPTS = [[4, 5, 6], [7], [8, PAD], [9, EOS[0]], [5, 0, 5]]
RESPONSES = [list(r) for n in range(4) for r in itertools.product((EOS[0], PAD, 5), repeat=n)]


def model(pad: str, seed: int = 1):
    lm, params = tiny_lm(seed, "reward", num_layers=1, pad_id=PADS[pad])
    return models.with_head(lm, models.Head("reward", pooling="mean" if pad == "mean" else "last")), params


def wanted(lm, params, prompt: list[int], response: list[int], tail=(), ends=EOS, label: int = 0) -> float:
    """The rule in plain Python: the whole text, with its tail, at its last id that is not the pad id, or the mean over
    all that are not."""
    text = [*prompt, *response, *(tail if response and response[-1] in ends else ())]
    places = [i for i, token in enumerate(text) if token != lm.config.pad_id]
    head = alone(lm, params, text).head[:, label]
    if lm.config.head.pooling == "mean":  # of a head without a bias or a bound
        return float(sum(head[i] for i in places) / max(len(places), 1))
    return float(head[max(places, default=0)])


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


@pytest.mark.parametrize("tail", [(7, 8), (7, EOS[0])])
def test_a_text_that_holds_its_tail_gets_no_other(tail):
    """Also where the tail ends in an id that ends a response; what only looks like it is not taken for one."""
    lm, params = model("none")
    reward = rewards.from_model(lm, tail=tail)
    written = [[5, EOS[0], *tail], [EOS[0], *tail]]
    others = [[5, *tail], [*tail], [EOS[0], 6, *tail], [5, EOS[0]]]  # none is a tail behind an end
    prompt = [4, EOS[0]]
    expected = [wanted(lm, params, prompt, r, ()) for r in written]
    expected += [wanted(lm, params, prompt, r, tail) for r in others]
    for side in ("left", "right"):
        found = whole(reward, params, *texts(prompt, [*written, *others], side))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    segments = padded([*written, *others], side="right")
    start = reward.prefix.init(params, padded([prompt]), 8)
    kept = jax.jit(reward.prefix.score)(params, start, segments.tokens[None], segments.mask[None])[0]
    np.testing.assert_allclose(kept[0], expected, rtol=1e-4, atol=1e-5)


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
        if len(first) > 1:
            continue
        state = commit(params, start, proposal, jnp.full(len(PROMPTS), number, jnp.int32))
        found = score(params, state, tokens, mask)[0]
        # Nothing follows an end where a tail does.
        keep = [k for k, r in enumerate(RESPONSES) if not (first == [EOS[0]] and TAILS[tail]) or not r]
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


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("pad", PADS)
def test_the_token_gradient_is_that_of_the_token_that_is_read(pad, tail):
    """Whole texts and a kept prefix: the reward, and the gradient at the response's first token, which is 0 where the
    model is read before it; beside the change of the reward along an embedding."""
    lm, params = model(pad)
    gain, prompt = rewards.token_gradient(lm, tail=TAILS[tail]), PROMPTS[3]
    responses = [r for r in RESPONSES if r]
    tokens, mask, length = texts(prompt, responses, "right")
    choices = jnp.broadcast_to(jnp.arange(VOCAB, dtype=jnp.int32), (len(responses), VOCAB))
    found = jax.jit(gain.with_reward)(params, tokens, mask, length, length, choices)
    expected = [wanted(lm, params, prompt, response, TAILS[tail]) for response in responses]
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
    start = gain.prefix.reward.init(params, padded([prompt] * len(responses)), 4)
    segments = padded(responses, side="right")
    kept = jax.jit(gain.prefix.score)(params, start, segments.tokens, segments.mask, choices)
    for mine, other in zip(kept[:2], found, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)
    ended = [r[-1] in EOS and any(t != lm.config.pad_id for t in TAILS[tail]) for r in responses]
    beyond = np.array([all(t == lm.config.pad_id for t in r) and not e for r, e in zip(responses, ended, strict=True)])
    moved = np.abs(np.asarray(found[1])).max(axis=1)
    assert (moved[beyond] == 0).all()
    assert (moved[~beyond] > 1e-4).all()

    texts_with_tail = [[*prompt, *r, *(TAILS[tail] if r[-1] in EOS else ())] for r in responses]
    text = padded(texts_with_tail, side="right")
    at = models.read_index(text.tokens, text.mask, lm.reward_pad_id)
    read = text.mask & (text.tokens != PAD)

    @jax.jit
    def along(size: jax.Array) -> jax.Array:
        """The rewards where the first token's embedding is moved towards that of token 9."""
        embeddings = lm.embed(params, text.tokens)
        embeddings = embeddings.at[:, len(prompt)].add(size * lm.embed(params, jnp.asarray(9)))
        hidden = lm.hidden(params, text.tokens, mask=text.mask, embeddings=embeddings)
        found = lm.head(params, hidden)[..., 0]
        if pad == "mean":
            return jnp.where(read, found, 0).sum(axis=1) / read.sum(axis=1)
        return found[jnp.arange(len(responses)), at]

    _, slope = jax.jvp(along, (jnp.zeros(()),), (jnp.ones(()),))
    np.testing.assert_allclose(found[1][:, 9], slope, rtol=1e-3, atol=1e-3 * np.abs(slope).max())


@pytest.mark.parametrize("pad", PADS)
def test_decoders_report_the_rewards_of_whole_texts(pad):
    """Blockwise by ARGS, with and without an end, and best of n: their scores are `from_model`'s."""
    lm, params = model(pad)
    base, base_params = tiny_lm(0)
    prompts, policy = padded(PROMPTS), policies.language_model(base)
    drawn = decoding.blockwise(
        policy,
        critics.args(lm, tail=(7,)),
        {"policy": base_params, "critic": params},
        jax.random.key(3),
        prompts,
        num_samples=3,
        block_size=2,
        max_new_tokens=5,
    )
    reward = rewards.from_model(lm, tail=(7,))
    given = {"policy": base_params, "reward": params}
    best = decoding.best_of_n(policy, reward, given, jax.random.key(4), prompts, num_samples=3, max_new_tokens=5)
    for found, score in ((drawn, drawn.info.score), (best, best.info.reward.max(axis=1))):
        assert bool(found.completions.finished.any())
        expected = whole(reward, params, *decoding.join(prompts, found.completions))
        np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad", PADS)
def test_training_reads_the_token_that_the_saved_model_is_read_at(pad):
    lm, params = model(pad)
    for side in ("left", "right"):
        tokens, mask, _ = texts(PROMPTS[0], RESPONSES, side)
        found = objectives.rewards_of(lm, params, {"tokens": tokens, "mask": mask})
        expected = [wanted(lm, params, PROMPTS[0], response) for response in RESPONSES]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Several labels -------------------------------------------------------------------------------------------------------


@functools.cache
def classifier():
    """A model with three labels, whose pad id is its EOS."""
    head = models.Head("reward", num_labels=3, labels=("good", "true", "long"), bound=2.0)
    lm = models.with_head(model("eos")[0], head)
    params = lm.init(jax.random.key(4))
    return lm, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)


def test_a_label_is_its_logit_by_name_and_by_number_and_weights_add_them():
    lm, params = classifier()
    responses = [[5, 6], [6, EOS[0]], [EOS[0]]]
    text = texts([4, 5], responses, "left")
    every = np.array([[wanted(lm, params, [4, 5], r, label=i) for i in range(3)] for r in responses])
    for number, name in enumerate(("good", "true", "long")):
        for label in (name, number):
            found = whole(rewards.from_model(lm, label=label), params, *text)
            np.testing.assert_allclose(found, every[:, number], rtol=1e-5)
    weights = jnp.array([0.5, -1.0, 2.0])
    weighted = rewards.from_model(lm, weighted=True)
    for given in (rewards.LabelParams(params, weights), {"model": params, "weights": weights}):
        np.testing.assert_allclose(whole(weighted, given, *text), every @ np.asarray(weights), rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda w: whole(weighted, rewards.LabelParams(params, w), *text).sum())(weights)
    np.testing.assert_allclose(gradient, every.sum(axis=0), rtol=1e-4)
    gains = rewards.token_gradient(lm, weighted=True)
    each = [rewards.token_gradient(lm, label=i) for i in range(3)]
    place, choices = jnp.full(3, 2), jnp.broadcast_to(jnp.arange(VOCAB), (3, VOCAB))
    whole_text = texts([4, 5], responses, "right")
    total = gains(rewards.LabelParams(params, weights), *whole_text, place, choices)
    parts = sum(w * gain(params, *whole_text, place, choices) for w, gain in zip(weights, each, strict=True))
    np.testing.assert_allclose(total, parts, rtol=1e-4, atol=1e-5)


def test_builders_with_labels_and_tails_are_cached_by_value():
    lm, _ = classifier()
    assert rewards.from_model(lm, label="true", tail=[7]) is rewards.from_model(lm, label=1, tail=(7,), ends=EOS)
    assert critics.args(lm, label="true") is critics.args(lm, label=1)
    assert rewards.from_model(lm, label=1) is not rewards.from_model(lm, label=2)


def test_what_cannot_be_read_is_named():
    lm, params = classifier()
    single, single_params = model("none")
    unended = models.LanguageModel(tiny_lm(1, "reward", num_layers=1, eos_ids=())[0].config)
    several = "label: expected one of 'good', 'true', 'long'"
    for build in (rewards.from_model, rewards.token_gradient, critics.args):
        for match, call in {
            several: lambda build=build: build(lm),
            several + " or its number, found 'bad'": lambda build=build: build(lm, label="bad"),
            several + " or its number, found 3": lambda build=build: build(lm, label=3),
            "'LABEL_0' or its number, found 'good'": lambda build=build: build(single, label="good"),
            r"tail: expected token ids in \[0, 11\)": lambda build=build: build(single, tail=(11,)),
            r"ends: expected token ids in \[0, 11\)": lambda build=build: build(single, tail=(1,), ends=(-1,)),
            "ends: expected an id that ends a response": lambda build=build: build(unended, tail=(1,)),
            "expected a model with a scalar head, found no head": lambda build=build: build(tiny_lm(0)[0]),
            "a scalar head, found a head of width 11": lambda build=build: build(tiny_lm(0, "q")[0]),
        }.items():
            with pytest.raises(ValueError, match=match):
                call()
    with pytest.raises(ValueError, match="label: expected None where the labels are weighted"):
        rewards.from_model(lm, label="good", weighted=True)
    weighted = rewards.from_model(lm, weighted=True)
    for weights, match in ((jnp.ones(2), "one for each of 3 labels"), (jnp.array([1, jnp.nan, 0]), "finite")):
        with pytest.raises(ValueError, match=f"weights: expected {match}"):
            weighted.check(rewards.LabelParams(params, weights), padded(PROMPTS), 4)
    with pytest.raises(ValueError, match="pooling: expected 'last' of a value head, found 'mean'"):
        models.Head("value", pooling="mean")
    with pytest.raises(ValueError, match="pooling: expected 'last' or 'mean', found 'max'"):
        models.Head("reward", pooling="max")
    with pytest.raises(ValueError, match="expected entries model, weights"):
        whole(weighted, params, *texts([4], [[5]], "left"))
    with pytest.raises(ValueError, match="reward: expected a model with a scalar head, found head_width = 3"):
        objectives.rewards_of(lm, params, {"tokens": jnp.ones((1, 2), jnp.int32), "mask": jnp.ones((1, 2), bool)})
    room = single.max_length - max(map(len, PROMPTS))
    rewards.from_model(single, tail=(7,)).check(single_params, padded(PROMPTS), room - 1)
    for part in (rewards.from_model(single, tail=(7,)), critics.args(single, tail=(7,))):
        with pytest.raises(ValueError, match="within the model's context"):
            part.check(single_params, padded(PROMPTS), room)
