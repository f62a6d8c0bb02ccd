"""--remat: the same training in less memory, chosen by an estimate that follows what the compiler plans."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import _devices, models, training
from jaxalign.models import log_prob
from jaxalign.training import memory, objectives, policy_gradient, rl_iteration, states
from jaxalign.training.options import MeshOptions
from tests.conftest import needs_jit, tiny_config, tiny_lm

SMALL = {"num_layers": 8, "max_length": 256, "hidden_size": 64, "intermediate_size": 192}


def step_of(lm, **options):
    half = options.get("gradient_dtype") is not None
    optimizer, schedule = training.adamw(learning_rate=1e-3, steps=4, clip_by_factor=half)
    return optimizer, training.train_step(objectives.language_model(lm), optimizer, schedule=schedule, **options)


def abstract_step(lm, texts: int, length: int, *, flags: dict | None = None, **options):
    """The compiled step of float32 masters on abstract values, with further flags of XLA."""
    optimizer, step = step_of(lm, **options)
    masters = jax.eval_shape(dataclasses.replace(lm, dtype="float32").init, jax.random.key(0))
    state = jax.eval_shape(lambda params: training.create(params, optimizer), masters)
    shape = (1, texts, length)
    names = {"tokens": jnp.int32, "mask": bool, "loss_mask": bool}
    batch = {name: jax.ShapeDtypeStruct(shape, kind) for name, kind in names.items()}
    return step.lower(state, batch, None).compile(flags)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_training_is_the_same(remat):
    lm, params = tiny_lm(0, num_layers=2, max_length=64)
    tokens = jax.random.randint(jax.random.key(1), (1, 3, 24), 0, lm.vocab_size)
    batch = {"tokens": tokens, "mask": tokens >= 0, "loss_mask": tokens > 2}
    found = []
    for m in (lm, dataclasses.replace(lm, remat=remat)):
        optimizer, step = step_of(m)
        state = training.create(params, optimizer)
        for _ in range(2):
            state, metrics = step(state, batch, None)
        found.append((metrics["loss"], metrics["grad_norm"], state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


@needs_jit
def test_a_step_with_full_remat_plans_a_third_of_the_temporaries():
    lm, _ = tiny_lm(0, dtype="bfloat16", **SMALL)
    kept, again = (
        abstract_step(m, 4, 256).memory_analysis().temp_size_in_bytes
        for m in (lm, dataclasses.replace(lm, remat="full"))
    )
    assert again < kept / 3


@needs_jit
def test_gradients_wait_for_the_update_in_the_type_of_the_model():
    """Half of their bytes is saved, and no copy of them is kept clipped. (Of jax 0.12 in the order of operations that
    takes the least memory: the CPU's own makes the float32 products of all gradients, whose squares the norm adds up,
    before the first sum.)"""
    order = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    flags = order if jax.__version_info__ >= (0, 11) else None
    lm, _ = tiny_lm(0, dtype="bfloat16", **SMALL | {"hidden_size": 256, "intermediate_size": 768})
    lm = dataclasses.replace(lm, remat="full")
    size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lm.init, jax.random.key(0))))
    whole, half = (
        abstract_step(lm, 1, 32, donate=True, gradient_dtype=dtype, flags=flags).memory_analysis().temp_size_in_bytes
        for dtype in (None, states.gradient_dtype(lm))
    )
    assert half < whole - 0.35 * 4 * size


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_in_the_type_of_the_model_lose_nothing(parts):
    """They are of that type already: a bfloat16 step is the same within the rounding of one gradient."""
    lm, params = tiny_lm(0, num_layers=2, max_length=64)
    lm = dataclasses.replace(lm, dtype="bfloat16")
    tokens = jax.random.randint(jax.random.key(1), (parts, 3, 24), 0, lm.vocab_size)
    batch = {"tokens": tokens, "mask": tokens >= 0, "loss_mask": tokens > 2}
    found = []
    for dtype in (None, states.gradient_dtype(lm)):
        step = training.train_step(objectives.language_model(lm), optax.sgd(1.0), gradient_dtype=dtype)
        after, metrics = step(training.create(params, optax.sgd(1.0)), batch, None)
        found.append((jax.tree.map(jnp.subtract, params, after.params), metrics["loss"]))
    assert found[0][1] == found[1][1]
    for one, other in zip(jax.tree.leaves(found[0][0]), jax.tree.leaves(found[1][0]), strict=True):
        assert np.abs(other - one).max() <= 2**-8 * np.abs(one).max()
    assert states.gradient_dtype(dataclasses.replace(lm, dtype="float32")) is None


def test_gradients_of_the_vocabulary_are_added_in_float32():
    """Over many chunks of positions, and over many places of one token: a sum in bfloat16 stops at 256 equal terms."""
    lm, params = tiny_lm(0, num_layers=1, max_length=2048)
    lm = dataclasses.replace(lm, dtype="bfloat16")
    tokens = jnp.full((1, 1, 1025), 3)
    batch = {"tokens": tokens, "mask": tokens >= 0, "loss_mask": tokens >= 0}

    def rows_of(loss):
        grad = jax.jit(jax.grad(lambda params: loss(params, jax.tree.map(lambda x: x[0], batch), None)[0]))(params)
        return [np.asarray(grad["transformer"][name], np.float64) for name in ("embedding", "lm_head")]

    small = functools.partial(log_prob.chunked, chunk=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_prob, "chunked", lambda f, *arrays, chunk=None, width=None: small(f, *arrays))
        many = rows_of(objectives.language_model.__wrapped__(lm))
    once = rows_of(objectives.language_model(lm))
    for one, other in zip(many, once, strict=True):
        assert np.abs(one - other).max() < 0.004 * np.abs(other).max()


def test_roll_outs_read_weights_in_the_type_of_the_model_whatever_is_rematerialised():
    lm, params = tiny_lm(0)
    lm = dataclasses.replace(lm, dtype="bfloat16", remat="full")
    found = rl_iteration.weights(lm, lambda params, frozen: params, params, None)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"bfloat16"}


@needs_jit
@pytest.mark.parametrize("length", [128, 640])
def test_the_estimate_follows_the_compiler(length):
    lm, _ = tiny_lm(0, **SMALL | {"max_length": 1024, "num_heads": 4, "head_dim": 16})
    one, two = (
        abstract_step(dataclasses.replace(lm, config=dataclasses.replace(lm.config, num_layers=n)), 8, length)
        .memory_analysis()
        .temp_size_in_bytes
        for n in (4, 8)
    )
    estimate = memory.kept_bytes(lm, texts=8, length=length) / 2
    assert 0.75 < estimate / (two - one) < 1.35


def test_auto_is_full_where_a_device_has_less_than_the_estimate(monkeypatch, capsys):
    lm, params = tiny_lm(0)
    given = {"texts": 4, "length": 8}

    def chosen(remat: str, **more) -> str:
        return memory.with_remat(lm, params, MeshOptions(remat=remat, **more), **given).remat

    assert chosen("auto") == "none"
    assert [chosen(name) for name in ("none", "dots", "full")] == ["none", "dots", "full"]
    state = memory.STATE_BYTES * sum(x.size for x in jax.tree.leaves(params))
    need = state + memory.kept_bytes(lm, **given)
    monkeypatch.setattr(_devices, "memory", lambda: need)
    assert chosen("auto") == "none"
    monkeypatch.setattr(_devices, "memory", lambda: need - 1)
    capsys.readouterr()
    assert chosen("auto") == "full"
    assert "remat: full, by an estimate" in capsys.readouterr().out
    assert chosen("auto", accumulate=2) == "none"


VOCABULARY, TOKENS = 32_768, 512


def vocabulary_step(name: str):
    """(loss, model, frozen parameters, batch of two rows of 512 tokens as shapes)."""
    small = {"num_layers": 1, "vocab_size": VOCABULARY, "max_length": TOKENS}
    lm = models.LanguageModel(tiny_config(**small))
    base = jax.eval_shape(lm.init, jax.random.key(0))
    kinds = {"tokens": jnp.int32, "mask": bool, "loss_mask": bool}
    texts = {key: jax.ShapeDtypeStruct((1, 2, TOKENS), kind) for key, kind in kinds.items()}
    if name == "dpo":
        pairs = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 1, TOKENS), x.dtype), texts)
        return objectives.dpo(lm, beta=0.1), lm, base, {"chosen": pairs, "rejected": pairs}
    if name == "a Q head":
        head = models.LanguageModel(tiny_config(models.Head("q"), **small))
        reward = {"reward": jax.ShapeDtypeStruct((1, 2), jnp.float32)}
        return objectives.value(head, "fudge"), head, None, texts | reward
    half = {"tokens": jnp.int32, "mask": bool, **dict.fromkeys(("drawn", "old", "ref", "advantage"), jnp.float32)}
    rows = {key: jax.ShapeDtypeStruct((1, 2, TOKENS // 2), kind) for key, kind in half.items()}
    rows |= {"prompt_tokens": rows["tokens"], "prompt_mask": rows["mask"]}
    rows |= {"beta": jax.ShapeDtypeStruct((1, 2), jnp.float32)}
    read, both = policy_gradient.of_model(lm), policy_gradient.of_models(lm, lm)
    return policy_gradient.loss(policy_gradient.Method("rloo", kl="exact"), read, both, once=True), lm, base, rows


@needs_jit
@pytest.mark.parametrize("name", ["dpo", "a Q head", "rl with the exact KL"])
def test_a_step_holds_scores_of_the_vocabulary_for_a_chunk_of_tokens_alone(name):
    loss, lm, frozen, batch = vocabulary_step(name)
    optimizer, _ = training.adamw(learning_rate=1e-3, steps=4)
    state = jax.eval_shape(lambda: training.create(lm.init(jax.random.key(0)), optimizer))
    text = training.train_step(loss, optimizer).lower(state, batch, frozen).compile().as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    rows = [math.prod(shape) // VOCABULARY for shape in shapes if VOCABULARY in shape]
    assert 16 < max(rows) <= 128  # the model's width, and 64 positions of two rows
