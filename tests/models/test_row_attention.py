"""The one attention function of whole rows: its long form and its kernel read what its short form does."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import row_attention, transformer
from jaxalign.models.row_attention import RowMask, attention
from tests.conftest import needs_jit, tiny_lm

LENGTH = 200
WINDOWS = [None, 7, 90]
HEADS = [(4, 2), (3, 1)]
AT = {"all": None, "columns": np.array([[149, 0, 3], [199, 100, 98], [199, 20, 150], [7, 8, 9]])}


def row_mask() -> RowMask:
    """Right-padded, left-padded, with a hole, and whole."""
    mask = np.ones((4, LENGTH), bool)
    mask[0, 150:], mask[1, :90], mask[2, 40:140] = False, False, False
    return RowMask(jnp.asarray(mask), transformer.real_position(jnp.asarray(mask)))


def arrays(heads: int, kv_heads: int, count: int = LENGTH):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (4, count, heads, 8), (4, LENGTH, kv_heads, 8), (4, LENGTH, kv_heads, 8), (4, count, heads * 8)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v, rows: RowMask, cap, window, at):
    """The same by a mask [B,L,L] and repeated heads."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    order = jnp.arange(LENGTH)
    reads = rows.mask[:, None] & (order[:, None] >= order)
    if window is not None:
        reads &= rows.position[:, :, None] - rows.position[:, None] < window
    if at is not None:
        reads = jnp.take_along_axis(reads, at[..., None], axis=1)
    score = jnp.einsum("blhd,bmhd->bhlm", q, k) / 8**0.5
    score = jnp.where(reads[:, None], score if cap is None else cap * jnp.tanh(score / cap), -jnp.inf)
    top = jnp.maximum(score.max(-1, keepdims=True), -1e9)
    weight = jnp.exp(score - top)
    weight /= jnp.maximum(weight.sum(-1, keepdims=True), 1e-30)
    return jnp.einsum("bhlm,bmhd->blhd", weight, v).reshape(*q.shape[:2], -1)


def real_queries(rows: RowMask, at) -> jax.Array:
    return (rows.mask if at is None else jnp.take_along_axis(rows.mask, at, axis=1))[..., None]


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("where", AT)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_both_forms_read_what_a_mask_of_the_square_lets_them(heads, window, where, short, monkeypatch):
    monkeypatch.setattr(row_attention, "SHORT", 1000 if short else 1)
    at = None if AT[where] is None else jnp.asarray(AT[where])
    rows, cap = row_mask(), 2.0 if window == 7 else None
    *given, weight = arrays(*heads, count=LENGTH if at is None else at.shape[1])

    def read(f):
        def total(q, k, v):
            found = jnp.where(real_queries(rows, at), f(q, k, v), 0)
            return (found * weight).sum(), found

        (_, found), slope = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*given)
        return found, slope

    found = read(lambda q, k, v: attention(q, k, v, rows, scale=8**-0.5, cap=cap, window=window, at=at))
    expected = read(lambda q, k, v: plain(q, k, v, rows, cap, window, at))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected)


def test_chunks_have_all_derivatives(monkeypatch):
    """A product of the Hessian by a direction, forward over reverse and reverse over reverse."""
    rows = row_mask()
    *given, weight = arrays(2, 1)
    moves = [jnp.sin(jnp.arange(x.size)).reshape(x.shape) for x in given]

    def products():
        total = lambda *x: (jnp.where(rows.mask[..., None], attention(*x, rows, scale=0.4), 0) ** 2 * weight).sum()  # noqa: E731
        slope = jax.grad(total, (0, 1, 2))
        forward = jax.jit(lambda *x: jax.jvp(slope, x, tuple(moves))[1])(*given)
        along = lambda *x: sum((g * m).sum() for g, m in zip(slope(*x), moves, strict=True))  # noqa: E731
        return forward, jax.jit(jax.grad(along, (0, 1, 2)))(*given)

    short = products()
    monkeypatch.setattr(row_attention, "SHORT", 1)
    for found in products():
        for a, b in zip(found, short[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(np.abs(b).max()))


def by_lengths(q, k, v, length, scale, window):
    """What the kernel computes, in jax's own form of it; padding is NaN, as a kernel may leave it."""
    size = None if window is None else (window - 1, 0)
    lengths = {"query_seq_lengths": length, "key_value_seq_lengths": length, "local_window_size": size}
    found = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="xla", **lengths)
    return jnp.where((jnp.arange(q.shape[1]) < length[:, None])[..., None, None], found, jnp.nan)


@pytest.mark.parametrize("at", [None, [[149], [199], [199], [8]]])
def test_rows_are_compacted_for_the_kernel_and_stand_where_they_stood(at, monkeypatch):
    lm, params = tiny_lm(0, max_length=256, num_heads=4, num_kv_heads=2, windows=(None, 70))
    rows = row_mask()
    tokens = jax.random.randint(jax.random.key(3), rows.mask.shape, 0, lm.vocab_size)
    at = None if at is None else jnp.asarray(at)

    def read(params):
        return jnp.where(real_queries(rows, at), lm.hidden(params, tokens, mask=rows.mask, at=at), 0)

    def prefill():
        hidden, cache = lm.prefill(params, tokens, rows.mask, 210)
        return hidden, [
            jnp.where((jnp.arange(210) < cache.length[:, None])[:, None, :, None], e.k, 0) for e in cache[0]
        ]

    def all_of_it():
        slope = jax.jit(jax.grad(lambda params: jnp.sin(read(params)).sum()))(params)
        return jax.jit(read)(params), slope, jax.jit(prefill)()

    expected = all_of_it()
    used = []
    kernel = lambda *x: used.append(1) or jnp.nan_to_num(by_lengths(*x))  # noqa: E731
    monkeypatch.setattr(row_attention, "_kernel", kernel)
    monkeypatch.setattr(transformer, "kernel_fits", lambda config, dtype: True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), all_of_it(), expected)
    assert used


@needs_jit
@pytest.mark.parametrize("cut", [0, 1])
def test_the_kernel_is_cudnns_where_it_serves(cut, monkeypatch):
    """Lowered for CUDA without a device: the versions that jax asks the device for are given. Its backward pass takes
    rows of even length alone, and a row that is trained on has lost its last token."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    length = row_mask().mask.shape[1] - cut
    q, k, v, _ = (x[:, :length].astype(jnp.bfloat16) for x in arrays(4, 2))
    rows = row_attention.RowMask(*(x[:, :length] for x in row_mask()))

    def total(q, k, v):
        found = attention(q, k, v, rows, scale=0.4, window=70, compact=True)
        assert found.shape == (len(q), length, 4 * q.shape[-1])
        return found.astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total)).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "PADDING_CAUSAL"):
        assert name in text


@pytest.mark.parametrize("cut", [0, 1])
def test_on_a_gpu_the_kernel_is_as_close_to_float32_as_the_other_forms(cut, monkeypatch):
    lm, params = tiny_lm(0, dtype="bfloat16", max_length=256, head_dim=8, windows=(None, 70))
    if not row_attention.kernel_fits(lm.config, lm.dtype):
        pytest.skip("no GPU on which the kernel serves")
    mask = row_mask().mask[:, : LENGTH - cut]
    tokens = jax.random.randint(jax.random.key(3), mask.shape, 0, lm.vocab_size)

    def all_of_it(dtype):
        """Hidden states and gradients, as one vector of float32."""
        of = dataclasses.replace(lm, dtype=dtype)

        def read(params):
            return jnp.where(mask[..., None], of.hidden(params, tokens, mask=mask), 0).astype(jnp.float32)

        both = lambda params: (read(params), jax.grad(lambda params: jnp.sin(read(params)).sum())(params))  # noqa: E731
        return [
            np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(part)])
            for part in jax.jit(both)(jax.tree.map(lambda x: x.astype(dtype), params))
        ]

    with jax.default_matmul_precision("highest"):
        exact = all_of_it("float32")
    kernel = all_of_it("bfloat16")
    monkeypatch.setattr(transformer, "kernel_fits", lambda config, dtype: False)
    for one, other, right in zip(kernel, all_of_it("bfloat16"), exact, strict=True):
        assert np.linalg.norm(one - right) < 2 * np.linalg.norm(other - right) < 0.05 * np.linalg.norm(right)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "fits"),
    [
        ("9.0", "bfloat16", 256, True),
        ("8.0", "bfloat16", 128, True),
        ("8.6", "float16", 64, True),
        ("8.0", "bfloat16", 256, False),
        ("9.0", "float32", 64, False),
        ("9.0", "bfloat16", 60, False),
        ("7.5", "bfloat16", 64, False),
        ("gfx90a", "bfloat16", 64, False),
    ],
)
def test_the_kernel_serves_half_precision_on_ampere_and_later(capability, dtype, head_dim, fits, monkeypatch):
    config = tiny_lm(0, head_dim=head_dim)[0].config
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert not row_attention.kernel_fits(config, dtype)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [type("Device", (), {"compute_capability": capability})])
    assert row_attention.kernel_fits(config, dtype) is fits
    capped = dataclasses.replace(config, block=dataclasses.replace(config.block, attention_cap=50.0))
    assert not row_attention.kernel_fits(capped, dtype)


def gradient_memory(lm, params, batch: int, length: int) -> int:
    """Bytes of temporaries of a gradient, as the compiler plans them."""
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    total = lambda params, tokens: jnp.sin(lm.hidden(params, tokens)).sum()  # noqa: E731
    return int(jax.jit(jax.grad(total)).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes)


@needs_jit
def test_memory_grows_with_tokens_and_not_with_the_square_of_the_length():
    lm, params = tiny_lm(0, num_layers=2, max_length=8192)
    short, long = gradient_memory(lm, params, 4, 2048), gradient_memory(lm, params, 1, 8192)
    assert long < 1.3 * short
