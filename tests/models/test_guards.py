"""What enters a model is checked: ranks, types, widths and rows always, values where they are concrete."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models, types
from jaxalign.models import sharding
from tests.conftest import PROMPTS, VOCAB, padded, tiny_config, tiny_lm

TOKENS = jnp.array([[1, 2, 3], [4, 5, 6]])
ALL = jnp.ones((2, 3), bool)


@pytest.fixture(scope="module")
def prefilled():
    """(lm, params, cache of two rows of three tokens, entries of two candidates, entries of two segments)."""
    lm, params = tiny_lm(0, "value", num_layers=1)
    _, cache = lm.prefill(params, TOKENS, ALL, 8)
    _, candidates = lm.candidates(params, cache, jnp.array([[1, 2], [3, 4]]))
    _, segments = lm.segments(params, cache, jnp.ones((2, 2, 3), jnp.int32), jnp.ones((2, 2, 3), bool))
    return lm, params, cache, candidates, segments


@pytest.mark.parametrize(
    ("match", "tokens", "options"),
    [
        (r"tokens: expected integers \[B,L\], found int32 of shape \(3,\)", TOKENS[0], {}),
        (r"tokens: expected integers \[B,L\], found float32", TOKENS.astype(float), {}),
        (r"tokens: expected integers \[B,L\], found bool", ALL, {"mask": TOKENS}),
        (r"tokens: expected ids in \[0, 11\), found ids from 1 to 11", TOKENS.at[1, 2].set(VOCAB), {}),
        (r"tokens: expected ids in \[0, 11\), found ids from -1 to 6", TOKENS.at[0, 0].set(-1), {}),
        (r"mask: expected the shape \[B,L\] of the tokens, \(2, 3\), found \(3,\)", TOKENS, {"mask": ALL[0]}),
        (r"mask: expected booleans .* found float32", TOKENS, {"mask": ALL.astype(float)}),
        (r"at: expected columns in \[0, 3\), or -1 for none, found 0 to 3", TOKENS, {"at": jnp.array([[0], [3]])}),
        (r"at: expected columns .* found -2 to 1", TOKENS, {"at": jnp.array([[-2], [1]])}),
        (r"at: expected integers \[B,R\], found int32 of shape \(2,\)", TOKENS, {"at": jnp.array([0, 1])}),
        (r"at: expected integers \[B,R\], found float32", TOKENS, {"at": jnp.ones((2, 1))}),
        (r"at: expected the rows \(2,\) of the tokens, found shape \(1, 1\)", TOKENS, {"at": jnp.array([[0]])}),
        (r"embeddings: expected numbers \[\.\.\., 16\], found", TOKENS, {"embeddings": jnp.ones((2, 3, 15))}),
        (r"embeddings: expected numbers .* found int32", TOKENS, {"embeddings": jnp.ones((2, 3, 16), jnp.int32)}),
        (r"embeddings: expected one for each token \[B,L\]", TOKENS, {"embeddings": jnp.ones((2, 4, 16))}),
    ],
)
def test_hidden(match, tokens, options, prefilled):
    lm, params, *_ = prefilled
    with pytest.raises(ValueError, match=match):
        lm.hidden(params, tokens, **options)


def test_values_are_not_looked_at_under_jit_but_ranks_are(prefilled):
    lm, params, *_ = prefilled
    assert jnp.isnan(jax.jit(lm.hidden)(params, TOKENS.at[1, 2].set(VOCAB))[1, 2]).all()
    with pytest.raises(ValueError, match=r"tokens: expected integers \[B,L\]"):
        jax.jit(lm.hidden)(params, TOKENS[0])


def test_embeddings_logits_and_heads(prefilled):
    lm, params, *_ = prefilled
    with pytest.raises(ValueError, match="tokens: expected integers, found float32"):
        lm.embed(params, jnp.ones(3))
    for function in (lm.logits, lm.head):
        with pytest.raises(
            ValueError, match=r"hidden: expected numbers \[\.\.\., 16\], found float32 of shape \(2, 8\)"
        ):
            function(params, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="head: expected a model with a head"):
        tiny_lm(0)[0].head(params, jnp.ones((2, 16)))


def test_prefill_and_step(prefilled):
    lm, params, cache, *_ = prefilled
    with pytest.raises(ValueError, match="capacity"):
        lm.prefill(params, TOKENS, ALL, 2)
    with pytest.raises(ValueError, match=r"tokens: expected integers \[B,P\], found int32 of shape \(3,\)"):
        lm.prefill(params, TOKENS[0], ALL[0], 8)
    with pytest.raises(ValueError, match=r"tokens: expected integers \[B,P\], found bool"):
        lm.prefill(params, ALL, TOKENS, 8)
    for token, match in (
        (jnp.array([[1], [2]]), r"token: expected integers \[B\]"),
        (jnp.array([1.0, 2.0]), r"token: expected integers \[B\], found float32"),
        (jnp.array([1, 2, 3]), "token: expected the cache's 2 rows"),
    ):
        with pytest.raises(ValueError, match=match):
            lm.step(params, cache, token)


def test_candidates_and_commit(prefilled):
    lm, params, cache, entries, _ = prefilled
    with pytest.raises(ValueError, match=r"tokens: expected integers \[B,K\]"):
        lm.candidates(params, cache, jnp.array([1, 2]))
    with pytest.raises(ValueError, match="tokens: expected the cache's 2 rows"):
        lm.candidates(params, cache, jnp.ones((3, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"choice: expected integers \[B\]"):
        lm.commit(cache, entries, jnp.array([[0], [1]]))
    with pytest.raises(ValueError, match="choice: expected the cache's 2 rows"):
        lm.commit(cache, entries, jnp.array([0]))


def test_segments_and_append(prefilled):
    lm, params, cache, _, entries = prefilled
    tokens, mask = jnp.ones((2, 2, 3), jnp.int32), jnp.ones((2, 2, 3), bool)
    for match, arguments, options in (
        (r"tokens: expected integers \[B,M,S\]", (tokens[0], mask[0]), {}),
        ("tokens: expected ids", (tokens + 10, mask), {}),
        ("mask: expected the shape", (tokens, mask[:, :1]), {}),
        ("expected the cache's 2 rows", (tokens[:1], mask[:1]), {}),
        (r"at: expected integers \[B,M\]", (tokens, mask), {"at": jnp.zeros(2, jnp.int32)}),
        (r"at: expected the rows \(2, 2\)", (tokens, mask), {"at": jnp.zeros((2, 3), jnp.int32)}),
        (r"at: expected columns in \[0, 3\)", (tokens, mask), {"at": jnp.full((2, 2), 3)}),
        ("packed: expected at least 12 real tokens, found 11", (tokens, mask), {"packed": 11}),
        ("embeddings: expected numbers", (tokens, mask), {"embeddings": jnp.ones((2, 2, 3, 4))}),
        ("embeddings: expected one for each token", (tokens, mask), {"embeddings": jnp.ones((2, 2, 4, 16))}),
    ):
        with pytest.raises(ValueError, match=match):
            lm.segments(params, cache, *arguments, **options)
    with pytest.raises(ValueError, match="mask: expected the shape"):
        lm.append(cache, entries, mask[:, :1], jnp.array([0, 0]))
    with pytest.raises(ValueError, match="choice: expected the cache's 2 rows"):
        lm.append(cache, entries, mask, jnp.array([0, 0, 0]))


@pytest.mark.parametrize("dtype", ["float32", jnp.float32, np.float32, np.dtype("float32")])
def test_a_dtype_in_any_form_is_one_model(dtype, tmp_path):
    lm = models.LanguageModel(tiny_config(), dtype)
    assert lm == models.LanguageModel(tiny_config())
    assert hash(lm) == hash(models.LanguageModel(tiny_config()))
    assert lm.dtype == "float32"
    models.save(tmp_path / "model", *tiny_lm(0))
    assert models.load(tmp_path / "model", dtype=dtype)[0] == lm


def test_other_dtypes_configs_and_meshes_are_refused(tmp_path):
    for dtype in ("int8", jnp.int32, "nonsense", None, 3):
        with pytest.raises(ValueError, match="dtype: expected one of"):
            models.LanguageModel(tiny_config(), dtype)
        with pytest.raises(ValueError, match="dtype: expected one of"):
            models.load(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match=r"config: expected a models\.Config, found dict"):
        models.LanguageModel({"vocab_size": 3})
    models.save(tmp_path / "model", *tiny_lm(0))
    with pytest.raises(ValueError, match=r"mesh: expected a jax\.sharding\.Mesh, found str"):
        models.load(tmp_path / "model", mesh="data=1")
    with pytest.raises(ValueError, match="mesh: expected Auto axes"):
        models.load(
            tmp_path / "model", mesh=jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
        )
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))
    with pytest.raises(ValueError, match=r"rules: expected logical axes .* found \['haeds'\]"):
        sharding.shard(tiny_lm(0)[1], mesh, {"haeds": "data"})


def test_folders_that_hold_something_else_are_refused(tmp_path):
    for text in ("{", "[1]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: expected"):
            models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ["llama"]}))
    with pytest.raises(ValueError, match="model_type: expected one of"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match="tokenizer: expected tokenizer files"):
        models.tokenizer(tmp_path)
    with pytest.raises(ValueError, match="path: expected a folder"):
        models.tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="values: expected the dict"):
        models.config_from_hf("config.json")
    with pytest.raises(ValueError, match="family: expected one of"):
        models.save(tmp_path / "new", models.LanguageModel(tiny_config(family="gpt9")), tiny_lm(0)[1])


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("vocab_size", {"vocab_size": 11.0}),
        ("hidden_size", {"hidden_size": True}),
        ("num_layers", {"num_layers": "2"}),
        ("norm_eps", {"norm_eps": 0.0}),
        ("rope", {"rope": 10000.0}),
        ("head: expected a models", {"head": "value"}),
        ("windows: expected a tuple", {"windows": 4}),
        ("eos_ids", {"eos_ids": (-1,)}),
        ("eos_ids", {"eos_ids": (0.5,)}),
        ("eos_ids: expected a tuple", {"eos_ids": "0"}),
    ],
)
def test_configs(match, changes):
    with pytest.raises(ValueError, match=match):
        tiny_config(**changes)


def test_heads_and_positions():
    for match, make in {
        "hidden_size": lambda: models.Head("value", hidden_size=0),
        "num_labels: expected 1 for a value head": lambda: models.Head("value", num_labels=2),
        "bound: expected None of a q head": lambda: models.Head("q", bound=1.0),
        "follower": lambda: models.Head("value", follower="soft"),
        "rope kind": lambda: models.Rope(kind="proportional"),
        "theta": lambda: models.Rope(theta=0.0),
        "factor": lambda: models.Rope(kind="linear", factor=float("inf")),
        "beta": lambda: models.Follower("soft", "1", 1.0),
    }.items():
        with pytest.raises(ValueError, match=match):
            make()


def test_lists_and_a_single_id_are_taken_as_tuples():
    config = tiny_config(eos_ids=[0], windows=[3, None])
    assert config == tiny_config(eos_ids=0, windows=(3, None))
    assert hash(config) == hash(tiny_config(eos_ids=0, windows=(3, None)))
    assert models.LanguageModel(config).eos_ids == (0,)
    assert hash(dataclasses.replace(config, windows=[None, None])) == hash(tiny_config())


def test_the_model_keeps_the_protocols_at_run_time():
    """Each public member of the three Protocols is there; their types are for mypy."""
    for protocol in (types.LanguageModel, types.HeadModel, types.CandidateModel):
        names = [name for name in vars(protocol) if not name.startswith("_")]
        assert names
        for name in names:
            assert hasattr(models.LanguageModel, name), name


def test_chunks_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"arrays: expected one \[B,L\]"):
        models.chunked(lambda x, y: x, jnp.ones((2, 3)), jnp.ones((2, 4)))


def test_importing_models_loads_neither_transformers_nor_torch_nor_orbax():
    heavy = ("transformers", "torch", "orbax", "tokenizers", "huggingface_hub", "tyro", "tqdm", "matplotlib", "grain")
    program = f"import sys, jaxalign.models; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_prompts_pass(prefilled):
    """The checks refuse nothing that is right: padding ids of any kind, both forms of a mask, numpy arrays."""
    lm, params, *_ = prefilled
    batch = padded(PROMPTS)
    tokens = jnp.where(batch.mask, batch.tokens, -1)
    one = lm.hidden(params, tokens, mask=batch.mask)
    other = lm.hidden(params, np.asarray(tokens), mask=np.asarray(batch.mask).astype(np.int32))
    np.testing.assert_array_equal(one, other)
