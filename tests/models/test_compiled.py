"""What the compiled programs do: no copy of the cache in a decoding loop, one trace for every position, a mesh."""

from __future__ import annotations

import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models
from jaxalign.models import sharding
from tests.conftest import needs_jit, on_devices, tiny_config, tiny_lm

CAPACITY = 512


def decode(lm, params, cache, tokens):
    """Four tokens by `step`, or (tokens [B,K]) by `candidates` and `commit`."""

    def body(carry):
        i, cache, tokens = carry
        if tokens.ndim == 1:
            hidden, cache = lm.step(params, cache, tokens)
            return i + 1, cache, lm.logits(params, hidden).argmax(axis=-1).astype(tokens.dtype)
        hidden, entries = lm.candidates(params, cache, tokens)
        scores = lm.logits(params, hidden)
        choice = scores[..., 0].argmax(axis=-1)
        top = jnp.take_along_axis(scores, choice[:, None, None], axis=1)[:, 0]
        drawn = jax.lax.top_k(top, tokens.shape[1])[1].astype(tokens.dtype)
        return i + 1, lm.commit(cache, entries, choice), drawn

    return jax.lax.while_loop(lambda carry: carry[0] < 4, body, (0, cache, tokens))[1]


@needs_jit
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("k", [None, 4])
def test_a_decoding_loop_copies_no_cache(batch, k):
    """Batch 1 is a case of its own: a scatter of one update becomes another instruction."""
    # Heads of 16: with narrower ones the attention's weights alone are as large as the cache.
    lm = models.LanguageModel(tiny_config(max_length=CAPACITY, head_dim=16))
    params = lm.init(jax.random.key(0))
    tokens = jnp.ones((batch, 2), jnp.int32)
    _, cache = lm.prefill(params, tokens, tokens > 0, CAPACITY)
    first = jnp.ones((batch,) if k is None else (batch, k), jnp.int32)
    program = jax.jit(decode, static_argnums=0, donate_argnums=2).lower(lm, params, cache, first).compile()
    shape = ",".join(map(str, cache.layers[0].k.shape))
    assert f"f32[{shape}]" in program.as_text()
    assert re.findall(rf"= f32\[{shape}\]\S* copy\(.*", program.as_text()) == []
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= size
    # Neither the candidates nor the attention hold another cache, whatever k.
    assert memory.temp_size_in_bytes < size / 2


@needs_jit
@pytest.mark.parametrize("k", [None, 4])
def test_a_step_costs_the_same_at_every_position(k):
    """The position is data: one program serves all, so its FLOPs and bytes cannot depend on it. Only the capacity
    (attention reads all slots) does."""
    lm = models.LanguageModel(tiny_config(max_length=4 * CAPACITY))
    params = lm.init(jax.random.key(0))
    tokens = jnp.ones((2, 2), jnp.int32)
    first = jnp.ones((2,) if k is None else (2, k), jnp.int32)

    def cost(length: int, capacity: int) -> dict:
        cache = lm.prefill(params, tokens, tokens > 0, capacity)[1]
        cache = cache._replace(length=jnp.full_like(cache.length, length))
        run = jax.jit(lambda p, c, t: lm.step(p, c, t) if k is None else lm.candidates(p, c, t))
        found = run.lower(params, cache, first).compile().cost_analysis()
        return {name: found[name] for name in ("flops", "bytes accessed")}

    early, late, wide = cost(2, CAPACITY), cost(CAPACITY - 1, CAPACITY), cost(2, 4 * CAPACITY)
    assert early == late
    assert wide["flops"] > early["flops"]
    assert wide["bytes accessed"] > early["bytes accessed"]


@needs_jit
def test_one_trace_serves_every_position():
    lm, params = tiny_lm(0)
    traces = []

    @jax.jit
    def step(params, cache, token):
        traces.append(1)
        return lm.step(params, cache, token)

    tokens = jnp.ones((2, 3), jnp.int32)
    _, cache = lm.prefill(params, tokens, tokens > 0, 9)
    for _ in range(6):
        _, cache = step(params, cache, jnp.array([1, 2]))
    np.testing.assert_array_equal(cache.length, 9)
    assert traces == [1]


@needs_jit
def test_hidden_states_cost_no_logits():
    """`apply` under jit pays only for what is read."""
    lm = models.LanguageModel(tiny_config(vocab_size=4096))
    params = jax.eval_shape(lm.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)

    def flops(f) -> float:
        return jax.jit(f).lower(params, tokens).compile().cost_analysis()["flops"]

    without = flops(lambda p, t: lm.apply(p, t).hidden)
    assert flops(lambda p, t: lm.apply(p, t).logits) - without > 0.9 * 2 * 16 * 16 * 4096


MESH = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jaxalign import models
    from jaxalign.models import sharding

    folder = {folder!r}
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    lm, params = models.load(folder, mesh=mesh)
    assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 4 for leaf in jax.tree.leaves(params))
    tokens = jnp.arange(32).reshape(8, 4) % lm.vocab_size
    placed = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    hidden, cache = jax.jit(lm.prefill, static_argnums=3)(params, placed, placed >= 0, 6)
    cache = sharding.shard(cache, mesh)
    k = cache.layers[0].k
    assert k.addressable_shards[0].data.shape == (2, *k.shape[1:]), k.sharding
    found = jax.jit(lm.step)(params, cache, placed[:, 0])[0]
    _, alone = models.load(folder)
    both = jax.jit(lambda p, t: lm.step(p, lm.prefill(p, t, t >= 0, 6)[1], t[:, 0])[0])
    expected = both(alone, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    # The same table places kernels over a tensor axis, with the same values: whole heads, gate beside up.
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2), ("data", "tensor"))
    split = sharding.shard(alone, mesh, dict(sharding.RULES) | dict(vocab=None))
    for path, axis in (("gate_up", 2), ("attention/qkv", 1), ("attention/out", 0), ("down", 0)):
        kernel = split["transformer"]["layer_0"]
        for name in path.split("/"):
            kernel = kernel[name]
        kernel = kernel["kernel"]
        shape = [size // 2 if i == axis else size for i, size in enumerate(kernel.shape)]
        assert list(kernel.addressable_shards[0].data.shape) == shape, path
    found = jax.jit(lm.hidden)(split, tokens)
    np.testing.assert_allclose(found, jax.jit(lm.hidden)(alone, tokens), rtol=1e-5, atol=1e-5)
"""


def test_parameters_and_caches_are_placed_by_the_table_on_four_devices(tmp_path):
    lm, params = tiny_lm(0, "value")
    models.save(tmp_path / "model", lm, params)
    program = textwrap.dedent(MESH).format(folder=str(tmp_path / "model"))
    on_devices(program)


def test_a_mesh_with_explicit_axes_is_refused():
    _, params = tiny_lm(0)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="mesh: expected Auto axes"):
        sharding.shard(params, mesh)
    sharding.shard(params, jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",)))
