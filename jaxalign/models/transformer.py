"""The one decoder-only transformer, in Flax Linen: layers unrolled, projections fused, cache in and out.

Four passes through the same layers: `__call__` over whole rows (training, prefill, scoring), `append` of one token to
a cache (decoding), `extend` over K alternative next tokens at one position against a cache (candidate scoring), and
`segments` over M alternative continuations of several tokens against a cache (scores of texts with a common prefix).
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign._arrays import NEGATIVE, at_least_float32
from jaxalign.models import sharding
from jaxalign.models.attention import PackedSegments, attend, soft_cap, wide_einsum, zero_invalid
from jaxalign.models.block import Rope
from jaxalign.models.cache import KeyValue, write_slot
from jaxalign.models.config import Config
from jaxalign.models.embedding import look_up
from jaxalign.models.experts import ACTIVATIONS, ExpertMLP
from jaxalign.models.norms import norm
from jaxalign.models.projections import Projection, by_rows
from jaxalign.models.remat import rematerialised
from jaxalign.models.rotary import rotate
from jaxalign.models.row_attention import RowMask, attention, kernel_fits, order_of
from jaxalign.types import Array


def at_columns(x: Array, at: Array) -> Array:
    """x [B,L,...] at the columns at [B,R]: [B,R,...]."""
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def real_position(mask: Array) -> Array:
    """The position [B,L] of each real token among those of its row of mask [B,L], at least 0."""
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


class Attention(nn.Module):
    """Grouped-query attention with or without rotary positions, biases, q/k norms, a cap and a sliding window."""

    config: Config
    window: int | None
    rope: Rope | None
    dtype: Any
    mesh: Mesh | None = None
    in_turn: bool = False

    def setup(self) -> None:
        c = self.config
        self.group = c.num_heads // c.num_kv_heads
        place = self.dtype, self.mesh, self.in_turn
        self.qkv = Projection((c.num_kv_heads, self.group + 2, c.head_dim), c.qkv_bias, *place)
        self.out = Projection((c.hidden_size,), c.out_bias, *place)
        if c.qk_norm:
            self.q_norm = norm(c.block, c.norm_eps, self.dtype)
            self.k_norm = norm(c.block, c.norm_eps, self.dtype)

    def project(
        self, x: Array, position: Array, total: Array, at: Array | None = None, limit: int | None = None
    ) -> tuple[Array, Array, Array]:
        """q [B,L,H,hd], k, v [B,L,Hkv,hd], rotated, in texts of total [B,L] or [B,1] tokens; of q the columns at [B,R]
        alone, where they are given."""
        if at is None:
            q, k, v = jnp.split(self.qkv(x), [self.group, self.group + 1], axis=-2)
        else:
            q = self.qkv(at_columns(x, at), stop=self.group)
            k, v = jnp.split(self.qkv(x, start=self.group), 2, axis=-2)
        q = q.reshape(*q.shape[:-3], self.config.num_heads, self.config.head_dim)
        at_position = position if at is None else at_columns(position, at)
        at_total = total if at is None or total.shape[1] == 1 else at_columns(total, at)
        k = self.turn(k[..., 0, :], position, total, limit, keys=True)
        return self.turn(q, at_position, at_total, limit), k, v[..., 0, :]

    def turn(self, x: Array, position: Array, total: Array, limit: int | None, *, keys: bool = False) -> Array:
        """Queries or keys x [B,L,H,hd] after their norm and the rotation at their positions, below the limit."""
        if self.config.qk_norm:
            apply = self.k_norm if keys else self.q_norm
            if self.config.block.qk_norm == "head":
                x = apply(x)
            else:
                x = apply(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)
        return x if self.rope is None else rotate(x, position, self.rope, limit=limit, total=total)

    def scores(self, product: Array) -> Array:
        """What the softmax is taken of, from products q·k."""
        return soft_cap(product * self.config.query_scale, self.config.block.attention_cap)

    def __call__(self, x: Array, rows: RowMask, at: Array | None = None) -> tuple[Array, KeyValue]:
        """Tokens x [B,L,D] read their own rows: all of them, or those at the columns at [B,R]."""
        position, scale, cap = rows.position, self.config.query_scale, self.config.block.attention_cap
        q, k, v = self.project(x, position, position[:, -1:] + 1, at, limit=x.shape[1])
        compact = kernel_fits(self.config, self.dtype)
        mixed = attention(q, k, v, rows, scale=scale, cap=cap, window=self.window, at=at, compact=compact)
        return self.out(mixed), KeyValue(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))

    def extend(self, x: Array, length: Array, cache: KeyValue) -> tuple[Array, KeyValue]:
        """K alternative tokens x [B,K,D] at position length [B]: each attends to the cache's first `length` slots and,
        by one extra logit, to itself. Neither a K×K mask nor a copy of the cache."""
        c = self.config
        batch, k_tokens = x.shape[:2]
        q, k, v = self.project(x, jnp.broadcast_to(length[:, None], (batch, k_tokens)), length[:, None] + 1)
        seen = self._seen(cache, length) & (jnp.arange(cache.k.shape[2]) < length[:, None])
        q = q.reshape(batch, k_tokens, c.num_kv_heads, -1, c.head_dim).transpose(0, 2, 1, 3, 4)
        groups = q.shape[3]
        flat = q.reshape(batch, c.num_kv_heads, k_tokens * groups, c.head_dim)
        score = self.scores(wide_einsum("bgqd,bgsd->bgqs", flat, cache.k))
        score = jnp.where(seen[:, None, None], score, NEGATIVE)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        own = self.scores((at_least_float32(q) * k[:, :, :, None]).sum(axis=-1))
        own = own.reshape(batch, c.num_kv_heads, -1)
        top = jnp.maximum(score.max(axis=-1), own)
        weight, weight_own = jnp.exp(score - top[..., None]), jnp.exp(own - top)
        total = weight.sum(axis=-1) + weight_own
        mixed = jnp.einsum("bgqs,bgsd->bgqd", (weight / total[..., None]).astype(v.dtype), cache.v)
        share = (weight_own / total).astype(v.dtype).reshape(batch, c.num_kv_heads, k_tokens, groups, 1)
        mixed = mixed.reshape(batch, c.num_kv_heads, k_tokens, groups, c.head_dim) + share * v[:, :, :, None]
        mixed = mixed.transpose(0, 2, 1, 3, 4).reshape(batch, k_tokens, -1)
        return self.out(mixed), KeyValue(k, v)

    def append(self, x: Array, length: Array, slot: Array, cache: KeyValue) -> tuple[Array, KeyValue]:
        """One token x [B,1,D] at position length [B]: written to `slot` [B] of the cache first (a slot past the end
        writes nowhere), then attended with it. Nothing reads the old cache after the write, so it happens in place."""
        c = self.config
        batch = x.shape[0]
        q, k, v = self.project(x, length[:, None], length[:, None] + 1)
        cache = KeyValue(write_slot(cache.k, k[:, 0], slot), write_slot(cache.v, v[:, 0], slot))
        seen = self._seen(cache, length)
        q = q.reshape(batch, c.num_kv_heads, -1, c.head_dim)
        score = self.scores(wide_einsum("bgqd,bgsd->bgqs", q, cache.k))
        weight = jax.nn.softmax(jnp.where(seen[:, None, None], score, NEGATIVE), axis=-1)
        mixed = jnp.einsum("bgqs,bgsd->bgqd", weight.astype(cache.v.dtype), cache.v)
        return self.out(mixed.reshape(batch, 1, -1)), cache

    def segments(
        self, x: Array, packing: PackedSegments, length: Array, cache: KeyValue, at: Array | None
    ) -> tuple[Array, KeyValue]:
        """Continuations of the cache's first `length` [B] slots, x [1,P,D] their packed tokens: each token, or the one
        at [B,M] of each, attends to the cache of its row and to its own segment up to itself. [1,P,D] or [1,B·M,D],
        and entries [B,M,Hkv,S,hd], zeros where there is none."""
        position, total = packing.gather(packing.position), packing.gather(packing.total)
        q, k, v = self.project(x, position, total, None if at is None else packing.packed_number(at))
        if at is None:
            q = packing.scatter(q)
        else:
            valid = packing.valid_at(at)
            q = zero_invalid(q.reshape(*valid.shape, *q.shape[2:]), valid)
        k, v = packing.scatter(k), packing.scatter(v)
        scale, cap = self.config.query_scale, self.config.block.attention_cap
        mixed = attend(q, k, v, cache, length, packing, self.window, at, scale=scale, cap=cap)
        mixed = packing.gather(mixed) if at is None else mixed.reshape(1, at.size, -1)
        return self.out(mixed), KeyValue(k.swapaxes(2, 3), v.swapaxes(2, 3))

    def _seen(self, cache: KeyValue, length: Array) -> Array:
        """Slots [B,S] that a token at position `length` may attend to, its own included."""
        slot = jnp.arange(cache.k.shape[2])
        seen = slot <= length[:, None]
        if self.window is not None:
            seen &= slot > length[:, None] - self.window
        return seen


class Layer(nn.Module):
    """Attention and MLP around a residual stream, as the config's `Block` has them."""

    config: Config
    window: int | None
    rope: Rope | None
    dtype: Any
    mesh: Mesh | None = None
    in_turn: bool = False

    def setup(self) -> None:
        c, block = self.config, self.config.block
        place = self.dtype, self.mesh, self.in_turn
        self.attention = Attention(c, self.window, self.rope, *place)
        if block.has_attention_norm:
            self.attention_norm = norm(block, c.norm_eps, self.dtype)
        if block.has_mlp_norm:
            self.mlp_norm = norm(block, c.norm_eps, self.dtype)
        if block.has_post_norms:
            self.attention_post_norm = norm(block, c.norm_eps, self.dtype)
            self.mlp_post_norm = norm(block, c.norm_eps, self.dtype)
        if block.experts is not None:
            sizes = (c.hidden_size, c.intermediate_size)
            self.experts = ExpertMLP(block.experts, *sizes, block.activation, self.dtype, self.mesh)
        else:
            self.gate_up = Projection((1 + block.gated, c.intermediate_size), c.mlp_bias, *place)
            self.down = Projection((c.hidden_size,), c.mlp_bias, *place)

    def before(self, x: Array) -> Array:
        """What attention reads of the residual stream."""
        return self.attention_norm(x) if self.config.block.has_attention_norm else x

    def after(self, x: Array, mixed: Array) -> Array:
        """The residual stream x with what attention gave, and with the MLP."""
        block, scale = self.config.block, self.config.block.residual_scale
        if block.has_post_norms:
            mixed = self.attention_post_norm(mixed)
        added = x + (mixed if scale == 1 else mixed * scale)
        read = added if block.residual == "sequential" else x
        if block.residual == "parallel_shared":
            read = self.attention_norm(read)
        elif block.has_mlp_norm:
            read = self.mlp_norm(read)
        given = self.mlp(read)
        if block.has_post_norms:
            given = self.mlp_post_norm(given)
        return added + (given if scale == 1 else given * scale)

    def mlp(self, x: Array) -> Array:
        block = self.config.block
        if block.experts is not None:
            return self.experts(x)
        activation, both = ACTIVATIONS[block.activation], self.gate_up(x)
        inner = activation(both[..., 0, :])
        given: Array = self.down(inner * both[..., 1, :] if block.gated else inner)
        return given

    def __call__(self, x: Array, rows: RowMask, at: Array | None = None) -> tuple[Array, KeyValue]:
        mixed, entries = self.attention(self.before(x), rows, at)
        return self.after(x if at is None else at_columns(x, at), mixed), entries

    def extend(self, x: Array, length: Array, cache: KeyValue) -> tuple[Array, KeyValue]:
        mixed, entries = self.attention.extend(self.before(x), length, cache)
        return self.after(x, mixed), entries

    def segments(
        self, x: Array, packing: PackedSegments, length: Array, cache: KeyValue, at: Array | None
    ) -> tuple[Array, KeyValue]:
        mixed, entries = self.attention.segments(self.before(x), packing, length, cache, at)
        return self.after(x if at is None else packing.pick(x, at), mixed), entries

    def append(self, x: Array, length: Array, slot: Array, cache: KeyValue) -> tuple[Array, KeyValue]:
        mixed, cache = self.attention.append(self.before(x), length, slot, cache)
        return self.after(x, mixed), cache


def layer_of(config: Config, i: int, dtype: Any, mesh: Mesh | None, in_turn: bool = False) -> Layer:
    """Layer i of a model, under its name."""
    return Layer(config, config.window(i), config.layer_rope(i), dtype, mesh, in_turn, name=f"layer_{i}")


class OneLayer(nn.Module):
    """A layer as a model of its own, whose parameters have the names that they have in the whole model."""

    config: Config
    i: int
    dtype: Any
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Array, rows: RowMask, at: Array | None = None) -> tuple[Array, KeyValue]:
        found: tuple[Array, KeyValue] = layer_of(self.config, self.i, self.dtype, self.mesh)(x, rows, at)
        return found

    def read(self, variables: Any, x: Array, rows: RowMask, at: Array | None) -> tuple[Array, KeyValue]:
        """The layer with these variables, which are cast here: of masters no copy is kept. They are put together from
        their shards here too, and not where they come from, which may be ahead of all layers."""
        held = {kind: _held(kind, tree, self.mesh) for kind, tree in variables.items()}
        found: tuple[Array, KeyValue] = self.apply(jax.tree.map(lambda w: w.astype(self.dtype), held), x, rows, at)
        return found


def _held(kind: str, variables: Any, mesh: Mesh | None) -> Any:
    """A layer's variables of one kind in the shards that they have in a model's parameters."""
    name = "transformer" if kind == "params" else kind
    return sharding.constrain({name: variables}, mesh)[name]


class ReadLayer(Protocol):
    """A layer over whole rows [B,L,D], of which the columns `at` [B,R] alone are asked for where it is given."""

    def __call__(self, x: Array, rows: RowMask, at: Array | None, /) -> tuple[Array, KeyValue]: ...


class Transformer(nn.Module):
    """Embedding, layers, final norm; logits and heads are separate so that nobody pays for what is not read."""

    config: Config
    dtype: Any
    mesh: Mesh | None = None
    remat: str = "none"
    in_turn: bool = False

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), self.dtype
        )
        if c.block.learned_positions:
            rows = c.max_length + c.block.position_offset
            self.positions = self.param("positions", nn.initializers.normal(0.02), (rows, c.hidden_size), self.dtype)
        self.layers = [layer_of(c, i, self.dtype, self.mesh, self.in_turn) for i in range(c.num_layers)]
        self.norm = norm(c.block, c.norm_eps, self.dtype)
        if not c.tie_embeddings and not (c.head is not None and c.head.kind == "reward"):
            self.lm_head = self.param(
                "lm_head", nn.initializers.normal(0.02), (c.hidden_size, c.vocab_size), self.dtype
            )

    def embed(self, tokens: Array) -> Array:
        found = look_up(self.embedding, tokens, self.mesh, self.dtype)
        scale = self.config.block.embedding_scale
        return found if scale == 1 else found * scale

    def placed(self, x: Array, position: Array) -> Array:
        """Embeddings x [B,L,D] with what an embedding of their position adds; NaN past the last position."""
        if not self.config.block.learned_positions:
            return x
        return x + jnp.take(self.positions, position + self.config.block.position_offset, axis=0)

    def __call__(self, x: Array, mask: Array, at: Array | None = None) -> tuple[Array, list[KeyValue]]:
        """x [B,L,D] embeddings, mask [B,L] -> (hidden [B,L,D], keys and values per layer [B,Hkv,L,hd]).

        at [B,R]: columns; hidden [B,R,D] of these alone. The last layer then takes of all others no more than their
        keys and values. These stand by columns where the real tokens of each row come first, as those of `prefill`."""
        position = real_position(mask)
        x = self.placed(x, position)
        # The kernel takes lengths for a mask: the real tokens of each row come first, and go back at the end.
        compact = kernel_fits(self.config, self.dtype)
        if compact:
            x = at_columns(x, order_of(mask))
            at = None if at is None else at_columns(position, at)
            mask = jnp.arange(mask.shape[1]) < mask.sum(axis=1, keepdims=True)
        rows, entries = RowMask(mask, real_position(mask) if compact else position), []
        for i, layer in enumerate(self.layers):
            read: ReadLayer = layer
            if self.remat != "none" and not self.is_initializing():
                alone = OneLayer(self.config, i, self.dtype, self.mesh, parent=None)
                variables = {kind: {f"layer_{i}": found} for kind, found in layer.variables.items()}
                read = functools.partial(rematerialised(alone.read, self.remat), variables)
            x, entry = read(x, rows, at if i == len(self.layers) - 1 else None)
            entries.append(entry)
        return self.norm(at_columns(x, position) if compact and at is None else x), entries

    def extend(self, x: Array, length: Array, caches: list[KeyValue]) -> tuple[Array, list[KeyValue]]:
        """x [B,K,D] embeddings of alternatives at position length [B] -> (hidden [B,K,D], entries per layer)."""
        x = self.placed(x, length[:, None])
        entries = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, entry = layer.extend(x, length, cache)
            entries.append(entry)
        return self.norm(x), entries

    def segments(
        self, x: Array, packing: PackedSegments, length: Array, caches: list[KeyValue], at: Array | None = None
    ) -> tuple[Array, list[KeyValue]]:
        """x [1,P,D] packed embeddings of continuations of length [B] slots -> (hidden [1,P,D], entries per layer); at
        [B,M], a place in each: hidden [1,B·M,D] there alone."""
        x = self.placed(x, packing.gather(packing.position))
        entries = []
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            x, entry = layer.segments(x, packing, length, cache, at if i == len(self.layers) - 1 else None)
            entries.append(entry)
        return self.norm(x), entries

    def append(self, x: Array, length: Array, slot: Array, caches: list[KeyValue]) -> tuple[Array, list[KeyValue]]:
        """x [B,1,D], one token at position length [B], written to slot [B] -> (hidden [B,1,D], caches)."""
        x = self.placed(x, length[:, None])
        updated = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.append(x, length, slot, cache)
            updated.append(cache)
        return self.norm(x), updated

    def logits(self, hidden: Array) -> Array:
        """[...,D] -> [...,V] in at least float32."""
        if self.config.tie_embeddings:
            embedding = sharding.hold(self.embedding.astype(self.dtype), self.mesh, "vocab", "embed", gather=("fsdp",))
            logits = by_rows(lambda flat: wide_einsum("nd,vd->nv", flat, embedding), hidden)
        else:
            lm_head = sharding.hold(self.lm_head.astype(self.dtype), self.mesh, "embed", "vocab", gather=("fsdp",))
            logits = by_rows(lambda flat: wide_einsum("nd,dv->nv", flat, lm_head), hidden)
        scale, cap = self.config.block.logits_scale, self.config.block.logits_cap
        logits = soft_cap(logits if scale == 1 else logits * scale, cap)
        return sharding.hold(logits, self.mesh, "batch", *(None,) * (logits.ndim - 2), "vocab")
