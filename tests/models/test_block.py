"""`models.Block`: every field reaches every pass, what it says is computed, and other values are refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from jaxalign.models import attention, rotary
from jaxalign.models.block import Block, Experts, Rope
from jaxalign.models.experts import ExpertMLP
from tests.conftest import padded, tiny_config

YARN = Rope(100.0, "yarn", 4.0, original_max_length=6, beta_fast=2.0, beta_slow=0.1, attention_factor=1.2)
LONG = Rope(50.0, "longrope", original_max_length=64, short_factors=(1.2, 2.0), long_factors=(3.0, 5.0))
DYNAMIC = Rope(50.0, "dynamic", 4.0, original_max_length=64)
# Each field of a Block, and positions of every kind, in one case at least.
CASES: dict[str, tuple[dict, dict]] = {
    "as in OPT": (
        {"norm": "layer", "gated": False, "activation": "relu", "learned_positions": True, "position_offset": 2},
        {"rope": None, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    ),
    "as in GPT-NeoX": (
        {"norm": "layer", "gated": False, "activation": "gelu", "residual": "parallel"},
        {"rope": Rope(100.0, share=0.5), "qkv_bias": True},
    ),
    "as in Falcon": ({"norm": "layer", "gated": False, "residual": "parallel_shared"}, {"num_kv_heads": 1}),
    "as in Gemma": (
        {
            "norm_offset": 1.0,
            "norm_place": "both",
            "activation": "gelu_tanh",
            "query_scale": 0.3,
            "attention_cap": 0.5,
            "logits_cap": 2.0,
            "embedding_scale": 4.0,
        },
        {"windows": (3, None), "ropes": (Rope(10.0), Rope(100.0, "linear", 2.0)), "qk_norm": True},
    ),
    "as in OLMo 2": ({"norm_place": "post", "qk_norm": "all_heads"}, {"qk_norm": True, "rope": YARN}),
    "as in Granite": ({"residual_scale": 0.4, "logits_scale": 0.2}, {"ropes": (Rope(), None)}),
    "experts": ({"experts": Experts(4, 2)}, {"rope": LONG}),
    "longrope beyond its original context": ({}, {"rope": dataclasses.replace(LONG, original_max_length=1)}),
    "experts, not normalized, in parallel": (
        {"experts": Experts(3, 1, normalized=False), "norm_place": "both", "residual": "parallel"},
        {"rope": DYNAMIC},
    ),
}
PROMPTS = [[4, 5, 6], [7, 3], [8, 9], [1, 2, 10, 4], [5, 5]]
TOKENS = jnp.array([[1, 2, 3], [5, 6, 7], [9, 10, 1], [3, 3, 3], [0, 1, 4]])


def made(block: dict, changes: dict, dtype: str = "float32"):
    """(lm, params): large weights, norms off their start, as a trained model has them."""
    lm = models.LanguageModel(tiny_config(block=Block(**block), **changes), dtype)
    draws = iter(jax.random.split(jax.random.key(1), 200))
    change = lambda x: x * 8 if x.ndim > 1 else x + 0.3 * jax.random.normal(next(draws), x.shape, x.dtype)  # noqa: E731
    return lm, jax.tree.map(change, lm.init(jax.random.key(0)))


def passes(lm, params, prompts):
    """What the three passes over a cache say of each prompt with its three tokens: hidden states [B,3,D] of each."""

    @jax.jit
    def run(params):
        start, cache = lm.prefill(params, prompts.tokens, prompts.mask, prompts.tokens.shape[1] + 4)
        steps = []
        kept = cache
        for t in range(3):
            hidden, kept = lm.step(params, kept, TOKENS[:, t])
            steps.append(hidden)
        mask = jnp.ones((len(TOKENS), 1, 3), bool)
        segments, entries = lm.segments(params, cache, TOKENS[:, None], mask)
        first, candidates = lm.candidates(params, cache, TOKENS[:, :2])
        committed = lm.commit(cache, candidates, jnp.zeros(len(TOKENS), jnp.int32))
        second, _ = lm.candidates(params, committed, TOKENS[:, 1:2])
        appended = lm.append(cache, entries, mask, jnp.zeros(len(TOKENS), jnp.int32))
        last = lm.segments(params, cache, TOKENS[:, None], mask, at=jnp.full((len(TOKENS), 1), 2))[0]
        after, _ = lm.candidates(params, appended, jnp.full((len(TOKENS), 1), 8))
        return start, jnp.stack(steps, axis=1), segments[:, 0], first[:, 0], second[:, 0], last[:, 0], after[:, 0]

    return run(params)


def whole(lm, params, side: str):
    """The same hidden states by one pass over whole rows [B,L]: of the prompt's end and of the four tokens after it."""
    rows = [[*prompt, *TOKENS[b].tolist(), 8] for b, prompt in enumerate(PROMPTS)]
    batch = padded(rows, side=side, extra=2)
    hidden = jax.jit(lm.hidden)(params, batch.tokens, mask=batch.mask)
    real = [np.asarray(hidden[b])[np.asarray(batch.mask[b])] for b in range(len(rows))]
    return np.stack([row[-5:] for row in real])


@pytest.mark.filterwarnings("ignore:capacity")
@pytest.mark.parametrize("name", CASES)
def test_cached_passes_equal_the_whole_pass_under_either_padding(name):
    lm, params = made(*CASES[name])
    expected = whole(lm, params, "left")
    np.testing.assert_allclose(whole(lm, params, "right"), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    start, steps, segments, first, second, last, after = passes(lm, params, padded(PROMPTS, extra=1))
    for found, wanted in (
        (start, expected[:, 0]),
        (steps, expected[:, 1:4]),
        (segments, expected[:, 1:4]),
        (first, expected[:, 1]),
        (second, expected[:, 2]),
        (last, expected[:, 3]),
        (after, expected[:, 4]),
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_every_field_is_in_a_case():
    fields = {field.name for field in dataclasses.fields(Block)}
    assert {field for block, _ in CASES.values() for field in block} == fields


FIELDS = {
    "norm_offset": 1.0,
    "residual": "parallel",
    "activation": "relu",
    "query_scale": 0.1,
    "attention_cap": 0.2,
    "logits_cap": 0.5,
    "embedding_scale": 0.5,
    "residual_scale": 0.5,
    "logits_scale": 0.5,
}


@functools.partial(jax.jit, static_argnums=0)
def logits(lm, params, prompts):
    """Of a whole pass and of a step."""
    hidden, cache = lm.prefill(params, prompts.tokens, prompts.mask, 8)
    return lm.logits(params, hidden), lm.logits(params, lm.step(params, cache, TOKENS[:, 0])[0])


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_changes_what_is_computed(field):
    """Fields without parameters of their own: the same parameters give other logits, in a whole pass and in a step."""
    lm, params = made({}, {"num_layers": 1})
    other = models.LanguageModel(dataclasses.replace(lm.config, block=Block(**{field: FIELDS[field]})))
    prompts = padded(PROMPTS)

    for found, plain in zip(logits(other, params, prompts), logits(lm, params, prompts), strict=True):
        assert float(jnp.abs(found - plain).max()) > 1e-2


def test_experts_are_the_sum_of_those_that_the_router_picks():
    """Against one expert after the other in numpy, weights normalized or not."""
    for normalized in (True, False):
        _, params = made({"experts": Experts(4, 2, normalized)}, {"num_layers": 1})
        weights = jax.tree.map(np.asarray, params["transformer"]["layer_0"]["experts"])
        x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
        module = ExpertMLP(Experts(4, 2, normalized), 16, 24, "silu", jnp.float32)
        found = module.apply({"params": weights}, jnp.asarray(x))
        score = np.exp(x @ weights["router"])
        share = score / score.sum(axis=1, keepdims=True)
        for row, probability, given in zip(x, share, np.asarray(found), strict=True):
            best = np.argsort(-probability)[:2]
            total = probability[best].sum() if normalized else 1.0
            expected = np.zeros(16)
            for e in best:
                gate, up = row @ weights["gate_up"][e][:, 0], row @ weights["gate_up"][e][:, 1]
                expected += probability[e] / total * ((gate / (1 + np.exp(-gate)) * up) @ weights["down"][e])
            np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)


def test_a_text_past_the_last_learned_position_is_nan():
    """It surfaces, in its own row alone; a shorter row beside it has its numbers."""
    lm, params = made({"learned_positions": True}, {"rope": None, "max_length": 4, "num_layers": 1})
    tokens, mask = jnp.ones((2, 5), jnp.int32), jnp.arange(5) < jnp.array([[5], [4]])
    hidden = lm.hidden(params, tokens, mask=mask)
    assert np.isnan(hidden[0]).all()
    np.testing.assert_allclose(hidden[1, :4], lm.hidden(params, tokens[:1, :4])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", [dataclasses.replace(r, original_max_length=3) for r in (LONG, DYNAMIC)])
def test_frequencies_that_read_the_length_read_each_rows_own(rope):
    """A row alone, and beside longer ones under either padding, gives the same; a longer text other frequencies."""
    lm, params = made({}, {"rope": rope, "num_layers": 1})
    rows = [[1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4]]
    read = jax.jit(lm.hidden)
    each = [read(params, jnp.array([row]))[0] for row in rows]
    for side in ("left", "right"):
        batch = padded(rows, side=side, extra=1)
        hidden = read(params, batch.tokens, mask=batch.mask)
        for b, alone in enumerate(each):
            np.testing.assert_allclose(hidden[b][np.asarray(batch.mask[b])], alone, rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(each[0] - each[1][:3]).max()) > 1e-3  # causal, but for the frequencies
    with pytest.warns(UserWarning, match="5 slots pass the 3 tokens beyond which rotary frequencies change"):
        lm.prefill(params, jnp.array([rows[0]]), jnp.ones((1, 3), bool), 5)
    lm.prefill(params, jnp.array([rows[0]]), jnp.ones((1, 3), bool), 3)


def test_a_length_is_needed_where_frequencies_read_it():
    with pytest.raises(ValueError, match="total: expected the length of each text"):
        rotary.inverse_frequencies(DYNAMIC, 4)


@pytest.mark.parametrize(
    ("match", "make"),
    [
        ("norm: expected one of", lambda: Block(norm="batch")),
        ("norm_place: expected one of", lambda: Block(norm_place="between")),
        ("norm_place: expected 'pre'", lambda: Block(norm_place="both", residual="parallel_shared")),
        ("residual: expected one of", lambda: Block(residual="none")),
        ("activation: expected one of", lambda: Block(activation="tanh")),
        ("qk_norm: expected one of", lambda: Block(qk_norm="heads")),
        ("norm_offset: expected 0, or 1", lambda: Block(norm_offset=0.5)),
        ("norm_offset: expected 0, or 1", lambda: Block(norm="layer", norm_offset=1.0)),
        ("position_offset: expected an integer", lambda: Block(position_offset=-1)),
        ("query_scale", lambda: Block(query_scale=0.0)),
        ("attention_cap", lambda: Block(attention_cap=float("inf"))),
        ("logits_cap", lambda: Block(logits_cap=-1.0)),
        ("embedding_scale", lambda: Block(embedding_scale=0)),
        ("residual_scale", lambda: Block(residual_scale=None)),
        ("logits_scale", lambda: Block(logits_scale="1")),
        (r"experts: expected a models\.Experts", lambda: Block(experts=4)),
        ("gated: expected True of experts", lambda: Block(experts=Experts(2, 1), gated=False)),
        ("per_token: expected at most 2", lambda: Experts(2, 3)),
        ("count: expected an integer", lambda: Experts(0, 1)),
        (r"block: expected a models\.Block", lambda: tiny_config(block="llama")),
        ("ropes: expected one per layer", lambda: tiny_config(ropes=(Rope(),))),
        (r"rope: expected a models\.Rope or None", lambda: tiny_config(ropes=(Rope(), 1e4))),
        ("share: expected at most 1", lambda: Rope(share=1.5)),
        ("head_dim: expected an even number", lambda: tiny_config(rope=Rope(share=0.25))),
        ("short_factors, long_factors", lambda: Rope(kind="longrope", short_factors=(1.0,))),
        ("short_factors: expected 4 frequencies, found 2", lambda: tiny_config(rope=LONG, head_dim=8)),
        ("attention_factor", lambda: Rope(attention_factor=0.0)),
    ],
)
def test_other_values_are_refused(match, make):
    with pytest.raises(ValueError, match=match):
        make()


def test_layers_that_are_alike_are_one_spelling():
    assert tiny_config(ropes=(Rope(5.0), Rope(5.0))) == tiny_config(rope=Rope(5.0))
    assert tiny_config(ropes=(None, None)) == tiny_config(rope=None)
    assert tiny_config(rope=Rope(7.0), ropes=(Rope(5.0), None)) == tiny_config(ropes=(Rope(5.0), None))


def test_the_length_that_a_segment_is_read_at_is_that_of_its_text():
    mask = jnp.array([[[True, True, False], [True, False, False]], [[True, True, True], [False, False, False]]])
    total = attention.pack_segments(mask, jnp.array([4, 2]), None).total
    assert total.shape == mask.shape
    np.testing.assert_array_equal(total[0], [[6, 6, 6], [5, 5, 5]])
    np.testing.assert_array_equal(total[1, 0], [5, 5, 5])
